"""LoRA for several concepts at once: one forward of the model serves them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from mima.adaptation.base import Run, autocast, training
from mima.adaptation.lora import LoRA
from mima.adapters.adapter import Adapter
from mima.adapters.mixed_batch import with_adapters
from mima.errors import MimaError
from mima.families import family_of
from mima.training.batches import losses


class Together:
    """LoRA runs on one model that share each forward and backward.

    A step draws each run's batch as `Run.advance` would, puts all of them through the model at
    once, each picture with its own run's adapter (`mima.ops.batched_lora`), and lets each run's
    optimiser step. The result is that of training the runs one by one, up to rounding; ranks,
    scales, learning rates, seeds, batch sizes and prior preservation may differ from run to run.
    Each run keeps its pipeline, its losses and its `save`, which writes a file of its own.

    Args:
        runs: N runs of `LoRA` or `DreamBoothLoRA`, started on the same pipeline.

    Attributes:
        runs: those.

    Raises:
        MimaError: another method, runs on different models, dropout, DoRA, adapted layers that are
            not linear, or different `gradient_accumulation_steps`.
        ValueError: no runs, or one of them twice.

    Examples:
        >>> lora = LoRA(rank=4)
        >>> together = Together([lora.start(pipeline, concept) for concept in concepts])
        >>> together.advance(500)
        >>> for run in together.runs:
        ...     run.save(f"{run.concept.name}-lora")
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        if not runs or len({id(run) for run in runs}) < len(runs):
            raise ValueError("Together: needs runs, each of them once")
        for run in runs:
            _check(run, runs[0])
        self.runs = tuple(runs)
        first = runs[0]._family
        adapters = [Adapter.of(run.pipeline) for run in runs]
        mixed, self._rows = with_adapters(first.pipeline, adapters)
        self._family = family_of(mixed, training=runs[0].adaptation.training)
        if any(run.adaptation.gradient_checkpointing for run in runs):
            self._family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def advance(self, steps: int, *, on_step: Callable[[Together], None] | None = None) -> None:
        """Train every run some more steps.

        Args:
            steps: how many.
            on_step: called after each step; an exception that it raises ends the training.

        Raises:
            MimaError: a loss is no longer finite.
        """
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run._prepared())
            stack.enter_context(training(self._family))
            for _ in range(steps):
                self._one_step()
                if on_step is not None:
                    on_step(self)

    def _one_step(self) -> None:
        count = self.runs[0].adaptation.gradient_accumulation_steps
        totals = [0.0] * len(self.runs)
        for _ in range(count):
            drawn = [(n, *part) for n, run in enumerate(self.runs) for part in run._batches()]
            owners, weights, batches = zip(*drawn, strict=True)
            self._rows.choose(
                n for n, batch in zip(owners, batches, strict=True) for _ in batch.latents
            )
            with autocast(self._family):
                values = losses(self._family, batches)
            scaled = []
            for n, weight, value in zip(owners, weights, values, strict=True):
                part = weight * value / count
                totals[n] += part.item()
                scaled.append(self.runs[n]._scaler.scale(part))
            # no adapter enters another's loss, so the sum's gradients are those of each loss
            torch.stack(scaled).sum().backward()
        for run, total in zip(self.runs, totals, strict=True):
            run._update(total)


def _check(run: Run, first: Run) -> None:
    settings = run.adaptation
    if not isinstance(settings, LoRA):
        raise MimaError(
            f"method {settings.method} trains one concept at a time; lora and dreambooth-lora "
            "train several at once"
        )
    if settings.dropout > 0 or settings.dora:
        name = "dora" if settings.dora else "dropout"
        raise MimaError(f"{name}: several concepts at once are trained without it")
    if settings.gradient_accumulation_steps != first.adaptation.gradient_accumulation_steps:
        raise MimaError(
            "gradient_accumulation_steps must be the same for concepts that are trained at once, "
            f"got {first.adaptation.gradient_accumulation_steps} and "
            f"{settings.gradient_accumulation_steps}"
        )
    if settings.training != first.adaptation.training:
        raise MimaError("training must be the same for concepts that are trained at once")
    sides = [run._family.resolution for run in (run, first)]
    if sides[0] != sides[1]:
        raise MimaError(
            "resolution must be the same for concepts that are trained at once, got "
            f"{sides[1]} and {sides[0]}"
        )
    bases = [next(one._family.denoiser.parameters()).data_ptr() for one in (run, first)]
    if bases[0] != bases[1]:
        raise MimaError("concepts that are trained at once must be learned by the same model")
