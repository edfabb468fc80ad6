"""batched_lora: y_b = x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ, an adapter per sample, mixed ranks."""

# N = adapters; b = samples, t = tokens, d -> o = features, r = rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mima import reference
from mima.ops import _checks
from mima.ops._autograd import (
    Operator,
    apply,
    apply_backward,
    call,
    filled,
    flat,
    no_autocast,
    raw_operators,
    split,
    total,
)
from mima.ops.backends import arguments
from mima.ops.backends import reference as reference_backend
from mima.ops.backends.arguments import Needs

_OP = "batched_lora"


def batched_lora(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor | Sequence[float],
    index: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a linear layer whose low-rank adapter differs from sample to sample.

        y_b = x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ,  i = index[b];  no adapter where i = −1

    The rank-r intermediate is kept in float32. Differentiable any number of times in `x`, `weight`,
    `A`, `B`, `scale` and `bias`.

    Args:
        x: [b, t, d]; float32, bfloat16, float16 or float64, and all arguments but `scale` and
            `index` of one dtype and device.
        weight: [o, d].
        A: N tensors [r_n, d]; ranks may differ, and be 0.
        B: N tensors [o, r_n].
        scale: [N]; a tensor or numbers. Used in float32 (float64 with float64).
        index: [b], int64, each in [−1, N).
        bias: [o], or None.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        [b, t, o].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; an index out of range.
        BackendError: `backend` cannot serve.

    Examples:
        >>> x, weight = torch.ones(2, 1, 3), torch.zeros(2, 3)
        >>> A, B = [torch.ones(1, 3)], [torch.ones(2, 1)]
        >>> batched_lora(x, weight, A, B, [2.0], torch.tensor([0, -1]))
        tensor([[[6., 6.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    _require_agreement(x, weight, A, B, index, bias)
    vector = _checks.as_vector(_OP, "scale", scale, len(A), x)
    kept: list[Tensor] | None = [] if _is_trained(vector, *A, *B) else None
    (y,) = apply(BatchedLora, len(A), backend or "", kept, x, weight, bias, vector, index, *A, *B)
    return cast(Tensor, y)


def _is_trained(*adapters: Tensor) -> bool:
    """Whether a backward will need x Aᵀ, which a kernel may then keep."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(x.requires_grad for x in adapters)
    )


def _require_agreement(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    index: Tensor,
    bias: Tensor | None,
) -> None:
    _checks.require_floating(_OP, "x", x)
    if x.ndim != 3:
        raise ValueError(f"{_OP}: x must be [b, t, d], got {list(x.shape)}")
    _checks.require_like(_OP, "weight", weight, x, "x", ("o", x.shape[2]))
    if bias is not None:
        _checks.require_like(_OP, "bias", bias, weight, "weight", weight.shape[:1])
    _checks.require_adapters(_OP, A, B, weight)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.device != x.device:
        raise TypeError(
            f"{_OP}: index must be torch.int64 on {x.device} like x, got {_checks.describe(index)}"
        )
    if index.shape != x.shape[:1]:
        raise ValueError(
            f"{_OP}: index must be [{x.shape[0]}], one per sample of x {list(x.shape)}, "
            f"got {list(index.shape)}"
        )


_forward, _backward = raw_operators(
    _OP,
    arguments.BatchedLora,
    "Tensor",
    saved=arguments.BatchedLoraSaved,
    fake=lambda given: given.x.new_empty(*given.x.shape[:2], given.weight.shape[0]),
    like=lambda d_y, saved: (*saved[:5], d_y.new_empty(d_y.shape[2:])),
    check=lambda given: _checks.require_in_range(_OP, given.indices, len(given.A)),
)


def _sizes(N: int) -> tuple[int | None, ...]:
    """How many tensors the gradients of x, weight, A, B, scale and bias are."""
    return None, None, N, N, None, None


def _forward_formula(
    N: int,
    backend: str,
    kept: object,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    index: Tensor,
    *AB: Tensor,
) -> list[Tensor]:
    return [reference.batched_lora(x, weight, AB[:N], AB[N:], scale, index, bias)]


def _backward_formula(N: int, backend: str, needs: Needs, *tensors: Any) -> list[Tensor]:
    d_y, x, weight, scale, index, projection, *AB = tensors
    saved = arguments.BatchedLoraSaved(x, weight, AB[:N], AB[N:], scale, index, projection)
    return flat(reference_backend.batched_lora_backward(d_y, saved, needs), needs)


class BatchedLora(Operator):
    """(N, backend, kept, x, weight, bias, scale, index, *A, *B) -> (y,).

    `kept` is an empty list that a kernel may put x Aᵀ into, for the backward, or None.
    """

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        N, backend, kept, x, weight, bias, scale, index, *AB = args
        args = x, weight, AB[:N], AB[N:], scale, index, bias, backend
        return (call(_forward, *args, kept=kept),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.N, ctx.backend, kept, x, weight, _, scale, index, *AB = inputs
        projection = kept[0] if kept else None
        ctx.save_for_backward(x, weight, scale, index, projection, *AB)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        N = ctx.N
        _, _, _, need_x, need_weight, need_bias, need_scale, _, *need_AB = ctx.needs_input_grad
        need_A, need_B = any(need_AB[:N]), any(need_AB[N:])
        needs = need_x, need_weight, need_A, need_B, need_scale, need_bias
        tensors = *d_out, *ctx.saved_tensors
        grads = apply_backward(BatchedLoraBackward, N, ctx.backend, needs, *tensors)
        d_x, d_weight, d_A, d_B, d_scale, d_bias = split(grads, _sizes(N), needs)
        return None, None, None, d_x, d_weight, d_bias, d_scale, None, *d_A, *d_B

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        N, index = args[0], args[7]
        # not where a vmap around this one, or a tracer, hides the values
        if index.__class__ is Tensor and not torch._C._functorch.is_batchedtensor(index):
            _checks.require_in_range(_OP, index, N)
        return super().vmap(info, in_dims, *args)


class BatchedLoraBackward(Operator):
    """(N, backend, needs, d_y, x, weight, scale, index, projection, *A, *B) -> those needed.

    It is the adjoint of the derivative of y, which in the direction u is

        u_x Wᵀ + s (u_x Aᵀ) Bᵀ  +  x u_Wᵀ + u_bias  +  (x A2ᵀ) B2ᵀ,
        A2 = [u_A; A],  B2 = [s B, s u_B + u_s B],

    the operator at u_x, a linear layer, and an adapter of twice the rank. Its own gradients are
    those three and theirs; the last two, in plain PyTorch.
    """

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        N, backend, needs, d_y, x, weight, scale, index, projection, *AB = args
        given = d_y, x, weight, AB[:N], AB[N:], scale, index, projection
        return tuple(call(_backward, *given, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.N, ctx.backend, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        with no_autocast(tensors[0]):
            return BatchedLoraBackward._derivative(ctx, tensors, u)

    @staticmethod
    def _derivative(
        ctx: Any, tensors: Sequence[Any], u: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        N, backend = ctx.N, ctx.backend
        d_y, x, weight, scale, index, _, *AB = tensors
        A, B = AB[:N], AB[N:]
        u_x, u_weight, u_A, u_B, u_scale, u_bias = split(u, _sizes(N), ctx.needs)
        need_d_y, need_x, need_weight, need_scale, _, _, *need_AB = ctx.needs_input_grad[3:]
        need_A, need_B = any(need_AB[:N]), any(need_AB[N:])
        dd_y: list[Tensor | None] = []
        d_x: list[Tensor | None] = []
        d_weight = None
        d_scale: list[Tensor | None] = []
        d_A: list[list[Tensor | None]] = []
        d_B: list[list[Tensor | None]] = []

        if u_x is not None:
            if need_d_y:
                dd_y += apply(BatchedLora, N, backend, None, u_x, weight, None, scale, index, *AB)
            needs = False, need_weight, need_A, need_B, need_scale, False
            if any(needs):
                args = d_y, u_x, weight, scale, index, None, *AB
                grads = apply_backward(BatchedLoraBackward, N, backend, needs, *args)
                _, d_weight, first_A, first_B, first_scale, _ = split(grads, _sizes(N), needs)
                d_A.append(first_A)
                d_B.append(first_B)
                d_scale.append(first_scale)
        if u_weight is not None:
            dd_y.append(F.linear(x, u_weight))
            d_x.append(d_y @ u_weight)
        if u_bias is not None:
            dd_y.append(u_bias.expand_as(d_y))
        if N and any(u_n is not None for u_n in (u_scale, *u_A, *u_B)):
            u_A, u_B = filled(u_A, A), filled(u_B, B)
            (u_scale,) = filled([u_scale], [scale])
            dtype = x.dtype
            x, d_y = reference.wide(x), reference.wide(d_y)
            A, B, u_A, u_B = ([reference.wide(y) for y in group] for group in (A, B, u_A, u_B))
            A2 = [torch.cat(pair) for pair in zip(u_A, A, strict=True)]
            B2 = [
                torch.cat([s * B_n, s * u_B_n + u_s * B_n], dim=1)
                for B_n, u_B_n, s, u_s in zip(B, u_B, scale, u_scale, strict=True)
            ]
            ones = torch.ones_like(scale)
            if need_d_y:
                dd_y.append(reference.low_rank(x, A2, B2, ones, index).to(dtype))
            need_B2 = need_B or need_scale
            d_x2, d_A2, d_B2, _ = reference_backend.low_rank_backward(
                d_y, x, A2, B2, ones, index, need_x, need_A, need_B2, False
            )
            if d_x2 is not None:
                d_x.append(d_x2.to(dtype))
            if need_A:
                d_A.append([d[len(d) // 2 :].to(dtype) for d in d_A2])
            if need_B2:
                # d_B2 = [of s B, of s u_B + u_s B]
                halves = [d.tensor_split(2, dim=1) for d in d_B2]
                d_B.append(
                    [
                        (s * left + u_s * right).to(dtype)
                        for (left, right), s, u_s in zip(halves, scale, u_scale, strict=True)
                    ]
                )
                inner = [
                    (left * B_n).sum() + (right * u_B_n).sum()
                    for (left, right), B_n, u_B_n in zip(halves, B, u_B, strict=True)
                ]
                d_scale.append(torch.stack(inner).to(scale.dtype) if inner else None)
        return (
            *(None,) * 3,
            total(dd_y),
            total(d_x),
            d_weight,
            total(d_scale),
            None,
            None,
            *(total(group) for group in _by_adapter(d_A, N)),
            *(total(group) for group in _by_adapter(d_B, N)),
        )


def _by_adapter(terms: Sequence[Sequence[Tensor | None]], N: int) -> list[list[Tensor | None]]:
    return [[term[n] for term in terms] for n in range(N)]
