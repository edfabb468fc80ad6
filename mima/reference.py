"""The mathematics of every operator in plain PyTorch: read this first.

These functions are the definition of every operator. They take any device and any floating dtype,
can be differentiated any number of times, and are what the kernels are tested against and what
serves an operator when no kernel can. They trust their arguments: :mod:`mima.ops` checks them.

Symbols, which `docs/math.md` maps to the papers'::

    N concepts      L layers      P parameters      o, d  rows and columns of a weight
    W0  [o, d]      shared weight                   W_n   [o, d]    weight adapted to concept n
    C_n [s_n, d]    token embeddings of concept n   C_reg [m, d]    those of ordinary captions
    M_n [s_n, d]    rows of the merge plan          w     [N]       weights of the concepts
    A_n [r_n, d], B_n [o, r_n]                      low-rank adapter of concept n

float16 and bfloat16 are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import cast, overload

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

RIDGE = 1e-5
"""Singular values of C_reg below this fraction of the largest count as zero: see `merge_plan`."""


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype that sums are kept in: float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@overload
def weighted_merge(base: Tensor, thetas: Sequence[Tensor], weights: Tensor) -> Tensor: ...


@overload
def weighted_merge(
    base: Sequence[Tensor], thetas: Sequence[Sequence[Tensor]], weights: Tensor
) -> list[Tensor]: ...


def weighted_merge(
    base: Tensor | Sequence[Tensor],
    thetas: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    weights: Tensor,
) -> Tensor | list[Tensor]:
    """Average adapted parameters: φ = base + Σ_n w_n (θ_n − base).

    Args:
        base: a tensor of any shape, or P of them.
        thetas: N tensors shaped as `base`, or N sequences of P.
        weights: [N].

    Returns:
        φ, a tensor or a list of P tensors, as `base` is.
    """
    if isinstance(base, Tensor):
        alone = [[theta] for theta in cast("Sequence[Tensor]", thetas)]
        return weighted_merge([base], alone, weights)[0]
    columns = cast("Sequence[Sequence[Tensor]]", thetas)
    merged = []
    for p, base_p in enumerate(base):
        origin = wide(base_p)
        phi = origin + 0
        for w_n, theta_n in zip(weights, columns, strict=True):
            phi = phi + w_n * (wide(theta_n[p]) - origin)
        merged.append(phi.to(base_p.dtype))
    return merged


def combine(
    x: Sequence[Sequence[Tensor]], factors: Sequence[Sequence[float]]
) -> list[list[Tensor]]:
    """Combine lists of tensors: out_i = Σ_j f_ij x_j, tensor by tensor.

    Args:
        x: J lists of P tensors.
        factors: I rows of J numbers; one of 0 leaves its list out, whatever that holds.

    Returns:
        I lists of P tensors.
    """
    combined: list[list[Tensor]] = [[] for _ in factors]
    for tensors in zip(*x, strict=True):
        for values, row in zip(combined, factors, strict=True):
            total = torch.zeros_like(wide(tensors[0]))
            for factor, tensor in zip(row, tensors, strict=True):
                if factor != 0:
                    total = total + factor * wide(tensor)
            values.append(total.to(tensors[0].dtype))
    return combined


def adam_step(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Take one step of Adam with decoupled decay.

        m⁺ = β₁ m + (1 − β₁) g,  v⁺ = β₂ v + (1 − β₂) g²
        z⁺ = (1 − lr · weight_decay) z − lr m̂ / (√v̂ + eps),  m̂ = m⁺ / (1 − β₁ᵏ⁺¹), v̂ likewise

    Args:
        z: P tensors of any shapes: what is trained.
        g: their gradients.
        m: their first moments.
        v: their second moments, ≥ 0.
        lr: step size.
        betas: β₁, β₂.
        eps: added to the root.
        weight_decay: decoupled decay, in units of lr.
        step: k, from 0.

    Returns:
        z⁺, m⁺ and v⁺.
    """
    beta1, beta2 = betas
    stepped: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for z_p, g_p, m_p, v_p in zip(z, g, m, v, strict=True):
        g_wide = wide(g_p)
        first = wide(m_p) * beta1 + g_wide * (1 - beta1)
        second = wide(v_p) * beta2 + g_wide * g_wide * (1 - beta2)
        root = root_of_moment(second / (1 - beta2 ** (step + 1)))
        update = first / (1 - beta1 ** (step + 1)) / (root + eps)
        moved = wide(z_p) * (1 - lr * weight_decay) - lr * update
        for values, value in zip(stepped, (moved, first, second), strict=True):
            values.append(value.to(z_p.dtype))
    return stepped


