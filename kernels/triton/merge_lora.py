"""merge_lora: W + Σ_n c_n B_n A_n, c = w s, one tile of the weight per program.

No adapted weight is ever formed: a program loops over adapters and ranks, its tile in registers.
The gradients B_nᵀ φ̄ and φ̄ A_nᵀ are one launch, in which each program owns a strip of one factor.

Bytes: one read and one write of the weight. FLOPs: 2 o d Σ r_n.
"""

# N = adapters; o, d = rows and columns of the weight, r = rank

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    TRITON_DTYPE,
    block_size,
    ceil_div,
    contiguous,
    dot,
    dot_precision,
    launch_options,
    load_matrix,
    load_pointer,
    on_device_of,
    pointer_table,
    rank_multiple,
    sizes_on_device,
)
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Launch settings of the two kernels."""

    block_o: int
    """Rows of a tile."""
    block_d: int
    """Columns of a tile."""
    block_r: int
    """Ranks per product; a power of 2."""
    num_warps: int
    num_stages: int


@functools.cache
def settings(dtype: torch.dtype, rank: int) -> Settings:
    """Return the settings for a dtype and the largest rank.

    tl.dot needs a rank of 16 at least; programs loop over ranks above block_r. float32, whose
    products are three, spills registers with 4 warps or 32 ranks a product (compiled for sm_80 with
    triton 3.5 to 3.8). Not measured on a GPU.
    """
    wide = dtype == torch.float32
    return Settings(
        block_o=64,
        block_d=64,
        block_r=block_size(rank, 16 if wide else 32),
        num_warps=8 if wide else 4,
        num_stages=2,
    )


@triton.jit
def _store_tile(pointer, tile, offs_i, offs_j, num_i, num_j):
    mask = (offs_i < num_i)[:, None] & (offs_j < num_j)[None, :]
    ptrs = pointer + offs_i.to(tl.int64)[:, None] * num_j + offs_j[None, :]
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask)


@triton.jit
def _merge_lora_fwd_kernel(
    weight_ptr,  # [o, d] in
    table_ptr,  # [2 N] in, int64: addresses of A_n [r_n, d], then of B_n [o, r_n]
    rank_ptr,  # [N] in, int64
    coefficient_ptr,  # [N] in, fp32: w_n s_n
    out_ptr,  # [o, d] out, aliases nothing
    o,
    d,
    num_adapters,  # N
    DTYPE: tl.constexpr,  # of all but the coefficients
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    RANK_MULTIPLE: tl.constexpr,  # divides every rank
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_O: tl.constexpr,  # rows per program
    BLOCK_D: tl.constexpr,  # columns per program
    BLOCK_R: tl.constexpr,  # ranks per product
):
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    merged = load_matrix(weight_ptr, offs_o, offs_d, o, d, d).to(tl.float32)
    for n in range(num_adapters):
        A_n = load_pointer(table_ptr, n, DTYPE, ALIGNED)
        B_n = load_pointer(table_ptr, num_adapters + n, DTYPE, ALIGNED)
        rank = tl.multiple_of(tl.load(rank_ptr + n).to(tl.int32), RANK_MULTIPLE)
        BA = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
        for start in range(0, rank, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            B = load_matrix(B_n, offs_o, offs_r, o, rank, rank)
            A = load_matrix(A_n, offs_r, offs_d, rank, d, d)
            BA = dot(B, A, BA, PRECISION)
        merged += tl.load(coefficient_ptr + n) * BA
    _store_tile(out_ptr, merged, offs_o, offs_d, o, d)


@triton.jit
def _merge_lora_bwd_kernel(
    d_out_ptr,  # [o, d] in
    table_ptr,  # [4 N] in, int64: addresses of A_n [r_n, d], B_n [o, r_n], d_A_n, d_B_n
    rank_ptr,  # [N] in, int64
    coefficient_ptr,  # [N] in, fp32: w_n s_n
    inner_ptr,  # [N, chunks, blocks_d] out, fp32: shares of ⟨d_out, B_n A_n⟩
    o,
    d,
    blocks_d,  # programs of a chunk that own columns of A; the rest own rows of B
    NEED_A: tl.constexpr,  # write d_A
    NEED_B: tl.constexpr,  # write d_B
    NEED_INNER: tl.constexpr,  # write inner
    DTYPE: tl.constexpr,  # of all but the coefficients
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    RANK_MULTIPLE: tl.constexpr,  # divides every rank
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_O: tl.constexpr,  # rows per program or step
    BLOCK_D: tl.constexpr,  # columns per program or step
    BLOCK_R: tl.constexpr,  # ranks per program
):
    pid = tl.program_id(0)
    chunk = tl.program_id(1)
    n = tl.program_id(2)
    offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    num_adapters = tl.num_programs(2)
    rank = tl.multiple_of(tl.load(rank_ptr + n), RANK_MULTIPLE)
    coefficient = tl.load(coefficient_ptr + n)
    A_n = load_pointer(table_ptr, n, DTYPE, ALIGNED)
    B_n = load_pointer(table_ptr, num_adapters + n, DTYPE, ALIGNED)
    if pid < blocks_d:
        if NEED_A or NEED_INNER:
            offs_d = pid * BLOCK_D + tl.arange(0, BLOCK_D)
            d_A = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for start in range(0, o, BLOCK_O):
                offs_o = start + tl.arange(0, BLOCK_O)
                B = load_matrix(B_n, offs_o, offs_r, o, rank, rank)
                d_out = load_matrix(d_out_ptr, offs_o, offs_d, o, d, d)
                d_A = dot(tl.trans(B), d_out, d_A, PRECISION)
            if NEED_INNER:
                A = load_matrix(A_n, offs_r, offs_d, rank, d, d).to(tl.float32)
                i = (n * tl.num_programs(1) + chunk) * blocks_d + pid
                tl.store(inner_ptr + i, tl.sum(d_A * A))
            if NEED_A:
                d_A_n = load_pointer(table_ptr, 2 * num_adapters + n, DTYPE, ALIGNED)
                _store_tile(d_A_n, coefficient * d_A, offs_r, offs_d, rank, d)
    else:
        if NEED_B:
            rows = (pid - blocks_d) * BLOCK_O + tl.arange(0, BLOCK_O)
            d_B = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
            for start in range(0, d, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                d_strip = load_matrix(d_out_ptr, rows, columns, o, d, d)
                A_strip = load_matrix(A_n, offs_r, columns, rank, d, d)
                d_B = dot(d_strip, tl.trans(A_strip), d_B, PRECISION)
            d_B_n = load_pointer(table_ptr, 3 * num_adapters + n, DTYPE, ALIGNED)
            _store_tile(d_B_n, coefficient * d_B, rows, offs_r, o, rank)


def merge_lora_forward(inputs: arguments.MergeLora) -> Tensor:
    """Return φ [o, d], by one launch."""
    weight, A, B, scale, weights = inputs
    weight, A, B = weight.contiguous(), contiguous(A), contiguous(B)
    out = torch.empty_like(weight)
    o, d = weight.shape
    if not A or out.numel() == 0:
        return weight.clone()
    chosen, common = _common_arguments(weight, A, [*A, *B], scale * weights)
    with on_device_of(weight):
        _merge_lora_fwd_kernel[(ceil_div(d, chosen.block_d), ceil_div(o, chosen.block_o))](
            weight_ptr=weight, out_ptr=out, num_adapters=len(A), **common
        )
    return out


def _common_arguments(
    like: Tensor, A: Sequence[Tensor], table_of: Sequence[Tensor | None], coefficients: Tensor
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings for adapters of a weight, and what the launches have in common."""
    ranks = tuple([A_n.shape[0] for A_n in A])
    chosen = settings(like.dtype, max(ranks))
    table = pointer_table(table_of, like.device)
    return chosen, {
        "table_ptr": table.pointers,
        "rank_ptr": sizes_on_device(ranks, like.device),
        "coefficient_ptr": coefficients,
        "o": like.shape[0],
        "d": like.shape[1],
        "DTYPE": TRITON_DTYPE[like.dtype],
        "ALIGNED": table.aligned,
        "RANK_MULTIPLE": rank_multiple(ranks),
        "PRECISION": dot_precision(like.dtype),
        "BLOCK_O": chosen.block_o,
        "BLOCK_D": chosen.block_d,
        "BLOCK_R": chosen.block_r,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        **launch_options(),
    }


