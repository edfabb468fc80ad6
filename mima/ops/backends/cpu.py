"""The native backend on the CPU: passes tensors to the C++ kernels of csrc/cpu.

Raw operators: arguments are validated, outputs freshly allocated, nothing recorded by autograd. All
are served in float32, float64, bfloat16 and float16, with as many threads as
`torch.get_num_threads()` says; results do not depend on how many.

Letters: N concepts, P tensors, L layers, [o, d] one weight, s_n tokens of concept n, r_n rank of
adapter n, b batch, t tokens. Flat lists are concept-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mima.ops.backends import arguments
from mima.ops.backends.arguments import Directions, Needs, Tensors
from mima.ops.backends.extension import (
    DTYPE_CODES,
    adam_step_backward_lists,
    adam_step_lists,
    contiguous,
    empty_like,
    loaded,
)


def cpu_level() -> str:
    """Return the instruction set that the CPU kernels use: generic, avx2 or avx512."""
    level: str = loaded("cpu").cpu_level()
    return level


def _run(name: str, like: Tensor, *args: object) -> Any:
    """Run a kernel on tensors of one dtype."""
    kernel = getattr(loaded("cpu"), name)
    return kernel(DTYPE_CODES[like.dtype], torch.get_num_threads(), *args)


def _with_rows(tensors: Tensors) -> list[Tensor]:
    """Matrices whose rows are contiguous: the tensors where they are, copies where not."""
    if loaded("cpu").have_contiguous_rows(tensors):
        return list(tensors)
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in tensors]


def weighted_merge_forward(inputs: arguments.WeightedMerge) -> list[Tensor]:
    """Return base_p + Σ_n w_n (θ_np − base_p) for each p."""
    base, thetas, weights = inputs
    if not base:
        return []
    base, thetas = contiguous(base), contiguous(thetas)
    # a memory format would cost a third more for each
    out = [torch.empty_like(x) for x in base]
    _run("weighted_merge_forward", out[0], base, thetas, weights.tolist(), out)
    return out


def weighted_merge_backward(
    d_out: Tensors, inputs: arguments.WeightedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return (1 − Σ w) d_out, w_n d_out and ⟨d_out, θ_n − base⟩, each where needed."""
    base, thetas, weights = inputs
    need_base, need_thetas, need_weights = needs
    d_base = empty_like(base) if need_base else []
    d_thetas = empty_like(thetas) if need_thetas else []
    if not base:
        return d_base, d_thetas, torch.zeros_like(weights) if need_weights else None
    d_out, base, thetas = contiguous(d_out), contiguous(base), contiguous(thetas)
    given = d_out, base, thetas, weights.tolist()
    sums = _run("weighted_merge_backward", base[0], *given, d_base, d_thetas, need_weights)
    d_weights = weights.new_tensor(sums) if need_weights else None
    return d_base, d_thetas, d_weights


def combine_into(out: Tensors, x: Tensors, factors: Sequence[Sequence[float]]) -> None:
    """Write Σ_j f_ij x_j into `out`, contiguous, which may have tensors of `x`."""
    _run("combine", x[0], factors, contiguous(x), out)


def token_outputs(X: Tensors, C: Tensor) -> Tensor:
    """Return A = X Cᵀ, [Σ o_l, s]."""
    A = C.new_empty(sum([X_l.shape[0] for X_l in X]), len(C))
    _run("token_outputs", C, _with_rows(X), *_with_rows([C]), A)
    return A


def add_token_outputs(X: Tensors, A: Tensor, M: Tensor) -> None:
    """Add A_l M to X_l, whose rows are contiguous."""
    _run("add_token_outputs", M, X, *_with_rows([M, A]))


