"""Several processes as one: who does which concepts, and the sums over all of them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mima.errors import MimaError, nearest

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; one that died is noticed sooner."""


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one problem, seen from one of them.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        group: torch's process group; None for a single process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def owner(self, n: int) -> int:
        """The rank that does concept n."""
        return n % self.size

    def share(self, count: int) -> range:
        """The concepts, of ``count``, that this process does."""
        return range(self.rank, count, self.size)

    def all_reduce(
        self, mine: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Add up named tensors over all processes, in one all-reduce.

        Args:
            mine: this process' summands; a name without one counts as zero.
            like: names, shapes and dtype of the result, the same in every process.
        """
        if self.size == 1:
            return {name: mine[name] for name in like if name in mine}
        parts = [mine[n].detach() if n in mine else torch.zeros_like(v) for n, v in like.items()]
        flat = _flatten_dense_tensors(parts)
        dist.all_reduce(flat, group=self.group)
        return dict(zip(like, _unflatten_dense_tensors(flat, parts), strict=True))

    def all_gather(self, mine: T) -> list[T]:
        """Every process' object, by rank, in every process."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def broadcast(self, value: T) -> T:
        """The main process' value, in every process."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.main else None]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]  # type: ignore[no-any-return]

    def interleave(self, mine: Sequence[T], count: int) -> list[T]:
        """What each process has for its ``share(count)``, put together in order."""
        everyone = self.all_gather(list(mine))
        return [everyone[self.owner(n)][n // self.size] for n in range(count)]

    def together(self, action: Callable[[], None]) -> None:
        """Do something in the main process alone; where it fails, fail in all.

        Raises:
            MimaError: what the action raised.
        """
        problem = None
        if self.main:
            try:
                action()
            except MimaError as error:
                if self.size == 1:
                    raise
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem


ALONE = Ranks()


def union(parts: Iterable[Mapping[str, T]], order: Collection[str] = ()) -> dict[str, T]:
    """Mappings with distinct names as one; names in ``order`` come first, in that order."""
    merged = {name: value for part in parts for name, value in part.items()}
    return {name: merged[name] for name in dict.fromkeys([*order, *merged]) if name in merged}


def join(device: torch.device | None = None) -> Ranks:
    """Join the other processes that ``torchrun`` or ``accelerate launch`` started, if it did.

    Args:
        device: where the model is; a CUDA device talks over nccl, anything else over gloo.

    Raises:
        MimaError: the environment announces other processes but they cannot be reached.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (ValueError, dist.DistError) as error:
            raise MimaError(
                f"distributed: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot "
                f"meet ({error}); start them with torchrun or accelerate launch"
            ) from error
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def device_of(name: str | torch.device | None) -> torch.device:
    """The named device; without a name, this process' own GPU where there is one, else the CPU.

    Raises:
        MimaError: torch knows no such device, or this machine has none.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = nearest(str(name), ["cpu", "cuda"])
        raise MimaError(f"device {name!r} is unknown; {hint}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MimaError(f"device {name}: this machine has no usable CUDA device")
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
