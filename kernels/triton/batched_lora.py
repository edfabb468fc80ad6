"""batched_lora: a linear layer and each sample's own low-rank adapter in one product.

A program computes BLOCK_T tokens of one sample times BLOCK_O outputs. It walks the input features
once, multiplying its tokens by both W and the sample's A; then adds the rank-r result, which never
left its registers and stayed float32, times B. The gradient of x is the same kernel on transposed
weights. Those of the adapters sum over the samples of an adapter: one kernel projects both sides to
rank r, one multiplies the projections with the other side.

FLOPs per token: 2 d o for the base and 2 r (d + o) for the adapter, of which 2 r d are repeated by
each of the o / BLOCK_O programs that share the tokens.
"""

# N = adapters; b = samples, T = tokens of a sample, K -> O = features, r = rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    TRITON_DTYPE,
    are_aligned,
    contiguous,
    dot,
    dot_precision,
    launch_options,
    load_pointer,
    on_device_of,
    pointer_table,
    sizes_on_device,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Launch settings of the kernels."""

    block_t: int
    """Tokens per program."""
    block_o: int
    """Outputs per program."""
    block_k: int
    """Input features per step."""
    block_r: int
    """Ranks per product; a power of 2."""
    num_warps: int
    num_stages: int


def settings(dtype: torch.dtype, rank: int) -> Settings:
    """Return the settings for a dtype and the largest rank.

    tl.dot needs a rank of 16 at least; a program loops over ranks above block_r. Larger tiles or
    fewer warps spill registers: 128 x 128 in bfloat16, and 32 features a step in float32, whose
    products are three (compiled for sm_80 with triton 3.8). Not measured on a GPU.
    """
    if dtype == torch.float32:
        return Settings(
            block_t=64, block_o=64, block_k=16, block_r=_ranks(rank, 32), num_warps=8, num_stages=3
        )
    return Settings(
        block_t=128, block_o=64, block_k=64, block_r=_ranks(rank, 64), num_warps=8, num_stages=3
    )


def _ranks(rank: int, limit: int) -> int:
    return min(max(triton.next_power_of_2(rank), 16), limit)


@triton.jit
def _load_matrix(pointer, offs_i, offs_j, num_i, num_j, ld, TRANSPOSED: tl.constexpr):
    """Load X[i, j], or X[j, i] if TRANSPOSED, of a contiguous X with rows of length ld."""
    mask = (offs_i < num_i)[:, None] & (offs_j < num_j)[None, :]
    if TRANSPOSED:
        offs = offs_j.to(tl.int64)[None, :] * ld + offs_i[:, None]
    else:
        offs = offs_i.to(tl.int64)[:, None] * ld + offs_j[None, :]
    return tl.load(pointer + offs, mask, other=0.0)


@triton.jit
def _load_inner(adapter_ptr, offs_r, offs_k, rank, num_in, TRANSPOSED: tl.constexpr):
    """Load [r, k] of the factor that reads the input: A, or Bᵀ if TRANSPOSED."""
    ld = rank if TRANSPOSED else num_in
    return _load_matrix(adapter_ptr, offs_r, offs_k, rank, num_in, ld, TRANSPOSED)


@triton.jit
def _batched_lora_fwd_kernel(
    x_ptr,  # [b, T, K] in
    weight_ptr,  # [O, K] in; [K, O] if TRANSPOSED
    bias_ptr,  # [O] in, if HAS_BIAS
    inner_ptr,  # [N] in, int64: addresses of A_n [r_n, K]; if TRANSPOSED, of B_n [K, r_n]
    outer_ptr,  # [N] in, int64: addresses of B_n [O, r_n]; if TRANSPOSED, of A_n [r_n, O]
    rank_ptr,  # [N] in, int64
    scale_ptr,  # [N] in, fp32
    index_ptr,  # [b] in, int64: adapter of each sample, −1 for none
    y_ptr,  # [b, T, O] out, aliases nothing
    T,  # tokens of a sample
    num_in,  # input features
    num_out,  # output features
    TRANSPOSED: tl.constexpr,  # multiply by the transposed weights: the gradient of x
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,  # of all but scale
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_T: tl.constexpr,  # tokens per program
    BLOCK_O: tl.constexpr,  # outputs per program
    BLOCK_K: tl.constexpr,  # input features per step
    BLOCK_R: tl.constexpr,  # ranks per product
):
    blocks_t = tl.cdiv(T, BLOCK_T)
    # int64: x and y may pass 2**31 elements
    sample = (tl.program_id(1) // blocks_t).to(tl.int64)
    offs_t = tl.program_id(1) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    n = tl.load(index_ptr + sample)
    has_adapter = n >= 0
    n = tl.maximum(n, 0)
    # Rank 0 masks every access to an adapter that is not there.
    rank = tl.load(rank_ptr + n, mask=has_adapter, other=0)
    scale = tl.load(scale_ptr + n, mask=has_adapter, other=0.0)
    inner = _load_adapter(inner_ptr, n, has_adapter, DTYPE, ALIGNED)
    outer = _load_adapter(outer_ptr, n, has_adapter, DTYPE, ALIGNED)
    x_ptr += sample * T * num_in

    y = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, num_in, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = _load_matrix(x_ptr, offs_t, offs_k, T, num_in, num_in, False)
        weight = _load_matrix(
            weight_ptr,
            offs_o,
            offs_k,
            num_out,
            num_in,
            num_out if TRANSPOSED else num_in,
            TRANSPOSED,
        )
        A = _load_inner(inner, offs_r, offs_k, rank, num_in, TRANSPOSED)
        y = dot(x, tl.trans(weight), y, PRECISION)
        h = dot(x, tl.trans(A), h, PRECISION)
    y = _add_outer(y, h * scale, outer, offs_o, offs_r, num_out, rank, TRANSPOSED, PRECISION)
    # int32: the count of a loop is
    for start_r in range(BLOCK_R, rank.to(tl.int32), BLOCK_R):
        h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, num_in, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            x = _load_matrix(x_ptr, offs_t, offs_k, T, num_in, num_in, False)
            A = _load_inner(inner, start_r + offs_r, offs_k, rank, num_in, TRANSPOSED)
            h = dot(x, tl.trans(A), h, PRECISION)
        y = _add_outer(
            y, h * scale, outer, offs_o, start_r + offs_r, num_out, rank, TRANSPOSED, PRECISION
        )
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_o, offs_o < num_out, other=0.0).to(tl.float32)[None, :]
    offs = (sample * T + offs_t)[:, None] * num_out + offs_o[None, :]
    tl.store(y_ptr + offs, y.to(DTYPE), (offs_t < T)[:, None] & (offs_o < num_out)[None, :])


@triton.jit
def _load_adapter(table_ptr, n, has_adapter, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + n, mask=has_adapter, other=0).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _add_outer(
    y, h, outer, offs_o, offs_r, num_out, rank, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return y + h [t, r] times the factor that writes the output: Bᵀ, or A if TRANSPOSED."""
    B = _load_matrix(
        outer, offs_o, offs_r, num_out, rank, num_out if TRANSPOSED else rank, TRANSPOSED
    )
    return tl.dot(h, tl.trans(B.to(tl.float32)), y, input_precision=PRECISION)


