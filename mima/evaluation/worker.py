"""What one process of an evaluation does: attack both models alike, and measure the pictures."""

# R = references, B = pictures

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from mima.adaptation import LoRA, configure
from mima.adapters.mixed_batch import Adapter, merged
from mima.choices import PictureProtocol
from mima.concepts import Concept
from mima.concepts.pictures import Picture, by_prompt
from mima.evaluation.benign import cmmd, text_features
from mima.evaluation.encoders import TextImageEncoder, load_similarity
from mima.evaluation.feature_cache import CachedSimilarity
from mima.evaluation.grid import Attack, GridConfig, material
from mima.evaluation.metrics import GapCurve
from mima.evaluation.records import (
    SIDES,
    AttackRow,
    Benign,
    CurvePoint,
    EvaluationFolder,
    Role,
    ScorePair,
    Side,
    measured,
    points_of,
)
from mima.evaluation.trajectory import trajectory
from mima.families import family_of, load_pipeline
from mima.sampling import Job, Sampler
from mima.storage.output import write_picture
from mima.storage.tensor_files import fingerprint

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.sqlite"
# sampling seeds of attacks with different seeds never meet
SEED_STRIDE = 1000

Advance = Callable[[int], None]
Task: TypeAlias = Attack | Side
"""An attack, or the pictures that one model draws of ordinary prompts."""


