"""projected_merge: every layer that reads text, one tile of rows per program.

A program owns BLOCK_O rows of one layer. Forward, it first projects its rows of each W_n − W0 on
the concept's tokens, A_n = (W_n − W0) C_nᵀ, then writes W0 + Σ_n A_n M_n. Backward is the same with
C and M swapped: B_n = φ̄ M_nᵀ, then W̄_n = B_n C_n. The projections [BLOCK_O, s_n] pass through a
scratch buffer, because a program cannot index registers by concept.

Bytes: forward reads N + 1 weights and writes one. W0 is read once for several concepts, two in
float32 and four otherwise, and once more at the end, from the cache, which is told to prefer it to
W_n. FLOPs: 4 o d s per concept, in float32 accuracy on the tensor cores.
"""

# N = concepts, L = layers, o, d = rows and columns of a weight; flat lists are concept-major
# S = BLOCK_S * SLOTS: tokens of a concept, padded with zero rows

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    TRITON_DTYPE,
    block_map,
    block_size,
    ceil_div,
    contiguous,
    dot_precision,
    launch_options,
    load_pointer,
    on_device_of,
    pointer_table,
    sizes_on_device,
)
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs, Tensors

NUM_SPLITS = 32
"""Shares of the sum over rows in the text's gradients: about 4 programs a multiprocessor of an H100
at N = 3, d = 768; chosen from that count, not measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Launch settings of the kernels."""

    block_o: int
    """Rows per program."""
    block_s: int
    """Tokens per product; a power of 2."""
    block_d: int
    """Columns per step."""
    num_warps: int
    num_stages: int


@functools.cache
def settings(dtype: torch.dtype, longest: int) -> Settings:
    """Return the settings for a dtype and the longest concept.

    tl.dot needs 16 tokens at least; beyond 64 a program loops. A row of a tile is one 128-byte
    line; twice that spills registers in float32 (compiled for sm_90 with triton 3.8). Not measured
    on a GPU.
    """
    block_s = block_size(longest, 64)
    return Settings(
        block_o=32, block_s=block_s, block_d=128 // dtype.itemsize, num_warps=4, num_stages=2
    )


@triton.jit
def _tile_pointer(table_ptr, i, first, d, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to row `first` of the i-th matrix; offsets within a tile fit in 32 bits."""
    return load_pointer(table_ptr, i, DTYPE, ALIGNED) + first * d


@triton.jit
def _load_tile(
    pointer, offs_d, rows, d, BLOCK_O: tl.constexpr, EVICTION: tl.constexpr = ""
):  # fmt: skip
    """Load a tile of rows as float32, zero outside; EVICTION tells the cache what comes next."""
    offs_o = tl.arange(0, BLOCK_O)
    mask = (offs_o < rows)[:, None] & (offs_d < d)[None, :]
    ptrs = pointer + offs_o[:, None] * d + offs_d[None, :]
    return tl.load(ptrs, mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def _store_tile(pointer, tile, offs_d, rows, d, BLOCK_O: tl.constexpr):
    """Round a tile of rows to the pointer's dtype and store what is inside."""
    offs_o = tl.arange(0, BLOCK_O)
    mask = (offs_o < rows)[:, None] & (offs_d < d)[None, :]
    ptrs = pointer + offs_o[:, None] * d + offs_d[None, :]
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask)


