"""attention: softmax(scale q kᵀ) v; its backward and double backward form the matrix in tiles.

Backward: a pass over the keys gives each query's sums, a second its gradients, and a pass over the
queries each key's. Products per pair of query and key, in multiples of d: 2 forward, 2 + 3 + 4
backward, 5 + 9 + 8 double backward. Products of inputs alone are made of them as they are, others
in float32 (TF32 where inputs are of 16 bits). What is kept is a few numbers for each query.
"""

# n = heads, T = queries, S = keys, d = columns of q and k, e = of v

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    ceil_div,
    dot,
    dot_precision,
    launch_options,
    load_matrix,
    on_device_of,
    store_narrow,
)
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Directions, Needs

LEAST_ROWS = 16
"""Queries or keys of a block, of which a product has no fewer."""
WIDE = 128
"""Columns of a head up to which a block's operands are loaded ahead."""


@triton.jit
def _rows_of(pointer, head, length, cols, offs_i, offs_j):
    """Load rows of one head of [n, length, cols]; zero outside."""
    start = pointer + head * length * cols
    return load_matrix(start, offs_i, offs_j, length, cols, cols)


@triton.jit
def _rows_of_both(x_ptr, y_ptr, head, length, d, e, offs_i, offs_d, offs_e):
    """Load the same rows of [n, length, d] and of [n, length, e]."""
    x = _rows_of(x_ptr, head, length, d, offs_i, offs_d)
    return x, _rows_of(y_ptr, head, length, e, offs_i, offs_e)


