"""Who attacks in each outer step: what an attacker draws, and which attackers live on."""

# n = index of a concept

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mima.bilevel.lower import Carried
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
class Attack:
    """Concept n's attacker at one outer step.

    Attributes:
        config: the attacker's settings.
        seed: the run's seed.
        n: index of the concept.
        born: the outer step at which the attacker began.
        carried: where it stopped before this outer step; None where it begins with it.
    """

    config: LowerConfig
    seed: int
    n: int
    born: int
    carried: Carried | None = None

    @cached_property
    def lr(self) -> float:
        """The step size."""
        lr = self.config.lr
        return log_uniform(*lr, self._draw("rate")) if isinstance(lr, tuple) else lr

    @property
    def continues(self) -> bool:
        """Whether the attacker outlives this outer step: whether it is younger than its age."""
        if self.config.age is None:
            return False
        low, high = self.config.age
        done = self.config.steps + (self.carried.age if self.carried else 0)
        # every whole age from low to high is reached
        return done < int(log_uniform(low, high + 1, self._draw("age")))

    def split(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Disjoint halves of ``count`` pictures, for both levels; a single picture serves both."""
        order = torch.randperm(count, generator=seeded(self.seed, self.born, self.n, "split"))
        half = (count + 1) // 2
        return order[:half], order[half:] if count > 1 else order

    def _draw(self, what: str) -> float:
        """A number in [0, 1) that is the same as long as the attacker lives."""
        generator = seeded(self.seed, self.born, self.n, what)
        return torch.rand((), generator=generator, dtype=torch.float64).item()


def log_uniform(low: float, high: float, u: float) -> float:
    """``low · (high / low)ᵘ``: log-uniform between two numbers > 0 for u uniform in [0, 1)."""
    drawn: float = low * (high / low) ** u
    return drawn


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
