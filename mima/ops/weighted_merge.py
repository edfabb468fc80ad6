"""weighted_merge: φ = base + Σ_n w_n (θ_n − base), every tensor of a model in one call."""

# N = concepts, P = parameters; flat lists are concept-major, thetas[n * P + p]

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, overload

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

_OP = "weighted_merge"


@overload
def weighted_merge(
    base: Tensor,
    thetas: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    backend: str | None = None,
) -> Tensor: ...


@overload
def weighted_merge(
    base: Sequence[Tensor],
    thetas: Sequence[Sequence[Tensor]],
    weights: Tensor | Sequence[float],
    *,
    backend: str | None = None,
) -> list[Tensor]: ...


def weighted_merge(
    base: Tensor | Sequence[Tensor],
    thetas: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    weights: Tensor | Sequence[float],
    *,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Average adapted parameters.

        φ = base + Σ_n w_n (θ_n − base)

    Differentiable any number of times in `base`, `thetas` and `weights`.

    Args:
        base: a tensor of any shape, or P of them; float32, bfloat16, float16 or float64, all of one
            dtype and device.
        thetas: N tensors shaped as `base`, or N sequences of P. N = 0 gives a copy of `base`.
        weights: [N], finite, any sum; a tensor or numbers. Used in float32 (float64 with float64).
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        φ, a tensor or a list of P tensors, as `base` is.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; weights not finite.
        BackendError: `backend` cannot serve.

    Examples:
        >>> base = torch.zeros(2)
        >>> weighted_merge(base, [base + 1, base + 3], [0.5, 0.5])
        tensor([2., 2.])
    """
    if isinstance(base, Tensor):
        _checks.require_sequence(_OP, "thetas", thetas)
        alone = [[theta] for theta in cast("Sequence[Tensor]", thetas)]
        return weighted_merge([base], alone, weights, backend=backend)[0]
    rows = cast("Sequence[Sequence[Tensor]]", thetas)
    _require_agreement(base, rows)
    if not base:
        return []
    vector = _checks.as_vector(_OP, "weights", weights, len(rows), base[0])
    given = [theta for row in rows for theta in row]
    return list(apply(WeightedMerge, len(base), backend or "", vector, *base, *given))


def weighted_merge_pullback(
    d_out: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    backend: str | None = None,
) -> list[list[Tensor]]:
    """Pull a gradient back through `weighted_merge`: θ̄_n = w_n φ̄.

    The merge is linear in each θ_n − base, so the same call gives what such a change, in the place
    of φ̄, adds to φ: concepts can be merged one at a time. Differentiable any number of times.

    Args:
        d_out: P tensors, as `base` of the merge.
        weights: [N].
        backend: "reference", "triton" or "native"; None chooses.

    Returns:
        N lists of P tensors.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: weights that are not a vector.
        BackendError: `backend` cannot serve.

    Examples:
        >>> weighted_merge_pullback([torch.ones(2)], [0.25, 0.75])
        [[tensor([0.2500, 0.2500])], [tensor([0.7500, 0.7500])]]
    """
    _require_agreement(d_out, [])
    if not d_out:
        return [[] for _ in weights]
    vector = _checks.as_vector(_OP, "weights", weights, len(weights), d_out[0])
    P, N = len(d_out), len(vector)
    # neither base nor θ is read for these gradients
    stand_ins = [x.detach() for x in d_out] * (N + 1)
    needs = False, True, False
    out = apply(WeightedMergeBackward, P, backend or "", needs, vector, *d_out, *stand_ins)
    return [list(out[n * P : (n + 1) * P]) for n in range(N)]


def _require_agreement(base: Sequence[Tensor], thetas: Sequence[Sequence[Tensor]]) -> None:
    _checks.require_sequence(_OP, "base", base)
    _checks.require_sequence(_OP, "thetas", thetas, of="sequences of tensors")
    for n, row in enumerate(thetas):
        _checks.require_sequence(_OP, f"thetas[{n}]", row)
        _checks.require_length(_OP, f"thetas[{n}]", row, len(base), "one per tensor of base")
    if not base:
        return
    _checks.require_floating(_OP, "base[0]", base[0])
    dtype, device = base[0].dtype, base[0].device
    # Hundreds of tensors: compare here, and leave the message to the slow path.
    for p, b in enumerate(base):
        if not isinstance(b, Tensor) or b.dtype is not dtype or b.device != device:
            _checks.require_like(_OP, f"base[{p}]", b, base[0], "base[0]", ("...",))
    shapes = [b.shape for b in base]
    for n, row in enumerate(thetas):
        for p, (t, shape) in enumerate(zip(row, shapes, strict=True)):
            if (
                not isinstance(t, Tensor)
                or t.dtype is not dtype
                or t.shape != shape
                or t.device != device
            ):
                _checks.require_like(_OP, f"thetas[{n}][{p}]", t, base[p], f"base[{p}]", shape)


_forward, _backward = raw_operators(
    _OP,
    arguments.WeightedMerge,
    "Tensor[]",
    fake=lambda given: [b.new_empty(b.shape) for b in given.base],
    like=lambda d_out, given: given,
    check=lambda given: _checks.require_finite(_OP, given.weights),
)


def _forward_formula(P: int, backend: str, weights: Tensor, *given: Tensor) -> list[Tensor]:
    merge = arguments.WeightedMerge(given[:P], given[P:], weights)
    return reference_backend.weighted_merge_forward(merge)


def _backward_formula(
    P: int, backend: str, needs: Needs, weights: Tensor, *given: Tensor
) -> list[Tensor]:
    merge = arguments.WeightedMerge(given[P : 2 * P], given[2 * P :], weights)
    return flat(reference_backend.weighted_merge_backward(given[:P], merge, needs), needs)


class WeightedMerge(Operator):
    """(P, backend, weights, *base, *thetas) -> P tensors."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        P, backend, weights, *given = args
        return tuple(call(_forward, given[:P], given[P:], weights, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.P, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        P = ctx.P
        weights, *given = ctx.saved_tensors
        _, _, need_weights, *need_flat = ctx.needs_input_grad
        need_base, need_thetas = any(need_flat[:P]), any(need_flat[P:])
        needs = need_base, need_thetas, need_weights
        grads = apply_backward(
            WeightedMergeBackward, P, ctx.backend, needs, weights, *d_out, *given
        )
        d_base, d_thetas, d_weights = split(grads, (P, len(given) - P, None), needs)
        return None, None, d_weights, *d_base, *d_thetas


class WeightedMergeBackward(Operator):
    """(P, backend, needs, weights, *d_out, *base, *thetas) -> the gradients that are needed.

    It is the adjoint of the derivative: its own gradient is `weighted_merge` and itself, at the
    incoming gradients.
    """

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        P, backend, needs, weights, *given = args
        d_out, base, thetas = given[:P], given[P : 2 * P], given[2 * P :]
        return tuple(call(_backward, d_out, base, thetas, weights, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.P, ctx.backend, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        P, backend = ctx.P, ctx.backend
        weights, *given = ctx.saved_tensors
        d_out, base, thetas = given[:P], given[P : 2 * P], given[2 * P :]
        u_base, u_thetas, u_weights = split(u, (P, len(thetas), None), ctx.needs)
        _, _, _, need_weights, *need_flat = ctx.needs_input_grad
        need_d_out, need_x = any(need_flat[:P]), any(need_flat[P:])
        dd_out: list[Tensor | None] = [None] * P
        d_base: list[Tensor | None] = [None] * P
        d_thetas: list[Tensor | None] = [None] * len(thetas)
        d_weights = None
        if any(x is not None for x in (*u_base, *u_thetas)):
            u_flat = filled([*u_base, *u_thetas], [*base, *thetas])
            if need_d_out:
                dd_out = list(apply(WeightedMerge, P, backend, weights, *u_flat))
            if need_weights:
                needs = False, False, True
                (d_weights,) = apply_backward(
                    WeightedMergeBackward, P, backend, needs, weights, *d_out, *u_flat
                )
        if u_weights is not None:
            if need_d_out:
                # On differences from zero, for the low precision dtypes' sake.
                zeros = [torch.zeros_like(b) for b in base]
                D = [theta - base[i % P] for i, theta in enumerate(thetas)]
                # not the operator, which refuses what is not finite, as a gradient may be
                more = _forward_formula(P, backend, u_weights, *zeros, *D)
                dd_out = [total(pair) for pair in zip(dd_out, more, strict=True)]
            if need_x:
                rest = -u_weights.sum()
                d_base = [rest * d for d in d_out]
                d_thetas = [u_n * d for u_n in u_weights for d in d_out]
        return None, None, None, d_weights, *dd_out, *d_base, *d_thetas