@dataclass(frozen=True)
class Outcome:
    """What one attack showed."""

    rows: list[AttackRow]
    points: list[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that the processes of one evaluation share; plain data but for the models."""

    models: Mapping[Side, Any]
    concepts: Mapping[str, Concept]
    roles: Mapping[str, Role]
    config: GridConfig
    sampler: Sampler
    similarities: Mapping[str, str]
    protocol: PictureProtocol
    folder: EvaluationFolder
    device: str
    prompts: Sequence[str]

    def with_role(self, role: Role) -> list[Concept]:
        """The concepts of one role."""
        return [concept for slug, concept in self.concepts.items() if self.roles[slug] == role]

    def material(self, attack: Attack) -> tuple[Concept, dict[str, list[Picture]]]:
        """What an attack trains on, and its references by prompt, as the files written of them."""
        concept = self.concepts[attack.slug]
        described, references = material(attack, concept, rare_token=self.config.rare_token)
        other = attack.images == "other"
        place = self.training_folder if other else self.folder.reference_folder
        files = _numbered(place(attack.slug), len(references))
        pictures = [Picture(f, p.prompt) for f, p in zip(files, references, strict=True)]
        return described, by_prompt(pictures, self.config.max_prompts)

    def training_files(self, attack: Attack) -> list[Path]:
        """The files of what an attack trains on."""
        concept = self.concepts[attack.slug]
        if attack.images == "other":
            return _numbered(self.folder.reference_folder(attack.slug), len(concept.held_out))
        return _numbered(self.training_folder(attack.slug), len(concept.images))

    def jobs(self, attack: Attack) -> list[Job]:
        """What is drawn at each evaluated step."""
        _, references = self.material(attack)
        seeds = range(self.config.pictures_per_prompt)
        return [
            Job(prompt, attack.seed * SEED_STRIDE + seed) for prompt in references for seed in seeds
        ]

    def work(self, task: Task) -> int:
        """Training steps and pictures of a task."""
        if not isinstance(task, Attack):
            return len(self.prompts)
        pictures = len(self.config.steps_of(task)) * len(self.jobs(task))
        preparation = self.config.preparation_steps * self.loras_before(task)
        return 2 * (task.steps + pictures + preparation)

    def loras_before(self, attack: Attack) -> int:
        """How many LoRAs its preparation trains."""
        targets = len(self.with_role("target"))
        return {"none": 0, "merge": targets, "benign": 1}[attack.preparation]

    def training_folder(self, slug: str) -> Path:
        """Where a concept's training pictures are written."""
        return self.folder.path / "images" / "training" / slug

    def benign_files(self, side: Side) -> list[Path]:
        """Where one model's pictures of ordinary prompts are written."""
        return _numbered(self.folder.path / "images" / "benign" / side, len(self.prompts))

    def benign_done(self, side: Side) -> bool:
        """Whether they all are."""
        return all(file.is_file() for file in self.benign_files(side))

    def write_references(self) -> None:
        """Write every concept's references and training pictures."""
        for slug, concept in self.concepts.items():
            if not concept.held_out:
                logger.warning(
                    "concept %s has no held_out pictures: adapted models are compared with those "
                    "that they were trained on, so that learning looks like memorising",
                    concept.name,
                )
            for place, pictures in (
                (self.folder.reference_folder(slug), concept.held_out or concept.images),
                (self.training_folder(slug), concept.images),
            ):
                place.mkdir(parents=True, exist_ok=True)
                for file, picture in zip(_numbered(place, len(pictures)), pictures, strict=True):
                    picture.load().save(file)


class Worker:
    """One process's models and similarities, and how it runs tasks with them.

    Attributes:
        advance: called with the amount of work just done.
    """

    def __init__(self, bench: Bench, advance: Advance = lambda _: None) -> None:
        self.bench = bench
        self.advance = advance
        self.pipelines = {
            side: load_pipeline(model, device=bench.device) for side, model in bench.models.items()
        }
        self.similarities = [
            CachedSimilarity(
                load_similarity(source, protocol=bench.protocol, device=bench.device),
                name=name,
                protocol=bench.protocol,
                path=bench.folder.path / FEATURES_FILE,
            )
            for name, source in bench.similarities.items()
        ]
        self._prepared: dict[Side, tuple[object, Any]] = {}

    def fingerprints(self) -> dict[str, str]:
        """A hash of each model's denoiser."""
        return {
            side: fingerprint(dict(family_of(pipeline).denoiser.state_dict()))
            for side, pipeline in self.pipelines.items()
        }

    def run(self, task: Task) -> Outcome | None:
        """Run an attack, or draw one model's pictures of ordinary prompts."""
        if isinstance(task, Attack):
            return self._attack(task)
        jobs = [Job(prompt, index) for index, prompt in enumerate(self.bench.prompts)]
        files = self.bench.benign_files(task)
        pictures = self.bench.sampler.draw(self.pipelines[task], jobs)
        for file, image in zip(files, pictures, strict=True):
            write_picture(file, image)
            self.advance(1)
        return None

    def benign(self) -> Benign:
        """Compare the models' pictures of ordinary prompts."""
        chosen = [s for s in self.similarities if isinstance(s.model, TextImageEncoder)]
        prompts = list(self.bench.prompts)
        if not chosen or not prompts:
            return Benign()
        encoder = chosen[0]
        assert isinstance(encoder.model, TextImageEncoder)
        texts_BD = text_features(prompts, encoder.model)
        features = {side: encoder.features(self.bench.benign_files(side)) for side in SIDES}
        alignment = {side: float((f * texts_BD).sum(dim=-1).mean()) for side, f in features.items()}
        return Benign(
            prompt_alignment=ScorePair(**alignment),
            cmmd=cmmd(features["original"], features["immunized"]),
        )

    def _attack(self, attack: Attack) -> Outcome:
        started = time.perf_counter()
        bench, jobs = self.bench, self.bench.jobs(attack)
        concept, references = bench.material(attack)
        reached = {}
        for side in SIDES:

            def keep(step: int, index: int, image: Image.Image, side: Side = side) -> None:
                place = bench.folder.image_folder(attack.id, side, step)
                write_picture(place / f"{index}.png", image)

            drawn = trajectory(
                self._start(side, attack),
                concept,
                attack.adaptation,
                bench.config.steps_of(attack),
                jobs,
                bench.sampler,
                advance=self.advance,
                on_picture=keep,
            )
            if drawn.diverged is not None:
                logger.warning("%s, %s model: %s", attack.id, side, drawn.diverged)
            reached[side] = drawn.steps
        steps = [step for step in reached["original"] if step in reached["immunized"]]
        seconds = time.perf_counter() - started
        rows, points = [], []
        for similarity in self.similarities:
            row, curve = self._measure(attack, similarity, steps, references, seconds)
            rows.append(row)
            points += curve
        return Outcome(rows, points)

    def _measure(
        self,
        attack: Attack,
        similarity: CachedSimilarity,
        steps: Sequence[int],
        references: Mapping[str, Sequence[Picture]],
        seconds: float,
    ) -> tuple[AttackRow, list[CurvePoint]]:
        folder, width = self.bench.folder, self.bench.config.pictures_per_prompt
        curves: dict[Side, list[float]] = {side: [] for side in SIDES}
        nearest: dict[Side, float] = {}
        for side in SIDES:
            for step in steps:
                files = folder.images(attack.id, side, step)
                means = [
                    similarity.table(
                        files[place * width : (place + 1) * width],
                        [_file(picture) for picture in group],
                    ).mean()
                    for place, group in enumerate(references.values())
                ]
                curves[side].append(float(torch.stack(means).double().mean()))
            last = folder.images(attack.id, side, steps[-1])
            table_BR = similarity.table(last, self.bench.training_files(attack))
            nearest[side] = float((1 - table_BR).amin(dim=1).mean())
        gap = None
        points = []
        if steps[-1] > 0:
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
            method=attack.adaptation.method,
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
        )
        return row, points

    def _start(self, side: Side, attack: Attack) -> Any:
        """The model that an attack starts from; of prepared ones, the last is kept."""
        pipeline = self.pipelines[side]
        if attack.preparation == "none":
            return pipeline
        key = (attack.preparation, attack.seed)
        if side not in self._prepared or self._prepared[side][0] != key:
            self._prepared[side] = key, self._prepare(pipeline, attack)
        else:
            # work that was announced and need not be done
            self.advance(self.bench.loras_before(attack) * self.bench.config.preparation_steps)
        return self._prepared[side][1]

    def _prepare(self, pipeline: Any, attack: Attack) -> Any:
        """Merge LoRAs of all targets, or of the other concepts' pictures, into the weights."""
        config = self.bench.config
        lora = replace(
            configure("lora", config.methods.get("lora", {})),
            steps=config.preparation_steps,
            seed=attack.seed,
        )
        assert isinstance(lora, LoRA)
        subjects = self.bench.with_role("target")
        if attack.preparation == "benign":
            pictures = [p for concept in self.bench.with_role("other") for p in concept.images]
            subjects = [Concept("benign", pictures[0].prompt, pictures)]
        adapters = []
        for subject in subjects:
            run = lora.adapt(pipeline, subject, on_step=lambda _: self.advance(1))
            adapters.append(Adapter.of(run.pipeline))
        return merged(pipeline, adapters)


def _numbered(folder: Path, count: int) -> list[Path]:
    return [folder / f"{index}.png" for index in range(count)]


def _file(picture: Picture) -> Path:
    assert isinstance(picture.image, Path)
    return picture.image
