"""How much work an evaluation is, and about how long it takes here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mima.errors import counted
from mima.evaluation.bench import Bench, Task
from mima.evaluation.grid import Attack, Trial
from mima.evaluation.worker import Worker

TIMED_STEPS = 2
TIMED_PICTURES = 4
SMALL_RATE = 1e-8
"""The learning rate of the steps that are timed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work of an evaluation that begins.

    Attributes:
        attacks: how many, each on both models.
        trials: trial runs before them.
        steps: training steps, of trials, preparations, attacks and repairs.
        pictures: how many are drawn.
        seconds: about how long it takes; two processes on two cores count as twice as fast as one.
    """

    attacks: int
    trials: int
    steps: int
    pictures: int
    seconds: float

    def __str__(self) -> str:
        trials = f" and {counted(self.trials, 'trial')}" if self.trials else ""
        minutes = self.seconds / 60
        about = f"{minutes:.0f} minutes" if minutes >= 2 else counted(round(self.seconds), "second")
        return (
            f"{counted(self.attacks, 'attack')}{trials}: {counted(self.steps, 'training step')} "
            f"and {counted(self.pictures, 'picture')}, about {about}"
        )


def estimate(bench: Bench, worker: Worker, tasks: Sequence[Task], processes: int) -> Estimate:
    """Count the work, and time a few steps and pictures of it.

    A step is taken to cost what one of the first attack or trial with its method on the original
    model does, in proportion to the batch.
    """
    pictures = sum(map(bench.drawn, tasks))
    runs = [task for task in tasks if isinstance(task, (Attack, Trial))]
    seconds = 0.0
    if runs:
        costs: dict[str, tuple[float, float]] = {}
        for task in runs:
            attack = _attack_of(task)
            if attack.label not in costs:
                costs[attack.label] = _timed(bench, worker, attack)
        trained = sum(
            _left(worker, task)
            * bench.steps(task)
            * _batch(task)
            * costs[_attack_of(task).label][0]
            for task in runs
        )
        drawn = pictures * sum(per_picture for _, per_picture in costs.values()) / len(costs)
        seconds = (trained + drawn) / processes
    return Estimate(
        attacks=sum(isinstance(task, Attack) for task in tasks),
        trials=sum(isinstance(task, Trial) for task in tasks),
        steps=sum(map(bench.steps, tasks)),
        pictures=pictures,
        seconds=seconds,
    )


def _left(worker: Worker, task: Attack | Trial) -> float:
    """The share of a task's training that no other evaluation's folder of originals holds."""
    first = task.adaptation if isinstance(task, Trial) else task.on("original")[0]
    entry = worker.kept_of(task, first)
    if entry is None or not entry.kept:
        return 1.0
    if isinstance(task, Trial):
        return 0.0 if task.side == "original" else 1.0
    return 0.5


def _attack_of(task: Attack | Trial) -> Attack:
    return task.attack if isinstance(task, Trial) else task


def _batch(task: Attack | Trial) -> int:
    """Pictures that one training step of a task reads."""
    settings = task.adaptation
    both = 2 if settings.prior_weight > 0 else 1
    return settings.batch_size * settings.gradient_accumulation_steps * both


def _timed(bench: Bench, worker: Worker, attack: Attack) -> tuple[float, float]:
    """Seconds of one picture in a training step, and of one that is drawn.

    They do not depend on the rate, and a small one does not diverge.
    """
    pipeline, (concept, _) = worker.pipelines["original"], bench.material(attack)
    run = replace(attack.adaptation, learning_rate=SMALL_RATE).start(pipeline, concept)
    # the first step allocates
    run.advance(1)
    started = time.perf_counter()
    run.advance(TIMED_STEPS)
    trained = time.perf_counter()
    jobs = bench.jobs(attack)[:TIMED_PICTURES]
    drawn = len(list(bench.sampler.draw(pipeline, jobs)))
    ended = time.perf_counter()
    return (trained - started) / (TIMED_STEPS * _batch(attack)), (ended - trained) / drawn