def root_of_moment(v_hat: Tensor) -> Tensor:
    """Return √v̂, with slope 0 at 0: entries that never saw a gradient keep a zero root."""
    seen = v_hat > 0
    return torch.where(seen, torch.where(seen, v_hat, 1.0).sqrt(), 0.0)


def projected_merge(
    W0: Sequence[Tensor], W: Sequence[Sequence[Tensor]], C: Sequence[Tensor], M: Sequence[Tensor]
) -> list[Tensor]:
    """Merge projections by the text they answer to: φ = W0 + Σ_n (W_n − W0) C_nᵀ M_n.

    Args:
        W0: L tensors [o_l, d].
        W: N sequences of L tensors [o_l, d].
        C: N tensors [s_n, d].
        M: N tensors [s_n, d], from `merge_plan`.

    Returns:
        L tensors [o_l, d].
    """
    merged = []
    for layer, W0_l in enumerate(W0):
        origin = wide(W0_l)
        phi = origin + 0
        for W_n, C_n, M_n in zip(W, C, M, strict=True):
            phi = phi + ((wide(W_n[layer]) - origin) @ wide(C_n).mT) @ wide(M_n)
        merged.append(phi.to(W0_l.dtype))
    return merged


def token_outputs(X: Sequence[Tensor], C: Tensor) -> Tensor:
    """Return what linear layers make of tokens, A = X Cᵀ, layer below layer.

    Args:
        X: L tensors [o_l, d].
        C: [s, d].

    Returns:
        [Σ o_l, s].
    """
    return torch.cat([wide(X_l) @ wide(C).mT for X_l in X]).to(C.dtype)


def add_token_outputs(X: Sequence[Tensor], A: Tensor, M: Tensor) -> list[Tensor]:
    """Return X_l + A_l M.

    Args:
        X: L tensors [o_l, d].
        A: [Σ o_l, s], layer below layer.
        M: [s, d].
    """
    parts = A.split([len(X_l) for X_l in X])
    return [
        (wide(X_l) + wide(A_l) @ wide(M)).to(X_l.dtype) for X_l, A_l in zip(X, parts, strict=True)
    ]


