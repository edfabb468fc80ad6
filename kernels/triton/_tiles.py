"""What the kernels on layers that read text share: tiles of a layer's rows, and packed tokens."""

# L = layers, o, d = rows and columns of one; S = BLOCK_S * SLOTS: tokens of a text, padded with
# zero rows

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    dot_precision,
    launch_options,
    load_pointer,
    pointer_table,
    sizes_on_device,
)

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
def place(block_map_ptr, rows_ptr, tile, BLOCK_O: tl.constexpr):
    """Return the layer of a tile, the first of its rows, and how many there are."""
    layer = tl.load(block_map_ptr + 2 * tile)
    # int64: offsets into weights may pass 2**31
    first = tl.load(block_map_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_O
    rows = tl.minimum(tl.load(rows_ptr + layer) - first, BLOCK_O).to(tl.int32)
    return layer, first, rows


@triton.jit
def tile_pointer(table_ptr, i, first, d, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to row `first` of the i-th matrix; offsets within a tile fit in 32 bits."""
    return load_pointer(table_ptr, i, DTYPE, ALIGNED) + first * d


# Triton 3.5 takes a default for what it is, and a text is no constant of a kernel there.
_AS_USUAL = tl.constexpr("")


@triton.jit
def load_tile(
    pointer, offs_d, rows, d, BLOCK_O: tl.constexpr, EVICTION: tl.constexpr = _AS_USUAL
):  # fmt: skip
    """Load a tile of rows as float32, zero outside; EVICTION tells the cache what comes next."""
    offs_o = tl.arange(0, BLOCK_O)
    mask = (offs_o < rows)[:, None] & (offs_d < d)[None, :]
    ptrs = pointer + offs_o[:, None] * d + offs_d[None, :]
    return tl.load(ptrs, mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def store_tile(pointer, tile, offs_d, rows, d, BLOCK_O: tl.constexpr):
    """Round a tile of rows to the pointer's dtype and store what is inside."""
    offs_o = tl.arange(0, BLOCK_O)
    mask = (offs_o < rows)[:, None] & (offs_d < d)[None, :]
    ptrs = pointer + offs_o[:, None] * d + offs_d[None, :]
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask)


@triton.jit
def load_text(text_ptr, n, j, offs_d, d, BLOCK_S: tl.constexpr, SLOTS: tl.constexpr):
    """Load tokens j BLOCK_S … of concept n from [N, S, d] as float32."""
    first = tl.cast((n * SLOTS + j) * BLOCK_S, tl.int64)
    ptrs = text_ptr + first * d + tl.arange(0, BLOCK_S)[:, None] * d + offs_d[None, :]
    return tl.load(ptrs, (offs_d < d)[None, :], other=0.0).to(tl.float32)


def pack(text: Sequence[Tensor], padded: int) -> Tensor:
    """Return [N, padded, d], each concept's tokens followed by zero rows."""
    packed = text[0].new_zeros(len(text), padded, text[0].shape[1])
    for row, x in zip(packed, text, strict=True):
        row[: len(x)] = x
    return packed


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What the launches of one call have in common."""

    chosen: Settings
    slots: int
    """Products of block_s tokens that the longest text takes."""
    count: int
    """Tiles of all layers together."""
    arguments: dict[str, Any]

    @property
    def padded(self) -> int:
        """S."""
        return self.slots * self.chosen.block_s

    @classmethod
    def of(
        cls,
        layers: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
        longest: int,
        *,
        most: int = 64,
    ) -> Tiles:
        """Prepare launches on tensors, contiguous, which the caller keeps: here are only addresses.

        Args:
            layers: [o_l, d], whose rows are cut into tiles.
            tensors: shaped as the layers, over and over.
            longest: tokens of the longest text.
            most: tokens of a product.
        """
        device, dtype = layers[0].device, layers[0].dtype
        # not `len`, which is a Python function of tensors
        rows = tuple([x.shape[0] for x in layers])
        chosen = settings(dtype, longest)
        chosen = replace(chosen, block_s=min(chosen.block_s, most))
        blocks = block_map(rows, chosen.block_o, device)
        table = pointer_table(tensors, device)
        return cls(
            chosen=chosen,
            slots=ceil_div(longest, chosen.block_s),
            count=len(blocks),
            arguments={
                "table_ptr": table.pointers,
                "rows_ptr": sizes_on_device(rows, device),
                "block_map_ptr": blocks,
                "d": layers[0].shape[1],
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
