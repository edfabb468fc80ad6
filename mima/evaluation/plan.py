"""In which order an evaluation's trials and attacks come: no attack before its own trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mima.adaptation import Adaptation
from mima.evaluation.grid import Attack, Trial
from mima.evaluation.records import SIDES, Side
from mima.evaluation.tuning import TrialRow, TuningLog, choices


@dataclass
class AttackPlan:
    """What is left to do.

    Attributes:
        log: the trials so far.
        pending: attacks that are not done.
        sides: the models that are attacked.
        waiting: those of the pending attacks whose trials are not done.
    """

    log: TuningLog
    pending: Sequence[Attack]
    sides: Sequence[Side] = SIDES
    waiting: list[Attack] = field(default_factory=list)

    def first(self) -> list[Trial | Attack]:
        """The trials that have not been done, then the attacks that need none of them."""
        trials = self._trials()
        awaited = {trial.attack.key for trial in trials}
        self.waiting = [attack for attack in self.pending if attack.key in awaited]
        ready = [attack for attack in self.pending if attack.key not in awaited]
        return [*trials, *map(self._tuned, ready)]

    def tried(self, row: TrialRow) -> list[Attack]:
        """Write a trial down; the attacks that waited for it alone come next."""
        self.log.add(row)
        if any(self.log.missing(row.attack, side) for side in self.sides):
            return []
        ready = [attack for attack in self.waiting if attack.key == row.attack]
        self.waiting = [attack for attack in self.waiting if attack.key != row.attack]
        return list(map(self._tuned, ready))

    def _trials(self) -> list[Trial]:
        tuning = self.log.tuning
        every = choices(tuning)
        # the attack with the first seed that is left tries for all
        by_key = {attack.key: attack for attack in reversed(self.pending)}
        return [
            Trial.of(attack, side, number, every[number], tuning)
            for attack in reversed(by_key.values())
            for side in self.sides
            for number in self.log.missing(attack.key, side)
        ]

    def _tuned(self, attack: Attack) -> Attack:
        """The attack with what its trials chose for each model."""

        def like(row: TrialRow) -> Adaptation:
            return replace(
                attack.adaptation,
                learning_rate=row.lr,
                schedule=row.schedule,
                batch_size=row.batch_size,
                optimizer=row.optimizer,
                use_8bit_adam=attack.adaptation.use_8bit_adam and row.optimizer == "adamw",
            )

        chosen = {side: tuple(map(like, self.log.ranked(attack.key, side))) for side in self.sides}
        return replace(attack, tuned={side: ways for side, ways in chosen.items() if ways})
