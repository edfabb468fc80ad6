"""What a plan says: what is trained, memory by phase and part, disk, and time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

KINDS = 12
"""Kinds of tensors that are told by name."""
BACKWARD, DOUBLE_BACKWARD = 2, 6
"""Of a forward's time: a backward, and a backward through a backward."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will train and need.

    Attributes:
        device: where it is to run, as it was named.
        capacity: bytes that the run may have there; None where that is not known.
        trained: by group, the names of the parameters.
        numels: sizes of these parameters, by name.
        memory: by phase of the run, by part, bytes at the most.
        disk: by part, bytes at the most.
        free_disk: bytes, where the run is to write something.
        steps: outer steps, those of all concepts where each is immunized alone.
        pictures: of one outer step, how many pictures go forward, backward, and backward through a
            backward.
        drawn: pictures that go forward, without a graph, to draw class pictures.
        seconds: of one picture's forward, where it was measured.
        refusal: why the run cannot fit, and with which settings it would; None where it fits.
        processes: that are to be started; memory is that of one.
        shards: how many of them hold a model between them.
        host: by part, bytes of the CPU's memory that each process takes beside its GPU's.
        received: by part, bytes that each process receives from others in one outer step.
    """

    device: str
    capacity: int | None
    trained: Mapping[str, Sequence[str]]
    numels: Mapping[str, int]
    memory: Mapping[str, Mapping[str, int]]
    disk: Mapping[str, int]
    free_disk: int | None = None
    steps: int
    pictures: Mapping[str, float]
    drawn: int
    seconds: float | None = None
    refusal: str | None = None
    processes: int = 1
    shards: int = 1
    host: Mapping[str, int] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of memory at the most."""
        return max(sum(parts.values()) for parts in self.memory.values())

    @property
    def forwards(self) -> float:
        """What one outer step takes, in forwards of one picture."""
        p = self.pictures
        return p["forward"] + BACKWARD * p["backward"] + DOUBLE_BACKWARD * p["backward of backward"]

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice, as far as that is known."""
        disk = self.free_disk is None or sum(self.disk.values()) <= self.free_disk
        return disk and (self.capacity is None or self.peak <= self.capacity)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterable[str]:
        yield "trains:"
        for group, names in self.trained.items():
            count = sum(self.numels[name] for name in names)
            yield f"  {group}: {len(names)} tensors, {count / 1e6:.1f} M parameters"
            kinds = Counter(map(_kind, names)).most_common()
            yield from (f"    {number} × {kind}" for kind, number in kinds[:KINDS])
            if len(kinds) > KINDS:
                yield f"    {len(kinds) - KINDS} further kinds of tensors"
        each = ""
        if self.shards > 1:
            each = " of each process"
            yield f"{self.processes} processes, {self.shards} of which hold a model between them"
        yield f"memory{each} on {self.device}, {gib(self.peak)} at the peak:"
        for phase, parts in self.memory.items():
            yield f"  {phase}: {gib(sum(parts.values()))}"
            yield from (f"    {part}: {gib(size)}" for part, size in parts.items() if size)
        if any(self.host.values()):
            yield "memory of the CPU besides, for each process:"
            yield from (f"  {part}: {gib(size)}" for part, size in self.host.items() if size)
        if self.received:
            told = gib(sum(self.received.values()))
            yield f"each process receives {told} in an outer step, on paper:"
            yield from (f"  {part}: {gib(size)}" for part, size in self.received.items())
        yield f"disk: {gib(sum(self.disk.values()))}"
        yield from (f"  {part}: {gib(size)}" for part, size in self.disk.items() if size)
        told = ", ".join(f"{round(n, 1):g} {way}" for way, n in self.pictures.items() if n)
        each = f"{round(self.forwards, 1):g} forwards of one picture each"
        yield f"time: {self.steps} outer steps of {each} ({told})"
        if self.drawn:
            yield f"  {self.drawn} forwards before that, where class pictures are to be drawn"
        if self.seconds is not None:
            total = self.seconds * (self.steps * self.forwards + self.drawn)
            hours = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
            yield f"  one took {self.seconds:.3g} s here: about {hours} in all"


def _kind(name: str) -> str:
    """A parameter's name without its place."""
    return re.sub(r"^.*\.(?=\w+\.[^.]*[a-z_][^.]*(?:\.\d+)?\.(?:weight|bias)$)", "", name)


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**24 else f"{math.ceil(size / 2**20)} MiB"
