"""Attack a model: adapt it to a concept and watch how like the real thing its pictures become."""

# S = evaluated steps, P = prompts, R = seeds, K = references of one prompt

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mima.adaptation.base import Adaptation, Diverged
from mima.adapters.adapter import Adapter
from mima.adapters.mixed_batch import can_share_batches
from mima.concepts import Concept
from mima.concepts.pictures import Picture, by_prompt
from mima.errors import MimaError
from mima.evaluation.encoders import ImageEncoder, similarity
from mima.evaluation.metrics import GapCurve
from mima.families.pipelines import Pipeline, readers
from mima.sampling import Job, Sampler


@dataclass(frozen=True, kw_only=True)
class AttackCurve:
    """How far one attack got, step by step.

    Attributes:
        concept: name of the attacked concept.
        method: name of the adaptation method.
        encoder: name of the similarity model.
        steps: adaptation steps at which the model was sampled, ascending.
        prompts: P prompts.
        seeds: R sampling seeds.
        scores: [S, P, R] similarity of each picture to the references of its own prompt.
        images: the pictures, ``images[step][prompt][seed]``.
        references: K reference pictures for each prompt.
        losses: training loss of every adaptation step.
    """

    concept: str
    method: str
    encoder: str
    steps: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: np.ndarray[Any, np.dtype[np.float64]]
    images: tuple[tuple[tuple[Image.Image, ...], ...], ...]
    references: tuple[tuple[Image.Image, ...], ...]
    losses: tuple[float, ...]

    @property
    def similarity(self) -> tuple[float, ...]:
        """Mean similarity at each of `steps`, over prompts and seeds."""
        return tuple(self.scores.mean(axis=(1, 2)).tolist())


