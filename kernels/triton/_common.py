"""What the launchers share: pointer tables, block maps, dtypes; and how a kernel reads a pointer.

A launcher serves a whole list of tensors with one launch. The kernel finds its tensor in a *block
map*, one row (tensor, block within the tensor) per program, and the tensor's address in a *pointer
table*. Triton knows nothing of an address that it loads, so the launcher promises alignment with a
constexpr, without which loads and stores would be one element each.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16
"""Bytes of the widest load and store."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, as it is when they are defined."""

TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def load_pointer(table_ptr, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the i-th address of a table as a pointer, on a 16-byte boundary if promised."""
    pointer = tl.load(table_ptr + i).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def stream_place(block_map_ptr, sizes_ptr, BLOCK: tl.constexpr):
    """Return a program's tensor, where it begins there, and the tensor's size."""
    pid = tl.program_id(0)
    p = tl.load(block_map_ptr + 2 * pid)
    # int64: a tensor may pass 2**31 elements
    start = tl.load(block_map_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    return p, start, tl.load(sizes_ptr + p)


@triton.jit
def load_wide(ptrs, mask, FULL: tl.constexpr):
    """Load as float32: everything, or where the mask says so and zero elsewhere.

    A load without a mask moves whole 16-byte words; one with a mask may not.
    """
    return tl.load(ptrs).to(tl.float32) if FULL else tl.load(ptrs, mask, other=0.0).to(tl.float32)


@triton.jit
def store_narrow(ptrs, value, mask, FULL: tl.constexpr):
    """Round to the pointers' dtype and store: everything, or where the mask says so."""
    if FULL:
        tl.store(ptrs, value.to(ptrs.dtype.element_ty))
    else:
        tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask)


