"""geglu: a · gelu(b), x = [a b]; forward, backward and double backward in one pass each.

Bytes per element of y: 3 e forward, 5 e backward, 8 e double backward; memory is the only limit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import ceil_div, launch_options, on_device_of, store_narrow
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Directions, Needs

NUM_WARPS = 4


@triton.jit
def _place(d, BLOCK: tl.constexpr):
    """Return the row of a program, its columns, and which of them there are."""
    blocks = tl.cdiv(d, BLOCK)
    pid = tl.program_id(0)
    offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    # int64: a tensor may pass 2**31 elements
    return (pid // blocks).to(tl.int64), offs, offs < d


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask, other=0.0).to(tl.float32)


@triton.jit
def _gelu(b):
    """Return b Φ(b) and its first two derivatives."""
    below = 0.5 * (1.0 + tl.math.erf(b * 0.7071067811865476))
    density = tl.exp(-0.5 * b * b) * 0.3989422804014327
    return b * below, below + b * density, density * (2.0 - b * b)


@triton.jit
def _geglu_fwd_kernel(
    x_ptr,  # [rows, 2 d] in
    out_ptr,  # [rows, d] out
    d,
    BLOCK: tl.constexpr,  # columns per program
):
    row, offs, mask = _place(d, BLOCK)
    x_ptr += row * 2 * d
    value, _, _ = _gelu(_load(x_ptr + d + offs, mask))
    store_narrow(out_ptr + row * d + offs, _load(x_ptr + offs, mask) * value, mask, False)


@triton.jit
def _geglu_bwd_kernel(
    x_ptr,  # [rows, 2 d] in
    d_out_ptr,  # [rows, d] in
    d_x_ptr,  # [rows, 2 d] out
    d,
    BLOCK: tl.constexpr,
):
    row, offs, mask = _place(d, BLOCK)
    x_ptr += row * 2 * d
    d_x_ptr += row * 2 * d
    value, slope, _ = _gelu(_load(x_ptr + d + offs, mask))
    up = _load(d_out_ptr + row * d + offs, mask)
    store_narrow(d_x_ptr + offs, up * value, mask, False)
    store_narrow(d_x_ptr + d + offs, up * _load(x_ptr + offs, mask) * slope, mask, False)


@triton.jit
def _geglu_double_bwd_kernel(
    x_ptr,  # [rows, 2 d] in
    d_out_ptr,  # [rows, d] in
    u_x_ptr,  # [rows, 2 d] in
    d_d_out_ptr,  # [rows, d] out
    d_x_ptr,  # [rows, 2 d] out
    d,
    BLOCK: tl.constexpr,
):
    row, offs, mask = _place(d, BLOCK)
    x_ptr += row * 2 * d
    u_x_ptr += row * 2 * d
    d_x_ptr += row * 2 * d
    a, up = _load(x_ptr + offs, mask), _load(d_out_ptr + row * d + offs, mask)
    u_a, u_b = _load(u_x_ptr + offs, mask), _load(u_x_ptr + d + offs, mask)
    value, slope, curve = _gelu(_load(x_ptr + d + offs, mask))
    store_narrow(d_d_out_ptr + row * d + offs, u_a * value + u_b * a * slope, mask, False)
    store_narrow(d_x_ptr + offs, up * slope * u_b, mask, False)
    store_narrow(d_x_ptr + d + offs, up * (u_a * slope + u_b * a * curve), mask, False)


def _launch(kernel: Any, x: Tensor, **pointers: Tensor) -> None:
    """Launch a kernel with a program for each block of each row's columns."""
    d = x.shape[-1] // 2
    rows = x.numel() // (2 * d) if d else 0
    block = min(1024, max(128, triton.next_power_of_2(d)))
    if rows == 0:
        return
    with on_device_of(x):
        kernel[(rows * ceil_div(d, block),)](
            x_ptr=x.contiguous(),
            **pointers,
            d=d,
            BLOCK=block,
            num_warps=NUM_WARPS,
            **launch_options(),
        )


def geglu_forward(inputs: arguments.Geglu) -> Tensor:
    """Return a · gelu(b), by one launch."""
    x = inputs.x
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch(_geglu_fwd_kernel, x, out_ptr=out)
    return out


def geglu_backward(d_out: Tensor, inputs: arguments.Geglu, needs: Needs) -> tuple[Tensor | None]:
    """Return the gradient of x, by one launch."""
    (x,), (need_x,) = inputs, needs
    if not need_x:
        return (None,)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(_geglu_bwd_kernel, x, d_out_ptr=d_out.contiguous(), d_x_ptr=d_x)
    return (d_x,)


def geglu_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Geglu, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of d_out and x, by one launch; None where not needed."""
    (x,), (u_x,), (need_d_out, need_x) = inputs, directions, needs
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_d_out = torch.empty_like(d_out, memory_format=torch.contiguous_format)
    _launch(
        *(_geglu_double_bwd_kernel, x),
        d_out_ptr=d_out.contiguous(),
        u_x_ptr=torch.zeros_like(x) if u_x is None else u_x.contiguous(),
        d_d_out_ptr=d_d_out,
        d_x_ptr=d_x,
    )
    return d_d_out if need_d_out else None, d_x if need_x else None
