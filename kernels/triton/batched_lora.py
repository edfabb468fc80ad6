"""batched_lora: a linear layer and each sample's own low-rank adapter in one product.

A program computes BLOCK_T tokens of one sample times BLOCK_O outputs. It walks the input features
once, multiplying its tokens by both W and the sample's A; then adds the rank-r result, which never
left its registers and stayed float32, times B. The gradient of x is the same kernel on transposed
weights. Both leave their rank-r result behind, float32, where the adapters' gradients will need it:
a kernel multiplies it with the other side, SPLIT_T tokens of a sample a program, and a last one
sums over the programs that saw an adapter, in a fixed order.

FLOPs per token: 2 d o for the base and 2 r (d + o) for the adapter, of which 2 r d are repeated by
each of the o / BLOCK_O programs that share the tokens.
"""

# N = adapters; b = samples, T = tokens of a sample, K -> O = features, r = rank

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mima.kernels._common import (
    TRITON_DTYPE,
    PointerTable,
    block_size,
    ceil_div,
    contiguous,
    dot,
    dot_precision,
    launch_options,
    load_matrix,
    load_pointer,
    on_device_of,
    pointer_table,
    rank_multiple,
    sizes_on_device,
)
from mima.ops.backends import arguments
from mima.ops.backends.arguments import Needs

OUTER_BLOCK_K = OUTER_BLOCK_T = 64
"""Features per program of the adapters' gradients, and tokens per step: twice as many tokens take
160 KB of shared memory at rank 64 in bfloat16 (compiled for sm_90 with triton 3.8)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Launch settings of the kernels."""

    block_t: int
    """Tokens per program."""
    block_o: int
    """Outputs per program."""
    block_k: int
    """Input features per step."""
    block_r: int
    """Ranks per product; a power of 2."""
    split_t: int
    """Tokens per program of the adapters' gradients: of one sample, so that a program's sum does
    not depend on the batch."""
    num_warps: int
    num_stages: int


@functools.cache
def settings(dtype: torch.dtype, rank: int) -> Settings:
    """Return the settings for a dtype and the largest rank.

    tl.dot needs a rank of 16 at least; a program loops over ranks above block_r. Larger tiles or
    fewer warps spill registers: 128 x 128 in bfloat16; in float32, whose products are three, 32
    features a step, or 64 tokens beside 32 ranks (compiled for sm_80 with triton 3.8). Not measured
    on a GPU.
    """
    if dtype == torch.float32:
        return Settings(
            block_t=64 if rank <= 16 else 32,
            block_o=64,
            block_k=16,
            block_r=block_size(rank, 32),
            split_t=256,
            num_warps=8,
            num_stages=3,
        )
    return Settings(
        block_t=128,
        block_o=64,
        block_k=64,
        block_r=block_size(rank, 64),
        split_t=512,
        num_warps=8,
        num_stages=3,
    )


@triton.jit
def _load_inner(adapter_ptr, offs_r, offs_k, rank, num_in, TRANSPOSED: tl.constexpr):
    """Load [r, k] of the factor that reads the input: A, or Bᵀ if TRANSPOSED."""
    ld = rank if TRANSPOSED else num_in
    return load_matrix(adapter_ptr, offs_r, offs_k, rank, num_in, ld, TRANSPOSED)


