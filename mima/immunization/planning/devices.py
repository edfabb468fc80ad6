"""How much memory and disk a device has."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path
from typing import Literal

import torch

from mima.distributed import device_of
from mima.errors import MimaError

GPU_GIB = {
    **{"l4": 22.5, "rtx3090": 23.6, "rtx4090": 23.6, "a10": 22.5, "rtx5090": 31.4},
    **{"l40s": 44.5, "a6000": 47.5, "a100-40": 39.4, "a100": 79.2, "h100": 79.1, "h200": 139.8},
}
"""GiB that a program finds on a GPU of a name."""
GPU_CONTEXT = int(0.6 * 2**30)
"""Bytes that a CUDA context and the libraries' workspaces take."""


def device_memory(device: str | torch.device | None) -> tuple[str, int | None]:
    """A device's name, and the bytes that a run may have there; None where that is not known.

    Of several processes of a machine, each has a share of its memory, and a GPU of its own.

    Raises:
        MimaError: no such device is known.
    """
    name = str(device_of(None) if device is None else device).lower()
    if name in GPU_GIB:
        return name, int(GPU_GIB[name] * 2**30)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(g|gb|gib|m|mb|mib)", name):
        unit = {"g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
        return f"a GPU of {name}", int(float(size[1]) * unit[size[2]])
    if name.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise MimaError(
                f"device {name}: this machine has no usable CUDA device; a plan for another "
                f"machine names one of {', '.join(GPU_GIB)}, or a size such as 24gib"
            )
        name = str(device_of(name))
        free, _ = torch.cuda.mem_get_info(name)
        return name, free + torch.cuda.memory_reserved(name)
    if name != "cpu":
        raise MimaError(
            f"device {name!r} is unknown; a plan takes cpu, cuda, {', '.join(GPU_GIB)}, or a size "
            "such as 24gib"
        )
    room = free_memory()
    if room is None:
        return name, None
    room //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        room = min(room, most - _own_memory("size"))
    return name, max(0, room) + resident()


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the machine has left, or the container or the job that this process is in.

    Args:
        proc: where the system says what there is, and in which control groups this process is.
        cgroups: where it says what these may have.
    """
    try:
        told = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        rooms = [int(told["MemAvailable"].split()[0]) * 1024]
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return None
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # a group's limit is one of those within; a container may see the innermost alone, as root
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                rooms += _room(folder, *files)
    return min(rooms)


def _room(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    """Bytes that a control group has left, where it has a limit; what caches files is left, too."""
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if most == "max" else [int(most) - int(used) + int(told.get(cached, "0"))]


def resident() -> int:
    """Bytes of this process in memory."""
    return _own_memory("resident")


def _own_memory(what: Literal["size", "resident"]) -> int:
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(pages[("size", "resident").index(what)]) * os.sysconf("SC_PAGESIZE")


def free_disk(output: Path) -> int | None:
    """Bytes that a run may write at a place, which need not be there yet."""
    folder = output.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
