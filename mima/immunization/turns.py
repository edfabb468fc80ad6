"""Whose turn it is, where an outer step is about some of the concepts alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mima.training.batches import seeded


class Turns:
    """Deals of concepts, each round of which is in an order of its own, drawn from the seed.

    None has a second turn before all had one, also where a deal ends within a round.

    Args:
        concepts: how many there are.
        at_once: how many are dealt at once, fewer than there are.
        seed: of the rounds' orders.
    """

    def __init__(self, concepts: int, at_once: int, seed: int) -> None:
        self.at_once = at_once
        self._concepts = concepts
        self._seed = seed
        self._deals: list[list[int]] = []
        self._waiting: list[int] = []
        self._rounds = 0

    def since(self, place: int) -> Iterator[int]:
        """Whose turn it is from a place on, deals laid end to end, without end."""
        while True:
            deal, within = divmod(place, self.at_once)
            while len(self._deals) <= deal:
                self._deals.append(self._next())
            yield self._deals[deal][within]
            place += 1

    def _next(self) -> list[int]:
        deal: list[int] = []
        while len(deal) < self.at_once:
            n = next((n for n in self._waiting if n not in deal), None)
            if n is None:
                draws = seeded(self._seed, self._rounds, "concepts")
                self._waiting += torch.randperm(self._concepts, generator=draws).tolist()
                self._rounds += 1
            else:
                deal.append(n)
                self._waiting.remove(n)
        return deal