@triton.jit
def _batched_lora_project_kernel(
    x_ptr,  # [b, T, K] in
    inner_ptr,  # [N] in, int64: addresses of A_n [r_n, K]; if TRANSPOSED, of B_n [K, r_n]
    rank_ptr,  # [N] in, int64
    index_ptr,  # [b] in, int64
    h_ptr,  # [b, T, R] out, fp32: x A_iᵀ, or x B_i if TRANSPOSED; zero beyond the rank
    T,  # tokens of a sample
    num_in,  # features
    R,  # BLOCK_R times the third size of the grid
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,  # of x and the adapters
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_T: tl.constexpr,  # tokens per program
    BLOCK_K: tl.constexpr,  # features per step
    BLOCK_R: tl.constexpr,  # ranks per program
):
    sample = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.load(index_ptr + sample)
    has_adapter = n >= 0
    n = tl.maximum(n, 0)
    rank = tl.load(rank_ptr + n, mask=has_adapter, other=0)
    inner = _load_adapter(inner_ptr, n, has_adapter, DTYPE, ALIGNED)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, num_in, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = _load_matrix(x_ptr + sample * T * num_in, offs_t, offs_k, T, num_in, num_in, False)
        A = _load_inner(inner, offs_r, offs_k, rank, num_in, TRANSPOSED)
        h = dot(x, tl.trans(A), h, PRECISION)
    offs = (sample * T + offs_t)[:, None] * R + offs_r[None, :]
    tl.store(h_ptr + offs, h, (offs_t < T)[:, None])


