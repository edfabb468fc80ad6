"""token_products: what layers make of tokens, and what that adds to them, a tile of rows a program.

X Cᵀ and the addition of A M read a layer once for all tokens; Σ Aᵀ X is a share per program, and
the sum of these.
"""

# L = layers, o, d = rows and columns of one, s = tokens; S: padded with zero rows

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import ceil_div, contiguous, on_device_of, sizes_on_device
from mima.kernels._tiles import (
    NUM_SPLITS,
    Tiles,
    load_text,
    load_tile,
    pack,
    place,
    store_tile,
    tile_pointer,
)


@triton.jit
def _token_pointers(A_ptr, first_row, j, num_tokens, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return pointers to [BLOCK_O, BLOCK_S] of A [Σ o, s] for tokens j BLOCK_S …."""
    rows = first_row + tl.arange(0, BLOCK_O)
    tokens = j * BLOCK_S + tl.arange(0, BLOCK_S)
    return A_ptr + rows[:, None] * num_tokens + tokens[None, :]


@triton.jit
def _token_mask(rows, j, num_tokens, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr):
    tokens = j * BLOCK_S + tl.arange(0, BLOCK_S)
    return (tl.arange(0, BLOCK_O) < rows)[:, None] & (tokens < num_tokens)[None, :]


@triton.jit
def _token_outputs_kernel(
    table_ptr,  # [L] in, int64: addresses of X
    rows_ptr,  # [L] in, int64: o of each layer
    first_rows_ptr,  # [L] in, int64: where each layer begins in A
    block_map_ptr,  # [num_tiles, 2] in, int32: layer, tile of rows
    C_ptr,  # [S, d] in, zero rows beyond the tokens
    A_ptr,  # [Σ o, s] out: X Cᵀ
    d,  # columns
    num_tokens,  # s
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per program
    BLOCK_S: tl.constexpr,  # tokens per program
    BLOCK_D: tl.constexpr,  # columns per step
):
    # int64: offsets into weights and A may pass 2**31
    tile = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
    X_ptr = tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    A = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        X = load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
        C = load_text(C_ptr, 0, j, offs_d, d, BLOCK_S, 1)
        A = tl.dot(X, tl.trans(C), A, input_precision=PRECISION)
    ptrs = _token_pointers(
        A_ptr, tl.load(first_rows_ptr + layer) + first, j, num_tokens, BLOCK_O, BLOCK_S
    )
    mask = _token_mask(rows, j, num_tokens, BLOCK_O, BLOCK_S)
    tl.store(ptrs, A.to(ptrs.dtype.element_ty), mask)


@triton.jit
def _add_token_outputs_kernel(
    table_ptr,  # [L] in, int64: addresses of X, read and written
    rows_ptr,  # [L] in, int64: o of each layer
    first_rows_ptr,  # [L] in, int64: where each layer begins in A
    block_map_ptr,  # [num_tiles, 2] in, int32: layer, tile of rows
    M_ptr,  # [S, d] in, zero rows beyond the tokens
    A_ptr,  # [Σ o, s] in
    d,  # columns
    num_tokens,  # s
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per program
    BLOCK_S: tl.constexpr,  # tokens per product
    BLOCK_D: tl.constexpr,  # columns per program
    SLOTS: tl.constexpr,  # products
):
    tile = tl.program_id(0).to(tl.int64)
    layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
    X_ptr = tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    first_row = tl.load(first_rows_ptr + layer) + first
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    X = load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
    for j in range(SLOTS):
        ptrs = _token_pointers(A_ptr, first_row, j, num_tokens, BLOCK_O, BLOCK_S)
        A = tl.load(ptrs, _token_mask(rows, j, num_tokens, BLOCK_O, BLOCK_S), other=0.0)
        M = load_text(M_ptr, 0, j, offs_d, d, BLOCK_S, 1)
        X = tl.dot(A.to(tl.float32), M, X, input_precision=PRECISION)
    store_tile(X_ptr, X, offs_d, rows, d, BLOCK_O)


@triton.jit
def _token_sums_kernel(
    table_ptr,  # [L] in, int64: addresses of X
    rows_ptr,  # [L] in, int64: o of each layer
    first_rows_ptr,  # [L] in, int64: where each layer begins in A
    block_map_ptr,  # [num_tiles, 2] in, int32: layer, tile of rows
    A_ptr,  # [Σ o, s] in
    sums_ptr,  # [num_splits, S, d] out, fp32: each program's share of Σ Aᵀ X
    d,  # columns
    num_tokens,  # s
    num_tiles,  # of rows, all layers together
    DTYPE: tl.constexpr,  # of X and A
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per tile
    BLOCK_S: tl.constexpr,  # tokens per program
    BLOCK_D: tl.constexpr,  # columns per program
):
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    j, num_slots = tl.program_id(1), tl.num_programs(1)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for tile_i32 in range(split, num_tiles, num_splits):
        tile = tl.cast(tile_i32, tl.int64)
        layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
        first_row = tl.load(first_rows_ptr + layer) + first
        ptrs = _token_pointers(A_ptr, first_row, j, num_tokens, BLOCK_O, BLOCK_S)
        A = tl.load(ptrs, _token_mask(rows, j, num_tokens, BLOCK_O, BLOCK_S), other=0.0)
        X_ptr = tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
        X = load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
        sums = tl.dot(tl.trans(A.to(tl.float32)), X, sums, input_precision=PRECISION)
    first_token = tl.cast((split * num_slots + j) * BLOCK_S, tl.int64)
    offs = first_token * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    tl.store(sums_ptr + offs, sums, (offs_d < d)[None, :])


def _output_rows(X: Sequence[Tensor], num_tokens: int) -> dict[str, Any]:
    """Where each layer's rows begin in A, and how long they are."""
    firsts = tuple(accumulate([x.shape[0] for x in X], initial=0))[:-1]
    return {"first_rows_ptr": sizes_on_device(firsts, X[0].device), "num_tokens": num_tokens}


def token_outputs(X: Sequence[Tensor], C: Tensor) -> Tensor:
    """Return X Cᵀ [Σ o_l, s], by one launch."""
    A = C.new_empty(sum([x.shape[0] for x in X]), len(C))
    if A.numel() == 0 or C.shape[1] == 0:
        return A.zero_()
    X = contiguous(X)
    with on_device_of(C):
        of = Tiles.of(X, X, len(C))
        _token_outputs_kernel[(of.count, of.slots)](
            C_ptr=pack([C], of.padded), A_ptr=A, **_output_rows(X, len(C)), **of.arguments
        )
    return A


def add_token_outputs(X: Sequence[Tensor], A: Tensor, M: Tensor) -> None:
    """Add A_l M to X_l, contiguous, by one launch."""
    if A.numel() == 0 or M.shape[1] == 0:
        return
    with on_device_of(M):
        # of 64 tokens, three products for float32 spill registers (triton 3.8, sm_90)
        of = Tiles.of(X, X, len(M), most=32)
        _add_token_outputs_kernel[of.count, ceil_div(M.shape[1], of.chosen.block_d)](
            M_ptr=pack([M], of.padded),
            A_ptr=A.contiguous(),
            **_output_rows(X, len(M)),
            SLOTS=of.slots,
            **of.arguments,
        )


def token_sums(X: Sequence[Tensor], A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l [s, d], by one launch and the sum of the programs' shares."""
    num_tokens, d = A.shape[1], X[0].shape[1]
    if A.numel() == 0 or d == 0:
        return A.new_zeros(num_tokens, d)
    X = contiguous(X)
    with on_device_of(A):
        of = Tiles.of(X, X, num_tokens)
        splits = min(NUM_SPLITS, of.count)
        shares = torch.empty((splits, of.padded, d), dtype=torch.float32, device=A.device)
        _token_sums_kernel[ceil_div(d, of.chosen.block_d), of.slots, splits](
            A_ptr=A.contiguous(),
            sums_ptr=shares,
            **_output_rows(X, num_tokens),
            num_tiles=of.count,
            **of.arguments,
        )
        return shares.sum(0)[:num_tokens].to(A.dtype)
