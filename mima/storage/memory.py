"""Memory that is given back to the system before a process ends."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

MADV_PAGEOUT = 21
"""Linux' advice to let pages leave memory, which Python's ``mmap`` does not name."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def trim() -> None:
    """Give back what is free between tensors that are in use: glibc keeps that for later ones.

    Elsewhere it stays.
    """
    # musl has no such function
    if (give_back := getattr(_LIBC, "malloc_trim", None)) is not None:
        give_back(0)


def page_out(x: torch.Tensor) -> None:
    """Let a tensor that is mapped from a file leave memory; reading it reads the file again.

    Its values stay: pages that were written to do not leave. On Linux alone.
    """
    if _LIBC is None or x.device.type != "cpu" or not x.is_contiguous():
        return
    # of the first and the last page, neighbours have a part
    first = -(-x.data_ptr() // mmap.PAGESIZE)
    count = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE - first
    if count > 0:
        # a kernel older than 5.4 does not know the advice: then the pages stay
        _LIBC.madvise(
            ctypes.c_void_p(first * mmap.PAGESIZE),
            ctypes.c_size_t(count * mmap.PAGESIZE),
            MADV_PAGEOUT,
        )
