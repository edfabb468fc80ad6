"""adam_step: a stream over every tensor of a lower level, forward and backward in one pass each.

Bytes: forward reads four values per element and writes three; backward reads six and writes up to
four. Some 20 operations per element: memory is the only limit.
"""

# P = tensors

from __future__ import annotations

import torch
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
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs, Tensors


@triton.jit
def _moments(
    table_ptr, g_list, p, num_tensors, start, offs, mask, beta1, rest1, beta2, rest2,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Return g and the two moments after the step; the lists g, m, v follow each other."""
    g_ptr = load_pointer(table_ptr, g_list * num_tensors + p, DTYPE, ALIGNED) + start
    m_ptr = load_pointer(table_ptr, (g_list + 1) * num_tensors + p, DTYPE, ALIGNED) + start
    v_ptr = load_pointer(table_ptr, (g_list + 2) * num_tensors + p, DTYPE, ALIGNED) + start
    g = load_wide(g_ptr + offs, mask, FULL)
    m = load_wide(m_ptr + offs, mask, FULL) * beta1 + g * rest1
    v = load_wide(v_ptr + offs, mask, FULL) * beta2 + g * g * rest2
    return g, m, v


@triton.jit
def _step_block(
    table_ptr, p, num_tensors, start, size,
    lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    z_ptr = load_pointer(table_ptr, p, DTYPE, ALIGNED) + start
    z = load_wide(z_ptr + offs, mask, FULL)
    _, m, v = _moments(
        table_ptr, 1, p, num_tensors, start, offs, mask, beta1, rest1, beta2, rest2,
        DTYPE, ALIGNED, FULL,
    )  # fmt: skip
    update = m / correction1 / (tl.sqrt(v / correction2) + eps)
    out_z_ptr = load_pointer(table_ptr, 4 * num_tensors + p, DTYPE, ALIGNED) + start
    out_m_ptr = load_pointer(table_ptr, 5 * num_tensors + p, DTYPE, ALIGNED) + start
    out_v_ptr = load_pointer(table_ptr, 6 * num_tensors + p, DTYPE, ALIGNED) + start
    store_narrow(out_z_ptr + offs, z * keep - lr * update, mask, FULL)
    store_narrow(out_m_ptr + offs, m, mask, FULL)
    store_narrow(out_v_ptr + offs, v, mask, FULL)


@triton.jit
def _adam_step_fwd_kernel(
    table_ptr,  # [7 P] in, int64: addresses of z, g, m, v, out z, m, v; the last two may be m, v
    sizes_ptr,  # [P] in, int64: elements
    block_map_ptr,  # [num_programs, 2] in, int32
    num_tensors,  # P
    lr,  # fp32, and so are those that follow
    keep,  # 1 - lr weight_decay
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    eps,
    correction1,  # 1 - beta1^(step + 1)
    correction2,  # 1 - beta2^(step + 1)
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements per program
):
    p, start, size = stream_place(block_map_ptr, sizes_ptr, BLOCK)
    if start + BLOCK <= size:
        _step_block(
            table_ptr, p, num_tensors, start, size,
            lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
            DTYPE, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        _step_block(
            table_ptr, p, num_tensors, start, size,
            lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
            DTYPE, ALIGNED, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _pullback_block(
    table_ptr, p, num_tensors, start, size,
    lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
    NEED_Z: tl.constexpr, NEED_G: tl.constexpr, NEED_M: tl.constexpr, NEED_V: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < size - start
    d_z_ptr = load_pointer(table_ptr, p, DTYPE, ALIGNED) + start
    d_m_ptr = load_pointer(table_ptr, num_tensors + p, DTYPE, ALIGNED) + start
    d_v_ptr = load_pointer(table_ptr, 2 * num_tensors + p, DTYPE, ALIGNED) + start
    d_z = load_wide(d_z_ptr + offs, mask, FULL)
    g, m, v = _moments(
        table_ptr, 3, p, num_tensors, start, offs, mask, beta1, rest1, beta2, rest2,
        DTYPE, ALIGNED, FULL,
    )  # fmt: skip
    root = tl.sqrt(v / correction2)
    update = m / correction1 / (root + eps)
    slope = lr * d_z / (root + eps)
    d_m = load_wide(d_m_ptr + offs, mask, FULL) - slope / correction1
    # the root has slope 0 at 0
    seen = root > 0
    through_root = slope * update / (2 * correction2 * tl.where(seen, root, 1.0))
    d_v = load_wide(d_v_ptr + offs, mask, FULL) + tl.where(seen, through_root, 0.0)
    if NEED_Z:
        out_ptr = load_pointer(table_ptr, 6 * num_tensors + p, DTYPE, ALIGNED) + start
        store_narrow(out_ptr + offs, keep * d_z, mask, FULL)
    if NEED_G:
        out_ptr = load_pointer(table_ptr, 7 * num_tensors + p, DTYPE, ALIGNED) + start
        store_narrow(out_ptr + offs, rest1 * d_m + 2 * rest2 * g * d_v, mask, FULL)
    if NEED_M:
        out_ptr = load_pointer(table_ptr, 8 * num_tensors + p, DTYPE, ALIGNED) + start
        store_narrow(out_ptr + offs, beta1 * d_m, mask, FULL)
    if NEED_V:
        out_ptr = load_pointer(table_ptr, 9 * num_tensors + p, DTYPE, ALIGNED) + start
        store_narrow(out_ptr + offs, beta2 * d_v, mask, FULL)


@triton.jit
def _adam_step_bwd_kernel(
    table_ptr,  # [10 P] in, int64: addresses of d_out z, m, v, of g, m, v and of d_z, d_g, d_m, d_v
    sizes_ptr,  # [P] in, int64: elements
    block_map_ptr,  # [num_programs, 2] in, int32
    num_tensors,  # P
    lr,  # fp32, and so are those that follow
    keep,  # 1 - lr weight_decay
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,  # 1 - beta2
    eps,
    correction1,  # 1 - beta1^(step + 1)
    correction2,  # 1 - beta2^(step + 1)
    NEED_Z: tl.constexpr,  # write d_z
    NEED_G: tl.constexpr,  # write d_g
    NEED_M: tl.constexpr,  # write d_m
    NEED_V: tl.constexpr,  # write d_v
    DTYPE: tl.constexpr,  # of all tensors
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements per program
):
    p, start, size = stream_place(block_map_ptr, sizes_ptr, BLOCK)
    if start + BLOCK <= size:
        _pullback_block(
            table_ptr, p, num_tensors, start, size,
            lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
            NEED_Z, NEED_G, NEED_M, NEED_V, DTYPE, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        _pullback_block(
            table_ptr, p, num_tensors, start, size,
            lr, keep, beta1, rest1, beta2, rest2, eps, correction1, correction2,
            NEED_Z, NEED_G, NEED_M, NEED_V, DTYPE, ALIGNED, BLOCK, False,
        )  # fmt: skip


def _factors(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> dict[str, float]:
    """Return the kernels' scalars."""
    # a whole number would be passed as an integer
    values = {
        "lr": lr,
        "keep": 1 - lr * weight_decay,
        "beta1": beta1,
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "eps": eps,
        "correction1": 1 - beta1 ** (step + 1),
        "correction2": 1 - beta2 ** (step + 1),
    }
    return {name: float(value) for name, value in values.items()}


def adam_step_forward(inputs: arguments.AdamStep, *, overwrite: bool = False) -> list[Tensor]:
    """Return z, m and v after the step, one after the other, by one launch; m, v in place if asked.

    Each program reads its elements before it writes them.
    """
    z, g, m, v = map(contiguous, inputs[:4])
    moments = [*m, *v]
    out = [torch.empty_like(x) for x in z]
    out += moments if overwrite else [torch.empty_like(x) for x in moments]
    launch_stream(_adam_step_fwd_kernel, z, [*z, *g, *moments, *out], **_factors(*inputs[4:]))
    return out


def adam_step_backward(
    d_out: Tensors, saved: arguments.AdamStepSaved, needs: Needs
) -> list[list[Tensor]]:
    """Return the gradients of z, g, m and v, an empty list where not needed, by one launch."""
    need_z, need_g, need_m, need_v = needs
    given = contiguous([*d_out, *saved.g, *saved.m, *saved.v])
    like = given[: len(saved.g)]
    grads = [[torch.empty_like(x) for x in like] if need else [] for need in needs]
    written = [x for grad in grads for x in (grad or [None] * len(like))]
    if any(needs):
        launch_stream(
            _adam_step_bwd_kernel,
            *(like, [*given, *written]),
            **_factors(*saved[3:]),
            NEED_Z=need_z,
            NEED_G=need_g,
            NEED_M=need_m,
            NEED_V=need_v,
        )
    return grads