@triton.jit
def _load_text(text_ptr, n, j, offs_d, d, BLOCK_S: tl.constexpr, SLOTS: tl.constexpr):
    """Load tokens j BLOCK_S … of concept n from [N, S, d] as float32."""
    first = tl.cast((n * SLOTS + j) * BLOCK_S, tl.int64)
    ptrs = text_ptr + first * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    return tl.load(ptrs, (offs_d < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scratch(scratch_ptr, tile, n, j, num_concepts,
             BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Return pointers to the [BLOCK_O, BLOCK_S] projections of a tile of rows."""
    first = ((tile * num_concepts + n) * SLOTS + j) * (BLOCK_O * BLOCK_S)
    offs_o, offs_s = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_S)
    return scratch_ptr + first + offs_o[:, None] * BLOCK_S + offs_s[None, :]


@triton.jit
def _add_product(
    product, rows_of_base, W_ptr, text_ptr, i, offs_d, rows, d,
    DIFFERENCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return the i-th product plus a step's columns of (W_n − base) Tᵀ, or of base Tᵀ."""
    tile = rows_of_base
    if DIFFERENCE:
        # each W_n is read here and nowhere else
        tile = _load_tile(W_ptr, offs_d, rows, d, BLOCK_O, "evict_first") - rows_of_base
    text = _load_text(text_ptr, i, 0, offs_d, d, BLOCK_S, 1)
    return tl.dot(tile, tl.trans(text), product, input_precision=PRECISION)


@triton.jit
def _project(
    table_ptr, base, text_ptr, scratch_ptr, layer, tile, first, rows, d, num_layers, num_concepts,
    DIFFERENCE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the products of a tile of rows with the concepts' tokens to the scratch buffer.

    Of the rows of W_n − base if DIFFERENCE, else of base, the table's `base`-th list. A step's
    columns of base are read once for GROUP products, those of one concept and of several alike; the
    cache is asked to keep them, for base is needed again at the end.
    """
    base_ptr = _tile_pointer(table_ptr, base * num_layers + layer, first, d, DTYPE, ALIGNED)
    num_products = num_concepts * SLOTS
    for i in range(0, num_products, GROUP):
        # a last group that is too large does the last product again
        i1 = tl.minimum(i + 1, num_products - 1)
        i2 = tl.minimum(i + 2, num_products - 1)
        i3 = tl.minimum(i + 3, num_products - 1)
        W_i = (i // SLOTS + 1) * num_layers + layer
        W_i1 = (i1 // SLOTS + 1) * num_layers + layer
        W_i2 = (i2 // SLOTS + 1) * num_layers + layer
        W_i3 = (i3 // SLOTS + 1) * num_layers + layer
        W_ptr = _tile_pointer(table_ptr, W_i, first, d, DTYPE, ALIGNED)
        W_ptr1 = _tile_pointer(table_ptr, W_i1, first, d, DTYPE, ALIGNED)
        W_ptr2 = _tile_pointer(table_ptr, W_i2, first, d, DTYPE, ALIGNED)
        W_ptr3 = _tile_pointer(table_ptr, W_i3, first, d, DTYPE, ALIGNED)
        A = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A1 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A2 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A3 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            rows_of_base = _load_tile(base_ptr, offs_d, rows, d, BLOCK_O, "evict_last")
            A = _add_product(
                A, rows_of_base, W_ptr, text_ptr, i, offs_d, rows, d,
                DIFFERENCE, PRECISION, BLOCK_O, BLOCK_S,
            )  # fmt: skip
            if GROUP > 1:
                A1 = _add_product(
                    A1, rows_of_base, W_ptr1, text_ptr, i1, offs_d, rows, d,
                    DIFFERENCE, PRECISION, BLOCK_O, BLOCK_S,
                )  # fmt: skip
            if GROUP > 2:
                A2 = _add_product(
                    A2, rows_of_base, W_ptr2, text_ptr, i2, offs_d, rows, d,
                    DIFFERENCE, PRECISION, BLOCK_O, BLOCK_S,
                )  # fmt: skip
            if GROUP > 3:
                A3 = _add_product(
                    A3, rows_of_base, W_ptr3, text_ptr, i3, offs_d, rows, d,
                    DIFFERENCE, PRECISION, BLOCK_O, BLOCK_S,
                )  # fmt: skip
        tl.store(_scratch(scratch_ptr, tile, i, 0, num_products, BLOCK_O, BLOCK_S, 1), A)
        if GROUP > 1:
            tl.store(_scratch(scratch_ptr, tile, i1, 0, num_products, BLOCK_O, BLOCK_S, 1), A1)
        if GROUP > 2:
            tl.store(_scratch(scratch_ptr, tile, i2, 0, num_products, BLOCK_O, BLOCK_S, 1), A2)
        if GROUP > 3:
            tl.store(_scratch(scratch_ptr, tile, i3, 0, num_products, BLOCK_O, BLOCK_S, 1), A3)


@triton.jit
def _projected_merge_fwd_kernel(
    table_ptr,  # [(N + 2) * L] in, int64: addresses of W0, each W_n, out; out aliases nothing
    rows_ptr,  # [L] in, int64: o of each layer
    block_map_ptr,  # [num_programs, 2] in, int32: layer, tile of rows
    C_ptr,  # [N, S, d] in
    M_ptr,  # [N, S, d] in
    A_ptr,  # [num_programs, N, SLOTS, BLOCK_O, BLOCK_S] scratch, fp32
    d,  # columns
    num_layers,  # L
    num_concepts,  # N
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per program
    BLOCK_S: tl.constexpr,  # tokens per product
    BLOCK_D: tl.constexpr,  # columns per step
    SLOTS: tl.constexpr,  # products per concept
    GROUP: tl.constexpr,  # products per pass over the rows, 4 at most
):
    # int64: offsets into weights and scratch may pass 2**31
    tile = tl.program_id(0).to(tl.int64)
    layer = tl.load(block_map_ptr + 2 * tile)
    first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
    rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
    _project(
        table_ptr, 0, C_ptr, A_ptr, layer, tile, first, rows, d, num_layers, num_concepts,
        True, DTYPE, ALIGNED, PRECISION, BLOCK_O, BLOCK_S, BLOCK_D, SLOTS, GROUP,
    )  # fmt: skip
    # The projections were written by other threads of this program.
    tl.debug_barrier()
    W0_ptr = _tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    out_ptr = _tile_pointer(
        table_ptr, (num_concepts + 1) * num_layers + layer, first, d, DTYPE, ALIGNED
    )
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        merged = _load_tile(W0_ptr, offs_d, rows, d, BLOCK_O)
        for n in range(num_concepts):
            for j in range(SLOTS):
                A = tl.load(_scratch(A_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
                M = _load_text(M_ptr, n, j, offs_d, d, BLOCK_S, SLOTS)
                merged = tl.dot(A, M, merged, input_precision=PRECISION)
        _store_tile(out_ptr, merged, offs_d, rows, d, BLOCK_O)


@triton.jit
def _projected_merge_bwd_kernel(
    table_ptr,  # [(2 N + 3) * L] in, int64: addresses of W0, W_n, d_out, d_W0, d_W_n
    rows_ptr,  # [L] in, int64: o of each layer
    block_map_ptr,  # [num_programs, 2] in, int32: layer, tile of rows
    C_ptr,  # [N, S, d] in
    M_ptr,  # [N, S, d] in
    A_ptr,  # [num_programs, N, SLOTS, BLOCK_O, BLOCK_S] out, fp32: (W_n − W0) C_nᵀ
    B_ptr,  # likewise: d_out M_nᵀ
    d,  # columns
    num_layers,  # L
    num_concepts,  # N
    NEED_W0: tl.constexpr,  # write d_W0
    NEED_W: tl.constexpr,  # write d_W
    NEED_A: tl.constexpr,  # write A, for d_M
    NEED_B: tl.constexpr,  # write B, for everything else
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per program
    BLOCK_S: tl.constexpr,  # tokens per product
    BLOCK_D: tl.constexpr,  # columns per step
    SLOTS: tl.constexpr,  # products per concept
    GROUP: tl.constexpr,  # products per pass over the rows, 4 at most
):
    tile = tl.program_id(0).to(tl.int64)
    layer = tl.load(block_map_ptr + 2 * tile)
    first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
    rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
    if NEED_A:
        _project(
            table_ptr, 0, C_ptr, A_ptr, layer, tile, first, rows, d, num_layers, num_concepts,
            True, DTYPE, ALIGNED, PRECISION, BLOCK_O, BLOCK_S, BLOCK_D, SLOTS, GROUP,
        )  # fmt: skip
    if NEED_B:
        _project(
            table_ptr, num_concepts + 1, M_ptr, B_ptr, layer, tile, first, rows, d, num_layers,
            num_concepts, False, DTYPE, ALIGNED, PRECISION, BLOCK_O, BLOCK_S, BLOCK_D, SLOTS, GROUP,
        )  # fmt: skip
    d_out_ptr = _tile_pointer(
        table_ptr, (num_concepts + 1) * num_layers + layer, first, d, DTYPE, ALIGNED
    )
    if NEED_W0 or NEED_W:
        # The projections were written by other threads of this program.
        tl.debug_barrier()
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            d_W0 = _load_tile(d_out_ptr, offs_d, rows, d, BLOCK_O)
            for n in range(num_concepts):
                d_W = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
                for j in range(SLOTS):
                    B = tl.load(_scratch(B_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
                    C = _load_text(C_ptr, n, j, offs_d, d, BLOCK_S, SLOTS)
                    d_W = tl.dot(B, C, d_W, input_precision=PRECISION)
                d_W0 -= d_W
                if NEED_W:
                    i = (num_concepts + 3 + n) * num_layers + layer
                    d_W_ptr = _tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
                    _store_tile(d_W_ptr, d_W, offs_d, rows, d, BLOCK_O)
            if NEED_W0:
                i = (num_concepts + 2) * num_layers + layer
                d_W0_ptr = _tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
                _store_tile(d_W0_ptr, d_W0, offs_d, rows, d, BLOCK_O)


@triton.jit
def _projected_merge_bwd_text_kernel(
    table_ptr,  # [(2 N + 3) * L] in, int64: as in _projected_merge_bwd_kernel
    rows_ptr,  # [L] in, int64: o of each layer
    block_map_ptr,  # [num_tiles, 2] in, int32: layer, tile of rows
    A_ptr,  # [num_tiles, N, SLOTS, BLOCK_O, BLOCK_S] in, fp32: (W_n − W0) C_nᵀ
    B_ptr,  # likewise: d_out M_nᵀ
    d_C_ptr,  # [num_splits, N, S, d] out, fp32: each program's share of the sum over rows
    d_M_ptr,  # likewise
    d,  # columns
    num_layers,  # L
    num_concepts,  # N
    num_tiles,  # of rows, all layers together
    NEED_C: tl.constexpr,  # write d_C
    NEED_M: tl.constexpr,  # write d_M
    DTYPE: tl.constexpr,  # of the weights
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    PRECISION: tl.constexpr,  # of tl.dot
    BLOCK_O: tl.constexpr,  # rows per tile
    BLOCK_S: tl.constexpr,  # tokens per product
    BLOCK_D: tl.constexpr,  # columns per program
    SLOTS: tl.constexpr,  # products per concept
):
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(1) // SLOTS
    j = tl.program_id(1) % SLOTS
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    d_C = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    d_M = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for tile_i32 in range(split, num_tiles, num_splits):
        tile = tl.cast(tile_i32, tl.int64)
        layer = tl.load(block_map_ptr + 2 * tile)
        first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
        rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
        if NEED_C:
            W0_ptr = _tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
            W_ptr = _tile_pointer(table_ptr, (n + 1) * num_layers + layer, first, d, DTYPE, ALIGNED)
            D = _load_tile(W_ptr, offs_d, rows, d, BLOCK_O) - _load_tile(
                W0_ptr, offs_d, rows, d, BLOCK_O
            )
            B = tl.load(_scratch(B_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
            d_C = tl.dot(tl.trans(B), D, d_C, input_precision=PRECISION)
        if NEED_M:
            i = (num_concepts + 1) * num_layers + layer
            d_out_ptr = _tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
            d_out = _load_tile(d_out_ptr, offs_d, rows, d, BLOCK_O)
            A = tl.load(_scratch(A_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
            d_M = tl.dot(tl.trans(A), d_out, d_M, input_precision=PRECISION)
    first_row = tl.cast(((split * num_concepts + n) * SLOTS + j) * BLOCK_S, tl.int64)
    offs = first_row * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    mask = (offs_d < d)[None, :]
    if NEED_C:
        tl.store(d_C_ptr + offs, d_C, mask)
    if NEED_M:
        tl.store(d_M_ptr + offs, d_M, mask)


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
    layer = tl.load(block_map_ptr + 2 * tile)
    first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
    rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
    X_ptr = _tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    A = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        X = _load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
        C = _load_text(C_ptr, 0, j, offs_d, d, BLOCK_S, 1)
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
    layer = tl.load(block_map_ptr + 2 * tile)
    first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
    rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
    X_ptr = _tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    first_row = tl.load(first_rows_ptr + layer) + first
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    X = _load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
    for j in range(SLOTS):
        ptrs = _token_pointers(A_ptr, first_row, j, num_tokens, BLOCK_O, BLOCK_S)
        A = tl.load(ptrs, _token_mask(rows, j, num_tokens, BLOCK_O, BLOCK_S), other=0.0)
        M = _load_text(M_ptr, 0, j, offs_d, d, BLOCK_S, 1)
        X = tl.dot(A.to(tl.float32), M, X, input_precision=PRECISION)
    _store_tile(X_ptr, X, offs_d, rows, d, BLOCK_O)


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
        layer = tl.load(block_map_ptr + 2 * tile)
        first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
        rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
        first_row = tl.load(first_rows_ptr + layer) + first
        ptrs = _token_pointers(A_ptr, first_row, j, num_tokens, BLOCK_O, BLOCK_S)
        A = tl.load(ptrs, _token_mask(rows, j, num_tokens, BLOCK_O, BLOCK_S), other=0.0)
        X_ptr = _tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
        X = _load_tile(X_ptr, offs_d, rows, d, BLOCK_O)
        sums = tl.dot(tl.trans(A.to(tl.float32)), X, sums, input_precision=PRECISION)
    first_token = tl.cast((split * num_slots + j) * BLOCK_S, tl.int64)
    offs = first_token * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    tl.store(sums_ptr + offs, sums, (offs_d < d)[None, :])


def _group(num_products: int, dtype: torch.dtype, *, both: bool = False) -> int:
    """Return how many products share a pass over the rows: evenly, and no more than fit.

    float32, whose products are three, spills registers with three; with two where a kernel makes
    both projections, of W_n − W0 and of the gradient (compiled for sm_100 with triton 3.8).
    """
    largest = 4 if dtype != torch.float32 else 1 if both else 2
    return ceil_div(num_products, ceil_div(num_products, largest))


def _pack(text: Sequence[Tensor], padded: int) -> Tensor:
    """Return [N, padded, d], each concept's tokens followed by zero rows."""
    packed = text[0].new_zeros(len(text), padded, text[0].shape[1])
    for row, x in zip(packed, text, strict=True):
        row[: len(x)] = x
    return packed


def _unpack(packed: Tensor, text: Sequence[Tensor]) -> list[Tensor]:
    """Undo `_pack`: [N, padded, d] -> N tensors [s_n, d], of the text's dtype."""
    return [row[: len(x)].to(x.dtype, copy=True) for row, x in zip(packed, text, strict=True)]


def projected_merge_forward(inputs: arguments.ProjectedMerge) -> list[Tensor]:
    """Return φ, L tensors, by one launch."""
    W0, W, C, M = inputs
    longest = max((len(C_n) for C_n in C), default=0)
    if longest == 0:
        return [x.clone(memory_format=torch.contiguous_format) for x in W0]
    W0, W = contiguous(W0), contiguous(W)
    out = [torch.empty_like(x) for x in W0]
    everything = [*W0, *W, *out]
    d = W0[0].shape[1]
    chosen = settings(W0[0].dtype, longest)
    slots = ceil_div(longest, chosen.block_s)
    rows = tuple([x.shape[0] for x in W0])
    tiles = block_map(rows, chosen.block_o, W0[0].device)
    if len(tiles) == 0 or d == 0:
        return out
    size = len(tiles) * len(C) * slots * chosen.block_o * chosen.block_s
    with on_device_of(W0[0]):
        table = pointer_table(everything, W0[0].device)
        _projected_merge_fwd_kernel[(len(tiles),)](
            table_ptr=table.pointers,
            rows_ptr=sizes_on_device(rows, W0[0].device),
            block_map_ptr=tiles,
            C_ptr=_pack(C, slots * chosen.block_s),
            M_ptr=_pack(M, slots * chosen.block_s),
            A_ptr=torch.empty(size, dtype=torch.float32, device=W0[0].device),
            d=d,
            num_layers=len(W0),
            num_concepts=len(C),
            DTYPE=TRITON_DTYPE[W0[0].dtype],
            ALIGNED=table.aligned,
            PRECISION=dot_precision(W0[0].dtype),
            BLOCK_O=chosen.block_o,
            BLOCK_S=chosen.block_s,
            BLOCK_D=chosen.block_d,
            SLOTS=slots,
            GROUP=_group(len(C) * slots, W0[0].dtype),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
    return out


def projected_merge_backward(
    d_out: Tensors, inputs: arguments.ProjectedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return d_W0, d_W, d_C, d_M, by one launch, or two if the text's gradients are needed."""
    W0, W, C, M = inputs
    need_W0, need_W, need_C, need_M = needs
    d_out = contiguous(d_out)
    device, dtype, d = d_out[0].device, d_out[0].dtype, d_out[0].shape[1]
    longest = max((len(C_n) for C_n in C), default=0)
    rows = tuple([x.shape[0] for x in d_out])
    if longest == 0 or d == 0 or sum(rows) == 0:
        return (
            [x.clone() for x in d_out] if need_W0 else [],
            [torch.zeros_like(x) for _ in C for x in d_out] if need_W else [],
            [torch.zeros_like(x) for x in C] if need_C else [],
            [torch.zeros_like(x) for x in M] if need_M else [],
        )
    if need_C or need_M:
        W0, W = contiguous(W0), contiguous(W)
    d_W0 = [torch.empty_like(x) for x in d_out] if need_W0 else []
    d_W = [torch.empty_like(x) for _ in C for x in d_out] if need_W else []
    nothing: list[Tensor | None] = [None]
    everything = [
        *(W0 if need_C or need_M else nothing * len(W0)),
        *(W if need_C or need_M else nothing * len(W)),
        *d_out,
        *(d_W0 or nothing * len(W0)),
        *d_W,
    ]
    chosen = settings(dtype, longest)
    slots = ceil_div(longest, chosen.block_s)
    padded = slots * chosen.block_s
    tiles = block_map(rows, chosen.block_o, device)
    size = len(tiles) * len(C) * chosen.block_o * padded
    A = torch.empty(size if need_M else 0, dtype=torch.float32, device=device)
    B = torch.empty(size, dtype=torch.float32, device=device)
    with on_device_of(d_out[0]):
        table = pointer_table(everything, device)
        _projected_merge_bwd_kernel[(len(tiles),)](
            table_ptr=table.pointers,
            rows_ptr=sizes_on_device(rows, device),
            block_map_ptr=tiles,
            C_ptr=_pack(C, padded),
            M_ptr=_pack(M, padded),
            A_ptr=A,
            B_ptr=B,
            d=d,
            num_layers=len(W0),
            num_concepts=len(C),
            NEED_W0=need_W0,
            NEED_W=need_W,
            NEED_A=need_M,
            NEED_B=need_W0 or need_W or need_C,
            DTYPE=TRITON_DTYPE[dtype],
            ALIGNED=table.aligned,
            PRECISION=dot_precision(dtype),
            BLOCK_O=chosen.block_o,
            BLOCK_S=chosen.block_s,
            BLOCK_D=chosen.block_d,
            SLOTS=slots,
            GROUP=_group(len(C) * slots, dtype, both=need_M),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
        if not (need_C or need_M):
            return d_W0, d_W, [], []
        splits = min(NUM_SPLITS, len(tiles))
        shares_C = torch.empty(
            (splits if need_C else 0, len(C), padded, d), dtype=torch.float32, device=device
        )
        shares_M = torch.empty(
            (splits if need_M else 0, len(C), padded, d), dtype=torch.float32, device=device
        )
        _projected_merge_bwd_text_kernel[(ceil_div(d, chosen.block_d), len(C) * slots, splits)](
            table_ptr=table.pointers,
            rows_ptr=sizes_on_device(rows, device),
            block_map_ptr=tiles,
            A_ptr=A,
            B_ptr=B,
            d_C_ptr=shares_C,
            d_M_ptr=shares_M,
            d=d,
            num_layers=len(W0),
            num_concepts=len(C),
            num_tiles=len(tiles),
            NEED_C=need_C,
            NEED_M=need_M,
            DTYPE=TRITON_DTYPE[dtype],
            ALIGNED=table.aligned,
            PRECISION=dot_precision(dtype),
            BLOCK_O=chosen.block_o,
            BLOCK_S=chosen.block_s,
            BLOCK_D=chosen.block_d,
            SLOTS=slots,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **launch_options(),
        )
    return (
        d_W0,
        d_W,
        _unpack(shares_C.sum(0), C) if need_C else [],
        _unpack(shares_M.sum(0), M) if need_M else [],
    )


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """What the launches for one text have in common."""

    chosen: Settings
    slots: int
    """Products of block_s tokens."""
    tiles: Tensor
    arguments: dict[str, Any]

    @classmethod
    def of(cls, X: Sequence[Tensor], num_tokens: int, most: int = 64) -> _Tokens:
        """Prepare launches on contiguous X, which the caller keeps: here are only addresses."""
        device, dtype = X[0].device, X[0].dtype
        rows = tuple([len(x) for x in X])
        chosen = settings(dtype, num_tokens)
        chosen = replace(chosen, block_s=min(chosen.block_s, most))
        tiles = block_map(rows, chosen.block_o, device)
        table = pointer_table(X, device)
        return cls(
            chosen=chosen,
            slots=ceil_div(num_tokens, chosen.block_s),
            tiles=tiles,
            arguments={
                "table_ptr": table.pointers,
                "rows_ptr": sizes_on_device(rows, device),
                "first_rows_ptr": sizes_on_device(tuple(accumulate(rows, initial=0))[:-1], device),
                "block_map_ptr": tiles,
                "d": X[0].shape[1],
                "num_tokens": num_tokens,
                "DTYPE": TRITON_DTYPE[dtype],
                "ALIGNED": table.aligned,
                "PRECISION": dot_precision(dtype),
                "BLOCK_O": chosen.block_o,
                "BLOCK_S": chosen.block_s,
                "BLOCK_D": chosen.block_d,
                "num_warps": chosen.num_warps,
                "num_stages": chosen.num_stages,
                **launch_options(),
            },
        )


def token_outputs(X: Sequence[Tensor], C: Tensor) -> Tensor:
    """Return X Cᵀ [Σ o_l, s], by one launch."""
    rows = sum(map(len, X))
    A = C.new_empty(rows, len(C))
    if A.numel() == 0 or C.shape[1] == 0:
        return A.zero_()
    X = contiguous(X)
    with on_device_of(C):
        of = _Tokens.of(X, len(C))
        text = _pack([C], of.slots * of.chosen.block_s)
        _token_outputs_kernel[(len(of.tiles), of.slots)](C_ptr=text, A_ptr=A, **of.arguments)
    return A


def add_token_outputs(X: Sequence[Tensor], A: Tensor, M: Tensor) -> None:
    """Add A_l M to X_l, contiguous, by one launch."""
    if A.numel() == 0 or M.shape[1] == 0:
        return
    with on_device_of(M):
        # of 64 tokens, three products for float32 spill registers (triton 3.8, sm_90)
        of = _Tokens.of(X, len(M), most=32)
        text = _pack([M], of.slots * of.chosen.block_s)
        grid = len(of.tiles), ceil_div(M.shape[1], of.chosen.block_d)
        _add_token_outputs_kernel[grid](
            M_ptr=text, A_ptr=A.contiguous(), SLOTS=of.slots, **of.arguments
        )


def token_sums(X: Sequence[Tensor], A: Tensor) -> Tensor:
    """Return Σ_l A_lᵀ X_l [s, d], by one launch and the sum of the programs' shares."""
    num_tokens, d = A.shape[1], X[0].shape[1]
    if A.numel() == 0 or d == 0:
        return A.new_zeros(num_tokens, d)
    X = contiguous(X)
    with on_device_of(A):
        of = _Tokens.of(X, num_tokens)
        splits = min(NUM_SPLITS, len(of.tiles))
        padded = of.slots * of.chosen.block_s
        shares = torch.empty((splits, padded, d), dtype=torch.float32, device=A.device)
        grid = ceil_div(d, of.chosen.block_d), of.slots, splits
        _token_sums_kernel[grid](
            A_ptr=A.contiguous(), sums_ptr=shares, num_tiles=len(of.tiles), **of.arguments
        )
        return shares.sum(0)[:num_tokens].to(A.dtype)
