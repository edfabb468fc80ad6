"""What an attack's pictures show: how like the concept they are, and whose objects are there."""

# R = references, B = pictures, N = names, D = features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mima.concepts.pictures import Picture
from mima.evaluation.bench import Bench, file_of
from mima.evaluation.benign import text_features
from mima.evaluation.encoders import TextImageEncoder
from mima.evaluation.feature_cache import CachedSimilarity
from mima.evaluation.grid import Attack
from mima.evaluation.metrics import GapCurve, sgr
from mima.evaluation.records import SIDES, AttackRow, CurvePoint, Side, measured, points_of


def measure(
    bench: Bench,
    attack: Attack,
    similarity: CachedSimilarity,
    steps: Sequence[int],
    references: Mapping[str, Sequence[Picture]],
    seconds: float,
) -> tuple[AttackRow, list[CurvePoint]]:
    """What one similarity model says of an attack's pictures on both models.

    Args:
        bench: what the attack was made with.
        attack: the one whose pictures are in the folder.
        similarity: what measures them.
        steps: those at which both models have pictures, 0 among them.
        references: pictures of the concept by the prompts that were drawn.
        seconds: how long the attack took.

    Returns:
        Its row in ``attacks.csv`` and those in ``curves.csv``.
    """
    folder = bench.folder
    curves: dict[Side, list[float]] = {side: [] for side in SIDES}
    # of an attack that counts as not tried, there is nothing after it to look at
    nearest: dict[Side, float | None] = dict.fromkeys(SIDES)
    objects: dict[Side, float | None] = dict.fromkeys(SIDES)
    for side in SIDES:
        for step in steps:
            files = folder.images(attack.id, side, step)
            curves[side].append(mean_similarity(bench, similarity, files, references))
        if steps[-1] == 0:
            continue
        last = folder.images(attack.id, side, steps[-1])
        table_BR = similarity.table(last, bench.training_files(attack))
        nearest[side] = float((1 - table_BR).amin(dim=1).mean())
        objects[side] = _recognised(bench, attack, similarity, last)
    gap = None
    if steps[-1] == 0:
        before = curves["original"][0], curves["immunized"][0]
        point = CurvePoint(
            attack=attack.id,
            similarity=similarity.name,
            step=0,
            original=before[0],
            immunized=before[1],
            sgr=sgr(*before),
            rise_left=None,
        )
        points = [point]
    else:
        gap = GapCurve(
            concept=attack.concept,
            steps=tuple(steps),
            original=tuple(curves["original"]),
            immunized=tuple(curves["immunized"]),
        )
        points = points_of(attack.id, similarity.name, gap)
    row = AttackRow(
        attack=attack.id,
        concept=attack.concept,
        role=attack.role,
        method=attack.label,
        lr=attack.adaptation.learning_rate,
        lr_factor=attack.lr_factor,
        steps=attack.steps,
        prompt_variant=attack.prompt_variant,
        images=attack.images,
        preparation=attack.preparation,
        seed=attack.seed,
        similarity=similarity.name,
        **measured(gap),
        nearest_original=nearest["original"],
        nearest_immunized=nearest["immunized"],
        seconds=seconds,
        objects_original=objects["original"],
        objects_immunized=objects["immunized"],
    )
    return row, points


def mean_similarity(
    bench: Bench,
    similarity: CachedSimilarity,
    files: Sequence[Path],
    references: Mapping[str, Sequence[Picture]],
) -> float:
    """Mean over prompts of the pictures' similarity to their prompt's references."""
    width = bench.config.pictures_per_prompt
    means = [
        similarity.table(
            files[place * width : (place + 1) * width], [file_of(picture) for picture in group]
        ).mean()
        for place, group in enumerate(references.values())
    ]
    return float(torch.stack(means).double().mean())


def _recognised(
    bench: Bench, attack: Attack, similarity: CachedSimilarity, files: Sequence[Path]
) -> float | None:
    """The share of pictures whose object the encoder names rightly among all objects."""
    if not isinstance(similarity.model, TextImageEncoder):
        return None
    shown = bench.objects(attack)
    names = bench.all_objects(shown.values())
    if any(right.issuperset(names) for right in shown.values()):
        return None
    texts_ND = text_features(names, similarity.model)
    guesses = (similarity.features(files) @ texts_ND.mT).argmax(dim=1).tolist()
    jobs = bench.jobs(attack)
    right = [names[guess] in shown[job.prompt] for guess, job in zip(guesses, jobs, strict=True)]
    return sum(right) / len(right)
