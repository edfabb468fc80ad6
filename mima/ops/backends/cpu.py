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

import torch
import torch.nn.functional as F
from torch import Tensor

from mima.ops.backends.extension import DTYPE_CODES, contiguous, empty_like, loaded


def cpu_level() -> str:
    """Return the instruction set that the CPU kernels use: generic, avx2 or avx512."""
    level: str = loaded("cpu").cpu_level()
    return level


def _with_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Matrices whose rows are contiguous: the tensors where they are, copies where not."""
    if loaded("cpu").have_contiguous_rows(tensors):
        return list(tensors)
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in tensors]


def weighted_merge_forward(
    base: Sequence[Tensor], thetas: Sequence[Tensor], weights: Tensor
) -> list[Tensor]:
    """Return base_p + Σ_n w_n (θ_np − base_p) for each p."""
    out = empty_like(base)
    if not base:
        return out
    base, thetas = contiguous(base), contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    tensors = base, thetas, weights.tolist(), out
    loaded("cpu").weighted_merge_forward(code, torch.get_num_threads(), *tensors)
    return out


def weighted_merge_backward(
    d_out: Sequence[Tensor],
    base: Sequence[Tensor],
    thetas: Sequence[Tensor],
    weights: Tensor,
    need_base: bool,
    need_thetas: bool,
    need_weights: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return (1 − Σ w) d_out, w_n d_out and ⟨d_out, θ_n − base⟩, each where needed."""
    d_base = empty_like(base) if need_base else []
    d_thetas = empty_like(thetas) if need_thetas else []
    if not base:
        return d_base, d_thetas, torch.zeros_like(weights) if need_weights else None
    d_out, base, thetas = contiguous(d_out), contiguous(base), contiguous(thetas)
    code = DTYPE_CODES[base[0].dtype]
    inputs = base, thetas, weights.tolist()
    sums = loaded("cpu").weighted_merge_backward(
        code, torch.get_num_threads(), d_out, *inputs, d_base, d_thetas, need_weights
    )
    d_weights = weights.new_tensor(sums) if need_weights else None
    return d_base, d_thetas, d_weights


def combine_into(
    out: Sequence[Tensor], x: Sequence[Tensor], factors: Sequence[Sequence[float]]
) -> None:
    """Write Σ_j f_ij x_j into `out`, contiguous, which may have tensors of `x`."""
    code = DTYPE_CODES[x[0].dtype]
    loaded("cpu").combine(code, torch.get_num_threads(), factors, contiguous(x), out)


def token_outputs(X: Sequence[Tensor], C: Tensor) -> Tensor:
    """Return A = X Cᵀ, [Σ o_l, s]."""
    A = C.new_empty(sum(len(X_l) for X_l in X), len(C))
    X, (C,) = _with_rows(X), _with_rows([C])
    code = DTYPE_CODES[C.dtype]
    loaded("cpu").token_outputs(code, torch.get_num_threads(), X, C, A)
    return A


def add_token_outputs(X: Sequence[Tensor], A: Tensor, M: Tensor) -> None:
    """Add A_l M to X_l, whose rows are contiguous."""
    A, M = _with_rows([A, M])
    code = DTYPE_CODES[M.dtype]
    loaded("cpu").add_token_outputs(code, torch.get_num_threads(), X, M, A)


