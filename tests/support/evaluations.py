"""Folders as `mima evaluate` leaves them, with made-up numbers and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.metrics import GapCurve
from mima.evaluation.records import (
    AttackRow,
    Benign,
    ConceptRecord,
    Evaluation,
    ModelPair,
    ScorePair,
    measured,
    points_of,
)
from mima.evaluation.summary import summarize

STEPS = (0, 25, 50, 100)
SIDES = ("original", "immunized")

Painter = Callable[[str, str, int, int], Image.Image]


def paint(concept: str, side: str, step: int, index: int) -> Image.Image:
    """One colour for each side, step and index: red grows with the step, blue with the index."""
    return Image.new("RGB", (32, 32), (step * 2, 200 if side == "original" else 60, 60 * index))


def write_evaluation(
    path: Path,
    *,
    name: str = "run",
    concepts: Sequence[tuple[str, str, str]] = (
        ("tiger", "target", "a photo of a tiger"),
        ("owl", "other", "a photo of an owl"),
    ),
    strength: float = 0.5,
    adaptations: Sequence[str] = ("lora", "textual-inversion"),
    lr_factors: Sequence[float] = (1.0,),
    variants: Sequence[str] = ("name",),
    seeds: Sequence[int] = (0, 1, 2),
    similarities: Sequence[str] = ("clip", "dino"),
    painter: Painter = paint,
    num_pictures: int = 2,
    recorded: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a whole evaluation.

    Args:
        path: the folder; it is made.
        name: label of the run.
        concepts: name, role and prompt of each.
        strength: how much of what is learned the immunization takes away.
        adaptations: methods of the attacks.
        lr_factors: of the attacks' learning rate; higher ones get further.
        variants: prompt variants of the attacks; others than the name get further.
        seeds: of the attacks.
        similarities: names of similarity models, the first is the primary.
        painter: draws (concept, side, step, index); the side may be "references".
        num_pictures: per step.
        recorded: further fields of every attack, or other values of what its curve determines.
        changes: replaces attributes of the `Evaluation`.
    """
    folder = EvaluationFolder(path)
    records = [
        ConceptRecord(name=concept, slug=slug(concept), kind="object", prompt=prompt, role=role)
        for concept, role, prompt in concepts
    ]
    rows, points = [], []
    for concept, adaptation, factor, variant, seed in product(
        records, adaptations, lr_factors, variants, seeds
    ):
        attack = f"{concept.slug}_{adaptation}_x{factor:g}_{variant}_seed{seed}"
        kept = strength if concept.role == "target" else 0.04
        kept *= 1 - 0.25 * math.log10(factor) - 0.2 * (variant != "name")
        kept *= 0.8 if adaptation == "lora" else 1.0
        learned = [0.5 * (1 - math.exp(-step * factor / 40)) for step in STEPS]
        for number, similarity in enumerate(similarities):
            base, wobble = 0.3 + 0.05 * number, 0.03 * math.sin(7 * seed + 3 * number)
            gap = GapCurve(
                concept=concept.name,
                steps=STEPS,
                original=tuple(base + part * (1 + wobble) for part in learned),
                immunized=tuple(
                    base + part * (1 - kept * (1 - step / 400) + wobble)
                    for part, step in zip(learned, STEPS, strict=True)
                ),
            )
            rows.append(
                AttackRow(
                    attack=attack,
                    concept=concept.name,
                    role=concept.role,
                    method=adaptation,
                    lr=1e-4 * factor,
                    lr_factor=factor,
                    steps=STEPS[-1],
                    prompt_variant=variant,
                    images="same",
                    preparation="none",
                    seed=seed,
                    similarity=similarity,
                    nearest_original=0.12 + wobble,
                    nearest_immunized=None if seed == 0 else 0.3 + wobble,
                    seconds=1.5,
                    **measured(gap) | dict(recorded or {}),
                )
            )
            points += points_of(attack, similarity, gap)
        for side, step in product(SIDES, STEPS):
            place = folder.image_folder(attack, side, step)
            _save([painter(concept.name, side, step, i) for i in range(num_pictures)], place)
    for concept in records:
        pictures = [painter(concept.name, "references", 0, index) for index in range(2)]
        _save(pictures, folder.reference_folder(concept.slug))
    evaluation = Evaluation(
        name=name,
        method="mima",
        models=ModelPair(original="embedded", immunized=f"runs/{name}"),
        preset="quick",
        protocol="standard",
        similarities=tuple(similarities),
        seeds=tuple(seeds),
        concepts=tuple(records),
        benign=Benign(
            prompt_alignment=ScorePair(original=0.3125, immunized=0.3063),
            cmmd=0.042,
            adaptability={record.name: 0.03 for record in records if record.role == "other"},
        ),
        summary={similarity: summarize(rows, records, similarity) for similarity in similarities},
        config={"grid": {"seeds": list(seeds)}, "sampler": {"steps": 15, "guidance": 3.0}},
        versions={"mima": "0.2.0", "torch": "2.14.0"},
        complete=True,
    )
    folder.write_evaluation(Evaluation.model_validate(evaluation.model_dump() | changes))
    folder.write_rows(rows, points)
    return path


def slug(text: str) -> str:
    """A file name from words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "concept"


def _save(pictures: Sequence[Image.Image], place: Path) -> None:
    place.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        picture.save(place / f"{index}.png")
