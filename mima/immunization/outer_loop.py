"""The outer loop's bookkeeping: where to go on, what to keep, what to report, when to stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mima.adaptation.steps import build_optimizers
from mima.bilevel.lower import Tensors
from mima.bilevel.outer import OuterGradient
from mima.distributed import ALONE, INTERRUPTED, Ranks, union, wait_for_nobody
from mima.errors import MimaError
from mima.immunization.attackers import Alive, from_tensors, to_tensors
from mima.immunization.levels import Problem
from mima.immunization.offload import MomentsOnDisk, step_offloaded
from mima.immunization.progress import (
    LOSSES,
    Callback,
    MetricsFile,
    StepReport,
    Tracker,
    open_trackers,
    peak_memory,
)
from mima.merging import Params
from mima.storage.checkpoint import Checkpoint, CheckpointFolder
from mima.storage.names import METRICS_FILE
from mima.storage.runs import uninterrupted

if TYPE_CHECKING:
    from mima.immunization.sharded_state import ShardedState

logger = logging.getLogger(__name__)

ETA_STEPS = 20
DIVERGENCE_STEPS = 10
MEMORY = 0.9
"""Decay of the running mean of the retaining gradient's length, per step."""
WARM_UP = 10
"""Steps over which a cosine schedule rises."""
LEAST = 0.1
"""What a cosine schedule falls to, as a share of its height."""
FLOOR = 1e-4
"""The least ratio of that mean to the ascent's length."""


