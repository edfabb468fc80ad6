"""What the launchers share: pointer tables, block maps, dtypes; and how a kernel reads a pointer.

A launcher serves a whole list of tensors with one launch. The kernel finds its tensor in a *block
map*, one row (tensor, block within the tensor) per program, and the tensor's address in a *pointer
table*. Triton knows nothing of an address that it loads, so the launcher promises alignment with a
constexpr, without which loads and stores would be one element each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return a b + acc.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """Return how tl.dot multiplies float32 operands.

    Three TF32 products keep float32's accuracy on NVIDIA's tensor cores; one is more accurate than
    float16 and bfloat16 inputs are. AMD's matrix cores multiply float32 as it is.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def launch_options() -> dict[str, int]:
    """Return what every launch passes besides its settings.

    NVIDIA's assembler spills a few bytes where that lets one more program fit on a multiprocessor,
    unless it is told how many registers a thread may use: here, as many as there are.
    """
    return {} if torch.version.hip else {"maxnreg": 255}


def pointer_table(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the tensors' addresses, int64 [len(tensors)], on their device; 0 for None."""
    device = next(x.device for x in tensors if x is not None)
    return to_device([0 if x is None else x.data_ptr() for x in tensors], torch.int64, device)


@functools.lru_cache(maxsize=64)
def sizes_on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 [len(sizes)]."""
    return to_device(sizes, torch.int64, device)


def to_device(
    values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Copy integers to the device without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def block_map(num_blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int32 [sum(num_blocks), 2]: the tensor of each program and the block within it."""
    counts = torch.tensor(num_blocks)
    tensor = torch.repeat_interleave(torch.arange(len(num_blocks)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    block = torch.arange(len(tensor)) - first
    return torch.stack([tensor, block], dim=1).to(device, torch.int32)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make x's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, copied where they are not contiguous."""
    return [x.contiguous() for x in tensors]


def are_aligned(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether every tensor starts on a 16-byte boundary."""
    return all(x is None or x.data_ptr() % ALIGNMENT == 0 for x in tensors)
