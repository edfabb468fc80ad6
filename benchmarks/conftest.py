"""Devices, threads and strictness for the benchmarks.

MIMA_BENCH_DEVICE: cpu or cuda (default: cuda where there is one). MIMA_BENCH_THREADS: default: the
cores that this process may use. MIMA_BENCH_COMPILE=0 leaves torch.compile out.

Memory that is freed stays with the process: otherwise glibc, depending on what was freed before,
gives pages back and takes them anew, zeroed, in every other call, and comparisons are by chance.
"""

from __future__ import annotations

import ctypes
import os
import sys

# a benchmark of a silent fallback would be worse than none
os.environ["MIMA_STRICT"] = "1"

import pytest
import torch

from benchmarks.harness import Machine, measure_machine

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def pytest_configure() -> None:
    """Let glibc keep what is freed."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to measure."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("MIMA_BENCH_DEVICE", default))


@pytest.fixture(scope="session")
def machine(device: torch.device) -> Machine:
    """The device's measured limits, with as many threads as this process has cores."""
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(int(os.environ.get("MIMA_BENCH_THREADS", len(cores))))
    torch.manual_seed(0)
    return measure_machine(device)
