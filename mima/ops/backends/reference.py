"""The backend that always serves: :mod:`mima.reference` and the gradients, in plain PyTorch.

Lists are flat and concept-major (`thetas[n * P + p]`), like those of every backend. Each backward
is a formula of its own, which the tests hold against autograd through the reference.
"""

# N = concepts, P = parameters, L = layers, b = samples, t = tokens, r = rank

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mima import reference
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Directions, Needs, Tensors
from mima.reference import wide


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Return why this backend cannot serve: it always can."""
    return []


def _rows(flat: Sequence[Tensor], num_rows: int) -> list[Sequence[Tensor]]:
    """Cut a concept-major list into one row per concept."""
    width = len(flat) // num_rows if num_rows else 0
    return [flat[n * width : (n + 1) * width] for n in range(num_rows)]


def _narrow(values: Sequence[Tensor], templates: Sequence[Tensor]) -> list[Tensor]:
    """Return the values, if there are any, in the templates' dtypes."""
    return [x.to(template.dtype) for x, template in zip(values, templates, strict=bool(values))]


def weighted_merge_forward(inputs: arguments.WeightedMerge) -> list[Tensor]:
    """Return φ, P tensors."""
    base, thetas, weights = inputs
    return reference.weighted_merge(base, _rows(thetas, len(weights)), weights)


