"""What all processes of an evaluation share, and where they write and read its pictures."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from mima.choices import SEED_STRIDE, PictureProtocol
from mima.concepts import Concept
from mima.concepts.naming import without_name
from mima.concepts.pictures import Picture, by_prompt
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import (
    Attack,
    GridConfig,
    Place,
    Trial,
    material,
    places,
)
from mima.evaluation.records import Role, Side
from mima.sampling import Job, Sampler
from mima.storage.output import write_picture

logger = logging.getLogger(__name__)

HELD_BACK = 4
"""Of so many training pictures, a trial is judged by one."""
TRIAL_PICTURES = 2
"""How many are drawn of each prompt by which a trial is judged."""

Task: TypeAlias = Attack | Trial | Side
"""An attack, a trial before it, or the pictures that one model draws of ordinary prompts."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that the processes of one evaluation share; plain data but for the models.

    ``models`` may be the original alone: what its attacks show is then kept, and not measured.
    """

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
    originals: Path | None = None

    def with_role(self, role: Role) -> dict[str, Concept]:
        """The concepts of one role, by their slugs."""
        return {slug: c for slug, c in self.concepts.items() if self.roles[slug] == role}

    @cached_property
    def written(self) -> dict[str, Concept]:
        """The concepts with the files that `write_references` wrote: what attacks train on.

        Those that they came from may change while attacks run, between one model and the other.
        """

        def own(pictures: Sequence[Picture], folder: Path) -> tuple[Picture, ...]:
            files = _numbered(folder, len(pictures))
            return tuple(Picture.trusted(f, p.prompt) for f, p in zip(files, pictures, strict=True))

        return {
            slug: replace(
                concept,
                images=own(concept.images, self.training_folder(slug)),
                held_out=own(concept.held_out, self.folder.reference_folder(slug)),
                class_images=own(concept.class_images, self.class_folder(slug)),
            )
            for slug, concept in self.concepts.items()
        }

    def material(self, attack: Attack) -> tuple[Concept, dict[str, list[Picture]]]:
        """What an attack trains on, and its references by prompt, as the files written of them."""
        concept = self.written[attack.slug]
        others = self.ordinary(attack.slug) if attack.images == "mixed" else ()
        described, references = material(
            attack, concept, rare_token=self.config.rare_token, others=others
        )
        _, where = places(attack.images, concept)
        pictures = [
            Picture(self._file_of(attack.slug, place), picture.prompt)
            for place, picture in zip(where, references, strict=True)
        ]
        return described, by_prompt(pictures, self.config.max_prompts)

    def ordinary(self, slug: str = "") -> tuple[Picture, ...]:
        """Pictures of the concepts that must stay learnable, without those of one of them."""
        return tuple(
            picture
            for other, concept in self.written.items()
            if self.roles[other] == "other" and other != slug
            for picture in concept.images
        )

    def merged(self, attack: Attack) -> list[Concept]:
        """The target concepts whose LoRAs an attack merges first, with pictures as its own are.

        None is one that the attack is compared with.
        """
        found = []
        for slug in self.with_role("target"):
            concept = self.written[slug]
            where, _ = places(attack.images, concept)
            pictures = tuple(getattr(concept, kind)[index] for kind, index in where)
            found.append(replace(concept, images=pictures) if pictures else concept)
        return found

    def training_files(self, attack: Attack) -> list[Path]:
        """The files of the concept's pictures that an attack trains on."""
        where, _ = places(attack.images, self.concepts[attack.slug])
        return [self._file_of(attack.slug, place) for place in where]

    def _file_of(self, slug: str, place: Place) -> Path:
        kind, index = place
        held_out = bool(self.concepts[slug].held_out) and kind == "held_out"
        folder = self.folder.reference_folder(slug) if held_out else self.training_folder(slug)
        return folder / f"{index}.png"

    def trial_material(self, attack: Attack) -> tuple[Concept, list[Job], list[list[Path]]]:
        """What a trial trains on, what it draws, and the pictures of each prompt that judge it.

        Every fourth training picture is held back to judge by: a setting that memorises is not to
        look like one that learns. Of fewer than four, all are trained on and judge.
        """
        concept, _ = self.material(attack)
        # behind the concept's own pictures may come ordinary ones
        files = self.training_files(attack)
        back = range(HELD_BACK - 1, len(files), HELD_BACK)
        images = tuple(p for index, p in enumerate(concept.images) if index not in back)
        judges = by_prompt(
            [
                Picture(files[index], concept.images[index].prompt)
                for index in back or range(len(files))
            ],
            self.config.max_prompts,
        )
        jobs = [
            Job(prompt, attack.seed * SEED_STRIDE + seed)
            for prompt in judges
            for seed in range(TRIAL_PICTURES)
        ]
        return (
            concept.trained_on(images),
            jobs,
            [[file_of(picture) for picture in group] for group in judges.values()],
        )

    def objects(self, attack: Attack) -> dict[str, frozenset[str]]:
        """What each prompt of an attack shows, in words that do not name a style.

        Of a style's prompts, their own object; any caption of a concept that is an object says what
        all of its prompts show.
        """
        concept = self.concepts[attack.slug]
        _, where = places(attack.images, concept)
        _, references = material(attack, concept, rare_token=self.config.rare_token)
        own = frozenset(
            _object_in(concept, picture) for picture in (*concept.images, *concept.held_out)
        )
        return {
            picture.prompt: own
            if concept.kind != "style"
            else frozenset({_object_in(concept, getattr(concept, kind)[index])})
            for (kind, index), picture in zip(where, references, strict=True)
        }

    def all_objects(self, shown: Collection[frozenset[str]]) -> list[str]:
        """What the references of all concepts show; if that is one thing, ordinary prompts besides.

        Args:
            shown: what is right of each prompt of an attack.
        """
        every = [
            _object_in(concept, picture)
            for concept in self.concepts.values()
            for picture in concept.held_out or concept.images
        ]
        # attacks that train on held-out pictures are compared with the others
        every += sorted(frozenset().union(*shown))
        if any(right.issuperset(every) for right in shown):
            every += self.prompts
        return list(dict.fromkeys(every))

    def jobs(self, attack: Attack) -> list[Job]:
        """What is drawn at each evaluated step."""
        _, references = self.material(attack)
        seeds = range(self.config.pictures_per_prompt)
        return [
            Job(prompt, attack.seed * SEED_STRIDE + seed) for prompt in references for seed in seeds
        ]

    def repaired_files(self, attack: Attack, side: Side) -> list[Path]:
        """Where the pictures of an attacked and repaired model are."""
        folder = self.folder.path / "images" / "repaired" / attack.id / side
        return _numbered(folder, len(self.jobs(attack)))

    def work(self, task: Task) -> int:
        """Training steps and pictures of a task."""
        return self.steps(task) + self.drawn(task)

    def steps(self, task: Task) -> int:
        """Training steps of a task."""
        if isinstance(task, Trial):
            return task.adaptation.steps + self._steps_before(task.attack)
        if not isinstance(task, Attack):
            return 0
        repair = self.config.repair_steps if self.repairs else 0
        return len(self.models) * (task.steps + repair + self._steps_before(task))

    def drawn(self, task: Task) -> int:
        """Pictures of a task."""
        if isinstance(task, Trial):
            _, jobs, _ = self.trial_material(task.attack)
            return len(jobs) if self.config.tune.by == "similarity" else 0
        if not isinstance(task, Attack):
            return len(self.prompts)
        times = len(self.config.steps_of(task)) + self.repairs
        return len(self.models) * times * len(self.jobs(task))

    @property
    def repairs(self) -> bool:
        """Whether attacked models are repaired."""
        return self.config.repair_steps > 0 and bool(self.ordinary())

    def repair_pictures(self, attack: Attack) -> tuple[Picture, ...]:
        """What an attacked model is repaired with: where it can be, nothing of its concept."""
        return self.ordinary(attack.slug) or self.ordinary()

    def _steps_before(self, attack: Attack) -> int:
        """Training steps of its preparation on one model."""
        return self.config.preparation_steps * self.trainings_before(attack)

    def trainings_before(self, attack: Attack) -> int:
        """How many trainings its preparation consists of."""
        targets = len(self.with_role("target"))
        return {"merge": targets, "benign": 1, "kick": 1}.get(attack.preparation, 0)

    def training_folder(self, slug: str) -> Path:
        """Where a concept's training pictures are written."""
        return self.folder.path / "images" / "training" / slug

    def class_folder(self, slug: str) -> Path:
        """Where its class pictures are written."""
        return self.folder.path / "images" / "class" / slug

    def benign_files(self, side: Side) -> list[Path]:
        """Where one model's pictures of ordinary prompts are written."""
        return _numbered(self.folder.path / "images" / "benign" / side, len(self.prompts))

    def benign_done(self, side: Side) -> bool:
        """Whether they all are."""
        return all(file.is_file() for file in self.benign_files(side))

    def write_references(self) -> None:
        """Write every concept's references, training and class pictures."""
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
                (self.class_folder(slug), concept.class_images),
            ):
                for file, picture in zip(_numbered(place, len(pictures)), pictures, strict=True):
                    write_picture(file, picture.load())


def _object_in(concept: Concept, picture: Picture) -> str:
    """What a picture shows: its caption, of a style's pictures without the style."""
    if concept.kind == "style":
        return without_name(picture.prompt, concept)
    return picture.prompt


def _numbered(folder: Path, count: int) -> list[Path]:
    return [folder / f"{index}.png" for index in range(count)]


def file_of(picture: Picture) -> Path:
    """Where a picture that an evaluation has written is."""
    assert isinstance(picture.image, Path)
    return picture.image
