"""group_norm: a group of a sample per program, which reads it twice more than it must.

Bytes: forward reads x and writes y; backward reads x and the upstream and writes d_x; the double
backward reads a direction more and writes two. Mean, variance and sums are passes of their own over
a group that the caches hold. The weights' gradients, which few runs ask for, are sums that PyTorch
forms of what the kernels leave for each element.
"""

# B = samples, G = groups, n = elements of a group, m = elements of a channel

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import launch_options, on_device_of, store_narrow
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Directions, Needs

FEW = 256
"""Programs that leave a GPU mostly idle, about two for each multiprocessor of an H100: each is
given more warps, which have more loads under way at a time. Not measured on a GPU."""


@triton.jit
def _read(pointer, offs, mask, PRESENT: tl.constexpr, absent):
    """Load as float32, zero outside; or a constant where there is nothing to load."""
    if PRESENT:
        return tl.load(pointer + offs, mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(offs.shape, tl.float32) + absent


@triton.jit
def _of_channels(pointer, first, start, offs, mask, m, PRESENT: tl.constexpr, absent,
                 ONE: tl.constexpr):  # fmt: skip
    """Load what is one number a channel for a step's elements; a step of ONE loads a single one."""
    if PRESENT and ONE:
        return tl.zeros(offs.shape, tl.float32) + tl.load(pointer + first + start // m)
    else:
        return _read(pointer, first + offs // m, mask, PRESENT, absent)


@triton.jit
def _place(groups, n, m):
    """Return the group of a program, all samples' one after the other, and its first channel."""
    # int64: a tensor may pass 2**31 elements
    group = tl.program_id(0).to(tl.int64)
    return group, group % groups * (n // m)


@triton.jit
def _moments(x_ptr, n, eps, BLOCK: tl.constexpr):
    """Return the mean and ρ = 1/√(variance + eps) of a group."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += _read(x_ptr, offs, offs < n, True, 0.0)
    mean = tl.sum(total) / n
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n
        centred = tl.where(mask, _read(x_ptr, offs, mask, True, 0.0) - mean, 0.0)
        squares += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(squares) / n + eps)


@triton.jit
def _normalised(
    x_ptr, weight_ptr, bias_ptr, start, first, n, m, mean, rho,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a step's places in a group, and which there are, x̂, γ and y = γ x̂ + β."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    x_hat = (_read(x_ptr, offs, mask, True, 0.0) - mean) * rho
    gamma = _of_channels(weight_ptr, first, start, offs, mask, m, HAS_WEIGHT, 1.0, ONE)
    beta = _of_channels(bias_ptr, first, start, offs, mask, m, HAS_BIAS, 0.0, ONE)
    y = x_hat * gamma + beta
    return offs, mask, x_hat, gamma, y


@triton.jit
def _sigmoid(y):
    return 1.0 / (1.0 + tl.exp(-y))


@triton.jit
def _group_norm_fwd_kernel(
    x_ptr,  # [B G, n] in
    weight_ptr,  # [G n / m] in if HAS_WEIGHT
    bias_ptr,  # [G n / m] in if HAS_BIAS
    out_ptr,  # [B G, n] out
    groups,
    n,
    m,
    eps,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE: tl.constexpr,  # a step's elements are of one channel
    BLOCK: tl.constexpr,  # elements per step
):
    group, first = _place(groups, n, m)
    x_ptr += group * n
    out_ptr += group * n
    mean, rho = _moments(x_ptr, n, eps, BLOCK)
    for start in range(0, n, BLOCK):
        offs, mask, _, _, y = _normalised(
            x_ptr, weight_ptr, bias_ptr, start, first, n, m, mean, rho,
            HAS_WEIGHT, HAS_BIAS, ONE, BLOCK,
        )  # fmt: skip
        if SILU:
            y = y * _sigmoid(y)
        store_narrow(out_ptr + offs, y, mask, False)


@triton.jit
def _upstream(d_out_ptr, y, offs, mask, SILU: tl.constexpr):
    """Return the gradient at y."""
    d_y = _read(d_out_ptr, offs, mask, True, 0.0)
    if SILU:
        s = _sigmoid(y)
        d_y = d_y * s * (1.0 + y * (1.0 - s))
    return d_y


@triton.jit
def _group_norm_bwd_kernel(
    x_ptr,  # [B G, n] in
    weight_ptr,  # [G n / m] in if HAS_WEIGHT
    bias_ptr,  # [G n / m] in if HAS_BIAS
    d_out_ptr,  # [B G, n] in
    d_x_ptr,  # [B G, n] out
    along_ptr,  # [B G, n] out if NEED_WEIGHTS, fp32: what d_weight sums
    d_y_ptr,  # [B G, n] out if NEED_WEIGHTS, fp32: what d_bias sums
    groups,
    n,
    m,
    eps,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, first = _place(groups, n, m)
    x_ptr += group * n
    d_out_ptr += group * n
    d_x_ptr += group * n
    mean, rho = _moments(x_ptr, n, eps, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    slope = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs, mask, x_hat, gamma, y = _normalised(
            x_ptr, weight_ptr, bias_ptr, start, first, n, m, mean, rho,
            HAS_WEIGHT, HAS_BIAS, ONE, BLOCK,
        )  # fmt: skip
        d_y = _upstream(d_out_ptr, y, offs, mask, SILU)
        total += gamma * d_y
        slope += gamma * d_y * x_hat
        if NEED_WEIGHTS:
            tl.store(along_ptr + group * n + offs, d_y * x_hat, mask)
            tl.store(d_y_ptr + group * n + offs, d_y, mask)
    g_mean, g_slope = tl.sum(total) / n, tl.sum(slope) / n
    for start in range(0, n, BLOCK):
        offs, mask, x_hat, gamma, y = _normalised(
            x_ptr, weight_ptr, bias_ptr, start, first, n, m, mean, rho,
            HAS_WEIGHT, HAS_BIAS, ONE, BLOCK,
        )  # fmt: skip
        g = gamma * _upstream(d_out_ptr, y, offs, mask, SILU)
        store_narrow(d_x_ptr + offs, rho * (g - g_mean - x_hat * g_slope), mask, False)


@triton.jit
def _second_parts(
    x_ptr, weight_ptr, bias_ptr, d_out_ptr, u_x_ptr, u_weight_ptr, u_bias_ptr,
    start, first, n, m, mean, rho, u_mean, u_slope,
    SILU: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_U_X: tl.constexpr, HAS_U_WEIGHT: tl.constexpr, HAS_U_BIAS: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return places, x̂, u, v, ȳ, e, h, f and the gradient of the upstream; see `docs/math.md`."""
    offs, mask, x_hat, gamma, y = _normalised(
        x_ptr, weight_ptr, bias_ptr, start, first, n, m, mean, rho,
        HAS_WEIGHT, HAS_BIAS, ONE, BLOCK,
    )  # fmt: skip
    u = _read(u_x_ptr, offs, mask, HAS_U_X, 0.0)
    u_gamma = _of_channels(u_weight_ptr, first, start, offs, mask, m, HAS_U_WEIGHT, 0.0, ONE)
    u_beta = _of_channels(u_bias_ptr, first, start, offs, mask, m, HAS_U_BIAS, 0.0, ONE)
    v = rho * (u - u_mean - x_hat * u_slope)
    y_dot = gamma * v + u_gamma * x_hat + u_beta
    d_y = _read(d_out_ptr, offs, mask, True, 0.0)
    e = tl.zeros_like(d_y)
    if SILU:
        s = _sigmoid(y)
        e = d_y * y_dot * s * (1.0 - s) * (2.0 + y * (1.0 - 2.0 * s))
        slope = s * (1.0 + y * (1.0 - s))
        d_y = d_y * slope
        y_dot = y_dot * slope
    return offs, mask, x_hat, u, v, d_y, e, gamma * d_y, gamma * e + u_gamma * d_y, y_dot


@triton.jit
def _group_norm_double_bwd_kernel(
    x_ptr,  # [B G, n] in
    weight_ptr,  # [G n / m] in if HAS_WEIGHT
    bias_ptr,  # [G n / m] in if HAS_BIAS
    d_out_ptr,  # [B G, n] in
    u_x_ptr,  # [B G, n] in if HAS_U_X
    u_weight_ptr,  # [G n / m] in if HAS_U_WEIGHT
    u_bias_ptr,  # [G n / m] in if HAS_U_BIAS
    d_d_out_ptr,  # [B G, n] out
    d_x_ptr,  # [B G, n] out
    along_ptr,  # [B G, n] out if NEED_WEIGHTS, fp32: what d_weight sums
    e_ptr,  # [B G, n] out if NEED_WEIGHTS, fp32: what d_bias sums
    groups,
    n,
    m,
    eps,
    SILU: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_U_X: tl.constexpr,
    HAS_U_WEIGHT: tl.constexpr,
    HAS_U_BIAS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, first = _place(groups, n, m)
    x_ptr += group * n
    d_out_ptr += group * n
    u_x_ptr += group * n
    d_d_out_ptr += group * n
    d_x_ptr += group * n
    mean, rho = _moments(x_ptr, n, eps, BLOCK)
    u_total = tl.zeros((BLOCK,), tl.float32)
    u_along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n
        u = _read(u_x_ptr, offs, mask, HAS_U_X, 0.0)
        u_total += u
        u_along += u * (_read(x_ptr, offs, mask, True, 0.0) - mean) * rho
    u_mean, u_slope = tl.sum(u_total) / n, tl.sum(u_along) / n
    h_total = tl.zeros((BLOCK,), tl.float32)
    h_along = tl.zeros((BLOCK,), tl.float32)
    f_total = tl.zeros((BLOCK,), tl.float32)
    # of f and v together, whose sums are needed only so
    f_along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offs, mask, x_hat, u, v, d_y, e, h, f, d_d_out = _second_parts(
            x_ptr, weight_ptr, bias_ptr, d_out_ptr, u_x_ptr, u_weight_ptr, u_bias_ptr,
            start, first, n, m, mean, rho, u_mean, u_slope,
            SILU, HAS_WEIGHT, HAS_BIAS, HAS_U_X, HAS_U_WEIGHT, HAS_U_BIAS, ONE, BLOCK,
        )  # fmt: skip
        h_total += h
        h_along += h * x_hat
        f_total += f
        f_along += f * x_hat + h * v
        store_narrow(d_d_out_ptr + offs, d_d_out, mask, False)
        if NEED_WEIGHTS:
            tl.store(along_ptr + group * n + offs, d_y * v + e * x_hat, mask)
            tl.store(e_ptr + group * n + offs, e, mask)
    h_slope = tl.sum(h_along) / n
    t_mean = tl.sum(f_total) / n - rho * (tl.sum(h_total) / n * u_slope + u_mean * h_slope)
    t_slope = tl.sum(f_along) / n - 2.0 * rho * u_slope * h_slope
    for start in range(0, n, BLOCK):
        offs, mask, x_hat, u, v, d_y, e, h, f, d_d_out = _second_parts(
            x_ptr, weight_ptr, bias_ptr, d_out_ptr, u_x_ptr, u_weight_ptr, u_bias_ptr,
            start, first, n, m, mean, rho, u_mean, u_slope,
            SILU, HAS_WEIGHT, HAS_BIAS, HAS_U_X, HAS_U_WEIGHT, HAS_U_BIAS, ONE, BLOCK,
        )  # fmt: skip
        t = f - rho * (h * u_slope + u * h_slope)
        store_narrow(d_x_ptr + offs, rho * (t - t_mean - x_hat * t_slope), mask, False)


def _launch(
    kernel: Any, inputs: arguments.GroupNorm, *, widest: int = 4096, **outputs: Any
) -> None:
    """Launch a kernel with a program for each group of each sample.

    Args:
        kernel: of this file.
        inputs: of the operator.
        widest: elements of a step where programs are few, for which registers suffice.
        outputs: the kernel's other arguments.
    """
    x, weight, bias, groups, eps, silu = inputs
    x = x.contiguous()
    programs = len(x) * groups
    if programs == 0:
        return
    n, m = x[0].numel() // groups, math.prod(x.shape[2:])
    # elements of a thread: one 16-byte access of 16 bits, or two; on AMD half
    few = programs <= FEW
    block = min(widest if few else 2048, max(128, triton.next_power_of_2(n)))
    with on_device_of(x):
        kernel[(programs,)](
            x_ptr=x,
            weight_ptr=x if weight is None else weight.contiguous(),
            bias_ptr=x if bias is None else bias.contiguous(),
            groups=groups,
            n=n,
            m=m,
            eps=float(eps),
            SILU=silu,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            **outputs,
            ONE=m % block == 0,
            BLOCK=block,
            num_warps=max(1, block // (256 if few else 512)),
            **launch_options(),
        )


def _of_elements(x: Tensor, needed: bool) -> Tensor:
    """Return what the kernels leave for each element, where the weights' gradients are needed."""
    size = x.numel() if needed else 0
    return torch.empty(size, dtype=torch.float32, device=x.device)


def _summed(of_elements: Tensor, x: Tensor, needed: bool) -> Tensor | None:
    if not needed:
        return None
    return of_elements.view(len(x), x.shape[1], math.prod(x.shape[2:])).sum((0, 2)).to(x.dtype)


def group_norm_forward(inputs: arguments.GroupNorm) -> Tensor:
    """Return γ x̂ + β, or its SiLU, by one launch."""
    out = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    _launch(_group_norm_fwd_kernel, inputs, out_ptr=out)
    return out


def group_norm_backward(
    d_out: Tensor, inputs: arguments.GroupNorm, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias, None where not needed."""
    x = inputs.x
    need_x, need_weight, need_bias = needs
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    need_weights = need_weight or need_bias
    along, d_y = (_of_elements(x, need_weights) for _ in range(2))
    _launch(
        *(_group_norm_bwd_kernel, inputs),
        d_out_ptr=d_out.contiguous(),
        d_x_ptr=d_x,
        along_ptr=along,
        d_y_ptr=d_y,
        NEED_WEIGHTS=need_weights,
    )
    sums = _summed(along, x, need_weight), _summed(d_y, x, need_bias)
    return d_x if need_x else None, *sums


def group_norm_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.GroupNorm, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of d_out, x, weight and bias, None where not needed."""
    x = inputs.x
    u_x, u_weight, u_bias = directions
    need_d_out, need_x, need_weight, need_bias = needs
    d_out = d_out.contiguous()
    d_d_out, d_x = torch.empty_like(d_out), torch.empty_like(d_out)
    need_weights = need_weight or need_bias
    along, e = (_of_elements(x, need_weights) for _ in range(2))
    _launch(
        *(_group_norm_double_bwd_kernel, inputs),
        # a thread has up to 142 registers, and a multiprocessor 128 for each of 512
        widest=2048,
        d_out_ptr=d_out,
        u_x_ptr=d_out if u_x is None else u_x.contiguous(),
        u_weight_ptr=d_out if u_weight is None else u_weight.contiguous(),
        u_bias_ptr=d_out if u_bias is None else u_bias.contiguous(),
        d_d_out_ptr=d_d_out,
        d_x_ptr=d_x,
        along_ptr=along,
        e_ptr=e,
        HAS_U_X=u_x is not None,
        HAS_U_WEIGHT=u_weight is not None,
        HAS_U_BIAS=u_bias is not None,
        NEED_WEIGHTS=need_weights,
    )
    sums = _summed(along, x, need_weight), _summed(e, x, need_bias)
    return d_d_out if need_d_out else None, d_x if need_x else None, *sums
