"""Several processes as one: who does which concepts, and the sums over all of them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import get_total_norm

from mima.errors import MimaError, counted, nearest, one_line

K = TypeVar("K")
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others to appear."""
PATIENT = timedelta(days=7)
"""How long it waits for what they have to do, as a concept's whole immunization; one that died is
noticed by its pulse, long before."""
PERIOD = 2.0
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds without one after which a process counts as dead."""
LEFT = "left"
"""The last sign of a process that has done its part."""
INTERRUPTED = KeyboardInterrupt.__name__
"""The last sign of one that a Ctrl-C ended."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """The processes that share concepts out, seen from one of them.

    Where several processes hold a model between them, its shards, each of them does the same
    concepts as the others. Concepts are then shared out over the processes that hold the same
    shard.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        group: torch's process group; None for a single process.
        mesh: ``concept`` × ``shard``, of all processes; None where each holds a whole model.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0 and (self.mesh is None or self.mesh.get_local_rank("shard") == 0)

    def split(self, shards: int, device: torch.device) -> Ranks:
        """The same processes, every ``shards`` neighbours of which hold a model between them.

        Neighbours are on one node where its number of processes is a multiple of ``shards``.
        """
        if shards == 1:
            return self
        by_model = torch.arange(self.size).view(-1, shards)
        # init_device_mesh's own groups would wait for minutes
        groups: list[Any] = [
            dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=PATIENT)[0]
            for ranks in (by_model.T, by_model)
        ]
        names = ("concept", "shard")
        mesh = DeviceMesh.from_group(groups, device.type, by_model, mesh_dim_names=names)
        rank, size = mesh.get_local_rank("concept"), mesh["concept"].size()
        return Ranks(rank, size, mesh.get_group("concept"), mesh)

    def for_one(self) -> Ranks:
        """Those who do one concept: this process, with the others that hold its model."""
        return Ranks(mesh=self.mesh)

    def over_shards(self, *mine: float) -> tuple[float, ...]:
        """Sums over rows of a model: added up over the processes that hold it between them."""
        if self.mesh is None:
            return mine
        device = "cpu" if self.mesh.device_type == "cpu" else torch.cuda.current_device()
        total = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.mesh.get_group("shard"))
        return tuple(total.tolist())

    def norm(self, values: Mapping[str, torch.Tensor]) -> float:
        """Length of named tensors, of which this process has its rows."""
        own = float(get_total_norm(list(values.values())))
        if self.mesh is None:
            return own
        (squared,) = self.over_shards(own**2)
        return float(squared**0.5)

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
        return _gather(mine, self.group)

    @property
    def place(self) -> tuple[int, int]:
        """This process among all, and how many there are, whatever they share."""
        return (self.rank, self.size) if self.mesh is None else (dist.get_rank(), self.mesh.size())

    def all_gather_everywhere(self, mine: T) -> list[T]:
        """Every process' object, also of those that hold other shards, in every process."""
        return self.all_gather(mine) if self.mesh is None else _gather(mine, dist.group.WORLD)

    def broadcast(self, value: T) -> T:
        """The main process' value, in every process."""
        if self.size == 1 and self.mesh is None:
            return value
        held: list[Any] = [value if self.main else None]
        everyone = self.group if self.mesh is None else dist.group.WORLD
        dist.broadcast_object_list(held, src=0, group=everyone)
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
                if self.size == 1 and self.mesh is None:
                    raise
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem


ALONE = Ranks()


def _gather(mine: T, group: Any) -> list[T]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def union(parts: Iterable[Mapping[K, T]]) -> dict[K, T]:
    """Mappings with distinct names as one."""
    return {name: value for part in parts for name, value in part.items()}