@triton.jit
def _batched_lora_outer_kernel(
    h_ptr,  # [b, T, R] in, fp32: a projection, zero beyond the rank
    x_ptr,  # [b, T, K] in
    rank_ptr,  # [N] in, int64
    scale_ptr,  # [N] in, fp32
    order_ptr,  # [b] in, int64: samples, those of one adapter together
    start_ptr,  # [N + 1] in, int64: where each adapter's samples start in that order
    out_ptr,  # [N] in, int64: addresses of d_A_n [r_n, K]; if TRANSPOSED, of d_B_n [K, r_n]
    T,  # tokens of a sample
    num_in,  # K
    R,  # BLOCK_R times the third size of the grid
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,  # of x and the gradients
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_T: tl.constexpr,  # tokens per step
    BLOCK_K: tl.constexpr,  # features per program
    BLOCK_R: tl.constexpr,  # ranks per program
):
    """Σ over the samples of adapter n: s_n hᵀ x, [r_n, K]."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(rank_ptr + n)
    steps = tl.cdiv(T, BLOCK_T)
    first = tl.load(start_ptr + n).to(tl.int32)
    last = tl.load(start_ptr + n + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for step in range(first * steps, last * steps):
        sample = tl.load(order_ptr + step // steps)
        offs_t = step % steps * BLOCK_T + tl.arange(0, BLOCK_T)
        h = _load_matrix(h_ptr + sample * T * R, offs_t, offs_r, T, R, R, False)
        x = _load_matrix(x_ptr + sample * T * num_in, offs_t, offs_k, T, num_in, num_in, False)
        acc = tl.dot(tl.trans(h), x.to(tl.float32), acc, input_precision=PRECISION)
    acc *= tl.load(scale_ptr + n)
    out = load_pointer(out_ptr, n, DTYPE, ALIGNED)
    mask = (offs_r < rank)[:, None] & (offs_k < num_in)[None, :]
    if TRANSPOSED:
        offs = offs_k.to(tl.int64)[None, :] * rank + offs_r[:, None]
    else:
        offs = offs_r.to(tl.int64)[:, None] * num_in + offs_k[None, :]
    tl.store(out + offs, acc.to(DTYPE), mask)


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """What the launches of one call share."""

    A: list[Tensor]
    B: list[Tensor]
    ranks: Tensor
    largest: int
    scale: Tensor
    index: Tensor

    @classmethod
    def prepare(
        cls, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, index: Tensor
    ) -> _Adapters:
        ranks = tuple(len(A_n) for A_n in A)
        return cls(
            A=contiguous(A),
            B=contiguous(B),
            ranks=sizes_on_device(ranks, x.device),
            largest=max(ranks, default=0),
            scale=scale.contiguous(),
            index=index.contiguous(),
        )


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: _Adapters, *, transposed: bool
) -> Tensor:
    """Return x Wᵀ + bias + s (x Aᵀ) Bᵀ, or with the transposed weights x W + s (x B) A."""
    b, T, num_in = x.shape
    num_out = weight.shape[1] if transposed else weight.shape[0]
    y = x.new_empty(b, T, num_out)
    if y.numel() == 0:
        return y
    chosen = settings(x.dtype, adapters.largest)
    inner, outer = (adapters.B, adapters.A) if transposed else (adapters.A, adapters.B)
    with on_device_of(x):
        _batched_lora_fwd_kernel[
            (triton.cdiv(num_out, chosen.block_o), b * triton.cdiv(T, chosen.block_t))
        ](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=weight if bias is None else bias,
            inner_ptr=pointer_table([*inner, x]),
            outer_ptr=pointer_table([*outer, x]),
            rank_ptr=adapters.ranks,
            scale_ptr=adapters.scale,
            index_ptr=adapters.index,
            y_ptr=y,
            T=T,
            num_in=num_in,
            num_out=num_out,
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            DTYPE=TRITON_DTYPE[x.dtype],
            ALIGNED=are_aligned([*inner, *outer]),
            PRECISION=dot_precision(x.dtype),
            BLOCK_T=chosen.block_t,
            BLOCK_O=chosen.block_o,
            BLOCK_K=chosen.block_k,
            BLOCK_R=chosen.block_r,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
    return y


def _project(x: Tensor, adapters: _Adapters, *, transposed: bool) -> Tensor:
    """Return x A_iᵀ, or x B_i if transposed, float32 [b, T, R], zero beyond the rank."""
    b, T, num_in = x.shape
    chosen = settings(x.dtype, adapters.largest)
    chunks = triton.cdiv(adapters.largest, chosen.block_r)
    inner = adapters.B if transposed else adapters.A
    h = torch.empty(b, T, chunks * chosen.block_r, dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h
    with on_device_of(x):
        _batched_lora_project_kernel[(triton.cdiv(T, chosen.block_t), b, chunks)](
            x_ptr=x,
            inner_ptr=pointer_table(inner),
            rank_ptr=adapters.ranks,
            index_ptr=adapters.index,
            h_ptr=h,
            T=T,
            num_in=num_in,
            R=h.shape[2],
            TRANSPOSED=transposed,
            DTYPE=TRITON_DTYPE[x.dtype],
            ALIGNED=are_aligned(inner),
            PRECISION=dot_precision(x.dtype),
            BLOCK_T=chosen.block_t,
            BLOCK_K=chosen.block_k,
            BLOCK_R=chosen.block_r,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
    return h


def _outer(h: Tensor, x: Tensor, adapters: _Adapters, *, transposed: bool) -> list[Tensor]:
    """Return s_n hᵀ x summed over the samples of each adapter: d_A, or d_B if transposed."""
    _, T, num_in = x.shape
    factors = adapters.B if transposed else adapters.A
    out = [torch.empty_like(factor) for factor in factors]
    if h.numel() == 0 or num_in == 0:
        return [factor.zero_() for factor in out]
    chosen = settings(x.dtype, adapters.largest)
    by_adapter, order = adapters.index.sort(stable=True)
    starts = torch.searchsorted(by_adapter, torch.arange(len(out) + 1, device=x.device))
    with on_device_of(x):
        _batched_lora_outer_kernel[
            (triton.cdiv(num_in, chosen.block_k), len(out), h.shape[2] // chosen.block_r)
        ](
            h_ptr=h,
            x_ptr=x,
            rank_ptr=adapters.ranks,
            scale_ptr=adapters.scale,
            order_ptr=order,
            start_ptr=starts,
            out_ptr=pointer_table(out),
            T=T,
            num_in=num_in,
            R=h.shape[2],
            TRANSPOSED=transposed,
            DTYPE=TRITON_DTYPE[x.dtype],
            ALIGNED=are_aligned(out),
            PRECISION=dot_precision(x.dtype),
            BLOCK_T=chosen.block_t,
            BLOCK_K=chosen.block_k,
            BLOCK_R=chosen.block_r,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
    return out


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
    """Return y [b, t, o], by one launch. Keeps nothing."""
    adapters = _Adapters.prepare(x, A, B, scale, index)
    bias = None if bias is None else bias.contiguous()
    return _apply(x.contiguous(), weight.contiguous(), bias, adapters, transposed=False)


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
    """Return d_x, d_weight, d_A, d_B, d_scale, d_bias.

    d_weight is one plain product over all tokens, which PyTorch's own library is best at.
    """
    d_y, x = d_y.contiguous(), x.contiguous()
    adapters = _Adapters.prepare(x, A, B, scale, index)
    d_x = _apply(d_y, weight.contiguous(), None, adapters, transposed=True) if need_x else None
    d_weight = d_y.flatten(0, 1).mT @ x.flatten(0, 1) if need_weight else None
    d_bias = d_y.sum((0, 1)) if need_bias else None
    d_A: list[Tensor] = []
    d_B: list[Tensor] = []
    d_scale = None
    if A and (need_A or need_scale):
        Q = _project(d_y, adapters, transposed=True)
    if A and (need_B or need_scale):
        P = _project(x, adapters, transposed=False)
    if A and need_A:
        d_A = _outer(Q, x, adapters, transposed=False)
    if A and need_B:
        d_B = _outer(P, d_y, adapters, transposed=True)
    if need_scale:
        d_scale = scale.new_zeros(len(A) + 1)
        if A:
            slot = torch.where(index < 0, len(A), index)
            d_scale.index_add_(0, slot, (P * Q).sum((1, 2)))
        d_scale = d_scale[: len(A)].clone()
    return d_x, d_weight, d_A, d_B, d_scale, d_bias