def token_sums(X: Tensors, A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l, [s, d]."""
    sums = A.new_empty(A.shape[1], X[0].shape[1])
    _run("token_sums", A, _with_rows(X), sums, *_with_rows([A]))
    return sums


def adam_step_forward(inputs: arguments.AdamStep, *, overwrite: bool = False) -> list[Tensor]:
    """Return z, m and v after the step, one after the other; m and v in place on request."""
    given, out = adam_step_lists(inputs, overwrite)
    _run("adam_step_forward", out[0], *given)
    return out


def adam_step_backward(
    d_out: Tensors, saved: arguments.AdamStepSaved, needs: Needs
) -> list[list[Tensor]]:
    """Return the gradients of z, g, m and v, an empty list where not needed."""
    given, grads = adam_step_backward_lists(d_out, saved, needs)
    _run("adam_step_backward", d_out[0], *given)
    return grads


def projected_merge_forward(inputs: arguments.ProjectedMerge) -> list[Tensor]:
    """Return W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n for each l."""
    if not inputs.W0:
        return []
    out = empty_like(inputs.W0)
    _run("projected_merge_forward", out[0], *map(_with_rows, inputs), out)
    return out


def projected_merge_backward(
    d_out: Tensors, inputs: arguments.ProjectedMerge, needs: Needs
) -> tuple[list[Tensor], ...]:
    """Return the gradients of `projected_merge_forward`, an empty list where not needed."""
    grads = tuple(
        empty_like(given) if need else [] for given, need in zip(inputs, needs, strict=True)
    )
    if not inputs.W0:
        return tuple([x.zero_() for x in grad] for grad in grads)
    _run("projected_merge_backward", d_out[0], *map(_with_rows, (d_out, *inputs)), *grads)
    return grads


def batched_lora_forward(inputs: arguments.BatchedLora, kept: list[Tensor] | None = None) -> Tensor:
    """Return x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ with i = index[b], [b, t, o].

    Puts x_b A_iᵀ into `kept`, for the backward with the same inputs: [b, t, largest rank or more],
    in the accumulator type. Where adapters are merged it is not formed, and `kept` stays empty.
    """
    x, weight, A, B, scale, index, bias = inputs
    x = x.contiguous()
    computes_base = bool(A) and _computes_base(x, weight)
    if computes_base:
        (weight,) = _with_rows([weight])
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        if bias is not None:
            y.copy_(bias.expand_as(y))
    else:
        y = F.linear(x, weight, bias).contiguous()
    if y.numel() == 0 or not A:
        return y
    A, B = _with_rows(A), contiguous(B)
    merges = computes_base and loaded("cpu").merges_adapters(*x.shape[1:], weight.shape[0])
    if kept is not None and not merges:
        # whole vectors, of whatever instruction set
        width = -(-max(A_n.shape[0] for A_n in A) // 16) * 16
        kept.append(x.new_empty(*x.shape[:2], width, dtype=scale.dtype))
    given = x, weight, computes_base, A, B, scale.tolist(), index.tolist()
    add = not computes_base or bias is not None
    _run("batched_lora_forward", x, *given, y, add, kept[0] if kept else None)
    return y


def _computes_base(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes the base product, and its part of d_x, or PyTorch does.

    In float32 the sums of the base product continue into the low-rank part without leaving the
    registers. 16-bit types have instructions of their own, which PyTorch's library uses; without
    AVX2 that library is the faster one, too. An empty weight has no address to pass.
    """
    return x.dtype == torch.float32 and weight.numel() > 0 and cpu_level() != "generic"


def batched_lora_backward(
    d_y: Tensor, saved: arguments.BatchedLoraSaved, needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, A, B, scale and bias; None or empty where not needed."""
    x, weight, A, B, scale, index, projection = saved
    need_x, need_weight, need_A, need_B, need_scale, need_bias = needs
    (b, t, d), o = x.shape, weight.shape[0]
    x, d_y = x.contiguous(), d_y.contiguous()
    d_x = None
    computes_base = need_x and bool(A) and _computes_base(x, weight)
    if computes_base:
        (weight,) = _with_rows([weight])
        d_x = torch.empty_like(x)
    elif need_x:
        d_x = torch.matmul(d_y, weight).contiguous()
    d_weight = d_y.view(b * t, o).mT @ x.view(b * t, d) if need_weight else None
    d_bias = d_y.sum((0, 1)) if need_bias else None
    d_A = empty_like(A) if need_A else []
    d_B = empty_like(B) if need_B else []
    d_scale = None
    if A and (need_x or need_A or need_B or need_scale):
        A, B = _with_rows(A), contiguous(B)
        given = d_y, x, weight, computes_base, A, B, scale.tolist(), index.tolist(), projection
        sums = _run("batched_lora_backward", x, *given, d_x, d_A, d_B, need_scale)
        d_scale = scale.new_tensor(sums) if need_scale else None
    elif need_scale:
        d_scale = torch.zeros_like(scale)
    return d_x, d_weight, d_A, d_B, d_scale, d_bias


def merge_lora_forward(inputs: arguments.MergeLora) -> Tensor:
    """Return W + Σ_n w_n s_n B_n A_n, [o, d]."""
    weight, A, B, scale, weights = inputs
    (out,) = empty_like([weight])
    given = *_with_rows([weight]), _with_rows(A), contiguous(B), scale.tolist(), weights.tolist()
    _run("merge_lora_forward", weight, *given, out)
    return out


def merge_lora_backward(
    d_out: Tensor, inputs: arguments.MergeLora, needs: Needs
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of weight, A, B, scale and weights; None or empty where not needed."""
    _, A, B, scale, weights = inputs
    need_weight, need_A, need_B, need_scale, need_weights = needs
    # a copy: an operator's output may not be its input
    d_weight = d_out.clone(memory_format=torch.contiguous_format) if need_weight else None
    d_A = empty_like(A) if need_A else []
    d_B = empty_like(B) if need_B else []
    need_products = need_scale or need_weights
    products = scale.new_zeros(scale.shape)
    if A and (need_A or need_B or need_products):
        given = *_with_rows([d_out]), _with_rows(A), contiguous(B), scale.tolist(), weights.tolist()
        # ⟨d_out, B_n A_n⟩, of which both gradients are multiples
        sums = _run("merge_lora_backward", d_out, *given, d_A, d_B, need_products)
        products = scale.new_tensor(sums) if need_products else products
    d_scale = weights * products if need_scale else None
    d_weights = scale * products if need_weights else None
    return d_weight, d_A, d_B, d_scale, d_weights


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _made(like: Sequence[Tensor | None], needs: Needs) -> list[Tensor | None]:
    """Memory for results, where they are needed."""
    return [
        None if x is None or not need else empty_like([x])[0]
        for x, need in zip(like, needs, strict=True)
    ]


def _group_norm_numbers(inputs: arguments.GroupNorm) -> tuple[list[int], float, bool]:
    x, groups = inputs.x, inputs.groups
    sizes = [len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:])]
    return sizes, inputs.eps, inputs.silu