@triton.jit
def _batched_lora_fwd_kernel(
    x_ptr,  # [b, T, K] in
    weight_ptr,  # [O, K] in; [K, O] if TRANSPOSED
    bias_ptr,  # [O] in, if HAS_BIAS
    table_ptr,  # [2 N] in, int64: addresses of A_n [r_n, K or O], then of B_n [O or K, r_n]
    rank_ptr,  # [N] in, int64
    scale_ptr,  # [N] in, fp32
    index_ptr,  # [b] in, int64: adapter of each sample, −1 for none
    y_ptr,  # [b, T, O] out, aliases nothing
    h_ptr,  # [b, T, R] out, fp32, if KEEP: x A_iᵀ, or x B_i if TRANSPOSED; zero beyond the rank
    T,  # tokens of a sample
    num_in,  # input features
    num_out,  # output features
    num_adapters,  # N
    R,  # BLOCK_R times the products that the largest rank takes
    TRANSPOSED: tl.constexpr,  # multiply by the transposed weights: the gradient of x
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,  # write h
    DTYPE: tl.constexpr,  # of all but scale and h
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    RANK_MULTIPLE: tl.constexpr,  # divides every rank
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_T: tl.constexpr,  # tokens per program
    BLOCK_O: tl.constexpr,  # outputs per program
    BLOCK_K: tl.constexpr,  # input features per step
    BLOCK_R: tl.constexpr,  # ranks per product
):
    # on the grid's first axis, as no other takes more than 65,535 programs
    blocks_o = tl.cdiv(num_out, BLOCK_O)
    sample, first = _place(tl.program_id(0) // blocks_o, T, BLOCK_T)
    offs_t = first + tl.arange(0, BLOCK_T)
    offs_o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    n = tl.load(index_ptr + sample)
    has_adapter = n >= 0
    n = tl.maximum(n, 0)
    # Rank 0 masks every access to an adapter that is not there.
    rank = _load_rank(rank_ptr + n, has_adapter, RANK_MULTIPLE)
    scale = tl.load(scale_ptr + n, mask=has_adapter, other=0.0)
    A_n = _load_adapter(table_ptr + n, has_adapter, DTYPE, ALIGNED)
    B_n = _load_adapter(table_ptr + num_adapters + n, has_adapter, DTYPE, ALIGNED)
    inner = B_n if TRANSPOSED else A_n
    outer = A_n if TRANSPOSED else B_n
    x_ptr += sample * T * num_in

    y = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, num_in, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = load_matrix(x_ptr, offs_t, offs_k, T, num_in, num_in, False)
        weight = load_matrix(
            weight_ptr,
            offs_o,
            offs_k,
            num_out,
            num_in,
            num_out if TRANSPOSED else num_in,
            TRANSPOSED,
        )
        A = _load_inner(inner, offs_r, offs_k, rank, num_in, TRANSPOSED)
        y = dot(x, tl.trans(weight), y, PRECISION)
        h = dot(x, tl.trans(A), h, PRECISION)
    if KEEP:
        _keep(h_ptr, h, offs_t, offs_r, T, R, blocks_o)
    y = _add_outer(y, h * scale, outer, offs_o, offs_r, num_out, rank, TRANSPOSED, PRECISION)
    # int32: the count of a loop is
    for start_r in range(BLOCK_R, rank.to(tl.int32), BLOCK_R):
        h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, num_in, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            x = load_matrix(x_ptr, offs_t, offs_k, T, num_in, num_in, False)
            A = _load_inner(inner, start_r + offs_r, offs_k, rank, num_in, TRANSPOSED)
            h = dot(x, tl.trans(A), h, PRECISION)
        if KEEP:
            _keep(h_ptr, h, offs_t, start_r + offs_r, T, R, blocks_o)
        y = _add_outer(
            y, h * scale, outer, offs_o, start_r + offs_r, num_out, rank, TRANSPOSED, PRECISION
        )
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_o, offs_o < num_out, other=0.0).to(tl.float32)[None, :]
    offs = (sample * T + offs_t)[:, None] * num_out + offs_o[None, :]
    tl.store(y_ptr + offs, y.to(DTYPE), (offs_t < T)[:, None] & (offs_o < num_out)[None, :])


