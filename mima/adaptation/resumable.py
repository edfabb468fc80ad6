"""An adaptation that shows its pictures on the way, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mima.adaptation import Adaptation, LoRA, Run, Together
from mima.adapters.merge import merge_adapters
from mima.concepts import Concept
from mima.concepts.pictures import by_prompt
from mima.distributed import device_of
from mima.errors import MimaError
from mima.families import load_pipeline, origin_of, source_of
from mima.families.pipelines import Pipeline, named_weights, scheduler_settings
from mima.sampling import Job, Sampler
from mima.storage.checkpoint import CheckpointFolder, latest_of_all
from mima.storage.inputs import expanded
from mima.storage.lock import locked
from mima.storage.output import check_folder, fresh_folder, slug, write_picture
from mima.storage.record import write_record
from mima.storage.runs import claim, default_folder, describe_run, uninterrupted

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
    CPU the result is the same bit by bit. Ctrl-C is put off until the step is done.

    Several runs have the same `steps`, and go on from the last that all have a checkpoint of; where
    only some have any, all begin anew, with a warning. The folder takes the checkpoints, and in
    ``samples/<step>/`` the pictures, of several runs in a folder for each: one picture for each of
    at most two prompts of the concept's pictures, at the last step, too; with ``sample_every`` 0,
    none.

    Raises:
        MimaError: more steps are done already; or the disk is full.
        Diverged: a loss is no longer finite; the last checkpoint is kept.
        KeyboardInterrupt: after a checkpoint of the last whole step has been written.
    """
    runs = [learner] if isinstance(learner, Run) else learner.runs
    parts = [folder] if len(runs) == 1 else [folder / f"run-{n:03d}" for n in range(len(runs))]
    total = runs[0].adaptation.steps
    # a process killed between two runs' checkpoints leaves different steps
    kept = latest_of_all(parts)
    if kept is not None:
        if kept[0].step > total:
            raise MimaError(f"steps: {kept[0].step} are done already, more than {total}")
        for run, part, one in zip(runs, parts, kept, strict=True):
            with part.restoring():
                run.restore(one)
    stops = {total, *range(checkpoint_every, total, checkpoint_every)}
    if sample_every:
        stops |= set(range(sample_every, total, sample_every))

    def keep() -> None:
        for run, part in zip(runs, parts, strict=True):
            part.write(run.checkpoint())

    # a stop that was reached comes again: its pictures may be missing
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


@dataclass(frozen=True)
class Learned:
    """What ``adapt`` wrote.

    Attributes:
        folders: the concepts' folders, in their order.
        steps: steps done.
    """

    folders: Sequence[Path]
    steps: int