def token_sums(X: Sequence[Tensor], A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l, [s, d]."""
    sums = A.new_empty(A.shape[1], X[0].shape[1])
    X, (A,) = _with_rows(X), _with_rows([A])
    code = DTYPE_CODES[A.dtype]
    loaded("cpu").token_sums(code, torch.get_num_threads(), X, sums, A)
    return sums


def adam_step_forward(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *rule: float,
    overwrite: bool = False,
) -> list[Tensor]:
    """Return z, m and v after the step, one after the other; m and v in place on request."""
    *numbers, step = rule
    z, g, m, v = contiguous(z), contiguous(g), contiguous(m), contiguous(v)
    out = empty_like(z), m if overwrite else empty_like(m), v if overwrite else empty_like(v)
    code = DTYPE_CODES[z[0].dtype]
    loaded("cpu").adam_step_forward(
        code, torch.get_num_threads(), numbers, step, *(z, g, m, v), *out
    )
    return [x for values in out for x in values]


def adam_step_backward(
    d_out: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *rule_and_needs: float,
) -> list[list[Tensor]]:
    """Return the gradients of z, g, m and v, an empty list where not needed."""
    *numbers, step = rule_and_needs[:-4]
    d_out, g, m, v = contiguous(d_out), contiguous(g), contiguous(m), contiguous(v)
    P = len(g)
    grads = [empty_like(g) if need else [] for need in rule_and_needs[-4:]]
    bars = d_out[:P], d_out[P : 2 * P], d_out[2 * P :]
    code = DTYPE_CODES[g[0].dtype]
    loaded("cpu").adam_step_backward(
        code, torch.get_num_threads(), numbers, step, *bars, *(g, m, v), *grads
    )
    return grads


def projected_merge_forward(
    W0: Sequence[Tensor], W: Sequence[Tensor], C: Sequence[Tensor], M: Sequence[Tensor]
) -> list[Tensor]:
    """Return W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n for each l."""
    if not W0:
        return []
    out = empty_like(W0)
    W0, W, C, M = _with_rows(W0), _with_rows(W), _with_rows(C), _with_rows(M)
    loaded("cpu").projected_merge_forward(
        DTYPE_CODES[W0[0].dtype], torch.get_num_threads(), W0, W, C, M, out
    )
    return out


def projected_merge_backward(
    d_out: Sequence[Tensor],
    W0: Sequence[Tensor],
    W: Sequence[Tensor],
    C: Sequence[Tensor],
    M: Sequence[Tensor],
    need_W0: bool,
    need_W: bool,
    need_C: bool,
    need_M: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients of `projected_merge_forward`, an empty list where not needed."""
    d_W0 = empty_like(W0) if need_W0 else []
    d_W = empty_like(W) if need_W else []
    d_C = empty_like(C) if need_C else []
    d_M = empty_like(M) if need_M else []
    if not W0:
        return d_W0, d_W, [x.zero_() for x in d_C], [x.zero_() for x in d_M]
    d_out, W0, W = _with_rows(d_out), _with_rows(W0), _with_rows(W)
    C, M = _with_rows(C), _with_rows(M)
    loaded("cpu").projected_merge_backward(
        DTYPE_CODES[W0[0].dtype],
        torch.get_num_threads(),
        *(d_out, W0, W, C, M),
        *(d_W0, d_W, d_C, d_M),
    )
    return d_W0, d_W, d_C, d_M


def batched_lora_forward(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
    bias: Tensor | None,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """Return x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ with i = index[b], [b, t, o].

    Puts x_b A_iᵀ into `kept`, for the backward with the same inputs: [b, t, largest rank or more],
    in the accumulator type. Where adapters are merged it is not formed, and `kept` stays empty.
    """
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
    loaded("cpu").batched_lora_forward(
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        *(x, weight, computes_base, A, B),
        scale.tolist(),
        index.tolist(),
        *(y, not computes_base or bias is not None, kept[0] if kept else None),
    )
    return y


def _computes_base(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes the base product, and its part of d_x, or PyTorch does.

    In float32 the sums of the base product continue into the low-rank part without leaving the
    registers. 16-bit types have instructions of their own, which PyTorch's library uses; without
    AVX2 that library is the faster one, too. An empty weight has no address to pass.
    """
    return x.dtype == torch.float32 and weight.numel() > 0 and cpu_level() != "generic"


def batched_lora_backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
    projection: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, A, B, scale and bias; None or empty where not needed."""
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
        sums = loaded("cpu").batched_lora_backward(
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
            *(d_y, x, weight, computes_base, A, B),
            scale.tolist(),
            index.tolist(),
            *(projection, d_x, d_A, d_B, need_scale),
        )
        d_scale = scale.new_tensor(sums) if need_scale else None
    elif need_scale:
        d_scale = torch.zeros_like(scale)
    return d_x, d_weight, d_A, d_B, d_scale, d_bias


def merge_lora_forward(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, weights: Tensor
) -> Tensor:
    """Return W + Σ_n w_n s_n B_n A_n, [o, d]."""
    (out,) = empty_like([weight])
    (weight,) = _with_rows([weight])
    A, B = _with_rows(A), contiguous(B)
    loaded("cpu").merge_lora_forward(
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
        *(weight, A, B),
        scale.tolist(),
        weights.tolist(),
        out,
    )
    return out


def merge_lora_backward(
    d_out: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    weights: Tensor,
    need_weight: bool,
    need_A: bool,
    need_B: bool,
    need_scale: bool,
    need_weights: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of weight, A, B, scale and weights; None or empty where not needed."""
    # a copy: an operator's output may not be its input
    d_weight = d_out.clone(memory_format=torch.contiguous_format) if need_weight else None
    d_A = empty_like(A) if need_A else []
    d_B = empty_like(B) if need_B else []
    need_products = need_scale or need_weights
    products = scale.new_zeros(scale.shape)
    if A and (need_A or need_B or need_products):
        (d_out,) = _with_rows([d_out])
        A, B = _with_rows(A), contiguous(B)
        # ⟨d_out, B_n A_n⟩, of which both gradients are multiples
        sums = loaded("cpu").merge_lora_backward(
            DTYPE_CODES[d_out.dtype],
            torch.get_num_threads(),
            *(d_out, A, B),
            scale.tolist(),
            weights.tolist(),
            *(d_A, d_B, need_products),
        )
        products = scale.new_tensor(sums) if need_products else products
    d_scale = weights * products if need_scale else None
    d_weights = scale * products if need_weights else None
    return d_weight, d_A, d_B, d_scale, d_weights


def _run_layer(name: str, x: Tensor, *args: object) -> None:
    """Run a layer's kernel on tensors of x's dtype."""
    getattr(loaded("cpu"), name)(DTYPE_CODES[x.dtype], torch.get_num_threads(), *args)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _made(like: Tensor | None, need: bool) -> Tensor | None:
    """A result's memory, where it is needed."""
    if not need:
        return None
    assert like is not None
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _groups(x: Tensor, groups: int) -> list[int]:
    return [len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:])]


def group_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> Tensor:
    """Return γ x̂ + β, or its SiLU."""
    (out,) = empty_like([x])
    given = _groups(x, groups), eps, silu, *_dense(x, weight, bias)
    _run_layer("group_norm_forward", x, *given, out)
    return out


def group_norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    *needs: bool,
) -> list[Tensor | None]:
    """Return the gradients of x, weight and bias, None where not needed."""
    made = [_made(*pair) for pair in zip((x, weight, bias), needs, strict=True)]
    given = _groups(x, groups), eps, silu, *_dense(x, weight, bias, d_out)
    _run_layer("group_norm_backward", x, *given, *made)
    return made


def group_norm_double_backward(
    d_out: Tensor,
    u_x: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    *needs: bool,
) -> list[Tensor | None]:
    """Return the gradients of d_out, x, weight and bias, None where not needed."""
    made = [_made(*pair) for pair in zip((d_out, x, weight, bias), needs, strict=True)]
    tensors = _dense(x, weight, bias, d_out, u_x, u_weight, u_bias)
    _run_layer("group_norm_double_backward", x, _groups(x, groups), eps, silu, *tensors, *made)
    return made


def geglu_forward(x: Tensor) -> Tensor:
    """Return a · gelu(b), x = [a b]."""
    d = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], d)
    _run_layer("geglu_forward", x, d, x.contiguous(), out)
    return out