@triton.jit
def _place(tile, T, BLOCK_T: tl.constexpr):
    """Return the sample of a block of tokens, and its first token."""
    blocks = tl.cdiv(T, BLOCK_T)
    # int64: x and y may pass 2**31 elements
    return (tile // blocks).to(tl.int64), tile % blocks * BLOCK_T


@triton.jit
def _keep(h_ptr, h, offs_t, offs_r, T, R, blocks_o):
    """Store a projection: by one of the programs that share the tokens, for all have the same."""
    if tl.program_id(0) % blocks_o == 0:
        # formed anew, for other ways spill registers (rank 64, bfloat16, sm_80)
        sample, first = _place(tl.program_id(0) // blocks_o, T, h.shape[0])
        offs = tl.arange(0, h.shape[0])[:, None] * R + offs_r[None, :]
        tl.store(h_ptr + (sample * T + first) * R + offs, h, (offs_t < T)[:, None])


@triton.jit
def _load_adapter(entry_ptr, has_adapter, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry_ptr, mask=has_adapter, other=0).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load_rank(rank_ptr, has_adapter, RANK_MULTIPLE: tl.constexpr):
    """Load a rank, and say what divides it: rows of B [O, r] are that long."""
    return tl.multiple_of(tl.load(rank_ptr, mask=has_adapter, other=0), RANK_MULTIPLE)


@triton.jit
def _add_outer(
    y, h, outer, offs_o, offs_r, num_out, rank, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return y + h [t, r] times the factor that writes the output: Bᵀ, or A if TRANSPOSED."""
    B = load_matrix(
        outer, offs_o, offs_r, num_out, rank, num_out if TRANSPOSED else rank, TRANSPOSED
    )
    return tl.dot(h, tl.trans(B.to(tl.float32)), y, input_precision=PRECISION)


@triton.jit
def _batched_lora_project_kernel(
    x_ptr,  # [b, T, K] in
    table_ptr,  # [2 N] in, int64: addresses of A_n [r_n, K], then of B_n; K is B's if TRANSPOSED
    rank_ptr,  # [N] in, int64
    index_ptr,  # [b] in, int64
    h_ptr,  # [b, T, R] out, fp32: x A_iᵀ, or x B_i if TRANSPOSED; zero beyond the rank
    T,  # tokens of a sample
    num_in,  # features
    num_adapters,  # N
    R,  # BLOCK_R times the second size of the grid
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,  # of x and the adapters
    ALIGNED: tl.constexpr,  # every adapter's address is a multiple of 16 bytes
    RANK_MULTIPLE: tl.constexpr,  # divides every rank
    PRECISION: tl.constexpr,  # of tl.dot on float32
    BLOCK_T: tl.constexpr,  # tokens per program
    BLOCK_K: tl.constexpr,  # features per step
    BLOCK_R: tl.constexpr,  # ranks per program
):
    sample, first = _place(tl.program_id(0), T, BLOCK_T)
    offs_t = first + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.load(index_ptr + sample)
    has_adapter = n >= 0
    n = tl.maximum(n, 0)
    rank = _load_rank(rank_ptr + n, has_adapter, RANK_MULTIPLE)
    entry_ptr = table_ptr + (num_adapters if TRANSPOSED else 0) + n
    inner = _load_adapter(entry_ptr, has_adapter, DTYPE, ALIGNED)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, num_in, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = load_matrix(x_ptr + sample * T * num_in, offs_t, offs_k, T, num_in, num_in, False)
        A = _load_inner(inner, offs_r, offs_k, rank, num_in, TRANSPOSED)
        h = dot(x, tl.trans(A), h, PRECISION)
    offs = (sample * T + offs_t)[:, None] * R + offs_r[None, :]
    tl.store(h_ptr + offs, h, (offs_t < T)[:, None])


@triton.jit
def _batched_lora_outer_kernel(
    h_ptr,  # [b, T, R] in, fp32: a projection
    x_ptr,  # [b, T, K] in
    share_ptr,  # [b * num_splits, R, K] out, fp32: hᵀ x of SPLIT_T tokens of a sample
    T,  # tokens of a sample
    num_in,  # K
    R,  # BLOCK_R times the third size of the grid
    num_splits,
    PRECISION: tl.constexpr,  # of tl.dot on float32
    SPLIT_T: tl.constexpr,  # tokens per program
    BLOCK_T: tl.constexpr,  # tokens per step
    BLOCK_K: tl.constexpr,  # features per program
    BLOCK_R: tl.constexpr,  # ranks per program
):
    # int64: x and the shares may pass 2**31 elements
    share = tl.program_id(0).to(tl.int64)
    sample = share // num_splits
    first = (share % num_splits).to(tl.int32) * SPLIT_T
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    h_ptr += sample * T * R
    x_ptr += sample * T * num_in
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(first, tl.minimum(first + SPLIT_T, T), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        h = load_matrix(h_ptr, offs_t, offs_r, T, R, R, False)
        x = load_matrix(x_ptr, offs_t, offs_k, T, num_in, num_in, False)
        acc = tl.dot(tl.trans(h), x.to(tl.float32), acc, input_precision=PRECISION)
    offs = (share * R + offs_r)[:, None] * num_in + offs_k[None, :]
    tl.store(share_ptr + offs, acc, (offs_k < num_in)[None, :])


@triton.jit
def _batched_lora_sum_kernel(
    share_ptr,  # [b * num_splits, R, K] in, fp32
    table_ptr,  # [N] in, int64: addresses of d_A_n [r_n, K]; if TRANSPOSED, of d_B_n [K, r_n]
    rank_ptr,  # [N] in, int64
    scale_ptr,  # [N] in, fp32
    index_ptr,  # [b] in, int64
    num_shares,  # b * num_splits
    num_splits,
    num_in,  # K
    R,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,  # of the gradients
    ALIGNED: tl.constexpr,  # every gradient's address is a multiple of 16 bytes
    RANK_MULTIPLE: tl.constexpr,  # divides every rank
    BLOCK_K: tl.constexpr,  # features per program
    BLOCK_R: tl.constexpr,  # ranks per program
):
    """s_n times the sum of an adapter's shares."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = _load_rank(rank_ptr + n, True, RANK_MULTIPLE)
    mask = (offs_r < rank)[:, None] & (offs_k < num_in)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for share in tl.range(0, num_shares, loop_unroll_factor=4):
        is_own = tl.load(index_ptr + share // num_splits) == n
        first_row = tl.cast(share, tl.int64) * R
        offs = (first_row + offs_r)[:, None] * num_in + offs_k[None, :]
        acc += tl.load(share_ptr + offs, mask & is_own, other=0.0)
    acc *= tl.load(scale_ptr + n)
    out = load_pointer(table_ptr, n, DTYPE, ALIGNED)
    if TRANSPOSED:
        out_offs = offs_k.to(tl.int64)[None, :] * rank + offs_r[:, None]
    else:
        out_offs = offs_r.to(tl.int64)[:, None] * num_in + offs_k[None, :]
    tl.store(out + out_offs, acc.to(DTYPE), mask)


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """What the launches of one call share."""

    A: list[Tensor]
    B: list[Tensor]
    scale: Tensor
    index: Tensor
    table: PointerTable
    """Of A, then B."""
    ranks: Tensor
    rank_multiple: int
    chunks: int
    """Products that the largest rank takes."""
    chosen: Settings

    @classmethod
    def prepare(
        cls, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, index: Tensor
    ) -> _Adapters:
        ranks = tuple([A_n.shape[0] for A_n in A])
        largest = max(ranks, default=0)
        chosen = settings(x.dtype, largest)
        A, B = contiguous(A), contiguous(B)
        return cls(
            A=A,
            B=B,
            scale=scale.contiguous(),
            index=index.contiguous(),
            table=pointer_table([*A, *B], x.device),
            ranks=sizes_on_device(ranks, x.device),
            rank_multiple=rank_multiple(ranks),
            chunks=ceil_div(largest, chosen.block_r),
            chosen=chosen,
        )

    @property
    def padded_rank(self) -> int:
        """R, the columns of a projection."""
        return self.chunks * self.chosen.block_r

    def projection(self, x: Tensor) -> Tensor:
        """Return memory for x A_iᵀ or x B_i, float32 [b, T, R]."""
        shape = *x.shape[:2], self.padded_rank
        # products that a sample's own rank does not take are not written
        make = torch.zeros if self.chunks > 1 else torch.empty
        return make(shape, dtype=torch.float32, device=x.device)

    def factors(self, x: Tensor) -> dict[str, Any]:
        """Return what launches that read the factors pass for tensors like x, beside `options`."""
        return {
            "table_ptr": self.table.pointers,
            "rank_ptr": self.ranks,
            "index_ptr": self.index,
            "T": x.shape[1],
            "num_in": x.shape[2],
            "num_adapters": len(self.A),
            "R": self.padded_rank,
            "DTYPE": TRITON_DTYPE[x.dtype],
            "ALIGNED": self.table.aligned,
            "RANK_MULTIPLE": self.rank_multiple,
            "BLOCK_K": self.chosen.block_k,
            **self.options(x),
        }

    def options(self, x: Tensor) -> dict[str, Any]:
        """Return what all launches on tensors like x pass."""
        return {
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_R": self.chosen.block_r,
            "num_warps": self.chosen.num_warps,
            "num_stages": self.chosen.num_stages,
            **launch_options(),
        }


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: _Adapters,
    *,
    transposed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return x Wᵀ + bias + s (x Aᵀ) Bᵀ and x Aᵀ; or, transposed, x W + s (x B) A and x B.

    The projection is None where it is not kept, or nothing was computed.
    """
    b, T, _ = x.shape
    num_out = weight.shape[1] if transposed else weight.shape[0]
    y = x.new_empty(b, T, num_out)
    if y.numel() == 0:
        return y, None
    chosen = adapters.chosen
    h = adapters.projection(x) if keep and adapters.chunks else None
    tiles = b * ceil_div(T, chosen.block_t) * ceil_div(num_out, chosen.block_o)
    _batched_lora_fwd_kernel[(tiles,)](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        scale_ptr=adapters.scale,
        y_ptr=y,
        h_ptr=adapters.scale if h is None else h,
        num_out=num_out,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        KEEP=h is not None,
        BLOCK_T=chosen.block_t,
        BLOCK_O=chosen.block_o,
        **adapters.factors(x),
    )
    return y, h


def _project(x: Tensor, adapters: _Adapters, *, transposed: bool) -> Tensor:
    """Return x A_iᵀ, or x B_i if transposed, float32 [b, T, R], zero beyond the rank."""
    h = adapters.projection(x)
    if h.numel() == 0:
        return h
    b, T, _ = x.shape
    block_t = max(adapters.chosen.block_t, OUTER_BLOCK_T)
    _batched_lora_project_kernel[b * ceil_div(T, block_t), adapters.chunks](
        x_ptr=x, h_ptr=h, TRANSPOSED=transposed, BLOCK_T=block_t, **adapters.factors(x)
    )
    return h


def _outer(h: Tensor, x: Tensor, adapters: _Adapters, *, transposed: bool) -> list[Tensor]:
    """Return s_n hᵀ x summed over the samples of each adapter: d_A, or d_B if transposed."""
    b, T, num_in = x.shape
    out = [torch.empty_like(factor) for factor in (adapters.B if transposed else adapters.A)]
    if h.numel() == 0 or num_in == 0:
        return [factor.zero_() for factor in out]
    chosen, R = adapters.chosen, h.shape[2]
    splits = ceil_div(T, chosen.split_t)
    shares = torch.empty(b * splits, R, num_in, dtype=torch.float32, device=x.device)
    blocks = ceil_div(num_in, OUTER_BLOCK_K)
    _batched_lora_outer_kernel[b * splits, blocks, adapters.chunks](
        h_ptr=h,
        x_ptr=x,
        share_ptr=shares,
        T=T,
        num_in=num_in,
        R=R,
        num_splits=splits,
        SPLIT_T=chosen.split_t,
        BLOCK_T=OUTER_BLOCK_T,
        BLOCK_K=OUTER_BLOCK_K,
        **adapters.options(x),
    )
    table = pointer_table(out, x.device)
    _batched_lora_sum_kernel[blocks, len(out), adapters.chunks](
        share_ptr=shares,
        table_ptr=table.pointers,
        rank_ptr=adapters.ranks,
        scale_ptr=adapters.scale,
        index_ptr=adapters.index,
        num_shares=b * splits,
        num_splits=splits,
        num_in=num_in,
        R=R,
        TRANSPOSED=transposed,
        DTYPE=TRITON_DTYPE[x.dtype],
        ALIGNED=table.aligned,
        RANK_MULTIPLE=adapters.rank_multiple,
        BLOCK_K=OUTER_BLOCK_K,
        BLOCK_R=chosen.block_r,
        num_warps=chosen.num_warps,
        **launch_options(),
    )
    return out


def batched_lora_forward(inputs: arguments.BatchedLora, kept: list[Tensor] | None = None) -> Tensor:
    """Return y [b, t, o], by one launch; put x Aᵀ into `kept`, float32 [b, t, R]."""
    x, weight, A, B, scale, index, bias = inputs
    bias = None if bias is None else bias.contiguous()
    with on_device_of(x):
        adapters = _Adapters.prepare(x, A, B, scale, index)
        y, projection = _apply(
            x.contiguous(),
            weight.contiguous(),
            bias,
            adapters,
            transposed=False,
            keep=kept is not None,
        )
    if kept is not None and projection is not None:
        kept.append(projection)
    return y


def batched_lora_backward(
    d_y: Tensor, saved: arguments.BatchedLoraSaved, needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Return d_x, d_weight, d_A, d_B, d_scale, d_bias.

    With P = x Aᵀ, which the forward kept, and Q = d_y B, which comes with d_x; each by a launch of
    its own where it is missing. d_weight is one plain product over all tokens, which PyTorch's own
    library is best at.
    """
    x, weight, A, B, scale, index, projection = saved
    need_x, need_weight, need_A, need_B, need_scale, need_bias = needs
    d_y, x = d_y.contiguous(), x.contiguous()
    need_Q = bool(A) and (need_A or need_scale)
    need_P = bool(A) and (need_B or need_scale)
    d_x: Tensor | None = None
    P, Q = projection, None
    d_A: list[Tensor] = []
    d_B: list[Tensor] = []
    d_scale = None
    with on_device_of(x):
        adapters = _Adapters.prepare(x, A, B, scale, index)
        if need_x:
            d_x, Q = _apply(d_y, weight.contiguous(), None, adapters, transposed=True, keep=need_Q)
        if need_Q and Q is None:
            Q = _project(d_y, adapters, transposed=True)
        if need_P and P is None:
            P = _project(x, adapters, transposed=False)
        if need_A and Q is not None:
            d_A = _outer(Q, x, adapters, transposed=False)
        if need_B and P is not None:
            d_B = _outer(P, d_y, adapters, transposed=True)
        if need_scale:
            d_scale = torch.zeros_like(scale)
            if P is not None and Q is not None:
                # not index_add, whose atomic additions come in any order
                adapter = sizes_on_device(tuple(range(len(A))), x.device)
                is_own = index == adapter[:, None]
                d_scale = torch.where(is_own, (P * Q).sum((1, 2)), 0).sum(1).to(scale.dtype)
    d_weight = d_y.flatten(0, 1).mT @ x.flatten(0, 1) if need_weight else None
    d_bias = d_y.sum((0, 1)) if need_bias else None
    return d_x, d_weight, d_A, d_B, d_scale, d_bias