@triton.jit
def _store_rows(pointer, value, head, length, cols, offs_i, offs_j):
    ptrs = pointer + head * length * cols + offs_i.to(tl.int64)[:, None] * cols + offs_j[None, :]
    mask = (offs_i < length)[:, None] & (offs_j < cols)[None, :]
    store_narrow(ptrs, value, mask, False)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Return a bᵀ."""
    acc = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    return dot(a, tl.trans(b), acc, PRECISION)


@triton.jit
def _mixed(a, b, acc, PRECISION: tl.constexpr):
    """Return a b + acc for a float32 `a` and rows of an input."""
    return dot(a, b.to(tl.float32), acc, PRECISION)


@triton.jit
def _scores(q, k, scale, offs_s, S, PRECISION: tl.constexpr):
    """Return scale q kᵀ, minus infinity at keys that there are not."""
    return tl.where((offs_s < S)[None, :], _product(q, k, PRECISION) * scale, -float("inf"))


@triton.jit
def _place(length, BLOCK: tl.constexpr):
    """Return the head of a program, and the rows that are its own."""
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    # int64: all heads' elements may pass 2**31
    return (pid // blocks).to(tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # [n, T, d] in
    k_ptr,  # [n, S, d] in
    v_ptr,  # [n, S, e] in
    out_ptr,  # [n, T, e] out
    T,
    S,
    d,
    e,
    scale,
    MULTIPLE: tl.constexpr,  # divides d and e
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # queries per program
    BLOCK_S: tl.constexpr,  # keys per step
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # what is said of an argument, `tl.multiple_of`, is lost; of a product it is known
    d, e = d // MULTIPLE * MULTIPLE, e // MULTIPLE * MULTIPLE
    head, offs_t = _place(T, BLOCK_T)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = _rows_of(q_ptr, head, T, d, offs_t, offs_d)
    top = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    out = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        k, v = _rows_of_both(k_ptr, v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
        s = _scores(q, k, scale, offs_s, S, PRECISION)
        risen = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp(s - risen[:, None]), tl.exp(top - risen)
        total = total * shrink + tl.sum(p, 1)
        out = _mixed(p, v, out * shrink[:, None], PRECISION)
        top = risen
    _store_rows(out_ptr, out / total[:, None], head, T, e, offs_t, offs_e)


@triton.jit
def _attention_sums_kernel(
    q_ptr,  # [n, T, d] in
    k_ptr,  # [n, S, d] in
    v_ptr,  # [n, S, e] in
    d_out_ptr,  # [n, T, e] in
    u_q_ptr,  # [n, T, d] in, and so are u_k and u_v shaped as k and v; if SECOND
    u_k_ptr,
    u_v_ptr,
    sums_ptr,  # [4, n T] out: lse, D; if SECOND r and the mean of E
    rows,  # n T
    T,
    S,
    d,
    e,
    scale,
    SECOND: tl.constexpr,  # for the double backward
    MULTIPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # what is said of an argument, `tl.multiple_of`, is lost; of a product it is known
    d, e = d // MULTIPLE * MULTIPLE, e // MULTIPLE * MULTIPLE
    head, offs_t = _place(T, BLOCK_T)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q, d_out = _rows_of_both(q_ptr, d_out_ptr, head, T, d, e, offs_t, offs_d, offs_e)
    if SECOND:
        u_q = _rows_of(u_q_ptr, head, T, d, offs_t, offs_d)
    top = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    D = tl.zeros((BLOCK_T,), tl.float32)
    r = tl.zeros((BLOCK_T,), tl.float32)
    mixed = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        k, v = _rows_of_both(k_ptr, v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
        s = _scores(q, k, scale, offs_s, S, PRECISION)
        g = _product(d_out, v, PRECISION)
        risen = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp(s - risen[:, None]), tl.exp(top - risen)
        total = total * shrink + tl.sum(p, 1)
        D = D * shrink + tl.sum(p * g, 1)
        if SECOND:
            u_k, u_v = _rows_of_both(u_k_ptr, u_v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
            s_dot = dot(q, tl.trans(u_k), _product(u_q, k, PRECISION), PRECISION) * scale
            h = _product(d_out, u_v, PRECISION)
            r = r * shrink + tl.sum(p * s_dot, 1)
            mixed = mixed * shrink + tl.sum(p * (s_dot * g + h), 1)
        top = risen
    ptrs, mask = sums_ptr + head * T + offs_t, offs_t < T
    D, r = D / total, r / total
    tl.store(ptrs, top + tl.log(total), mask)
    tl.store(ptrs + rows, D, mask)
    if SECOND:
        # not 2 * rows, which may pass 2**31
        tl.store(ptrs + rows + rows, r, mask)
        tl.store(ptrs + rows + rows + rows, mixed / total - 2 * r * D, mask)


@triton.jit
def _load_sums(sums_ptr, rows, head, T, offs_t, SECOND: tl.constexpr):
    ptrs, mask = sums_ptr + head * T + offs_t, offs_t < T
    lse, D = tl.load(ptrs, mask, other=0.0), tl.load(ptrs + rows, mask, other=0.0)
    r, mean = D, D
    if SECOND:
        r = tl.load(ptrs + rows + rows, mask, other=0.0)
        mean = tl.load(ptrs + rows + rows + rows, mask, other=0.0)
    return lse[:, None], D[:, None], r[:, None], mean[:, None]


@triton.jit
def _second_parts(p, g, D, r, mean, q, k, u_q, u_k, d_out, u_v, scale, PRECISION: tl.constexpr):
    """Return P's derivative along u, and the gradients at the scores of this and the backward."""
    s_dot = dot(q, tl.trans(u_k), _product(u_q, k, PRECISION), PRECISION) * scale
    E = s_dot * g - r * g - D * s_dot + _product(d_out, u_v, PRECISION)
    return p * (s_dot - r), scale * p * (E - mean), scale * p * (g - D)