def group_norm_forward(inputs: arguments.GroupNorm) -> Tensor:
    """Return γ x̂ + β, or its SiLU."""
    (out,) = empty_like([inputs.x])
    given = *_group_norm_numbers(inputs), *_dense(*inputs[:3])
    _run("group_norm_forward", out, *given, out)
    return out


def group_norm_backward(
    d_out: Tensor, inputs: arguments.GroupNorm, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias, None where not needed."""
    made = _made(inputs[:3], needs)
    given = *_group_norm_numbers(inputs), *_dense(*inputs[:3], d_out)
    _run("group_norm_backward", d_out, *given, *made)
    return made


def group_norm_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.GroupNorm, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of d_out, x, weight and bias, None where not needed."""
    made = _made((d_out, *inputs[:3]), needs)
    given = *_group_norm_numbers(inputs), *_dense(*inputs[:3], d_out, *directions)
    _run("group_norm_double_backward", d_out, *given, *made)
    return made


def geglu_forward(inputs: arguments.Geglu) -> Tensor:
    """Return a · gelu(b), x = [a b]."""
    x = inputs.x
    d = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], d)
    _run("geglu_forward", x, d, x.contiguous(), out)
    return out


def geglu_backward(d_out: Tensor, inputs: arguments.Geglu, needs: Needs) -> list[Tensor | None]:
    """Return the gradient of x."""
    made = _made(inputs, needs)
    if any(needs):
        _run("geglu_backward", d_out, d_out.shape[-1], *_dense(*inputs, d_out), *made)
    return made


def geglu_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Geglu, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of d_out and x."""
    made = _made((d_out, *inputs), needs)
    tensors = _dense(*inputs, d_out, *_or_zeros(directions, inputs))
    _run("geglu_double_backward", d_out, d_out.shape[-1], *tensors, *made)
    return made


def _or_zeros(directions: Directions, like: Tensors) -> list[Tensor]:
    return [torch.zeros_like(x) if u is None else u for u, x in zip(directions, like, strict=True)]


def attention_forward(inputs: arguments.Attention) -> Tensor:
    """Return softmax(scale · q kᵀ) v, [n, T, e]."""
    q, _, v, scale = inputs
    out = q.new_empty(*q.shape[:2], v.shape[2])
    _run("attention_forward", q, scale, *_dense(*inputs[:3]), out)
    return out


def attention_backward(
    d_out: Tensor, inputs: arguments.Attention, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of q, k and v, None where not needed."""
    made = _made(inputs[:3], needs)
    tensors = _dense(*inputs[:3], d_out)
    _run("attention_backward", d_out, inputs.scale, *tensors, *made)
    return made


def attention_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Attention, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of d_out, q, k and v, None where not needed."""
    made = _made((d_out, *inputs[:3]), needs)
    tensors = _dense(*inputs[:3], d_out, *_or_zeros(directions, inputs[:3]))
    _run("attention_double_backward", d_out, inputs.scale, *tensors, *made)
    return made
