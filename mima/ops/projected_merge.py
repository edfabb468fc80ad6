"""projected_merge: φ = W0 + Σ_n (W_n − W0) C_nᵀ M_n, every layer that reads text in one call."""

# N = concepts, L = layers; given lists are concept-major, W[n * L + l]

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mima.ops import _checks
from mima.ops._autograd import (
    Operator,
    apply,
    apply_backward,
    call,
    filled,
    flat,
    raw_operators,
    split,
    total,
)
from mima.ops.backends import arguments
from mima.ops.backends import reference as reference_backend
from mima.ops.backends.arguments import Needs

_OP = "projected_merge"


def projected_merge(
    W0: Sequence[Tensor],
    W: Sequence[Sequence[Tensor]],
    C: Sequence[Tensor],
    M: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Merge projections by the text they answer to.

        φ_l = W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n

    Differentiable any number of times in `W0`, `W`, `C` and `M`.

    Args:
        W0: L tensors [o_l, d]; float32, bfloat16, float16 or float64, and all arguments of one
            dtype and device.
        W: N sequences of L tensors [o_l, d]. N = 0 gives a copy of `W0`.
        C: N tensors [s_n, d]: the token embeddings of each concept; s_n = 0 leaves it out.
        M: N tensors [s_n, d]: the merge plan, `mima.reference.merge_plan`.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        L tensors [o_l, d].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree.
        BackendError: `backend` cannot serve.

    Examples:
        >>> W0, W1 = torch.zeros(2, 3), torch.ones(2, 3)
        >>> first = torch.tensor([[1.0, 0.0, 0.0]])
        >>> projected_merge([W0], [[W1]], [first], [first])
        [tensor([[1., 0., 0.],
                [1., 0., 0.]])]
    """
    _require_agreement(W0, W, C, M)
    if not W0:
        return []
    given = [W_nl for row in W for W_nl in row]
    return list(apply(ProjectedMerge, len(W0), len(W), backend or "", *W0, *given, *C, *M))


def projected_merge_pullback(
    d_out: Sequence[Tensor],
    C: Sequence[Tensor],
    M: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> list[list[Tensor]]:
    """Pull a gradient back through `projected_merge`: W̄_nl = (φ̄_l M_nᵀ) C_n.

    With C and M exchanged it is what a change W_n − W0, in the place of φ̄, adds to φ: concepts can
    be merged one at a time. Differentiable any number of times.

    Args:
        d_out: L tensors [o_l, d].
        C: N tensors [s_n, d].
        M: N tensors [s_n, d].
        backend: "reference", "triton" or "native"; None chooses.

    Returns:
        N lists of L tensors [o_l, d].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree.
        BackendError: `backend` cannot serve.

    Examples:
        >>> first = torch.tensor([[1.0, 0.0, 0.0]])
        >>> projected_merge_pullback([torch.ones(2, 3)], [first], [first])
        [[tensor([[1., 0., 0.],
                [1., 0., 0.]])]]
    """
    _require_agreement(d_out, [d_out] * len(C), C, M)
    L, N = len(d_out), len(C)
    if not d_out:
        return [[] for _ in C]
    # neither W0 nor W is read for these gradients
    stand_ins = [x.detach() for x in d_out] * (N + 1)
    needs = False, True, False, False
    given = *d_out, *stand_ins, *C, *M
    out = apply(ProjectedMergeBackward, L, N, backend or "", needs, *given)
    return [list(out[n * L : (n + 1) * L]) for n in range(N)]


def _require_agreement(
    W0: Sequence[Tensor], W: Sequence[Sequence[Tensor]], C: Sequence[Tensor], M: Sequence[Tensor]
) -> None:
    _checks.require_sequence(_OP, "W0", W0)
    _checks.require_sequence(_OP, "W", W, of="sequences of tensors")
    _checks.require_sequence(_OP, "C", C)
    _checks.require_sequence(_OP, "M", M)
    _checks.require_length(_OP, "C", C, len(W), "one per concept of W")
    _checks.require_length(_OP, "M", M, len(W), "one per concept of W")
    for n, row in enumerate(W):
        _checks.require_sequence(_OP, f"W[{n}]", row)
        _checks.require_length(_OP, f"W[{n}]", row, len(W0), "one per layer of W0")
    if not W0:
        return
    _checks.require_matrices(_OP, "W0", W0)
    d, dtype, device = W0[0].shape[1], W0[0].dtype, W0[0].device
    for layer, W0_l in enumerate(W0):
        for n, row in enumerate(W):
            x = row[layer]
            # As many as layers times concepts: compare, and leave the message to the slow path.
            if (
                not isinstance(x, Tensor)
                or x.shape != W0_l.shape
                or x.dtype != dtype
                or x.device != device
            ):
                name = f"W[{n}][{layer}]"
                _checks.require_like(_OP, name, x, W0_l, f"W0[{layer}]", W0_l.shape)
    for n, (C_n, M_n) in enumerate(zip(C, M, strict=True)):
        _checks.require_like(_OP, f"C[{n}]", C_n, W0[0], "W0[0]", ("s", d))
        _checks.require_like(_OP, f"M[{n}]", M_n, C_n, f"C[{n}]", C_n.shape)


_forward, _backward = raw_operators(
    _OP,
    arguments.ProjectedMerge,
    "Tensor[]",
    fake=lambda given: [x.new_empty(x.shape) for x in given.W0],
    like=lambda d_out, given: given,
)


def _sizes(L: int, N: int) -> tuple[int, int, int, int]:
    """How many tensors W0, W, C and M are."""
    return L, N * L, N, N


def _groups(given: Sequence[Any], L: int, N: int) -> list[list[Any]]:
    """Cut a given list into W0, W, C, M."""
    return split(given, _sizes(L, N), (True,) * 4)


def _forward_formula(L: int, N: int, backend: str, *given: Tensor) -> list[Tensor]:
    merge = arguments.ProjectedMerge(*_groups(given, L, N))
    return reference_backend.projected_merge_forward(merge)


def _backward_formula(L: int, N: int, backend: str, needs: Needs, *tensors: Tensor) -> list[Tensor]:
    d_out, merge = tensors[:L], arguments.ProjectedMerge(*_groups(tensors[L:], L, N))
    return flat(reference_backend.projected_merge_backward(d_out, merge, needs), needs)


class ProjectedMerge(Operator):
    """(L, N, backend, *W0, *W, *C, *M) -> L tensors."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        L, N, backend, *given = args
        return tuple(call(_forward, *_groups(given, L, N), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.L, ctx.N, ctx.backend, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        L, N = ctx.L, ctx.N
        needs = tuple(any(group) for group in _groups(ctx.needs_input_grad[3:], L, N))
        tensors = *d_out, *ctx.saved_tensors
        grads = apply_backward(ProjectedMergeBackward, L, N, ctx.backend, needs, *tensors)
        return *(None,) * 3, *chain.from_iterable(split(grads, _sizes(L, N), needs))


class ProjectedMergeBackward(Operator):
    """(L, N, backend, needs, *d_out, *W0, *W, *C, *M) -> the gradients that are needed.

    The merge is linear in the weights, in C and in M, and its derivative in the direction u is

        u_W0 + Σ_n (u_Wn − u_W0) C_nᵀ M_n + Σ_n D_n [C_n; u_Cn]ᵀ [u_Mn; M_n],   D_n = W_n − W0,

    two merges. This function is the adjoint of that map, so its own gradients are those merges and
    their gradients.
    """

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        L, N, backend, needs, *tensors = args
        given = tensors[:L], *_groups(tensors[L:], L, N)
        return tuple(call(_backward, *given, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.L, ctx.N, ctx.backend, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        L, N, backend = ctx.L, ctx.N, ctx.backend
        d_out, given = ctx.saved_tensors[:L], ctx.saved_tensors[L:]
        W0, W, C, M = _groups(given, L, N)
        u_W0, u_W, u_C, u_M = split(u, _sizes(L, N), ctx.needs)
        _, _, _, _, *need_flat = ctx.needs_input_grad
        need_d_out = any(need_flat[:L])
        need_W0, need_W, need_C, need_M = map(any, _groups(need_flat[L:], L, N))
        need_D = need_W0 or need_W
        dd_out: list[Tensor | None] = [None] * L
        d_W0: list[Tensor | None] = [None] * L
        d_W: list[Tensor | None] = [None] * (N * L)
        d_C: list[Tensor | None] = [None] * N
        d_M: list[Tensor | None] = [None] * N

        if any(x is not None for x in (*u_W0, *u_W)):
            direction = filled([*u_W0, *u_W], [*W0, *W])
            if need_d_out:
                dd_out = list(apply(ProjectedMerge, L, N, backend, *direction, *C, *M))
            if need_C or need_M:
                needs = False, False, need_C, need_M
                grads = apply_backward(
                    ProjectedMergeBackward, L, N, backend, needs, *d_out, *direction, *C, *M
                )
                _, _, d_C, d_M = split(grads, _sizes(L, N), needs)

        if any(x is not None for x in (*u_C, *u_M)):
            # From zero, not from W0: a low precision W0 + δ has lost digits of δ.
            zeros = [torch.zeros_like(x) for x in W0]
            D = [W_nl - W0[i % L] for i, W_nl in enumerate(W)]
            C2 = [torch.cat(pair) for pair in zip(C, filled(u_C, C), strict=True)]
            M2 = [torch.cat(pair) for pair in zip(filled(u_M, M), M, strict=True)]
            if need_d_out:
                more = apply(ProjectedMerge, L, N, backend, *zeros, *D, *C2, *M2)
                dd_out = [total(pair) for pair in zip(dd_out, more, strict=True)]
            needs = False, need_D, need_C, need_M
            if any(needs):
                grads = apply_backward(
                    ProjectedMergeBackward, L, N, backend, needs, *d_out, *zeros, *D, *C2, *M2
                )
                _, d_W, d_C2, d_M2 = split(grads, _sizes(L, N), needs)
                if need_C:
                    first = [x[: len(C_n)] for x, C_n in zip(d_C2, C, strict=True)]
                    d_C = [total(pair) for pair in zip(d_C, first, strict=True)]
                if need_M:
                    last = [x[len(M_n) :] for x, M_n in zip(d_M2, M, strict=True)]
                    d_M = [total(pair) for pair in zip(d_M, last, strict=True)]
                if need_W0:
                    sums = (total(d_W[layer::L]) for layer in range(L))
                    d_W0 = [None if x is None else -x for x in sums]
        return *(None,) * 4, *dd_out, *d_W0, *d_W, *d_C, *d_M