@triton.jit
def _attention_queries_kernel(
    q_ptr,  # [n, T, d] in
    k_ptr,  # [n, S, d] in
    v_ptr,  # [n, S, e] in
    d_out_ptr,  # [n, T, e] in
    u_q_ptr,  # as in the sums' kernel
    u_k_ptr,
    u_v_ptr,
    sums_ptr,  # [4, n T] in
    d_q_ptr,  # [n, T, d] out
    d_d_out_ptr,  # [n, T, e] out if SECOND
    rows,
    T,
    S,
    d,
    e,
    scale,
    SECOND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # what is said of an argument, `tl.multiple_of`, is lost; of a product it is known
    d, e = d // MULTIPLE * MULTIPLE, e // MULTIPLE * MULTIPLE
    head, offs_t = _place(T, BLOCK_T)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q, d_out = _rows_of_both(q_ptr, d_out_ptr, head, T, d, e, offs_t, offs_d, offs_e)
    lse, D, r, mean = _load_sums(sums_ptr, rows, head, T, offs_t, SECOND)
    d_q = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if SECOND:
        u_q = _rows_of(u_q_ptr, head, T, d, offs_t, offs_d)
        d_d_out = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        k, v = _rows_of_both(k_ptr, v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
        p = tl.exp(_scores(q, k, scale, offs_s, S, PRECISION) - lse)
        g = _product(d_out, v, PRECISION)
        if SECOND:
            u_k, u_v = _rows_of_both(u_k_ptr, u_v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
            p_dot, x, d_s = _second_parts(
                p, g, D, r, mean, q, k, u_q, u_k, d_out, u_v, scale, PRECISION
            )
            d_d_out = _mixed(p, u_v, _mixed(p_dot, v, d_d_out, PRECISION), PRECISION)
            d_q = _mixed(d_s, u_k, _mixed(x, k, d_q, PRECISION), PRECISION)
        else:
            d_q = _mixed(scale * p * (g - D), k, d_q, PRECISION)
    _store_rows(d_q_ptr, d_q, head, T, d, offs_t, offs_d)
    if SECOND:
        _store_rows(d_d_out_ptr, d_d_out, head, T, e, offs_t, offs_e)


@triton.jit
def _attention_keys_kernel(
    q_ptr,  # [n, T, d] in
    k_ptr,  # [n, S, d] in
    v_ptr,  # [n, S, e] in
    d_out_ptr,  # [n, T, e] in
    u_q_ptr,  # as in the sums' kernel
    u_k_ptr,
    u_v_ptr,
    sums_ptr,  # [4, n T] in
    d_k_ptr,  # [n, S, d] out
    d_v_ptr,  # [n, S, e] out
    rows,
    T,
    S,
    d,
    e,
    scale,
    SECOND: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # queries per step
    BLOCK_S: tl.constexpr,  # keys per program
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # what is said of an argument, `tl.multiple_of`, is lost; of a product it is known
    d, e = d // MULTIPLE * MULTIPLE, e // MULTIPLE * MULTIPLE
    head, offs_s = _place(S, BLOCK_S)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k, v = _rows_of_both(k_ptr, v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
    d_k = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    if SECOND:
        u_k, u_v = _rows_of_both(u_k_ptr, u_v_ptr, head, S, d, e, offs_s, offs_d, offs_e)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        # rows that there are not are zero, and so is what they add
        q, d_out = _rows_of_both(q_ptr, d_out_ptr, head, T, d, e, offs_t, offs_d, offs_e)
        lse, D, r, mean = _load_sums(sums_ptr, rows, head, T, offs_t, SECOND)
        p = tl.exp(_scores(q, k, scale, offs_s, S, PRECISION) - lse)
        g = _product(d_out, v, PRECISION)
        if SECOND:
            u_q = _rows_of(u_q_ptr, head, T, d, offs_t, offs_d)
            p_dot, x, d_s = _second_parts(
                p, g, D, r, mean, q, k, u_q, u_k, d_out, u_v, scale, PRECISION
            )
            d_k = _mixed(tl.trans(d_s), u_q, _mixed(tl.trans(x), q, d_k, PRECISION), PRECISION)
            d_v = _mixed(tl.trans(p_dot), d_out, d_v, PRECISION)
        else:
            d_k = _mixed(tl.trans(scale * p * (g - D)), q, d_k, PRECISION)
            d_v = _mixed(tl.trans(p), d_out, d_v, PRECISION)
    _store_rows(d_k_ptr, d_k, head, S, d, offs_s, offs_d)
    _store_rows(d_v_ptr, d_v, head, S, e, offs_s, offs_e)


def _settings(q: Tensor, v: Tensor, tiles: int) -> dict[str, Any]:
    """Return widths, and blocks of queries and keys that registers hold. Not measured on a GPU.

    Args:
        q: queries.
        v: values.
        tiles: how many operands of a block are held at a time.
    """
    d, e = q.shape[2], v.shape[2]
    precision = dot_precision(q.dtype)
    width_d, width_e = (max(16, triton.next_power_of_2(x)) for x in (d, e))
    block = min(64, max(LEAST_ROWS, 64 * 64 * 3 // (max(width_d, width_e) * tiles)))
    block = 1 << (block.bit_length() - 1)
    # a warp's product has 16 rows and 8 columns: eight would form a score of 16 rows four times;
    # float32's, without matrix units, are every thread's
    warps = 2 if block == LEAST_ROWS else 4
    if q.dtype == torch.float32 and precision != "tf32":
        warps = 8
    # shared memory holds no second block of rows so wide, to be loaded ahead
    stages = {"num_stages": 1} if max(width_d, width_e) > WIDE else {}
    return {
        "d": d,
        "e": e,
        "MULTIPLE": math.gcd(16, d, e),
        # three products of TF32 would take more registers for their operands than there are
        "PRECISION": "ieee" if precision == "tf32x3" else precision,
        "BLOCK_T": block,
        "BLOCK_S": block,
        "BLOCK_D": width_d,
        "BLOCK_E": width_e,
        "num_warps": warps,
        **stages,
        **launch_options(),
    }


def widest(shared: int, dtype: torch.dtype) -> int:
    """Return the widest heads whose double backward a program's shared memory holds.

    Compiled for sm_80 and sm_90, it takes 7.25 tiles of 16 rows in float32 at most, and 3.5 of 16
    bits, for which 6 are asked: no heads of 512 columns were compiled; of as many columns as the
    next power of two; up to `WIDE`, less than any GPU's has that bfloat16 products are made on.

    Args:
        shared: bytes of a program.
        dtype: of the inputs.
    """
    tiles = 8 if dtype == torch.float32 else 6
    columns = shared // (tiles * LEAST_ROWS * 4)
    return max(WIDE, 1 << max(columns.bit_length() - 1, 0))


def _launch(kernel: Any, length: int, block: str, q: Tensor, k: Tensor, **options: Any) -> None:
    """Launch a kernel with a program for each block of `length` rows of each head."""
    programs = q.shape[0] * ceil_div(length, options[block])
    if programs == 0:
        return
    with on_device_of(q):
        kernel[(programs,)](q_ptr=q, k_ptr=k, T=q.shape[1], S=k.shape[1], **options)


def attention_forward(inputs: arguments.Attention) -> Tensor:
    """Return softmax(scale · q kᵀ) v, by one launch."""
    q, k, v = (x.contiguous() for x in inputs[:3])
    out = q.new_empty(*q.shape[:2], v.shape[2])
    _launch(
        *(_attention_fwd_kernel, q.shape[1], "BLOCK_T", q, k),
        v_ptr=v,
        out_ptr=out,
        scale=float(inputs.scale),
        **_settings(q, v, 3),
    )
    return out


def _gradients(
    d_out: Tensor, directions: Directions | None, inputs: arguments.Attention, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of d_out, q, k and v, by three launches; None where not needed."""
    need_d_out, need_q, need_k, need_v = needs
    q, k, v, d_out = (x.contiguous() for x in (*inputs[:3], d_out))
    # without directions, addresses that nothing reads
    u = q, k, v
    if directions is not None:
        u = tuple(
            torch.zeros_like(x) if direction is None else direction.contiguous()
            for direction, x in zip(directions, u, strict=True)
        )
    u_q, u_k, u_v = u
    rows = q.shape[0] * q.shape[1]
    sums = torch.empty(4, rows, dtype=torch.float32, device=q.device)
    given = {"v_ptr": v, "d_out_ptr": d_out, "u_q_ptr": u_q, "u_k_ptr": u_k, "u_v_ptr": u_v}
    # float32 operands are multiplied as they are, by threads that hold more of them
    second = directions is not None
    settings = _settings(q, v, 12 if second or q.dtype == torch.float32 else 6)
    shared = {**given, "sums_ptr": sums, "rows": rows, "scale": float(inputs.scale), **settings}
    shared["SECOND"] = second
    d_d_out, d_q, d_k, d_v = (torch.empty_like(x) for x in (d_out, q, k, v))
    _launch(_attention_sums_kernel, q.shape[1], "BLOCK_T", q, k, **shared)
    if need_d_out or need_q:
        kernel = _attention_queries_kernel
        outputs = {"d_q_ptr": d_q, "d_d_out_ptr": d_d_out}
        _launch(kernel, q.shape[1], "BLOCK_T", q, k, **outputs, **shared)
    if need_k or need_v:
        outputs = {"d_k_ptr": d_k, "d_v_ptr": d_v}
        _launch(_attention_keys_kernel, k.shape[1], "BLOCK_S", q, k, **outputs, **shared)
    grads = d_d_out, d_q, d_k, d_v
    return tuple(x if need else None for x, need in zip(grads, needs, strict=True))


def attention_backward(
    d_out: Tensor, inputs: arguments.Attention, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v, None where not needed."""
    return _gradients(d_out, None, inputs, (False, *needs))[1:]


def attention_double_backward(
    d_out: Tensor, directions: Directions, inputs: arguments.Attention, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return the gradients of d_out, q, k and v, None where not needed."""
    return _gradients(d_out, directions, inputs, needs)