def world_size() -> int:
    """How many processes were started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        if world_size() == 1:
            return ALONE
        # not in builds of torch that know one process alone
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # nobody is waited for longer where all are there
            here = PrefixStore("mima/here", store)
            here.set(str(rank), "")
            here.wait([str(other) for other in range(size)], TIMEOUT)
            # the prefix is that under which torch itself keeps what it meets by
            own = PrefixStore("default_pg", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENT)
            _PULSES.append(Pulse(dist.get_rank(), dist.get_world_size()))
        except (ValueError, dist.DistError) as error:
            raise MimaError(
                f"distributed: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot "
                f"meet ({error}); start them with torchrun or accelerate launch"
            ) from error
        if backend == "nccl":
            # nccl sends pickled objects through the current device
            torch.cuda.set_device(device)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def device_of(name: str | torch.device | None) -> torch.device:
    """The named device; without a name, this process' own GPU where there is one, else the CPU.

    ``cuda`` alone is this process' own GPU, too, where several were started.

    Raises:
        MimaError: torch knows no such device, or this machine has none.
    """
    if name is None:
        name = f"cuda:{_local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = nearest(str(name), ["cpu", "cuda"])
        raise MimaError(f"device {name!r} is unknown; {hint}") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise MimaError(f"device {name}: this machine has no usable CUDA device")
    if device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", _local_rank())
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise MimaError(
            f"device {device}: this machine has {counted(count, 'usable CUDA device')}, and each "
            "process takes one of its own"
        )
    return device


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class Pulse:
    """Lets no process wait for one that has died: it names that process and ends this one.

    A collective over nccl waits for a dead process until its time is out, and gloo says that a
    connection was closed, by whom it does not say. So a thread of each process counts up at the
    store where all met, and looks whether the others do.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        # a connection of its own: one on which the process waits for a key lets nobody else in
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._key = f"mima/pulse/{attempt}"
        self._size = size
        self._runs = 0
        self._problem = ""
        self._ended = threading.Event()
        self._ended.set()

    def start(self) -> None:
        """Begin to count, and to look after the others that have begun."""
        self._runs += 1
        self._ended, self._found = threading.Event(), threading.Event()
        self._problem = ""
        self._say("0")
        self._thread = threading.Thread(target=self._watch, name="mima pulse", daemon=True)
        self._thread.start()

    def stop(self, last: str) -> None:
        """Tell the others, once, that this process waits for nobody any more: why, or ``LEFT``."""
        if self._ended.is_set():
            return
        self._ended.set()
        # the process that served the store may be gone
        with contextlib.suppress(dist.DistError):
            self._say(last)
        # Python crashes at exit while one of its threads waits within the store
        self._thread.join(PATIENCE)

    @property
    def lost(self) -> bool:
        """Whether another process has died or failed in the last run."""
        return bool(self._problem)

    def problem(self) -> str | None:
        """Which process has died, waiting as long as it takes to say so; None for none."""
        return self._problem if self._found.wait(PATIENCE + 2 * PERIOD) else None

    def _key_of(self, rank: int) -> str:
        return f"{self._key}/{self._runs}/{rank}"

    def _say(self, count: str) -> None:
        self._store.set(self._key_of(self._rank), count)

    def _watch(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._ended.wait(PERIOD):
            count += 1
            try:
                self._say(str(count))
                keys = {n: self._key_of(n) for n in range(self._size) if n != self._rank}
                told = {n: self._store.get(k) for n, k in keys.items() if self._store.check([k])}
            except dist.DistError as error:
                self._end(
                    "the store where the processes met does not answer: process 0, or torchrun on "
                    f"its node, has died ({one_line(error)})"
                )
                return
            now = time.monotonic()
            for n, new in told.items():
                before, since = seen.get(n, (b"", now))
                seen[n] = (new, since if new == before else now)
                silent = now - seen[n][1]
                if new.isdigit() and silent > PATIENCE:
                    self._end(f"process {n} has given no sign of life for {silent:.0f} s")
                elif not new.isdigit() and new != LEFT.encode():
                    # a step that has begun is done before a Ctrl-C counts here, too
                    patience = PATIENCE if new == INTERRUPTED.encode() else 2 * PERIOD
                    self._end(f"process {n} has failed: {new.decode(errors='replace')}", patience)
                if self._found.is_set():
                    return

    def _end(self, problem: str, patience: float | None = None) -> None:
        self._problem = problem
        self._found.set()
        # a process that is about to fail, too, says so by itself
        if not self._ended.wait(2 * PERIOD if patience is None else patience):
            logger.error("distributed: %s; process %d ends, too", problem, self._rank)
            os._exit(1)


_PULSES: list[Pulse] = []
"""That of this process, where ``join`` made its process group."""


@contextmanager
def looking_after_each_other() -> Iterator[None]:
    """While it lasts, a process that dies, or leaves with an error, ends all the others.

    Nothing is done where the process group is the caller's own.

    Raises:
        MimaError: a collective failed because a process had died, which is named.
    """
    if not _PULSES:
        yield
        return
    pulse = _PULSES[-1]
    pulse.start()
    try:
        yield
    except BaseException as error:
        of_the_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        problem = pulse.problem() if of_the_group else None
        pulse.stop(problem or one_line(error) or type(error).__name__)
        if problem is not None:
            raise MimaError(f"distributed: {problem}") from error
        raise
    else:
        pulse.stop(LEFT)


def wait_for_nobody(why: str) -> None:
    """Leave the others, as at the end of `looking_after_each_other`: what follows may take long.

    No process ends this one any more.

    Args:
        why: what they are told, as ``INTERRUPTED``.
    """
    for pulse in _PULSES:
        pulse.stop(why)


def _leave() -> None:
    # to destroy a group whose process was lost may wait for that process
    if dist.is_initialized() and not any(pulse.lost for pulse in _PULSES):
        dist.destroy_process_group()