def adapt(
    model: Any,
    concepts: Sequence[Concept],
    adaptation: Adaptation,
    output: str | Path | None = None,
    *,
    checkpoint_every: int = 100,
    sample_every: int | None = None,
    whole: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    on_step: Callable[[Sequence[Run]], None] | None = None,
    on_pictures: Callable[[int, Path], None] = lambda step, place: None,
) -> Learned:
    """Teach a model concepts and write what was learned: what ``mima adapt`` does.

    Args:
        model: whatever ``load_pipeline`` opens.
        concepts: one, or with LoRA several, which are learned at once, each in a folder of its own.
        adaptation: the method and its settings.
        output: the folder, or for several concepts the folder of their folders; by default as
            ``default_output`` says.
        checkpoint_every: steps between checkpoints, which go to ``output`` with ``.checkpoint``
            appended and stay there until all is written.
        sample_every: steps between pictures, 0 for none; by default a fifth of all.
        whole: write whole models, with a card, instead of adapters.
        resume: go on from the last checkpoint, if there is one; bit by bit on a CPU.
        overwrite: replace earlier results in ``output``, and an earlier run's checkpoint.
        dtype: of the model's weights.
        device: where to compute; by default a GPU where there is one.
        on_step: called with the runs after each step.
        on_pictures: called with the step and the folder of pictures that were just drawn.

    Raises:
        MimaError: a model, concept, setting or folder cannot be used; or the disk is full.
        KeyboardInterrupt: after a checkpoint of the last whole step has been written.

    Examples:
        >>> adapt("embedded", [concept], LoRA(steps=200), "cat-lora").folders
    """
    folder = expanded(output or default_output(concepts, adaptation))
    check_folder(folder, overwrite=overwrite, resume=resume)
    names = _folder_names(concepts, adaptation)
    kept = CheckpointFolder(default_folder(folder))
    kept.check_own()
    pipeline = load_pipeline(model, dtype=dtype, device=device_of(device))
    runs = [adaptation.start(pipeline, concept) for concept in concepts]
    with locked(folder):
        # another run may have finished since
        check_folder(folder, overwrite=overwrite, resume=resume)
        if overwrite and not resume:
            kept.remove()
        config = {"method": adaptation.method, **json.loads(json.dumps(asdict(adaptation)))}
        described = [concept.identity() for concept in concepts]
        claim(
            kept,
            describe_run(config, described, named_weights(pipeline), scheduler_settings(pipeline)),
            resume=resume,
        )
        learn(
            runs[0] if len(runs) == 1 else Together(runs),
            kept,
            checkpoint_every=checkpoint_every,
            sample_every=-(-adaptation.steps // 5) if sample_every is None else sample_every,
            sampler=Sampler(),
            on_step=lambda: None if on_step is None else on_step(runs),
            on_pictures=on_pictures,
        )
        with fresh_folder(folder, overwrite=overwrite) as staging:
            for run, name in zip(runs, names, strict=True):
                inside = staging / name
                if whole:
                    _save_whole(run, pipeline, inside)
                else:
                    run.save(inside)
                _record(inside, model, [run.concept], adaptation)
            if len(runs) > 1:
                _record(staging, model, concepts, adaptation)
            if (kept.path / SAMPLES).is_dir():
                shutil.copytree(kept.path / SAMPLES, staging / SAMPLES)
        kept.remove()
    return Learned([folder / name for name in names], runs[0].step)


def default_output(concepts: Sequence[Concept], adaptation: Adaptation) -> str:
    """A folder's name from the concepts' and the method's."""
    names = "-".join(slug(concept.name) for concept in concepts)
    return f"{slug(names)}-{adaptation.method}"


def _folder_names(concepts: Sequence[Concept], adaptation: Adaptation) -> list[str]:
    """Each concept's folder in the output; a single concept has the output itself."""
    if len(concepts) == 1:
        return [""]
    if not isinstance(adaptation, LoRA):
        raise MimaError(
            f"method {adaptation.method} learns one concept at a time, got {len(concepts)} "
            f"({', '.join(one.name for one in concepts)}); lora and dreambooth-lora learn several"
        )
    names = [slug(concept.name) for concept in concepts]
    if SAMPLES in names:
        name = concepts[names.index(SAMPLES)].name
        raise MimaError(
            f"concept {name!r}: the folder {SAMPLES} is that of sample pictures; "
            "give the concept another name"
        )
    alike = [one.name for one, name in zip(concepts, names, strict=True) if names.count(name) > 1]
    if alike:
        raise MimaError(
            f"concepts {', '.join(map(repr, alike))} would be written to one folder; "
            "give them names that differ in letters or digits"
        )
    return names


def _save_whole(run: Run, pipeline: Pipeline, folder: Path) -> None:
    """Write the model with what was learned merged into it."""
    with tempfile.TemporaryDirectory(prefix="mima-") as scratch:
        adapter = run.save(Path(scratch) / slug(run.concept.name))
        merged = merge_adapters(pipeline, [adapter], weights=[1.0], method="weighted")
        merged.save_pretrained(folder)


def _record(folder: Path, model: Any, concepts: Sequence[Concept], adaptation: Adaptation) -> None:
    source = source_of(model)
    write_record(
        folder,
        "adapt",
        model=origin_of(model),
        opened_with={} if source is None else source.options,
        concepts=[concept.name for concept in concepts],
        prompts=[concept.prompt for concept in concepts],
        details={"method": adaptation.method, "settings": asdict(adaptation)},
    )
