"""An adaptation that shows its pictures on the way, and goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mima.adaptation import Run, Together
from mima.concepts.pictures import by_prompt
from mima.errors import MimaError
from mima.sampling import Job, Sampler
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.output import write_picture
from mima.storage.runs import uninterrupted

MAX_PROMPTS = 2
SAMPLES = "samples"


def learn(
    learner: Run | Together,
    folder: CheckpointFolder,
    *,
    checkpoint_every: int,
    sample_every: int,
    sampler: Sampler,
    on_step: Callable[[], None],
    on_pictures: Callable[[int, Path], None] = lambda step, place: None,
) -> None:
    """Train to the end of `steps`, from the last checkpoint on, and draw pictures meanwhile.

    Batches, noise and the optimiser's state are those of a run that was never stopped, so that on a
    CPU the result is the same bit by bit; with dropout, which draws from torch's own random state,
    up to its draws. Ctrl-C is put off until the step is done.

    Args:
        learner: one run or several, started and not trained, with the same `steps`.
        folder: for the checkpoints, and for the pictures in ``samples/<step>/``, of several runs in
            a folder for each.
        checkpoint_every: steps between checkpoints, at least 1.
        sample_every: steps between pictures, one for each of at most two prompts of the concept's
            pictures; the last step has some too. 0 draws none.
        sampler: how to draw.
        on_step: called after each step.
        on_pictures: called with the step and the folder of pictures that were just drawn.

    Raises:
        MimaError: more steps are done already; or the disk is full.
        Diverged: a loss is no longer finite; the last checkpoint is kept.
        KeyboardInterrupt: after a checkpoint of the last whole step has been written.
    """
    runs = [learner] if isinstance(learner, Run) else learner.runs
    parts = [folder] if len(runs) == 1 else [folder / f"run-{n:03d}" for n in range(len(runs))]
    total = runs[0].adaptation.steps
    kept = [one for part in parts if (one := part.latest()) is not None]
    # killed between two runs' checkpoints, they have no step in common and start again
    if len(kept) == len(runs) and len({one.step for one in kept}) == 1:
        if kept[0].step > total:
            raise MimaError(f"steps: {kept[0].step} are done already, more than {total}")
        for run, one in zip(runs, kept, strict=True):
            run.restore(one)
    stops = {total, *range(checkpoint_every, total, checkpoint_every)}
    if sample_every:
        stops |= set(range(sample_every, total, sample_every))

    def keep() -> None:
        for run, part in zip(runs, parts, strict=True):
            part.write(run.checkpoint())

    # the last step done comes again: its pictures may be missing
    for stop in sorted(step for step in stops if step >= runs[0].step):
        with uninterrupted() as arrived:

            def after(_: Any, arrived: Sequence[object] = arrived) -> None:
                on_step()
                if arrived:
                    keep()
                    raise KeyboardInterrupt

            learner.advance(stop - runs[0].step, on_step=after)
            keep()
        if sample_every and (stop % sample_every == 0 or stop == total):
            place = folder.path / SAMPLES / f"{stop:05d}"
            for n, run in enumerate(runs):
                _draw(run, sampler, place if len(runs) == 1 else place / f"{n:03d}")
            on_pictures(stop, place)


def _draw(run: Run, sampler: Sampler, place: Path) -> None:
    if sampler.size is None:
        sampler = replace(sampler, size=run.adaptation.resolution)
    jobs = [
        Job(prompt, run.adaptation.seed) for prompt in by_prompt(run.concept.images, MAX_PROMPTS)
    ]
    for index, image in enumerate(sampler.draw(run.pipeline, jobs)):
        write_picture(place / f"{index}.png", image)