@triton.jit
def load_matrix(pointer, offs_i, offs_j, num_i, num_j, ld, TRANSPOSED: tl.constexpr = False):
    """Load X[i, j], or X[j, i] if TRANSPOSED, of an X with rows of length ld; zero outside."""
    mask = (offs_i < num_i)[:, None] & (offs_j < num_j)[None, :]
    if TRANSPOSED:
        offs = offs_j.to(tl.int64)[None, :] * ld + offs_i[:, None]
    else:
        offs = offs_i.to(tl.int64)[:, None] * ld + offs_j[None, :]
    return tl.load(pointer + offs, mask, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return a b + acc.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def block_size(length: int, limit: int) -> int:
    """Return a power of 2 for products over a length: 16 at least, as tl.dot needs."""
    return min(max(triton.next_power_of_2(length), 16), limit)


def dot_precision(dtype: torch.dtype) -> str:
    """Return how tl.dot multiplies float32 operands.

    On NVIDIA's tensor cores three TF32 products keep float32's accuracy: Triton adds their sum to
    the accumulator outside of them, which truncate what they add. One is enough for float16 and
    bfloat16 inputs, which are less accurate, and for float32 where PyTorch's own products are
    allowed TF32 (`torch.backends.cuda.matmul`). AMD's matrix cores multiply float32 as it is.
    """
    if torch.version.hip:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed or dtype != torch.float32 else "tf32x3"


def launch_options() -> dict[str, int]:
    """Return what every launch passes besides its settings.

    NVIDIA's assembler spills a few bytes where that lets one more program fit on a multiprocessor,
    unless it is told how many registers a thread may use: here, as many as there are.
    """
    return {} if torch.version.hip else {"maxnreg": 255}


def ceil_div(a: int, b: int) -> int:
    """Return ⌈a / b⌉; `triton.cdiv` takes 3 µs on the host, and lists have hundreds of tensors."""
    return -(-a // b)


@dataclass(frozen=True)
class PointerTable:
    """The addresses of a list of tensors, on their device."""

    pointers: Tensor
    """int64 [len(tensors)]; 0 for None."""
    aligned: bool
    """Whether every address is a multiple of `ALIGNMENT`."""


def pointer_table(tensors: Sequence[Tensor | None], device: torch.device) -> PointerTable:
    """Return the tensors' addresses; copied once for as long as the same addresses come again."""
    addresses = tuple([0 if x is None else x.data_ptr() for x in tensors])
    return _pointer_table(addresses, device, _stream(device))


def sizes_on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 [len(sizes)], copied once."""
    return _sizes_on_device(sizes, device, _stream(device))


def block_map(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return int32 [num_programs, 2]: the tensor of each program and the block within it, once."""
    return _block_map(sizes, block, device, _stream(device))


# Each cache is one of content: what a list of numbers is on a device. Its entries belong to the
# stream that copied them, whose order makes the copy precede every launch that reads it, and the
# reuse of an evicted entry's memory follow them. The bound covers a table per adapted layer of the
# largest models; if every entry were a table of a merge, 24 KB for 3000 tensors, it were 50 MB.
_ENTRIES = 2048


@functools.lru_cache(maxsize=_ENTRIES)
def _pointer_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> PointerTable:
    aligned = functools.reduce(operator.or_, addresses, 0) % ALIGNMENT == 0
    return PointerTable(_integers(addresses, device), aligned)


@functools.lru_cache(maxsize=_ENTRIES)
def _sizes_on_device(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _integers(sizes, device)


@functools.lru_cache(maxsize=64)
def _block_map(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> Tensor:
    with torch.device("cpu"):
        counts = torch.tensor([ceil_div(size, block) for size in sizes], dtype=torch.int64)
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        rows = torch.stack([tensor, torch.arange(len(tensor)) - first], dim=1)
    return _copied(rows.to(torch.int32), device)


def _stream(device: torch.device) -> int:
    """Return the current stream; refuse one that is being captured into a CUDA graph.

    A graph keeps the addresses of the tables that its kernels read, and the tables themselves stay
    only as long as a cache keeps them. `torch.compile` leaves the operators out of its graphs by
    their tag `cudagraph_unsafe`.
    """
    if device.type != "cuda":
        return 0
    # "current" is said of the current device
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("mima.kernels cannot be captured into a CUDA graph")
        return torch.cuda.current_stream(device).cuda_stream


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 [len(values)] on a device."""
    # not on the default device, which torch.set_default_device may have made the GPU
    return _copied(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def _copied(host: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it."""
    if device.type == "cpu":
        return host
    # pinned memory belongs to the current device, too
    with torch.cuda.device(device):
        return host.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def rank_multiple(ranks: tuple[int, ...]) -> int:
    """Return the largest power of 2 up to 16 that divides every rank.

    A kernel that knows it reads rows of B [o, r] in words as wide as they allow: 128 bits where a
    row is a multiple of 16 bytes.
    """
    return math.gcd(16, *ranks)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make x's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


STREAM_WARPS = 4
"""Of kernels that stream over lists of tensors."""


def stream_block(dtype: torch.dtype) -> int:
    """Return the elements per program: for each thread, 16-byte accesses. Not measured on a GPU.

    Eight elements a thread; four in float32 on AMD, whose warps are twice as wide.
    """
    return 2048 if torch.version.hip is not None and dtype.itemsize == 2 else 1024


def launch_stream(
    kernel: Any,
    like: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    *,
    block: int | None = None,
    **arguments: Any,
) -> None:
    """Launch a kernel that streams over lists of P tensors, each shaped as `like`."""
    device = like[0].device
    sizes = tuple([x.numel() for x in like])
    block = block or stream_block(like[0].dtype)
    blocks = block_map(sizes, block, device)
    if len(blocks) == 0:
        return
    table = pointer_table(tensors, device)
    with on_device_of(like[0]):
        kernel[(len(blocks),)](
            table_ptr=table.pointers,
            sizes_ptr=sizes_on_device(sizes, device),
            block_map_ptr=blocks,
            num_tensors=len(like),
            **arguments,
            DTYPE=TRITON_DTYPE[like[0].dtype],
            ALIGNED=table.aligned,
            BLOCK=block,
            num_warps=STREAM_WARPS,
            **launch_options(),
        )


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, copied where they are not contiguous."""
    return [x.contiguous() for x in tensors]