@dataclass(frozen=True)
class Trajectory:
    """One adaptation, and what it drew on the way.

    Attributes:
        steps: steps at which it was sampled; those after a divergence are missing.
        images: the pictures of each, in the order of the jobs.
        losses: training loss of every step done.
        diverged: why the last steps are missing, or their pictures are no finite numbers.
        broken: steps at which some pictures are no finite numbers.
        pipeline: the adapted pipeline, after the last step; where another model draws, that one
            with the last adapter drawn in it.
    """

    steps: tuple[int, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    losses: tuple[float, ...]
    diverged: Diverged | None
    broken: tuple[int, ...]
    pipeline: Pipeline

    @property
    def last(self) -> int:
        """The last step up to which all pictures are of finite numbers; 0 where no later one is."""
        sound = [step for step in self.steps if all(step < place for place in self.broken)]
        return max(sound, default=0)


def trajectory(
    pipeline: Pipeline,
    concept: Concept,
    adaptation: Adaptation,
    steps: Sequence[int],
    jobs: Sequence[Job],
    sampler: Sampler,
    *,
    drawn_by: Any = None,
    class_pictures_by: Pipeline | None = None,
    advance: Callable[[int], None] = lambda _: None,
    on_picture: Callable[[int, int, Image.Image], None] = lambda *_: None,
) -> Trajectory:
    """Adapt a pipeline and draw the same pictures at some steps.

    LoRA adapters are small: those of all steps are kept, and their pictures drawn in common batches
    when training is over. Other methods' models are sampled when they are reached.

    Args:
        pipeline: the model; it stays as it is.
        concept: what is learned.
        adaptation: how; its `steps` are not used.
        steps: when to sample, ascending.
        jobs: what to draw.
        sampler: how to draw.
        drawn_by: another model of the same architecture that draws the pictures with the adapters
            trained on `pipeline`; for LoRA on linear layers of the denoiser alone.
        class_pictures_by: another model that draws missing class pictures; see `Adaptation.start`.
        advance: called with the amount of work just done, in steps and pictures.
        on_picture: called with step, index of the job and picture as soon as it is drawn.

    Raises:
        MimaError: adapters of another kind were to be drawn by another model.
    """
    run = adaptation.start(pipeline, concept, class_pictures_by=class_pictures_by)
    adapters: list[Adapter] = []
    reached: list[int] = []
    images: list[list[Image.Image]] = []
    black: list[int] = []

    def keep(step: int, index: int, image: Image.Image) -> None:
        images[-1].append(image)
        on_picture(step, index, image)
        advance(1)

    diverged = None
    try:
        for step in run.until(*steps, on_step=lambda _: advance(1)):
            reached.append(step)
            pairs = zip(readers(run.pipeline), readers(pipeline), strict=True)
            text_is_frozen = all(own.encoder is given.encoder for own, given in pairs)
            shared = text_is_frozen and can_share_batches(run.pipeline)
            if drawn_by is not None and not shared:
                raise MimaError(
                    f"method {adaptation.method}: only a LoRA on linear layers of the denoiser can "
                    "be drawn by another model"
                )
            if shared:
                adapters.append(Adapter.of(run.pipeline).copied())
                continue
            images.append([])
            broken: list[int] = []
            for index, image in enumerate(sampler.draw(run.pipeline, jobs, broken=broken)):
                keep(step, index, image)
            if broken:
                black.append(step)
    except Diverged as error:
        diverged = error
    adapted = run.pipeline
    if adapters:
        mixed = [Job(job.prompt, job.seed, n) for n in range(len(reached)) for job in jobs]
        artist, places = pipeline if drawn_by is None else drawn_by, list[int]()
        for number, image in enumerate(sampler.draw(artist, mixed, adapters, broken=places)):
            n, index = divmod(number, len(jobs))
            if index == 0:
                images.append([])
            keep(reached[n], index, image)
        black += [reached[place // len(jobs)] for place in places]
        if drawn_by is not None:
            # not merged into its weights: what trains on finds the same layers in both models
            adapted = adaptation.inject(drawn_by, concept).pipeline
            with torch.no_grad():
                for name, own in Adapter.of(adapted).factors.items():
                    own.A.copy_(adapters[-1].factors[name].A)
                    own.B.copy_(adapters[-1].factors[name].B)
    # the last step's loss is that of the weights before it
    if diverged is None and any(step > 0 for step in black):
        diverged = Diverged(
            f"{adaptation.method}: after step {max(black)} pictures are not finite numbers; lower "
            f"learning_rate ({adaptation.learning_rate})"
        )
    return Trajectory(
        steps=tuple(reached),
        images=tuple(map(tuple, images)),
        losses=tuple(run.losses),
        diverged=diverged,
        broken=tuple(sorted(set(black))),
        pipeline=adapted,
    )


def attack(
    pipeline: Pipeline,
    concept: Concept,
    adaptation: Adaptation,
    *,
    encoder: ImageEncoder,
    steps: Sequence[int] = (25, 50, 100),
    seeds: Sequence[int] = (0, 1, 2),
    sampler: Sampler | None = None,
    references: Sequence[Picture] | None = None,
    max_prompts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AttackCurve:
    """Adapt a pipeline to a concept and measure its pictures at some steps on the way.

    Each picture is compared with the references of the same prompt, and scores the mean of their
    similarities. Two pipelines attacked with the same arguments see the same batches, noise and
    seeds; but for class pictures that the concept lacks, which each of them draws.

    Args:
        pipeline: the model under attack; it stays as it is.
        concept: what is learned, from `concept.images`.
        adaptation: method, settings and the seed of the training; its `steps` are not used.
        encoder: similarity model.
        steps: when to sample, ascending; 0 is before any training.
        seeds: sampling seeds.
        sampler: how to sample; default `Sampler()`.
        references: what to compare with, `concept.held_out` by default. They must not be
            pictures that were trained on if learning is to be told from memorising.
        max_prompts: sample at most this many prompts, spread evenly over those of the references.
        progress: called with work done and all work, in steps and pictures.

    Returns:
        Similarity and pictures at each of `steps`.

    Raises:
        MimaError: the concept has no references, or the model draws no finite numbers.
        ValueError: steps do not ascend, or an empty list.
    """
    steps = tuple(steps)
    seeds = tuple(seeds)
    if not steps or not seeds or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(
            f"attack: steps must ascend from 0 and seeds be given, got {steps} and {seeds}"
        )
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"attack: max_prompts must be at least 1, got {max_prompts}")
    pictures = by_prompt(concept.held_out if references is None else references, max_prompts)
    if not pictures:
        raise MimaError(
            f"concept {concept.name!r} has no held_out pictures to compare with; "
            "add some, or pass references"
        )
    prompts = tuple(pictures)
    reference_images = tuple(
        tuple(picture.load() for picture in group) for group in pictures.values()
    )
    references_KD = [encoder.embed(group) for group in reference_images]
    sampler = sampler or Sampler()

    jobs = [Job(prompt, seed) for prompt in prompts for seed in seeds]
    total = steps[-1] + len(steps) * len(jobs)
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total)

    drawn = trajectory(pipeline, concept, adaptation, steps, jobs, sampler, advance=advance)
    if 0 in drawn.broken:
        raise MimaError(
            "attack: before any training the model's pictures are not of finite numbers: nothing "
            "can be measured of it"
        )
    if drawn.diverged is not None:
        raise drawn.diverged
    images = [
        tuple(row[start : start + len(seeds)] for start in range(0, len(jobs), len(seeds)))
        for row in drawn.images
    ]
    scores = [score(rows, references_KD, encoder) for rows in images]
    return AttackCurve(
        concept=concept.name,
        method=adaptation.method,
        encoder=encoder.name,
        steps=steps,
        prompts=prompts,
        seeds=seeds,
        scores=np.stack(scores),
        images=tuple(images),
        references=reference_images,
        losses=drawn.losses,
    )


def score(
    rows: Sequence[Sequence[Image.Image]],
    references_KD: Sequence[torch.Tensor],
    encoder: ImageEncoder,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean similarity [P, R] of pictures, P rows of R, to the K references of their row.

    References are P sets of normalised features, which the encoder made.
    """
    features_BD = encoder.embed([image for row in rows for image in row])
    split = features_BD.split([len(row) for row in rows])
    return np.stack(
        [
            similarity(features, references).double().mean(dim=1).numpy()
            for features, references in zip(split, references_KD, strict=True)
        ]
    )


def compare(original: AttackCurve, immunized: AttackCurve) -> GapCurve:
    """The same attack on two models, as SGR along the adaptation.

    Raises:
        ValueError: the attacks differ in concept, method, encoder, steps, prompts or seeds.
    """
    for name in ("concept", "method", "encoder", "steps", "prompts", "seeds"):
        first, second = getattr(original, name), getattr(immunized, name)
        if first != second:
            raise ValueError(f"compare: the attacks differ in {name}: {first!r} and {second!r}")
    return GapCurve(
        concept=original.concept,
        steps=original.steps,
        original=original.similarity,
        immunized=immunized.similarity,
    )
