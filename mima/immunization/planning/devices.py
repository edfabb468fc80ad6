"""How much memory and disk a device has."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from mima.errors import MimaError

DEVICES = {
    **{"l4": 22.5, "rtx3090": 23.6, "rtx4090": 23.6, "a10": 22.5, "rtx5090": 31.4},
    **{"l40s": 44.5, "a6000": 47.5, "a100-40": 39.4, "a100": 79.2, "h100": 79.1, "h200": 139.8},
}
"""GiB that a program finds on a GPU of a name."""
GPU_CONTEXT = int(0.6 * 2**30)
"""Bytes that a CUDA context and the libraries' workspaces take."""


def device_memory(device: str | torch.device | None) -> tuple[str, int | None]:
    """A device's name, and the bytes that a run may have there; None where that is not known.

    Raises:
        MimaError: no such device is known.
    """
    name = "cuda" if device is None and torch.cuda.is_available() else str(device or "cpu").lower()
    if name in DEVICES:
        return name, int(DEVICES[name] * 2**30)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(g|gb|gib|m|mb|mib)", name):
        unit = {"g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
        return f"a GPU of {name}", int(float(size[1]) * unit[size[2]])
    if name.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise MimaError(
                f"device {name}: this machine has no usable CUDA device; a plan for another "
                f"machine names one of {', '.join(DEVICES)}, or a size such as 24gib"
            )
        free, _ = torch.cuda.mem_get_info(name)
        return name, free + torch.cuda.memory_reserved(name)
    if name != "cpu":
        raise MimaError(
            f"device {name!r} is unknown; a plan takes cpu, cuda, {', '.join(DEVICES)}, or a size "
            "such as 24gib"
        )
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return name, None
    return name, available + resident()


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def free_disk(output: Path) -> int | None:
    """Bytes that a run may write at a place, which need not be there yet."""
    folder = output.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