class Ascent:
    """The steps of a run, resumed where a checkpoint is found, and θ's updates.

    θ, the optimizers' states and the history change together, in ``update`` alone, which a Ctrl-C
    cannot cut in two; so do the attackers that live on. Draws depend on seed, step and concept
    only. A checkpoint of these four is therefore all that a run needs to go on as if it had never
    stopped.

    Args:
        problem: what is solved; θ is the denoiser's own weights.
        callbacks: called in the main process after each step.
        folder: where checkpoints go; None keeps none.
        logs: where trackers write files.
        lower_names: parameters that a second optimizer, with the lower level's step size, updates.
        stage: the concept that is being immunized, where each is immunized alone.

    Attributes:
        theta: θ by name.
        history: one report per step done.
        alive: the attackers that live on from earlier steps, by concept.
        moved: φ − θ along the path of an attack that serves again, by state; empty for none.

    Examples:
        >>> with Ascent(problem) as run:
        ...     for step in run.steps():
        ...         run.update(problem.hypergradient(run.theta, ...))
    """

    def __init__(
        self,
        problem: Problem,
        callbacks: Sequence[Callback] = (),
        folder: CheckpointFolder | None = None,
        *,
        logs: Path | None = None,
        lower_names: Sequence[str] = (),
        stage: str = "",
    ) -> None:
        config = problem.config
        self.theta = problem.theta()
        self.history: list[StepReport] = []
        self.alive: dict[int, Alive] = {}
        self.moved: dict[int, Tensors] = {}
        self._problem = problem
        self._config = config
        self._callbacks = list(callbacks) if problem.ranks.main else []
        self._folder = folder
        self._logs = logs
        self._stage = stage
        self._names = {"upper": tuple(problem.upper_names), "lower": tuple(lower_names)}
        # by level and name: what steps a parameter, which several have in common
        self._optimizers = {
            level: self._stepping(names, lr)
            for (level, names), lr in zip(
                self._names.items(), (config.upper.lr, config.highest_lr), strict=True
            )
        }
        self._on_disk: list[MomentsOnDisk] = []
        whole = problem.family.sharded is None
        if config.offload_optimizer and whole and MomentsOnDisk.serves(problem.family.device):
            place = folder.path if folder is not None and folder.path.is_dir() else None
            distinct = [one for level in self._optimizers for one in self._distinct(level)]
            self._on_disk = [MomentsOnDisk(one, place) for one in distinct]
        # by level: where levels take turns, the steps of one may all fail
        self._skipped_in_a_row = {"upper": 0, "lower": 0}
        self._retained: float | None = None
        self._stopped = False
        self._trackers: list[Tracker] = []
        self._clock = time.perf_counter()

    def __enter__(self) -> Ascent:
        self._restore()
        if self._problem.ranks.main:
            folder = self._folder.path if self._folder else None
            if folder is not None:
                self._callbacks.append(MetricsFile(folder / METRICS_FILE, self.history))
            config = self._config.model_dump(mode="json")
            self._trackers = open_trackers(self._config.trackers, self._logs, config)
            for tracker in self._trackers:
                tracker.start()
            self._callbacks += self._trackers
        self._clock = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # processes that write together are interrupted at different places
        together = self._problem.family.sharded is not None
        try:
            if kind is None:
                self._write()
            elif issubclass(kind, KeyboardInterrupt) and not together:
                # torchrun sends another one to those that a terminal's Ctrl-C has reached
                with uninterrupted():
                    wait_for_nobody(INTERRUPTED)
                    self._write()
        finally:
            for tracker in self._trackers:
                tracker.finish()

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0; ends early where a callback wants it."""
        while len(self.history) < self._config.steps and not self._stopped:
            yield len(self.history)

    def update(
        self,
        outer: OuterGradient,
        level: str = "upper",
        committed: Params | None = None,
        retain: OuterGradient | None = None,
    ) -> None:
        """Clip the gradient and take one step, unless it is not finite; then report.

        Args:
            outer: the gradient and what was seen on the way.
            level: ``upper``, or ``lower`` for the second optimizer, whose gradient is not clipped.
            committed: new values of other parameters, taken over as they are.
            retain: the gradient that keeps the model useful; ``outer`` is then scaled to ρ times
                the running mean of its length, and nothing is clipped.

        Raises:
            MimaError: too many steps in a row were not finite, or the run diverges.
        """
        ranks = self._problem.ranks
        norm = ranks.norm(outer.gradient) if outer.gradient else 0.0
        kept = 0.0
        if retain is not None:
            kept = ranks.norm(retain.gradient)
            outer = replace(outer, losses=union([outer.losses, retain.losses]))
        seen = (norm, kept, outer.drift, *outer.losses.values())
        finite = all(map(math.isfinite, seen))
        with uninterrupted():
            if finite:
                self._skipped_in_a_row[level] = 0
                if level == "lower":
                    self._step(outer.gradient, level)
                elif retain is None:
                    self._step(self._clipped(outer.gradient, norm), level)
                else:
                    pulling = 1.0 if (share := _pulling(outer)) is None else share
                    both = self._balanced(outer.gradient, norm, retain.gradient, kept, pulling)
                    self._step(both, level)
                for name, value in (committed or {}).items():
                    self.theta[name].copy_(value)
                ends, moved = outer.ends, outer.moved
            else:
                # attackers of a step that is left out may have diverged
                ends, moved = {}, {}
                self._skipped_in_a_row[level] += 1
                self._problem.anew = len(self.history) + 1
            step = len(self.history)
            taken = self._problem.turns_taken(step, self.alive)
            self.alive = self._problem.survivors(step, self.alive, ends)
            self._problem.turn += taken
            self.history.append(self._report(outer, norm, skipped=not finite))
            serves_again = len(self.history) % self._config.attack_every
            self.moved = moved if serves_again else {}
        report = self.history[-1]
        if not finite:
            self._skip(report, self._skipped_in_a_row[level])
        self._check_divergence()
        # every callback is called, also after one that wants to stop
        answers = [callback(report) for callback in self._callbacks]
        wanted = any(isinstance(answer, str) and answer == "stop" for answer in answers)
        self._stopped = ranks.broadcast(wanted)
        if self._stopped and ranks.main:
            of = f" of {self._stage!r}" if self._stage else ""
            logger.info(
                "a callback ended the run%s after step %d of %d", of, report.step, report.steps
            )
        every = self._config.checkpoint_every
        if every is not None and report.step % every == 0:
            self._write()

    def _clipped(self, gradient: Tensors, norm: float) -> Tensors:
        longest = self._config.upper.max_grad_norm
        # as torch.nn.utils.clip_grad_norm_
        scale = 1.0 if longest is None else min(1.0, longest / (norm + 1e-6))
        return {name: value * scale for name, value in gradient.items()}

    def _balanced(
        self, ascent: Tensors, norm: float, retain: Tensors, kept: float, pulling: float
    ) -> Tensors:
        """``retain + s · ascent``, ``s ‖ascent‖`` = ρ p times the running mean of ``‖retain‖``.

        p is the share of pictures that still pull: where few do, their short gradient is not to be
        drawn out to the length of all.

        At the first step distillation has no gradient: the mean is then ``FLOOR · ‖ascent‖``, of
        which the optimizers, whose steps do not depend on a gradient's scale, see the direction.
        """
        ratio = self._config.upper.ascent_ratio
        assert ratio is not None
        before = kept if self._retained is None else self._retained
        self._retained = MEMORY * before + (1 - MEMORY) * kept
        scale = ratio * pulling * max(self._retained / norm, FLOOR) if norm else 0.0
        if self._config.upper.projection:
            ascent = without_conflict(ascent, retain, self._problem.ranks)
        return {name: value + scale * ascent[name] for name, value in retain.items()}

    def _step(self, gradient: Tensors, level: str) -> None:
        if not gradient:
            return
        if level == "upper" and self._config.upper.lr_schedule == "cosine":
            share = cosine(len(self.history), self._config.steps)
            for optimizer in self._distinct(level):
                for group in optimizer.param_groups:
                    group["lr"] = share * self._config.upper.lr
        if self._config.offload_optimizer:
            for name, optimizer in self._optimizers[level].items():
                step_offloaded(optimizer, self.theta[name], gradient[name])
            self._leave_memory()
            return
        for name in self._names[level]:
            self.theta[name].grad = gradient[name]
        for optimizer in self._distinct(level):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _stepping(self, names: Sequence[str], lr: float) -> dict[str, torch.optim.Optimizer]:
        upper, parameters = self._config.upper, {name: self.theta[name] for name in names}
        if not names:
            return {}
        tables = {
            f"{path}.weight"
            for path, layer in self._problem.family.denoiser.named_modules()
            if isinstance(layer, torch.nn.Embedding)
        }
        optimizers = build_optimizers(
            [*parameters.values()],
            optimizer=upper.optimizer,
            learning_rate=lr,
            weight_decay=upper.weight_decay,
            tables=[value for name, value in parameters.items() if name in tables],
        )
        steps = {
            id(parameter): optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: steps[id(value)] for name, value in parameters.items()}

    def _distinct(self, level: str) -> list[torch.optim.Optimizer]:
        return list(dict.fromkeys(self._optimizers[level].values()))

    def _leave_memory(self) -> None:
        for moments in self._on_disk:
            moments.leave_memory()

    def _report(self, outer: OuterGradient, norm: float, *, skipped: bool) -> StepReport:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        recent = [report.seconds for report in self.history[1 - ETA_STEPS :]] + [seconds]
        done, steps = len(self.history) + 1, self._config.steps
        before = self.history[-1].skipped if self.history else 0
        return StepReport(
            done,
            steps,
            drift=outer.drift,
            gradient_norm=norm,
            residual=outer.residual,
            seconds=seconds,
            eta=sum(recent) / len(recent) * (steps - done),
            memory=peak_memory(self._problem.family.device),
            skipped=before + skipped,
            stage=self._stage,
            pulling=_pulling(outer),
            **{
                told: {name.concept: x for name, x in outer.losses.items() if name.kind == kind}
                for told, kind in LOSSES.items()
            },
        )

    def _skip(self, report: StepReport, in_a_row: int) -> None:
        seen = [f"{name} {value:g}" for name, value in report.losses.items()]
        seen += [f"class of {name} {value:g}" for name, value in report.prior_losses.items()]
        seen += [f"gradient norm {report.gradient_norm:g}", f"drift {report.drift:g}"]
        what = f"losses {', '.join(seen)}"
        if in_a_row <= self._config.max_skipped:
            logger.warning("step %d left out, not finite: %s", report.step, what)
            return
        raise MimaError(
            f"immunize: {in_a_row} steps in a row were not finite, the last being "
            f"step {report.step} ({what}); a smaller upper.lr ({self._config.upper.lr:g}) or "
            f"lower.lr ({self._config.highest_lr:g}) may help{self._kept()}"
        )

    def _check_divergence(self) -> None:
        most, count = self._config.divergence, DIVERGENCE_STEPS
        if most is None:
            return
        # alternating has such losses on every other step alone
        every = [report.prior_loss for report in self.history]
        values = [value for value in every if value is not None and math.isfinite(value)]
        if len(values) < 2 * count:
            return
        first, last = sum(values[:count]) / count, sum(values[-count:]) / count
        if last > most * first:
            upper = self._config.upper
            help_ = [f"a smaller upper.lr ({upper.lr:g})"]
            if upper.ascent_ratio is None:
                help_.append(f"a larger upper.prior_weight ({upper.prior_weight:g})")
            else:
                help_.append(f"a smaller upper.ascent_ratio ({upper.ascent_ratio:g})")
                if upper.objective != "hinge":
                    # the others go on raising what is broken
                    help_.append("upper.objective: hinge with a margin")
            raise MimaError(
                f"immunize: step {len(self.history)}: the mean loss on class pictures has grown "
                f"from {first:.3g} to {last:.3g}, more than {most:g} times (divergence): the model "
                f"is being destroyed; {' or '.join(help_)} may help{self._kept()}"
            )

    def _kept(self) -> str:
        return f"; the last checkpoint is in {self._folder.path}" if self._folder else ""

    def _write(self) -> None:
        sharded = self._sharded_state()
        if self._folder is None or not (self._problem.ranks.main or sharded) or not self.history:
            return
        tensors = {f"theta.{name}": value for name, value in self.theta.items()}
        for level, optimizers in self._optimizers.items():
            for name, optimizer in optimizers.items():
                state = optimizer.state[self.theta[name]]
                tensors |= {f"{level}.{key}.{name}": value for key, value in state.items()}
        attackers, alive = to_tensors(self.alive)
        tensors |= attackers
        for k, change in self.moved.items():
            tensors |= {f"moved.{k}.{name}": value for name, value in change.items()}
        state = {
            "alive": alive,
            "turn": self._problem.turn,
            "stopped": self._stopped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "retained": self._retained,
            "history": [report.to_dict() for report in self.history],
        }
        (sharded or self._folder).write(Checkpoint(len(self.history), tensors, state))
        self._leave_memory()

    def _sharded_state(self) -> ShardedState | None:
        """What writes and reads checkpoints where a process has its rows of them alone."""
        denoiser = self._problem.family.sharded
        if denoiser is None or self._folder is None:
            return None
        from mima.immunization.sharded_state import ShardedState

        return ShardedState(self._folder, denoiser, self._problem.ranks)

    def _restore(self) -> None:
        ranks = self._problem.ranks
        if sharded := self._sharded_state():
            kept = sharded.latest()
        else:
            kept = self._folder.latest() if self._folder and ranks.main else None
            kept = ranks.broadcast(kept)
        if kept is None or self._folder is None:
            return
        if kept.step > self._config.steps:
            raise MimaError(f"steps: {kept.step} are done already, more than {self._config.steps}")
        with self._folder.restoring():
            self._take_up(kept)
        logger.info("going on after step %d", kept.step)

    def _take_up(self, kept: Checkpoint) -> None:
        for name, value in self.theta.items():
            value.copy_(kept.tensors[f"theta.{name}"])
        for level, optimizers in self._optimizers.items():
            for name, optimizer in optimizers.items():
                parameter = self.theta[name]
                for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    moment = kept.tensors.get(f"{level}.{key}.{name}")
                    if moment is not None and self._on_disk:
                        optimizer.state[parameter][key].copy_(moment)
                    elif moment is not None:
                        on_cpu = key == "step" or self._config.offload_optimizer
                        device = moment.device if on_cpu else parameter.device
                        optimizer.state[parameter][key] = moment.to(device)
        self.moved = {}
        for key, value in kept.tensors.items():
            if key.startswith("moved."):
                _, k, name = key.split(".", 2)
                self.moved.setdefault(int(k), {})[name] = value.to(self._problem.family.device)
        # in the order that they had: sums hang on it
        for step, change in self.moved.items():
            self.moved[step] = {name: change[name] for name in self.theta if name in change}
        self.alive = from_tensors(
            kept.tensors, kept.state.get("alive", {}), self._problem.family.device
        )
        self.history = [StepReport.from_dict(plain) for plain in kept.state["history"]]
        skipped = [report.skipped for report in self.history]
        self._problem.anew = skipped.index(skipped[-1]) + 1 if skipped[-1] else 0
        self._skipped_in_a_row = kept.state["skipped_in_a_row"]
        self._retained = kept.state.get("retained")
        self._problem.turn = kept.state.get("turn", 0)
        # of concepts that are immunized one by one, it may have ended one of them; a run goes on
        self._stopped = kept.state["stopped"] and bool(self._stage)


def cosine(step: int, steps: int) -> float:
    """The share of the step size at a step counted from 0: a warm-up, then half a cosine to 0.1."""
    falling = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARM_UP) * falling


def without_conflict(ascent: Tensors, retain: Tensors, ranks: Ranks = ALONE) -> Tensors:
    """``a − min(0, ⟨a, r⟩) r / ‖r‖²``: a gradient without its part against another, as in PCGrad.

    ⟨a, r⟩ < 0 where a step along −a undoes what one along −r does.
    """
    (against,) = ranks.over_shards(
        sum(float((ascent[name] * value).sum()) for name, value in retain.items())
    )
    if against >= 0:
        return ascent
    squared = ranks.norm(retain) ** 2
    return {name: ascent[name] - against / squared * value for name, value in retain.items()}


def _pulling(outer: OuterGradient) -> float | None:
    """The mean share of pictures that still pull, over concepts and states of their paths."""
    shares = [x for seen in outer.path.values() for name, x in seen.items() if name.kind == "pull"]
    return sum(shares) / len(shares) if shares else None