def token_sums(X: Sequence[Tensor], A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l, [s, d], for X of L tensors [o_l, d] and A [Σ o_l, s]."""
    parts = A.split([len(X_l) for X_l in X])
    total = wide(A).new_zeros(A.shape[1], X[0].shape[1])
    for X_l, A_l in zip(X, parts, strict=True):
        total = total + wide(A_l).mT @ wide(X_l)
    return total.to(A.dtype)


def batched_lora(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose low-rank adapter differs from sample to sample.

    y_b = x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ with i = index[b]; no adapter where i = −1.

    Args:
        x: [b, t, d].
        weight: [o, d].
        A: N tensors [r_n, d]; ranks may differ.
        B: N tensors [o, r_n].
        scale: [N].
        index: [b], int64, each in [−1, N).
        bias: [o], or None.

    Returns:
        [b, t, o].
    """
    y = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    return (y + low_rank(wide(x), A, B, scale, index)).to(x.dtype)


def low_rank(
    x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, index: Tensor
) -> Tensor:
    """Return the adapters' part of `batched_lora`: s_i (x_b A_iᵀ) B_iᵀ, [b, t, o] or a scalar 0."""
    if not A:
        return x.new_zeros(())
    A_b, B_b, s_b = select_adapters(A, B, scale, index)
    return (s_b * (x @ A_b.mT)) @ B_b.mT


def select_adapters(
    A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's adapter and scale: [b, r, d], [b, o, r] and [b, 1, 1]."""
    # Zeros make the ranks equal; one more adapter of zeros, last, is what −1 selects.
    rank = max(A_n.shape[0] for A_n in A)
    A_stack = torch.stack([_extended(wide(A_n), 0, rank) for A_n in A])
    B_stack = torch.stack([_extended(wide(B_n), 1, rank) for B_n in B])
    A_b, B_b, s_b = (
        _extended(stack, 0, len(A) + 1)[index]
        for stack in (A_stack, B_stack, scale.to(A_stack.dtype))
    )
    return A_b, B_b, s_b[:, None, None]


def _extended(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind a dimension until it has a size; `F.pad` of torch 2.9 refuses empty tensors."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


def merge_lora(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, weights: Tensor
) -> Tensor:
    """Average models that differ by low-rank adapters: φ = W + Σ_n w_n s_n B_n A_n.

    Args:
        weight: [o, d].
        A: N tensors [r_n, d]; ranks may differ.
        B: N tensors [o, r_n].
        scale: [N], the adapters' own scales.
        weights: [N], the concepts' weights.

    Returns:
        [o, d].
    """
    phi = wide(weight) + 0
    for A_n, B_n, s_n, w_n in zip(A, B, scale, weights, strict=True):
        phi = phi + (w_n * s_n) * (wide(B_n) @ wide(A_n))
    return phi.to(weight.dtype)


def merge_plan(
    C: Sequence[Tensor],
    C_reg: Tensor,
    lam: float = 1e-4,
    weights: Tensor | None = None,
    *,
    ridge: float | None = None,
) -> list[Tensor]:
    """Return the M_n of `projected_merge`, which depend on text only.

    With G = C_regᵀ C_reg, C the rows of all C_n, and Λ = λ · mean(diag(C G⁻¹ Cᵀ)) · diag(1/w),

        M = (C G⁻¹ Cᵀ + Λ)⁻¹ C G⁻¹

    gives the φ that changes the outputs for C_reg least subject to φ C_nᵀ = W_n C_nᵀ: exactly for
    λ = 0, softly, and weighted by w, for λ > 0; λ → 0 gives the hard constraint back. Everything is
    computed in float64 by QR factorisations and triangular solves: with C_reg = Q R and
    Z = R⁻ᵀ Cᵀ, C G⁻¹ Cᵀ = Zᵀ Z; with [Z; Λ^½] = [U; V] T, M = T⁻¹ Uᵀ R⁻ᵀ. No inverse is formed and
    neither G nor Zᵀ Z, whose condition numbers are the squares, appears.

    Fewer captions than d, or dependent ones, leave G singular. Then G + ρ² I replaces it, with ρ =
    `RIDGE` (1e-5) times the largest singular value of C_reg: directions that no caption uses
    become nearly free to change. The replacement is logged. So it is also done when the smallest
    singular value is below ρ. ρ is a constant in differentiation.

    Differentiable any number of times in `C`, `C_reg` and `weights`.

    Args:
        C: N tensors [s_n, d] of one dtype and device.
        C_reg: [m, d].
        lam: λ ≥ 0.
        weights: [N], positive; None means 1/N each. Without effect when λ = 0.
        ridge: ρ, absolute, instead of the choice above; 0 for none.

    Returns:
        N tensors [s_n, d], dtype of `C`.

    Raises:
        TypeError: C not floating-point, or of several dtypes or devices.
        ValueError: λ = 0 and the rows of C are dependent, so that the constraints contradict each
            other or are redundant; λ or a weight out of range; shapes that do not agree; C_reg all
            zero or not finite.

    Examples:
        >>> C, C_reg = [torch.randn(3, 8)], torch.randn(50, 8)
        >>> (M,) = merge_plan(C, C_reg, lam=0.0)
        >>> torch.allclose(C[0] @ M.mT, torch.eye(3), atol=1e-4)
        True
    """
    if not lam >= 0:
        raise ValueError(f"merge_plan: lam must be at least 0, got {lam}")
    if lam == math.inf:
        raise ValueError("merge_plan: lam must be finite, got inf")
    R = caption_factor(C_reg)
    if ridge is None:
        _, ridge = caption_spectrum(R, len(C_reg))
    d = C_reg.shape[1]
    for n, C_n in enumerate(C):
        if C_n.ndim != 2 or C_n.shape[1] != d:
            raise ValueError(
                f"merge_plan: C[{n}] must be [s, {d}] to match C_reg {list(C_reg.shape)}, "
                f"got {list(C_n.shape)}"
            )
        if not C_n.dtype.is_floating_point or C_n.dtype != C[0].dtype or C_n.device != C[0].device:
            raise TypeError(
                "merge_plan: C must be floating-point tensors of one dtype and device, got "
                f"{C[0].dtype} on {C[0].device} and, for C[{n}], {C_n.dtype} on {C_n.device}"
            )
    lengths = [C_n.shape[0] for C_n in C]
    if sum(lengths) == 0:
        return [C_n.clone() for C_n in C]

    C_all = torch.cat([C_n.double() for C_n in C])
    if ridge > 0:
        R = _qr_r(torch.cat([R, ridge * torch.eye(d, dtype=R.dtype, device=R.device)]))
    # Z = R⁻ᵀ Cᵀ, [d, s]
    Z = torch.linalg.solve_triangular(R.mT, C_all.mT, upper=False)
    tall = Z
    if lam > 0:
        tall = torch.cat([Z, torch.diag_embed(_softness(Z, lam, weights, lengths).sqrt())])
    elif Z.shape[1] > d:
        raise ValueError(
            f"merge_plan: lam must be positive for {Z.shape[1]} tokens of dimension {d}: "
            "that many hard constraints contradict each other"
        )
    Q, T = torch.linalg.qr(tall)
    pivots = T.detach().diagonal().abs()
    if lam == 0 and bool(pivots.min() <= pivots.max() * d * torch.finfo(T.dtype).eps):
        raise ValueError(
            "merge_plan: lam must be positive when rows of C are linearly dependent "
            "(concepts that share a token, for example); got lam=0"
        )
    # M = T⁻¹ Uᵀ R⁻ᵀ, and X R⁻ᵀ solves X' Rᵀ = X
    M = torch.linalg.solve_triangular(T, Q[:d].mT, upper=True)
    M = torch.linalg.solve_triangular(R.mT, M, upper=False, left=False)
    return [M_n.to(C_n.dtype) for M_n, C_n in zip(M.split(lengths), C, strict=True)]


def _softness(Z: Tensor, lam: float, weights: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Return the diagonal of Λ, one entry per token."""
    num_concepts = len(lengths)
    if weights is None:
        weights = Z.new_full((num_concepts,), 1 / num_concepts)
    if weights.shape != (num_concepts,):
        raise ValueError(
            f"merge_plan: weights must be [{num_concepts}], one per concept, "
            f"got {list(weights.shape)}"
        )
    if not bool((weights.detach() > 0).all()):
        raise ValueError(f"merge_plan: weights must be positive, got {weights.tolist()}")
    per_concept = lam * Z.square().sum(0).mean() / weights.to(Z)
    return torch.cat([x.expand(length) for x, length in zip(per_concept, lengths, strict=True)])


def caption_factor(C_reg: Tensor) -> Tensor:
    """Return R, upper triangular, with RᵀR = C_regᵀ C_reg: all that `merge_plan` needs of C_reg.

    Differentiable any number of times.

    Args:
        C_reg: [m, d].

    Returns:
        [min(m, d), d], float64.

    Raises:
        ValueError: another shape, or no rows or columns.
    """
    if C_reg.ndim != 2 or C_reg.numel() == 0:
        raise ValueError(
            f"merge_plan: C_reg must be [m, d], m > 0 and d > 0, got {list(C_reg.shape)}"
        )
    return _qr_r(C_reg.double())


def caption_spectrum(R: Tensor, num_rows: int) -> tuple[Tensor, float]:
    """Return the singular values of a `caption_factor`, descending, and the ρ of `merge_plan`.

    A ρ other than 0 is logged.

    Args:
        R: [k, d].
        num_rows: rows of the C_reg that R stands for, which are tokens.

    Raises:
        ValueError: R, and so C_reg, is all zero or not finite.
    """
    d = R.shape[1]
    if not 0 < float(R.detach().abs().max()) < math.inf:
        raise ValueError("merge_plan: C_reg must be finite and not all zero")
    singular_values = torch.linalg.svdvals(R.detach())
    largest = float(singular_values[0])
    if len(singular_values) == d and float(singular_values[-1]) >= RIDGE * largest:
        return singular_values, 0.0
    ridge = RIDGE * largest
    logger.warning(
        "merge plan: the captions' %d tokens span %d of %d directions; using a ridge of %.2e "
        "(%.0e of the largest singular value)",
        num_rows,
        int((singular_values >= ridge).sum()),
        d,
        ridge,
        RIDGE,
    )
    return singular_values, ridge


def _qr_r(x: Tensor) -> Tensor:
    # torch differentiates R only where Q was computed too.
    mode = "reduced" if x.requires_grad and torch.is_grad_enabled() else "r"
    R: Tensor = torch.linalg.qr(x, mode=mode)[1]
    return R


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Normalise groups of channels: y = γ x̂ + β, or with ``silu`` y σ(y).

    x̂ has mean 0 and variance 1 (but for ``eps``) over a group of a sample.

    Args:
        x: [B, C, ...].
        weight: γ [C], or None for 1.
        bias: β [C], or None for 0.
        groups: a divisor of C.
        eps: added to the variance.
        silu: whether the activation follows.

    Returns:
        A tensor shaped as x.
    """
    grouped = wide(x).reshape(len(x), groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    centred = grouped - grouped.mean((2, 3), keepdim=True)
    variance = centred.square().mean((2, 3), keepdim=True)
    y = centred * (variance + eps).rsqrt()
    if weight is not None:
        y = y * wide(weight).reshape(groups, -1, 1)
    if bias is not None:
        y = y + wide(bias).reshape(groups, -1, 1)
    if silu:
        y = y * y.sigmoid()
    return y.reshape(x.shape).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension: `group_norm` of every row as one group.

    Args:
        x: [..., D].
        weight: [D] or None.
        bias: [D] or None.
        eps: added to the variance.
    """
    return group_norm(x.reshape(-1, x.shape[-1]), weight, bias, 1, eps).reshape(x.shape)


def geglu(x: Tensor) -> Tensor:
    """Gate one half of the last dimension by the other: y = a · gelu(b), x = [a b].

    Args:
        x: [..., 2 D].

    Returns:
        [..., D].
    """
    a, b = wide(x).chunk(2, dim=-1)
    return (a * (b * (0.5 * (1 + torch.erf(b * math.sqrt(0.5)))))).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention without a mask: softmax(scale · q kᵀ) v.

    Args:
        q: [..., T, d].
        k: [..., S, d].
        v: [..., S, e].
        scale: 1/√d by default.

    Returns:
        [..., T, e].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (scale * (wide(q) @ wide(k).mT)).softmax(-1)
    return (weights @ wide(v)).to(q.dtype)
