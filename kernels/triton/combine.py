"""combine: a stream over lists of tensors, read once and written once.

Bytes: J values read and I written per element. I J multiply-adds: memory is the only limit.
"""

# P = tensors of a list, J = given lists, I = resulting lists

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    contiguous,
    launch_stream,
    load_pointer,
    load_wide,
    store_narrow,
    stream_place,
)

MOST = 3
"""Lists on either side."""


@triton.jit
def _store_sum(
    table_ptr, out_list, p, num_tensors, start, offs, mask, x0, x1, x2, f0, f1, f2,
    USED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store the sum of the products whose bits are set: infinity times 0 would be NaN."""
    total = tl.zeros_like(x0)
    if USED & 1:
        total += f0 * x0
    if USED & 2:
        total += f1 * x1
    if USED & 4:
        total += f2 * x2
    out_ptr = load_pointer(table_ptr, out_list * num_tensors + p, DTYPE, ALIGNED) + start
    store_narrow(out_ptr + offs, total, mask, FULL)


@triton.jit
def _combine_block(
    table_ptr, p, num_tensors, start, size, f00, f01, f02, f10, f11, f12, f20, f21, f22,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr,
    USED0: tl.constexpr, USED1: tl.constexpr, USED2: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    # everything is read before anything is written: a result may be one of the given lists
    x0_ptr = load_pointer(table_ptr, p, DTYPE, ALIGNED) + start
    x0 = load_wide(x0_ptr + offs, mask, FULL)
    x1 = x0
    x2 = x0
    if NUM_IN > 1:
        x1_ptr = load_pointer(table_ptr, num_tensors + p, DTYPE, ALIGNED) + start
        x1 = load_wide(x1_ptr + offs, mask, FULL)
    if NUM_IN > 2:
        x2_ptr = load_pointer(table_ptr, 2 * num_tensors + p, DTYPE, ALIGNED) + start
        x2 = load_wide(x2_ptr + offs, mask, FULL)
    _store_sum(
        table_ptr, NUM_IN, p, num_tensors, start, offs, mask, x0, x1, x2, f00, f01, f02,
        USED0, DTYPE, ALIGNED, FULL,
    )  # fmt: skip
    if NUM_OUT > 1:
        _store_sum(
            table_ptr, NUM_IN + 1, p, num_tensors, start, offs, mask, x0, x1, x2, f10, f11, f12,
            USED1, DTYPE, ALIGNED, FULL,
        )  # fmt: skip
    if NUM_OUT > 2:
        _store_sum(
            table_ptr, NUM_IN + 2, p, num_tensors, start, offs, mask, x0, x1, x2, f20, f21, f22,
            USED2, DTYPE, ALIGNED, FULL,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    table_ptr,  # [(J + I) P] in, int64: addresses of x, and of out, which may be among x
    sizes_ptr,  # [P] in, int64: elements
    block_map_ptr,  # [num_programs, 2] in, int32
    num_tensors,  # P
    f00,  # fp32, factor of the first result and the first list; so are those that follow
    f01,
    f02,
    f10,
    f11,
    f12,
    f20,
    f21,
    f22,
    NUM_IN: tl.constexpr,  # J
    NUM_OUT: tl.constexpr,  # I
    USED0: tl.constexpr,  # bits of the lists that the first result reads
    USED1: tl.constexpr,  # likewise the second
    USED2: tl.constexpr,  # likewise the third
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements per program
):
    p, start, size = stream_place(block_map_ptr, sizes_ptr, BLOCK)
    if start + BLOCK <= size:
        _combine_block(
            table_ptr, p, num_tensors, start, size, f00, f01, f02, f10, f11, f12, f20, f21, f22,
            NUM_IN, NUM_OUT, USED0, USED1, USED2, DTYPE, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        _combine_block(
            table_ptr, p, num_tensors, start, size, f00, f01, f02, f10, f11, f12, f20, f21, f22,
            NUM_IN, NUM_OUT, USED0, USED1, USED2, DTYPE, ALIGNED, BLOCK, False,
        )  # fmt: skip


def combine_into(
    out: Sequence[Tensor], x: Sequence[Tensor], factors: Sequence[Sequence[float]]
) -> None:
    """Write Σ_j f_ij x_j into `out`, contiguous, which may have tensors of `x`, by one launch."""
    num_in = len(factors[0])
    rows = [[*row, *[0.0] * (MOST - num_in)] for row in factors]
    rows += [[0.0] * MOST for _ in range(MOST - len(factors))]
    launch_stream(
        _combine_kernel,
        x[: len(x) // num_in],
        [*contiguous(x), *out],
        **{f"f{i}{j}": rows[i][j] for i in range(MOST) for j in range(MOST)},
        NUM_IN=num_in,
        NUM_OUT=len(factors),
        **{f"USED{i}": sum((rows[i][j] != 0) << j for j in range(num_in)) for i in range(MOST)},
    )
