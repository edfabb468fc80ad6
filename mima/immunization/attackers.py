"""Who attacks in each outer step: what an attacker draws, and who lives on."""

# n = index of a concept

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mima.bilevel.lower import Carried
from mima.choices import AttackerCaptions
from mima.immunization.config import LowerConfig
from mima.training.batches import seeded


@dataclass(frozen=True)
class Alive:
    """An attacker between two of the outer steps that it lives through.

    Attributes:
        born: the outer step at which it began from θ; the seed, n and this say what it draws.
        carried: where it stopped, relative to θ.
    """

    born: int
    carried: Carried


@dataclass(frozen=True)
class Attacker:
    """Concept n's attacker at one outer step.

    Attributes:
        config: the attacker's settings.
        seed: the run's seed.
        n: index of the concept.
        born: the outer step at which the attacker began.
        carried: where it stopped before this outer step; None where it begins with it.
        who: tells the draws of those who attack, "", from those of others.
    """

    config: LowerConfig
    seed: int
    n: int
    born: int
    carried: Carried | None = None
    who: str = ""

    @cached_property
    def lr(self) -> float:
        """The step size."""
        lr = self.config.lr
        return log_uniform(*lr, self._draw("rate")) if isinstance(lr, tuple) else lr

    @cached_property
    def rank(self) -> int:
        """Rank of the LoRA factors."""
        rank = self.config.rank
        return _whole(*rank, self._draw("rank")) if isinstance(rank, tuple) else rank

    @cached_property
    def captions(self) -> AttackerCaptions:
        """What the attacker calls the concept."""
        kinds = self.config.captions
        return kinds[int(self._draw("captions") * len(kinds))]

    @property
    def continues(self) -> bool:
        """Whether the attacker outlives this outer step: whether it is younger than its age."""
        if self.config.age is None:
            return False
        done = self.config.steps + (self.carried.age if self.carried else 0)
        return done < _whole(*self.config.age, self._draw("age"))

    def split(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Disjoint halves of ``count`` pictures, for both levels; a single picture serves both."""
        order = torch.randperm(count, generator=self._draws("split"))
        half = (count + 1) // 2
        return order[:half], order[half:] if count > 1 else order

    def begins_with(self, concepts: int) -> tuple[int, int]:
        """The benign concept, of so many, that the attacker begins with, and its steps on it."""
        if self.carried is not None or self.config.benign_start is None:
            return 0, 0
        low, high = self.config.benign_start
        steps = low + int((high - low + 1) * self._draw("benign steps"))
        return int(concepts * self._draw("benign concept")), steps

    def _draw(self, what: str) -> float:
        """A number in [0, 1) that is the same as long as the attacker lives."""
        return torch.rand((), generator=self._draws(what), dtype=torch.float64).item()

    def _draws(self, what: str) -> torch.Generator:
        who = (self.who,) if self.who else ()
        return seeded(self.seed, self.born, self.n, what, *who)


def choose(attackers: Sequence[LowerConfig], seed: int, n: int, born: int) -> LowerConfig:
    """One of several attackers for concept n, as often as its share says."""
    if len(attackers) == 1:
        return attackers[0]
    shares = torch.tensor([attacker.share for attacker in attackers], dtype=torch.float64)
    drawn = torch.multinomial(shares, 1, generator=seeded(seed, born, n, "attacker"))
    return attackers[int(drawn)]


def log_uniform(low: float, high: float, u: float) -> float:
    """``low · (high / low)ᵘ``: log-uniform between two numbers > 0 for u uniform in [0, 1)."""
    drawn: float = low * (high / low) ** u
    return drawn


def _whole(low: int, high: int, u: float) -> int:
    """A whole number from ``low`` to ``high``, both among them, log-uniformly."""
    return int(log_uniform(low, high + 1, u))


def to_tensors(alive: Mapping[int, Alive]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Living attackers for a checkpoint: named tensors, and birth and age of each as plain data."""
    tensors, plain = {}, {}
    for n, attacker in alive.items():
        carried = attacker.carried
        plain[str(n)] = [attacker.born, carried.age]
        for name, value in carried.moved.items():
            tensors[f"attacker.{n}.moved.{name}"] = value
        for name, memory in (carried.memory or {}).items():
            for i, value in enumerate(memory):
                tensors[f"attacker.{n}.memory{i}.{name}"] = value
    return tensors, plain


def from_tensors(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, list[int]], device: torch.device
) -> dict[int, Alive]:
    """The inverse of ``to_tensors``, on a device."""
    alive = {}
    for n, (born, age) in plain.items():
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"attacker.{n}."):
                _, _, part, name = key.split(".", 3)
                parts.setdefault(part, {})[name] = value.to(device)
        moved = parts.pop("moved", {})
        memory = {name: tuple(parts[part][name] for part in sorted(parts)) for name in moved}
        alive[int(n)] = Alive(born, Carried(moved, memory, age))
    return alive
