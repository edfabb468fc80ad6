"""How an attacker chooses rate, schedule, batch and optimiser: by trials on the model at hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from mima.adaptation import Adaptation, TextualInversion
from mima.adaptation.steps import Optimizer
from mima.choices import LearningRateSchedule
from mima.errors import MimaError
from mima.evaluation.folder import read_rows, write_rows
from mima.evaluation.records import CsvRow, Side
from mima.settings import Settings

TUNING_FILE = "tuning.csv"

SGD_RATE = 100.0
"""SGD's rate as a multiple of AdamW's: it follows a gradient that is clipped to norm 1, where AdamW
moves every weight by about its rate."""


def above_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    """For pydantic: refuse values that are not all above 0."""
    if min(values) <= 0:
        raise ValueError("must be above 0")
    return values


class Tuning(Settings):
    """What every attack may try, on each model for itself, before it begins."""

    trials: int = Field(0, ge=0)
    """Trial runs of each attack on each model; its seeds share them. 0 and 1 try nothing: the first
    trial is the attack as it is configured. See `choices`."""
    lr_factors: tuple[float, ...] = Field((0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=1)
    """Learning rates, as multiples of the attack's."""
    schedules: tuple[LearningRateSchedule, ...] = Field(("constant", "cosine"), min_length=1)
    """Schedules of the rate that the freely drawn trials have, unless the attack has its own."""
    batch_factors: tuple[float, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Batch sizes of these trials, as multiples of the attack's."""
    optimizers: tuple[Optimizer, ...] = Field(("adamw", "sgd", "muon"), min_length=1)
    """Optimisers of these trials, unless the attack has one of its own; the rate of SGD is a
    hundred times as high. Textual Inversion, whose one vector is no matrix, has AdamW for Muon."""
    by: Literal["similarity", "loss"] = "similarity"
    """What a trial is judged by: ``similarity`` of its last pictures to every fourth of the
    training pictures, which the trial holds back, by the primary similarity model, or ``loss``, the
    mean training loss of its last quarter. Never by the pictures that judge the attack. A model may
    be made so that its loss falls while its pictures stay wrong: the loss would then choose what
    helps the attacker least."""
    steps: int | None = Field(None, ge=1)
    """Training steps of a trial; None, as many as the attack's."""

    _positive = field_validator("lr_factors", "batch_factors")(above_zero)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting of the attacker's knobs; None and 1 leave an attack as it is configured."""

    lr_factor: float = 1.0
    schedule: LearningRateSchedule | None = None
    batch_factor: float = 1.0
    optimizer: Optimizer | None = None

    def apply(self, adaptation: Adaptation) -> Adaptation:
        """The adaptation with these settings; an optimiser or schedule of its own stays.

        So does AdamW of Textual Inversion, whose one vector is no matrix for Muon.
        """
        optimizer, schedule = adaptation.optimizer, adaptation.schedule
        rate = adaptation.learning_rate * self.lr_factor
        no_matrix = self.optimizer == "muon" and isinstance(adaptation, TextualInversion)
        if self.optimizer is not None and optimizer == "adamw" and not no_matrix:
            optimizer = self.optimizer
            rate *= SGD_RATE if optimizer == "sgd" else 1
        if self.schedule is not None and schedule == "constant":
            schedule = self.schedule
        return replace(
            adaptation,
            learning_rate=rate,
            schedule=schedule,
            optimizer=optimizer,
            batch_size=max(1, round(adaptation.batch_size * self.batch_factor)),
            use_8bit_adam=adaptation.use_8bit_adam and optimizer == "adamw",
        )


def choices(tuning: Tuning) -> list[Choice]:
    """What is tried, the same for every attack and model.

    The first is the attack as it is. From there every other one changes its rate alone, to the
    nearest that was not, of two as near the higher. The rest draw their rates from all factors in
    turn, so that none comes twice before each came once, and schedule, batch and optimiser freely;
    they alone go on once every rate was tried. One trial is none: there is nothing to choose.
    """
    if tuning.trials < 2:
        return []
    draws = random.Random("tuning")
    other = [factor for factor in tuning.lr_factors if factor != 1]
    nearest = sorted(set(other), key=lambda factor: (round(abs(math.log(factor)), 6), -factor))
    found = [Choice()]
    rates: list[float] = []
    while len(found) < tuning.trials:
        if nearest and len(found) % 2:
            found.append(Choice(lr_factor=nearest.pop(0)))
            continue
        if not rates:
            rates = draws.sample(tuning.lr_factors, len(tuning.lr_factors))
        found.append(
            Choice(
                lr_factor=rates.pop(),
                schedule=draws.choice(tuning.schedules),
                batch_factor=draws.choice(tuning.batch_factors),
                optimizer=draws.choice(tuning.optimizers),
            )
        )
    return found[: tuning.trials]


class TrialRow(CsvRow):
    """One trial, in ``tuning.csv``."""

    attack: str
    """The attack without its seed, which all of its seeds share."""
    side: Side
    trial: int
    """From 0; 0 is the attack as it is configured."""
    lr: float
    schedule: LearningRateSchedule
    batch_size: int
    optimizer: Optimizer
    similarity: float | None
    """Of its last pictures to the training pictures that it held back; None where it diverged, or
    was not looked at."""
    loss: float | None
    """Mean training loss of its last quarter; None where it diverged."""
    diverged: bool
    """A trial that diverged is not chosen."""
    chosen: bool = False


def ranked(rows: Iterable[TrialRow], by: Literal["similarity", "loss"]) -> list[TrialRow]:
    """The trials that did not diverge, the best first; of two equal ones, the earlier.

    An attacker goes on with the first, and with the next where that diverges at full length.
    """
    left = [row for row in rows if not row.diverged]

    def badness(row: TrialRow) -> tuple[float, int]:
        value = row.loss if by == "loss" else row.similarity
        assert value is not None
        return (value if by == "loss" else -value), row.trial

    return sorted(left, key=badness)


HARDLY = 2.0
"""Settings hardly train that end with so many times the loss of the attack as configured."""


def hardly_trained(rows: Sequence[TrialRow]) -> tuple[str, ...]:
    """Attacks whose trials chose settings that hardly train the immunized model.

    Where every trial that trains breaks the pictures, those win that leave them as they are. An
    attack of more steps than its trials may get further as it was configured.
    """
    mine = [row for row in rows if row.side == "immunized"]
    usual = {row.attack: row.loss for row in mine if row.trial == 0}
    found = []
    for row in mine:
        loss, as_configured = row.loss, usual.get(row.attack)
        if not row.chosen or loss is None or as_configured is None:
            continue
        if loss > HARDLY * as_configured:
            found.append(row.attack)
    return tuple(found)


@dataclass
class TuningLog:
    """The trials so far, on disk after each of them.

    Attributes:
        folder: of the evaluation.
        tuning: says what is tried, and by what it is chosen.
    """

    folder: Path
    tuning: Tuning
    _trials: dict[tuple[str, Side], list[TrialRow]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Take over what an earlier call has tried.

        Raises:
            MimaError: the file cannot be read.
        """
        path, by = self.folder / TUNING_FILE, self.tuning.by
        rows = read_rows(path, TrialRow)
        if any(not row.diverged and getattr(row, by) is None for row in rows):
            raise MimaError(
                f"evaluation: cannot read {path}: a trial that did not diverge has no {by}"
            )
        for row in rows:
            self._trials.setdefault((row.attack, row.side), []).append(row)
        for pair in self._trials:
            self._choose(*pair)

    @property
    def rows(self) -> list[TrialRow]:
        """The finished trials, by attack, model and number."""
        return [row for pair in sorted(self._trials) for row in self._trials[pair]]

    def missing(self, attack: str, side: Side) -> list[int]:
        """Numbers of the trials of an attack on a model that have not been done."""
        done = {row.trial for row in self.of(attack, side)}
        return [number for number in range(len(choices(self.tuning))) if number not in done]

    def of(self, attack: str, side: Side) -> list[TrialRow]:
        """The finished trials of an attack on a model."""
        return self._trials.get((attack, side), [])

    def ranked(self, attack: str, side: Side) -> list[TrialRow]:
        """The trials of an attack on a model that did not diverge, the chosen one first."""
        return ranked(self.of(attack, side), self.tuning.by)

    def add(self, row: TrialRow) -> None:
        """Write down a finished trial, and which is now the best of its attack and model."""
        self._trials.setdefault((row.attack, row.side), []).append(row)
        self._choose(row.attack, row.side)
        write_rows(self.folder / TUNING_FILE, TrialRow, self.rows)

    def _choose(self, attack: str, side: Side) -> None:
        """Order the trials of an attack on a model, and mark the best of them."""
        best = [row.trial for row in self.ranked(attack, side)[:1]]
        self._trials[attack, side] = [
            row.model_copy(update={"chosen": row.trial in best})
            for row in sorted(self.of(attack, side), key=lambda row: row.trial)
        ]