def weighted_merge_backward(
    d_out: Tensors, inputs: arguments.WeightedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients: (1 − Σw) φ̄, w_n φ̄ and ⟨φ̄, θ_n − base⟩."""
    base, thetas, weights = inputs
    need_base, need_thetas, need_weights = needs
    d_base: list[Tensor] = []
    d_thetas: list[Tensor] = []
    d_weights = None
    if need_base:
        rest = 1 - weights.sum()
        d_base = [(rest * wide(d)).to(d.dtype) for d in d_out]
    if need_thetas:
        d_thetas = [(w_n * wide(d)).to(d.dtype) for w_n in weights for d in d_out]
    if need_weights:
        sums = [
            sum(
                (
                    (wide(d) * (wide(t) - wide(b))).sum()
                    for d, t, b in zip(d_out, row, base, strict=True)
                ),
                start=weights.new_zeros(()),
            )
            for row in _rows(thetas, len(weights))
        ]
        d_weights = torch.stack(sums) if sums else torch.zeros_like(weights)
    return d_base, d_thetas, d_weights


def combine_into(out: Tensors, x: Tensors, factors: Sequence[Sequence[float]]) -> None:
    """Write Σ_j f_ij x_j into `out`, which may have tensors of `x`."""
    P = len(x) // len(factors[0])
    for p in range(P):
        # a tensor is read before it is written
        made = reference.combine([[x_jp] for x_jp in x[p::P]], factors)
        for out_ip, (value,) in zip(out[p::P], made, strict=True):
            out_ip.copy_(value)


def token_outputs(X: Tensors, C: Tensor) -> Tensor:
    """Return A [Σ o_l, s]."""
    return reference.token_outputs(X, C)


def add_token_outputs(X: Tensors, A: Tensor, M: Tensor) -> None:
    """Add A_l M to X_l."""
    for X_l, A_l in zip(X, A.split([len(x) for x in X]), strict=True):
        X_l.copy_(reference.add_token_outputs([X_l], A_l, M)[0])


def token_sums(X: Tensors, A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l [s, d]."""
    return reference.token_sums(X, A)


def adam_step_forward(inputs: arguments.AdamStep, *, overwrite: bool = False) -> list[Tensor]:
    """Return z, m and v after the step, one after the other. Overwrites nothing."""
    z, g, m, v, lr, beta1, beta2, eps, weight_decay, step = inputs
    rule = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    stepped = reference.adam_step(z, g, m, v, **rule, step=step)  # type: ignore[arg-type]
    return [x for values in stepped for x in values]


def adam_step_backward(
    d_out: Tensors, saved: arguments.AdamStepSaved, needs: Needs
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients of z, g, m and v; differentiable.

    With s = lr z̄⁺ / (√v̂ + eps) and the update u = m̂ / (√v̂ + eps): through the moments after the
    step come m̄ = m̄⁺ − s / (1 − β₁ᵏ⁺¹) and v̄ = v̄⁺ + s u / (2 (1 − β₂ᵏ⁺¹) √v̂), and from them
    (1 − β₁) m̄ + 2 (1 − β₂) g v̄ to g, β₁ m̄ to m, β₂ v̄ to v.
    """
    g, m, v, lr, beta1, beta2, eps, weight_decay, step = saved
    need_z, need_g, need_m, need_v = needs
    correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
    P = len(g)
    grads: tuple[list[Tensor], ...] = [], [], [], []
    for p, (g_p, m_p, v_p) in enumerate(zip(g, m, v, strict=True)):
        bar_z, bar_m, bar_v = (wide(x) for x in d_out[p::P])
        g_wide = wide(g_p)
        first = wide(m_p) * beta1 + g_wide * (1 - beta1)
        second = wide(v_p) * beta2 + g_wide * g_wide * (1 - beta2)
        root = reference.root_of_moment(second / correction2)
        update = first / correction1 / (root + eps)
        slope = lr * bar_z / (root + eps)
        bar_m = bar_m - slope / correction1
        seen = root > 0
        through_root = slope * update / (2 * correction2 * torch.where(seen, root, 1.0))
        bar_v = bar_v + torch.where(seen, through_root, 0.0)
        values = (
            bar_z * (1 - lr * weight_decay) if need_z else None,
            bar_m * (1 - beta1) + bar_v * g_wide * (2 * (1 - beta2)) if need_g else None,
            bar_m * beta1 if need_m else None,
            bar_v * beta2 if need_v else None,
        )
        for grad, value in zip(grads, values, strict=True):
            if value is not None:
                grad.append(value.to(g_p.dtype))
    return grads[0], grads[1], grads[2], grads[3]


def projected_merge_forward(inputs: arguments.ProjectedMerge) -> list[Tensor]:
    """Return φ, L tensors."""
    W0, W, C, M = inputs
    return reference.projected_merge(W0, _rows(W, len(C)), C, M)


def projected_merge_backward(
    d_out: Tensors, inputs: arguments.ProjectedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradients, with D = W_n − W0 of one layer and sums over layers for the text's.

    W̄_n = (φ̄ M_nᵀ) C_n, W̄0 = φ̄ − Σ_n W̄_n, C̄_n = Σ (φ̄ M_nᵀ)ᵀ D, M̄_n = Σ (D C_nᵀ)ᵀ φ̄.
    """
    W0, W, C, M = inputs
    need_W0, need_W, need_C, need_M = needs
    d_W0 = [wide(d) + 0 for d in d_out] if need_W0 else []
    d_W: list[Tensor] = []
    d_C = [torch.zeros_like(wide(C_n)) for C_n in C] if need_C else []
    d_M = [torch.zeros_like(wide(M_n)) for M_n in M] if need_M else []
    for n, W_n in enumerate(_rows(W, len(C))):
        C_n, M_n = wide(C[n]), wide(M[n])
        for layer, d in enumerate(d_out):
            if need_W0 or need_W or need_C:
                d_A = wide(d) @ M_n.mT
            if need_W0 or need_W:
                d_W_nl = d_A @ C_n
            if need_W0:
                d_W0[layer] = d_W0[layer] - d_W_nl
            if need_W:
                d_W.append(d_W_nl.to(d.dtype))
            if need_C or need_M:
                D = wide(W_n[layer]) - wide(W0[layer])
            if need_C:
                d_C[n] = d_C[n] + d_A.mT @ D
            if need_M:
                d_M[n] = d_M[n] + (D @ C_n.mT).mT @ wide(d)
    return (
        _narrow(d_W0, d_out),
        d_W,
        _narrow(d_C, C),
        _narrow(d_M, M),
    )


def batched_lora_forward(inputs: arguments.BatchedLora, kept: list[Tensor] | None = None) -> Tensor:
    """Return y [b, t, o]. Keeps nothing."""
    return reference.batched_lora(*inputs)


def batched_lora_backward(
    d_y: Tensor, saved: arguments.BatchedLoraSaved, needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return d_x, d_weight, d_A, d_B, d_scale, d_bias."""
    x, weight, A, B, scale, index, _ = saved
    need_x, need_weight, need_A, need_B, need_scale, need_bias = needs
    d_y_wide = wide(d_y)
    d_x, d_A, d_B, d_scale = low_rank_backward(
        d_y_wide, wide(x), A, B, scale, index, need_x, need_A, need_B, need_scale
    )
    if need_x:
        base = d_y_wide @ wide(weight)
        d_x = (base if d_x is None else base + d_x).to(x.dtype)
    d_weight = None
    if need_weight:
        # not flatten, which batched gradients do not know
        every = x.shape[0] * x.shape[1]
        d_y_rows, x_rows = (wide(y).reshape(every, y.shape[2]) for y in (d_y, x))
        d_weight = (d_y_rows.mT @ x_rows).to(weight.dtype)
    d_bias = d_y_wide.sum((0, 1)).to(d_y.dtype) if need_bias else None
    return d_x, d_weight, d_A, d_B, d_scale, d_bias


def low_rank_backward(
    d_y: Tensor,
    x: Tensor,
    A: Tensors,
    B: Tensors,
    scale: Tensor,
    index: Tensor,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_scale: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
    """Return the gradients of the adapters' part of the output: d_x, d_A, d_B, d_scale.

    With P = x_b A_iᵀ and Q = d_y_b B_i: s_i Q A_i, s_i Qᵀ x, s_i d_yᵀ P and ⟨P, Q⟩, the last three
    summed over the samples of an adapter.
    """
    num_adapters = len(A)
    if num_adapters == 0:
        return None, [], [], torch.zeros_like(scale) if need_scale else None
    A_b, B_b, s_b = reference.select_adapters(A, B, scale, index)
    slot = torch.where(index < 0, num_adapters, index)
    d_x: Tensor | None = None
    d_A: list[Tensor] = []
    d_B: list[Tensor] = []
    d_scale: Tensor | None = None
    Q = d_y @ B_b
    if need_x:
        d_x = (s_b * Q) @ A_b
    if need_A:
        per_adapter = _sum_by_slot((s_b * Q).mT @ x, slot, num_adapters)
        d_A = [
            d[: A_n.shape[0]].to(A_n.dtype, copy=True)
            for d, A_n in zip(per_adapter, A, strict=True)
        ]
    if need_B or need_scale:
        P = x @ A_b.mT
    if need_B:
        per_adapter = _sum_by_slot(d_y.mT @ (s_b * P), slot, num_adapters)
        d_B = [
            d.narrow(1, 0, B_n.shape[1]).to(B_n.dtype, copy=True)
            for d, B_n in zip(per_adapter, B, strict=True)
        ]
    if need_scale:
        d_scale = _sum_by_slot((P * Q).sum((1, 2)), slot, num_adapters).to(scale.dtype)
    return d_x, d_A, d_B, d_scale


def _sum_by_slot(per_sample: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """Sum [b, …] by adapter to [N, …]; slot N, no adapter, is dropped."""
    sums = per_sample.new_zeros(num_slots + 1, *per_sample.shape[1:])
    return sums.index_add(0, slot, per_sample)[:num_slots]


def merge_lora_forward(inputs: arguments.MergeLora) -> Tensor:
    """Return φ [o, d]."""
    return reference.merge_lora(*inputs)


def merge_lora_backward(
    d_out: Tensor, inputs: arguments.MergeLora, needs: Needs
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return d_weight, d_A, d_B, d_scale, d_weights.

    With c_n = w_n s_n: φ̄, c_n B_nᵀ φ̄, c_n φ̄ A_nᵀ, and ⟨φ̄, B_n A_n⟩ times w_n and s_n.
    """
    _, A, B, scale, weights = inputs
    need_weight, need_A, need_B, need_scale, need_weights = needs
    d = wide(d_out)
    d_A: list[Tensor] = []
    d_B: list[Tensor] = []
    inner: list[Tensor] = []
    for A_n, B_n, c_n in zip(A, B, scale * weights, strict=True):
        if need_A or need_scale or need_weights:
            projected = wide(B_n).mT @ d
        if need_A:
            d_A.append((c_n * projected).to(A_n.dtype))
        if need_B:
            d_B.append((c_n * (d @ wide(A_n).mT)).to(B_n.dtype))
        if need_scale or need_weights:
            inner.append((projected * wide(A_n)).sum())
    d_c = torch.stack(inner) if inner else torch.zeros_like(scale)
    return (
        d_out.clone() if need_weight else None,
        d_A,
        d_B,
        d_c * weights if need_scale else None,
        d_c * scale if need_weights else None,
    )


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return a layer's tensor [B, C, ...] as [B, G, C / G, rest], in the type of sums."""
    return wide(x).reshape(len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def _per_channel(x: Tensor | None, groups: int) -> Tensor | None:
    return None if x is None else wide(x).reshape(groups, -1, 1)


def _mean(x: Tensor) -> Tensor:
    """The mean of each group of each sample."""
    return x.mean((2, 3), keepdim=True)


def _normalised(inputs: arguments.GroupNorm) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Return x̂, ρ = 1/√(variance + eps), γ and y = γ x̂ + β."""
    x, weight, bias, groups, eps, _ = inputs
    grouped = _grouped(x, groups)
    centred = grouped - _mean(grouped)
    rho = (_mean(centred * centred) + eps).rsqrt()
    x_hat = centred * rho
    gamma, beta = _per_channel(weight, groups), _per_channel(bias, groups)
    y = x_hat if gamma is None else x_hat * gamma
    return x_hat, rho, 1.0 if gamma is None else gamma, y if beta is None else y + beta


def _projected(x: Tensor, x_hat: Tensor, rho: Tensor) -> Tensor:
    """Apply the Jacobian of x̂ in x, which is symmetric: ρ (x − mean x − x̂ mean(x x̂))."""
    return rho * (x - _mean(x) - x_hat * _mean(x * x_hat))


def _silu_slopes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of y σ(y)."""
    s = y.sigmoid()
    return s * (1 + y * (1 - s)), s * (1 - s) * (2 + y * (1 - 2 * s))


def group_norm_forward(inputs: arguments.GroupNorm) -> Tensor:
    """Return γ x̂ + β, or its SiLU."""
    return reference.group_norm(*inputs).contiguous()


def group_norm_backward(
    d_out: Tensor, inputs: arguments.GroupNorm, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias.

    With ȳ = z̄ φ'(y), φ the activation: ρ (γȳ − mean γȳ − x̂ mean(γȳ x̂)), Σ ȳ x̂ and Σ ȳ.
    """
    x = inputs.x
    need_x, need_weight, need_bias = needs
    x_hat, rho, gamma, y = _normalised(inputs)
    d_y = _grouped(d_out, inputs.groups)
    if inputs.silu:
        d_y = d_y * _silu_slopes(y)[0]
    d_x = d_weight = d_bias = None
    if need_x:
        d_x = _projected(gamma * d_y, x_hat, rho).reshape(x.shape).to(x.dtype)
    if need_weight:
        d_weight = (d_y * x_hat).sum((0, 3)).reshape(-1).to(x.dtype)
    if need_bias:
        d_bias = d_y.sum((0, 3)).reshape(-1).to(x.dtype)
    return d_x, d_weight, d_bias


def group_norm_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.GroupNorm, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of d_out, x, weight and bias. The formula is in `docs/math.md`."""
    x, groups = inputs.x, inputs.groups
    u_x, u_weight, u_bias = directions
    need_d_out, need_x, need_weight, need_bias = needs
    x_hat, rho, gamma, y = _normalised(inputs)
    d_z = _grouped(d_out, groups)
    zero = torch.zeros_like(x_hat)
    u = zero if u_x is None else _grouped(u_x, groups)
    v = _projected(u, x_hat, rho)
    y_dot = gamma * v
    u_gamma, u_beta = _per_channel(u_weight, groups), _per_channel(u_bias, groups)
    if u_gamma is not None:
        y_dot = y_dot + u_gamma * x_hat
    if u_beta is not None:
        y_dot = y_dot + u_beta
    d_y, d_d_out, e = d_z, y_dot, zero
    if inputs.silu:
        slope, curve = _silu_slopes(y)
        d_y, d_d_out, e = d_z * slope, y_dot * slope, d_z * curve * y_dot
    h = gamma * d_y
    d_x = d_weight = d_bias = None
    if need_x:
        t = gamma * e if u_gamma is None else gamma * e + u_gamma * d_y
        t = t - rho * (h * _mean(u * x_hat) + u * _mean(h * x_hat))
        d_x = _projected(t, x_hat, rho) - rho * x_hat * _mean(h * v)
        d_x = d_x.reshape(x.shape).to(x.dtype)
    if need_weight:
        d_weight = (d_y * v + e * x_hat).sum((0, 3)).reshape(-1).to(x.dtype)
    if need_bias:
        d_bias = e.sum((0, 3)).reshape(-1).to(x.dtype)
    return d_d_out.reshape(x.shape).to(x.dtype) if need_d_out else None, d_x, d_weight, d_bias


def _gelu(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gelu(b) = b Φ(b) and its first two derivatives."""
    below = 0.5 * (1 + torch.erf(b * math.sqrt(0.5)))
    density = torch.exp(-0.5 * b * b) * (0.5 / math.pi) ** 0.5
    return b * below, below + b * density, density * (2 - b * b)


def geglu_forward(inputs: arguments.Geglu) -> Tensor:
    """Return a · gelu(b)."""
    return reference.geglu(inputs.x).contiguous()


def geglu_backward(d_out: Tensor, inputs: arguments.Geglu, needs: Needs) -> tuple[Tensor | None]:
    """Return the gradient of x = [a b]: ȳ gelu(b) and ȳ a gelu'(b)."""
    (x,), (need_x,) = inputs, needs
    a, b = wide(x).chunk(2, dim=-1)
    value, slope, _ = _gelu(b)
    d = wide(d_out)
    return (torch.cat([d * value, d * a * slope], -1).to(x.dtype) if need_x else None,)


def geglu_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Geglu, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of d_out and x.

    With u = [u_a u_b]: u_a gelu(b) + u_b a gelu'(b), and the gradient of ȳ times this in a and b.
    """
    (x,), (u_x,), (need_d_out, need_x) = inputs, directions, needs
    a, b = wide(x).chunk(2, dim=-1)
    u_a, u_b = wide(torch.zeros_like(x) if u_x is None else u_x).chunk(2, dim=-1)
    value, slope, curve = _gelu(b)
    d = wide(d_out)
    d_x = torch.cat([d * slope * u_b, d * (u_a * slope + u_b * a * curve)], -1)
    return (
        (u_a * value + u_b * a * slope).to(x.dtype) if need_d_out else None,
        d_x.to(x.dtype) if need_x else None,
    )


STRIP = 1 << 22
"""Elements of a strip of the attention matrix: some queries, all keys, all heads."""


def _strips(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Cut the queries, so that no more of the matrix is there at a time than a strip.

    Returns starts and lengths, for `narrow`: batched gradients know no `[:, rows]`.
    """
    T = q.shape[1]
    rows = max(1, STRIP // max(1, k.shape[0] * k.shape[1]))
    return [(start, min(rows, T - start)) for start in range(0, T, rows)]


def attention_forward(inputs: arguments.Attention) -> Tensor:
    """Return softmax(scale · q kᵀ) v, [n, T, e]."""
    q, k, v, scale = inputs
    parts = [reference.attention(q.narrow(1, *rows), k, v, scale) for rows in _strips(q, k)]
    return torch.cat(parts, 1)


def attention_backward(
    d_out: Tensor, inputs: arguments.Attention, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v: scale · S̄ k, scale · S̄ᵀ q and Pᵀ Ō.

    P = softmax(scale · q kᵀ), S̄ = P ∘ (Ō vᵀ − rowsum(P ∘ Ō vᵀ)), a strip of queries at a time.
    """
    q, k, v, scale = inputs
    need_q, need_k, need_v = needs
    k_wide, v_wide = wide(k), wide(v)
    d_q: list[Tensor] = []
    d_k, d_v = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for rows in _strips(q, k):
        q_rows, d_rows = wide(q.narrow(1, *rows)), wide(d_out.narrow(1, *rows))
        P = (scale * (q_rows @ k_wide.mT)).softmax(-1)
        G = d_rows @ v_wide.mT
        d_S = scale * P * (G - (P * G).sum(-1, keepdim=True))
        d_q.append(d_S @ k_wide)
        d_k = d_k + d_S.mT @ q_rows
        d_v = d_v + P.mT @ d_rows
    return (
        torch.cat(d_q, 1).to(q.dtype) if need_q else None,
        d_k.to(k.dtype) if need_k else None,
        d_v.to(v.dtype) if need_v else None,
    )


def attention_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Attention, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of d_out, q, k and v, a strip of queries at a time.

    The formula is in `docs/math.md`; four strips are there at once, and never the matrix.
    """
    q, k, v, scale = inputs
    need_d_out, need_q, need_k, need_v = needs
    k_wide, v_wide = wide(k), wide(v)
    u_q, u_k, u_v = (
        wide(torch.zeros_like(x) if u is None else u)
        for u, x in zip(directions, (q, k, v), strict=True)
    )
    d_d_out: list[Tensor] = []
    d_q: list[Tensor] = []
    d_k, d_v = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for rows in _strips(q, k):
        q_rows, u_rows, d_rows = (wide(x.narrow(1, *rows)) for x in (q, u_q, d_out))
        P = (scale * (q_rows @ k_wide.mT)).softmax(-1)
        S_dot = scale * (u_rows @ k_wide.mT + q_rows @ u_k.mT)
        G, H = d_rows @ v_wide.mT, d_rows @ u_v.mT
        r, D = (P * S_dot).sum(-1, keepdim=True), (P * G).sum(-1, keepdim=True)
        P_dot = P * (S_dot - r)
        d_S = scale * P * (G - D)
        E = S_dot * G - r * G - D * S_dot + H
        X = scale * P * (E - (P * E).sum(-1, keepdim=True))
        d_d_out.append(P_dot @ v_wide + P @ u_v)
        d_q.append(X @ k_wide + d_S @ u_k)
        d_k = d_k + X.mT @ q_rows + d_S.mT @ u_rows
        d_v = d_v + P_dot.mT @ d_rows
    return (
        torch.cat(d_d_out, 1).to(q.dtype) if need_d_out else None,
        torch.cat(d_q, 1).to(q.dtype) if need_q else None,
        d_k.to(k.dtype) if need_k else None,
        d_v.to(v.dtype) if need_v else None,
    )
