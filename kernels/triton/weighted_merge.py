"""weighted_merge: a stream over every parameter of a model, forward and backward in one pass each.

Bytes: forward reads N + 1 values per parameter and writes one; backward reads up to N + 2 and
writes up to N + 1. A multiply and an add per value read: memory is the only limit.
"""

# N = concepts, P = tensors; flat lists are concept-major, thetas[n * P + p]

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    block_map,
    contiguous,
    launch_stream,
    load_pointer,
    load_wide,
    store_narrow,
    stream_place,
)
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs, Tensors


def _block(dtype: torch.dtype) -> int:
    """Return the elements per program: each thread makes two 16-byte accesses per tensor.

    Chosen from the count of bytes in flight, not measured on a GPU: N + 1 independent loads of 512
    bytes a warp, twice, before the last use.
    """
    return 1024 * (4 // dtype.itemsize)


@triton.jit
def _merge_block(
    table_ptr, weights_ptr, p, num_tensors, start, size,
    NUM_CONCEPTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    base_ptr = load_pointer(table_ptr, p, DTYPE, ALIGNED) + start
    out_ptr = load_pointer(table_ptr, (NUM_CONCEPTS + 1) * num_tensors + p, DTYPE, ALIGNED) + start
    base = load_wide(base_ptr + offs, mask, FULL)
    merged = base
    for n in tl.range(0, NUM_CONCEPTS, loop_unroll_factor=4):
        theta_ptr = load_pointer(table_ptr, (n + 1) * num_tensors + p, DTYPE, ALIGNED) + start
        theta = load_wide(theta_ptr + offs, mask, FULL)
        merged += tl.load(weights_ptr + n) * (theta - base)
    store_narrow(out_ptr + offs, merged, mask, FULL)


@triton.jit
def _weighted_merge_fwd_kernel(
    table_ptr,  # [(N + 2) * P] in, int64: addresses of base, each θ_n, out; out aliases nothing
    sizes_ptr,  # [P] in, int64: elements
    block_map_ptr,  # [num_programs, 2] in, int32
    weights_ptr,  # [N] in, fp32
    num_tensors,  # P
    NUM_CONCEPTS: tl.constexpr,  # N
    DTYPE: tl.constexpr,  # of base, θ and out
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements per program
):
    p, start, size = stream_place(block_map_ptr, sizes_ptr, BLOCK)
    if start + BLOCK <= size:
        _merge_block(
            table_ptr, weights_ptr, p, num_tensors, start, size,
            NUM_CONCEPTS, DTYPE, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        _merge_block(
            table_ptr, weights_ptr, p, num_tensors, start, size,
            NUM_CONCEPTS, DTYPE, ALIGNED, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _merge_bwd_block(
    table_ptr, weights_ptr, d_weights_ptr, pid, p, num_tensors, start, size,
    NEED_BASE: tl.constexpr, NEED_THETAS: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
    NUM_CONCEPTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    d_out_ptr = load_pointer(table_ptr, p, DTYPE, ALIGNED) + start
    d_out = load_wide(d_out_ptr + offs, mask, FULL)
    if NEED_WEIGHTS:
        base_ptr = load_pointer(table_ptr, num_tensors + p, DTYPE, ALIGNED) + start
        base = load_wide(base_ptr + offs, mask, FULL)
    rest = 1.0
    for n in tl.range(0, NUM_CONCEPTS, loop_unroll_factor=4):
        weight = tl.load(weights_ptr + n)
        rest -= weight
        if NEED_THETAS:
            i = (NUM_CONCEPTS + 3 + n) * num_tensors + p
            d_theta_ptr = load_pointer(table_ptr, i, DTYPE, ALIGNED) + start
            store_narrow(d_theta_ptr + offs, weight * d_out, mask, FULL)
        if NEED_WEIGHTS:
            theta_ptr = load_pointer(table_ptr, (n + 2) * num_tensors + p, DTYPE, ALIGNED) + start
            theta = load_wide(theta_ptr + offs, mask, FULL)
            tl.store(d_weights_ptr + pid * NUM_CONCEPTS + n, tl.sum(d_out * (theta - base)))
    if NEED_BASE:
        i = (NUM_CONCEPTS + 2) * num_tensors + p
        d_base_ptr = load_pointer(table_ptr, i, DTYPE, ALIGNED) + start
        store_narrow(d_base_ptr + offs, rest * d_out, mask, FULL)


@triton.jit
def _weighted_merge_bwd_kernel(
    table_ptr,  # [(2 N + 3) * P] in, int64: addresses of d_out, base, θ_n, d_base, d_θ_n
    sizes_ptr,  # [P] in, int64: elements
    block_map_ptr,  # [num_programs, 2] in, int32
    weights_ptr,  # [N] in, fp32
    d_weights_ptr,  # [num_programs, N] out, fp32: each program's share of the sum
    num_tensors,  # P
    NEED_BASE: tl.constexpr,  # write d_base
    NEED_THETAS: tl.constexpr,  # write d_θ
    NEED_WEIGHTS: tl.constexpr,  # read base and θ, write d_weights
    NUM_CONCEPTS: tl.constexpr,  # N
    DTYPE: tl.constexpr,  # of all tensors but the weights
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements per program
):
    # int64: programs times concepts may pass 2**31
    pid = tl.program_id(0).to(tl.int64)
    p, start, size = stream_place(block_map_ptr, sizes_ptr, BLOCK)
    if start + BLOCK <= size:
        _merge_bwd_block(
            table_ptr, weights_ptr, d_weights_ptr, pid, p, num_tensors, start, size,
            NEED_BASE, NEED_THETAS, NEED_WEIGHTS, NUM_CONCEPTS, DTYPE, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        _merge_bwd_block(
            table_ptr, weights_ptr, d_weights_ptr, pid, p, num_tensors, start, size,
            NEED_BASE, NEED_THETAS, NEED_WEIGHTS, NUM_CONCEPTS, DTYPE, ALIGNED, BLOCK, False,
        )  # fmt: skip


def weighted_merge_forward(inputs: arguments.WeightedMerge) -> list[Tensor]:
    """Return φ, P tensors, by one launch."""
    base, thetas, weights = inputs
    base, thetas, weights = contiguous(base), contiguous(thetas), weights.contiguous()
    out = [torch.empty_like(b) for b in base]
    launch_stream(
        *(_weighted_merge_fwd_kernel, base, [*base, *thetas, *out]),
        block=_block(base[0].dtype),
        weights_ptr=weights,
        NUM_CONCEPTS=len(weights),
    )
    return out


def weighted_merge_backward(
    d_out: Tensors, inputs: arguments.WeightedMerge, needs: Needs
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return d_base, d_thetas, d_weights, by one launch and the sum of the programs' shares."""
    base, thetas, weights = inputs
    need_base, need_thetas, need_weights = needs
    d_out, weights = contiguous(d_out), weights.contiguous()
    if need_weights:
        base, thetas = contiguous(base), contiguous(thetas)
    d_base = [torch.empty_like(d) for d in d_out] if need_base else []
    d_thetas = [torch.empty_like(d) for _ in weights for d in d_out] if need_thetas else []
    everything: list[Tensor | None] = [
        *d_out,
        *(base if need_weights else [None] * len(base)),
        *(thetas if need_weights else [None] * len(thetas)),
        *(d_base or [None] * len(base)),
        *d_thetas,
    ]
    block = _block(d_out[0].dtype)
    sizes = tuple([d.numel() for d in d_out])
    programs = len(block_map(sizes, block, d_out[0].device)) if need_weights else 0
    shares = weights.new_empty(programs, len(weights))
    if any(needs):
        launch_stream(
            *(_weighted_merge_bwd_kernel, d_out, everything),
            block=block,
            weights_ptr=weights,
            d_weights_ptr=shares,
            NEED_BASE=need_base,
            NEED_THETAS=need_thetas,
            NEED_WEIGHTS=need_weights,
            NUM_CONCEPTS=len(weights),
        )
    return d_base, d_thetas, shares.double().sum(0).float() if need_weights else None