def merge_lora_backward(
    d_out: Tensor, inputs: arguments.MergeLora, needs: Needs
) -> tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return d_weight, d_A, d_B, d_scale, d_weights, by one launch."""
    _, A, B, scale, weights = inputs
    need_weight, need_A, need_B, need_scale, need_weights = needs
    d_out, A, B = d_out.contiguous(), contiguous(A), contiguous(B)
    need_inner = need_scale or need_weights
    o, d = d_out.shape
    largest = max((len(A_n) for A_n in A), default=0)
    d_A = [torch.zeros_like(A_n) for A_n in A] if need_A else []
    d_B = [torch.zeros_like(B_n) for B_n in B] if need_B else []
    inner = torch.zeros_like(scale)
    if d_out.numel() > 0 and largest > 0 and (need_A or need_B or need_inner):
        nothing: list[Tensor | None] = [None] * len(A)
        everything = [*A, *B, *(d_A or nothing), *(d_B or nothing)]
        chosen, common = _common_arguments(d_out, A, everything, scale * weights)
        blocks_d = ceil_div(d, chosen.block_d)
        blocks_o = ceil_div(o, chosen.block_o) if need_B else 0
        chunks = ceil_div(largest, chosen.block_r)
        shares = torch.zeros(
            (len(A) if need_inner else 0, chunks, blocks_d),
            dtype=torch.float32,
            device=d_out.device,
        )
        with on_device_of(d_out):
            _merge_lora_bwd_kernel[(blocks_d + blocks_o, chunks, len(A))](
                d_out_ptr=d_out,
                inner_ptr=shares,
                blocks_d=blocks_d,
                NEED_A=need_A,
                NEED_B=need_B,
                NEED_INNER=need_inner,
                **common,
            )
        if need_inner:
            inner = shares.sum((1, 2))
    return (
        d_out.clone() if need_weight else None,
        d_A,
        d_B,
        inner * weights if need_scale else None,
        inner * scale if need_weights else None,
    )
