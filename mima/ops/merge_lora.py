"""merge_lora: φ = W + Σ_n w_n s_n B_n A_n, without materialising any adapted weight."""

# N = adapters; o, d = rows and columns of the weight, r = rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

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
from mima.reference import wide

_OP = "merge_lora"


def merge_lora(
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor | Sequence[float],
    weights: Tensor | Sequence[float],
    *,
    backend: str | None = None,
) -> Tensor:
    """Average models that differ by low-rank adapters.

        φ = W + Σ_n w_n s_n B_n A_n

    Differentiable any number of times in `weight`, `A`, `B`, `scale` and `weights`.

    Args:
        weight: [o, d]; float32, bfloat16, float16 or float64, like `A` and `B`, on their device.
        A: N tensors [r_n, d]; ranks may differ, and be 0.
        B: N tensors [o, r_n].
        scale: [N], the adapters' own scales; a tensor or numbers, used in float32 (float64 with
            float64).
        weights: [N], finite, the concepts' weights; likewise.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        [o, d].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; weights not finite.
        BackendError: `backend` cannot serve.

    Examples:
        >>> A, B = [torch.ones(1, 2)], [torch.ones(2, 1)]
        >>> merge_lora(torch.zeros(2, 2), A, B, [4.0], [0.5])
        tensor([[2., 2.],
                [2., 2.]])
    """
    _checks.require_floating(_OP, "weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"{_OP}: weight must be [o, d], got {list(weight.shape)}")
    _checks.require_adapters(_OP, A, B, weight)
    scales = _checks.as_vector(_OP, "scale", scale, len(A), weight)
    shares = _checks.as_vector(_OP, "weights", weights, len(A), weight)
    (phi,) = apply(MergeLora, len(A), backend or "", weight, scales, shares, *A, *B)
    return cast(Tensor, phi)


_forward, _backward = raw_operators(
    _OP,
    arguments.MergeLora,
    "Tensor",
    fake=lambda given: given.weight.new_empty(given.weight.shape),
    like=lambda d_out, given: given,
    check=lambda given: _checks.require_finite(_OP, given.weights),
)


def _sizes(N: int) -> tuple[int | None, ...]:
    """How many tensors the gradients of weight, A, B, scale and weights are."""
    return None, N, N, None, None


def _forward_formula(
    N: int, backend: str, weight: Tensor, scale: Tensor, weights: Tensor, *AB: Tensor
) -> list[Tensor]:
    given = arguments.MergeLora(weight, AB[:N], AB[N:], scale, weights)
    return [reference_backend.merge_lora_forward(given)]


def _backward_formula(N: int, backend: str, needs: Needs, *tensors: Tensor) -> list[Tensor]:
    d_out, weight, scale, weights, *AB = tensors
    given = arguments.MergeLora(weight, AB[:N], AB[N:], scale, weights)
    return flat(reference_backend.merge_lora_backward(d_out, given, needs), needs)


class MergeLora(Operator):
    """(N, backend, weight, scale, weights, *A, *B) -> (φ,)."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        N, backend, weight, scale, weights, *AB = args
        return (call(_forward, weight, AB[:N], AB[N:], scale, weights, backend),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.N, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        N = ctx.N
        _, _, need_weight, need_scale, need_weights, *need_AB = ctx.needs_input_grad
        needs = need_weight, any(need_AB[:N]), any(need_AB[N:]), need_scale, need_weights
        grads = apply_backward(MergeLoraBackward, N, ctx.backend, needs, *d_out, *ctx.saved_tensors)
        d_weight, d_A, d_B, d_scale, d_weights = split(grads, _sizes(N), needs)
        return None, None, d_weight, d_scale, d_weights, *d_A, *d_B


class MergeLoraBackward(Operator):
    """(N, backend, needs, d_out, weight, scale, weights, *A, *B) -> the gradients that are needed.

    It is the adjoint of the derivative of φ, which in the direction u is, with c = w s and
    k = w u_s + s u_w,

        u_W + Σ_n B2_n A2_n,   A2 = [A; u_A],   B2 = [c u_B + k B, c B],

    the operator with adapters of twice the rank; its own gradients follow from that.
    """

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        N, backend, needs, d_out, weight, scale, weights, *AB = args
        given = d_out, weight, AB[:N], AB[N:], scale, weights
        return tuple(call(_backward, *given, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.N, ctx.backend, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        N, backend = ctx.N, ctx.backend
        d_out, weight, scale, weights, *AB = ctx.saved_tensors
        A, B = AB[:N], AB[N:]
        u_weight, u_A, u_B, u_scale, u_weights = split(u, _sizes(N), ctx.needs)
        need_d_out, _, need_scale, need_weights, *need_AB = ctx.needs_input_grad[3:]
        need_A, need_B = any(need_AB[:N]), any(need_AB[N:])
        dd_out: Tensor | None = u_weight
        d_A: list[Tensor | None] = [None] * N
        d_B: list[Tensor | None] = [None] * N
        d_scale = d_weights = None

        if N and any(x is not None for x in (*u_A, *u_B, u_scale, u_weights)):
            u_A, u_B = filled(u_A, A), filled(u_B, B)
            u_scale, u_weights = filled([u_scale, u_weights], [scale, weights])
            c, k = weights * scale, weights * u_scale + scale * u_weights
            A2 = [torch.cat(pair) for pair in zip(A, u_A, strict=True)]
            B2 = [
                torch.cat([c_n * u_B_n + k_n * B_n, c_n * B_n], dim=1)
                for B_n, u_B_n, c_n, k_n in zip(B, u_B, c, k, strict=True)
            ]
            ones = torch.ones_like(scale)
            if need_d_out:
                start = total([u_weight, torch.zeros_like(d_out)])
                (dd_out,) = apply(MergeLora, N, backend, start, ones, ones, *A2, *B2)
            need_B2 = need_B or need_scale or need_weights
            if need_A or need_B2:
                needs = False, need_A, need_B2, False, False
                tensors = d_out, weight, ones, ones, *A2, *B2
                grads = apply_backward(MergeLoraBackward, N, backend, needs, *tensors)
                _, d_A2, d_B2, _, _ = split(grads, _sizes(N), needs)
                if need_A:
                    d_A = [d[: len(A_n)] for d, A_n in zip(d_A2, A, strict=True)]
                if need_B2:
                    # d_B2 = [of c u_B + k B, of c B]
                    halves = [d.tensor_split(2, dim=1) for d in d_B2]
                    d_B = [
                        k_n * left + c_n * right
                        for (left, right), c_n, k_n in zip(halves, c, k, strict=True)
                    ]
                    # sums that 16 bits may not hold
                    d_c = torch.stack(
                        [
                            (wide(left) * wide(u_B_n)).sum() + (wide(right) * wide(B_n)).sum()
                            for (left, right), B_n, u_B_n in zip(halves, B, u_B, strict=True)
                        ]
                    ).to(scale.dtype)
                    d_k = torch.stack(
                        [
                            (wide(left) * wide(B_n)).sum()
                            for (left, _), B_n in zip(halves, B, strict=True)
                        ]
                    ).to(scale.dtype)
                    d_scale = d_c * weights + d_k * u_weights
                    d_weights = d_c * scale + d_k * u_scale
        return None, None, None, dd_out, None, d_scale, d_weights, *d_A, *d_B
