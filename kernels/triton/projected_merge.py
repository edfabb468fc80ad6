"""projected_merge: every layer that reads text, one tile of rows per program.

A program owns BLOCK_O rows of one layer. Forward, it first projects its rows of each W_n − W0 on
the concept's tokens, A_n = (W_n − W0) C_nᵀ, then writes W0 + Σ_n A_n M_n. Backward is the same with
C and M swapped: B_n = φ̄ M_nᵀ, then W̄_n = B_n C_n. The projections [BLOCK_O, s_n] pass through a
scratch buffer, because a program cannot index registers by concept.

Bytes: forward reads N + 1 weights and writes one. W0 is read once for several concepts, two in
float32 (one, of an odd number) and four otherwise, and once more at the end, from the cache, which
is told to prefer it to W_n. FLOPs: 4 o d s per concept, in float32 accuracy on the tensor cores.
"""

# N = concepts, L = layers, o, d = rows and columns of a weight; flat lists are concept-major
# S = BLOCK_S * SLOTS: tokens of a concept, padded with zero rows

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import ceil_div, contiguous, on_device_of
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
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs, Tensors


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
        tile = load_tile(W_ptr, offs_d, rows, d, BLOCK_O, "evict_first") - rows_of_base
    text = load_text(text_ptr, i, 0, offs_d, d, BLOCK_S, 1)
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
    base_ptr = tile_pointer(table_ptr, base * num_layers + layer, first, d, DTYPE, ALIGNED)
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
        W_ptr = tile_pointer(table_ptr, W_i, first, d, DTYPE, ALIGNED)
        W_ptr1 = tile_pointer(table_ptr, W_i1, first, d, DTYPE, ALIGNED)
        W_ptr2 = tile_pointer(table_ptr, W_i2, first, d, DTYPE, ALIGNED)
        W_ptr3 = tile_pointer(table_ptr, W_i3, first, d, DTYPE, ALIGNED)
        A = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A1 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A2 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        A3 = tl.zeros((BLOCK_O, BLOCK_S), tl.float32)
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            rows_of_base = load_tile(base_ptr, offs_d, rows, d, BLOCK_O, "evict_last")
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
    layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
    _project(
        table_ptr, 0, C_ptr, A_ptr, layer, tile, first, rows, d, num_layers, num_concepts,
        True, DTYPE, ALIGNED, PRECISION, BLOCK_O, BLOCK_S, BLOCK_D, SLOTS, GROUP,
    )  # fmt: skip
    # The projections were written by other threads of this program.
    tl.debug_barrier()
    W0_ptr = tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
    out_ptr = tile_pointer(
        table_ptr, (num_concepts + 1) * num_layers + layer, first, d, DTYPE, ALIGNED
    )
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        merged = load_tile(W0_ptr, offs_d, rows, d, BLOCK_O)
        for n in range(num_concepts):
            for j in range(SLOTS):
                A = tl.load(_scratch(A_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
                M = load_text(M_ptr, n, j, offs_d, d, BLOCK_S, SLOTS)
                merged = tl.dot(A, M, merged, input_precision=PRECISION)
        store_tile(out_ptr, merged, offs_d, rows, d, BLOCK_O)


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
    layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
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
    d_out_ptr = tile_pointer(
        table_ptr, (num_concepts + 1) * num_layers + layer, first, d, DTYPE, ALIGNED
    )
    if NEED_W0 or NEED_W:
        # The projections were written by other threads of this program.
        tl.debug_barrier()
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            d_W0 = load_tile(d_out_ptr, offs_d, rows, d, BLOCK_O)
            for n in range(num_concepts):
                d_W = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
                for j in range(SLOTS):
                    B = tl.load(_scratch(B_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
                    C = load_text(C_ptr, n, j, offs_d, d, BLOCK_S, SLOTS)
                    d_W = tl.dot(B, C, d_W, input_precision=PRECISION)
                d_W0 -= d_W
                if NEED_W:
                    i = (num_concepts + 3 + n) * num_layers + layer
                    d_W_ptr = tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
                    store_tile(d_W_ptr, d_W, offs_d, rows, d, BLOCK_O)
            if NEED_W0:
                i = (num_concepts + 2) * num_layers + layer
                d_W0_ptr = tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
                store_tile(d_W0_ptr, d_W0, offs_d, rows, d, BLOCK_O)


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
        layer, first, rows = place(block_map_ptr, rows_ptr, tile, BLOCK_O)
        if NEED_C:
            W0_ptr = tile_pointer(table_ptr, layer, first, d, DTYPE, ALIGNED)
            W_ptr = tile_pointer(table_ptr, (n + 1) * num_layers + layer, first, d, DTYPE, ALIGNED)
            D = load_tile(W_ptr, offs_d, rows, d, BLOCK_O) - load_tile(
                W0_ptr, offs_d, rows, d, BLOCK_O
            )
            B = tl.load(_scratch(B_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
            d_C = tl.dot(tl.trans(B), D, d_C, input_precision=PRECISION)
        if NEED_M:
            i = (num_concepts + 1) * num_layers + layer
            d_out_ptr = tile_pointer(table_ptr, i, first, d, DTYPE, ALIGNED)
            d_out = load_tile(d_out_ptr, offs_d, rows, d, BLOCK_O)
            A = tl.load(_scratch(A_ptr, tile, n, j, num_concepts, BLOCK_O, BLOCK_S, SLOTS))
            d_M = tl.dot(tl.trans(A), d_out, d_M, input_precision=PRECISION)
    first_row = tl.cast(((split * num_concepts + n) * SLOTS + j) * BLOCK_S, tl.int64)
    offs = first_row * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    mask = (offs_d < d)[None, :]
    if NEED_C:
        tl.store(d_C_ptr + offs, d_C, mask)
    if NEED_M:
        tl.store(d_M_ptr + offs, d_M, mask)


def _group(num_products: int, dtype: torch.dtype, *, both: bool = False) -> int:
    """Return how many products share a pass over the rows: evenly, and no more than fit.

    float32, whose products are three, spills registers with three; with two where a kernel makes
    both projections, of W_n − W0 and of the gradient (compiled for sm_100 with triton 3.8), and
    with a loop of its own for one that is left over: an odd number is made one by one, which reads
    base once more from the cache, but makes no product twice.
    """
    largest = 4 if dtype != torch.float32 else 1 if both or num_products % 2 else 2
    return ceil_div(num_products, ceil_div(num_products, largest))


def _unpack(packed: Tensor, text: Sequence[Tensor]) -> list[Tensor]:
    """Undo `pack`: [N, padded, d] -> N tensors [s_n, d], of the text's dtype."""
    return [row[: len(x)].to(x.dtype, copy=True) for row, x in zip(packed, text, strict=True)]


def projected_merge_forward(inputs: arguments.ProjectedMerge) -> list[Tensor]:
    """Return φ, L tensors, by one launch."""
    W0, W, C, M = inputs
    longest = max((len(C_n) for C_n in C), default=0)
    if longest == 0:
        return [x.clone(memory_format=torch.contiguous_format) for x in W0]
    W0, W = contiguous(W0), contiguous(W)
    out = [torch.empty_like(x) for x in W0]
    if W0[0].shape[1] == 0 or sum([x.shape[0] for x in W0]) == 0:
        return out
    of = Tiles.of(W0, [*W0, *W, *out], longest)
    size = of.count * len(C) * of.chosen.block_o * of.padded
    with on_device_of(W0[0]):
        _projected_merge_fwd_kernel[(of.count,)](
            C_ptr=pack(C, of.padded),
            M_ptr=pack(M, of.padded),
            A_ptr=torch.empty(size, dtype=torch.float32, device=W0[0].device),
            num_layers=len(W0),
            num_concepts=len(C),
            SLOTS=of.slots,
            GROUP=_group(len(C) * of.slots, W0[0].dtype),
            **of.arguments,
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
    if longest == 0 or d == 0 or sum([x.shape[0] for x in d_out]) == 0:
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
    of = Tiles.of(d_out, everything, longest)
    size = of.count * len(C) * of.chosen.block_o * of.padded
    A = torch.empty(size if need_M else 0, dtype=torch.float32, device=device)
    B = torch.empty(size, dtype=torch.float32, device=device)
    common = {
        "A_ptr": A,
        "B_ptr": B,
        "num_layers": len(W0),
        "num_concepts": len(C),
        "SLOTS": of.slots,
        **of.arguments,
    }
    with on_device_of(d_out[0]):
        _projected_merge_bwd_kernel[(of.count,)](
            C_ptr=pack(C, of.padded),
            M_ptr=pack(M, of.padded),
            NEED_W0=need_W0,
            NEED_W=need_W,
            NEED_A=need_M,
            NEED_B=need_W0 or need_W or need_C,
            GROUP=_group(len(C) * of.slots, dtype, both=need_M),
            **common,
        )
        if not (need_C or need_M):
            return d_W0, d_W, [], []
        splits = min(NUM_SPLITS, of.count)
        shares_C, shares_M = (
            torch.empty((splits if need else 0, len(C), of.padded, d), dtype=B.dtype, device=device)
            for need in (need_C, need_M)
        )
        _projected_merge_bwd_text_kernel[ceil_div(d, of.chosen.block_d), len(C) * of.slots, splits](
            d_C_ptr=shares_C,
            d_M_ptr=shares_M,
            num_tiles=of.count,
            NEED_C=need_C,
            NEED_M=need_M,
            **common,
        )
    return (
        d_W0,
        d_W,
        _unpack(shares_C.sum(0), C) if need_C else [],
        _unpack(shares_M.sum(0), M) if need_M else [],
    )