def geglu_backward(d_out: Tensor, x: Tensor, need_x: bool) -> list[Tensor | None]:
    """Return the gradient of x."""
    d_x = _made(x, need_x)
    if need_x:
        _run_layer("geglu_backward", x, x.shape[-1] // 2, *_dense(x, d_out), d_x)
    return [d_x]


def geglu_double_backward(
    d_out: Tensor, u_x: Tensor | None, x: Tensor, *needs: bool
) -> list[Tensor | None]:
    """Return the gradients of d_out and x."""
    u_x = torch.zeros_like(x) if u_x is None else u_x
    made = [_made(*pair) for pair in zip((d_out, x), needs, strict=True)]
    _run_layer("geglu_double_backward", x, x.shape[-1] // 2, *_dense(x, d_out, u_x), *made)
    return made


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale · q kᵀ) v, [n, T, e]."""
    out = q.new_empty(*q.shape[:2], v.shape[2])
    _run_layer("attention_forward", q, scale, *_dense(q, k, v), out)
    return out


def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, *needs: bool
) -> list[Tensor | None]:
    """Return the gradients of q, k and v, None where not needed."""
    made = [_made(*pair) for pair in zip((q, k, v), needs, strict=True)]
    _run_layer("attention_backward", q, scale, *_dense(q, k, v, d_out), *made)
    return made


def attention_double_backward(
    d_out: Tensor,
    u_q: Tensor | None,
    u_k: Tensor | None,
    u_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *needs: bool,
) -> list[Tensor | None]:
    """Return the gradients of d_out, q, k and v, None where not needed."""
    directions = [
        torch.zeros_like(x) if u is None else u
        for u, x in zip((u_q, u_k, u_v), (q, k, v), strict=True)
    ]
    made = [_made(*pair) for pair in zip((d_out, q, k, v), needs, strict=True)]
    tensors = _dense(q, k, v, d_out, *directions)
    _run_layer("attention_double_backward", q, scale, *tensors, *made)
    return made
