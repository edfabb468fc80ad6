"""What an immunization saw, as the run's own record says, and what of that is measured with.

The record (``mima.json``) may hold, for each level of the run that saw anything (``lower``,
``upper``, ``prior``, ``benign`` or whatever it calls them)::

    "saw": {"prior": {"concepts": [names], "pictures": [digests], "signatures": [signatures],
                      "prompts": [texts]}}

with pictures named by `mima.concepts.pictures.digest`, and recognised in other files and sizes by
`mima.concepts.near_duplicates.signature`: `mima.immunization.encoding.saw` makes it. A record
without it is not held against anybody, and records of before there were signatures are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from mima.concepts import Concept
from mima.concepts.near_duplicates import SIGNATURE_LENGTH, nearly_the_same, signature
from mima.concepts.pictures import Picture, digest, spread
from mima.errors import MimaError, one_line
from mima.evaluation.grid import NEEDS_OTHERS, Attack, GridConfig
from mima.families import source_of
from mima.storage.inputs import expanded
from mima.storage.record import read_record
from mima.training.captions import divided

UNKNOWN = (
    "What the immunization saw is not on record with the model: whether it saw what is measured "
    "with cannot be told."
)
"""Stands among overlaps where none can be found."""

EXACT_ONLY = (
    "The model's record names the pictures that its immunization saw by exact hashes alone: "
    "whether it saw nearly the same pictures (saved anew, resized, cropped or mirrored) cannot be "
    "told."
)
"""Stands among overlaps of records without signatures."""

Signature = Annotated[str, StringConstraints(pattern=rf"^[A-Za-z0-9+/]{{{SIGNATURE_LENGTH}}}$")]


class Level(BaseModel):
    """What one level of an immunization saw."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    concepts: tuple[str, ...] = ()
    pictures: frozenset[str] = frozenset()
    signatures: frozenset[Signature] | None = None
    """None in records of before there were signatures."""
    prompts: frozenset[str] = frozenset()

    def saw(self, pictures: Sequence[Picture]) -> tuple[int, int]:
        """How many of some pictures it saw, and how many others are nearly the same as one."""
        left = [picture for picture in pictures if digest(picture) not in self.pictures]
        near = nearly_the_same(left, self.signatures or ())
        return len(pictures) - len(left), sum(near)


class Seen(BaseModel):
    """What all levels saw, and the seed of the run."""

    model_config = ConfigDict(frozen=True)

    levels: dict[str, Level] = {}
    seed: int | None = None
    known: bool = True
    """Whether the model's record says what its immunization saw."""

    @property
    def prompts(self) -> frozenset[str]:
        """Prompts that any level saw."""
        return frozenset().union(*(level.prompts for level in self.levels.values()))

    @property
    def untold(self) -> list[str]:
        """Sentences about overlaps that the record cannot tell."""
        if not self.known:
            return [UNKNOWN]
        levels = self.levels.values()
        exact = any(level.pictures and level.signatures is None for level in levels)
        return [EXACT_ONLY] if exact else []

    def said(self, prompt: str) -> bool:
        """Whether a level saw a prompt, however it was written."""
        return _plain(prompt) in self._plain_prompts

    @cached_property
    def _plain_prompts(self) -> frozenset[str]:
        return frozenset(map(_plain, self.prompts))

    def overlaps(self, targets: Sequence[Concept], others: Sequence[Concept]) -> list[str]:
        """Sentences about what is measured with although the immunization saw it.

        Target concepts are meant to have been seen, their held-out pictures are not; of concepts
        that must stay learnable, neither.
        """
        found = []
        for name, level in self.levels.items():
            names = set(map(_plain, level.concepts))
            prompts = set(map(_plain, level.prompts))
            for concept in targets:
                same, near = level.saw(concept.held_out)
                if same:
                    found.append(
                        f"{same} of the pictures that attacks on {concept.name} are compared with "
                        f"were seen by the immunization's {name} level."
                    )
                if near:
                    found.append(
                        f"{near} of the pictures that attacks on {concept.name} are compared with "
                        "are nearly the same pictures as some that were seen by the immunization's "
                        f"{name} level."
                    )
            for concept in others:
                pictures = *concept.images, *concept.held_out
                same, near = level.saw(pictures)
                if _plain(concept.name) in names:
                    found.append(
                        f"{concept.name}, which is to stay learnable, was a concept of the "
                        f"immunization's {name} level: how well it can be learned is not held out."
                    )
                elif same:
                    found.append(
                        f"Pictures of {concept.name}, which is to stay learnable, were seen by the "
                        f"immunization's {name} level."
                    )
                elif near:
                    found.append(
                        f"Pictures of {concept.name}, which is to stay learnable, are nearly the "
                        f"same pictures as some that were seen by the immunization's {name} level."
                    )
                elif {_plain(picture.prompt) for picture in pictures} & prompts:
                    found.append(
                        f"Prompts of {concept.name}, which is to stay learnable, were seen by the "
                        f"immunization's {name} level."
                    )
        return found


def trained_on(concepts: Sequence[Concept], shared: Sequence[Concept] = ()) -> list[str]:
    """Sentences about held-out pictures that the attacks themselves train on.

    Args:
        concepts: each is compared with its own held-out pictures.
        shared: concepts whose pictures attacks on others train on, too.
    """
    found = []
    trained = {one.name: _level_of(one.images) for one in (*concepts, *shared)}
    for concept in concepts:
        if not concept.held_out:
            continue
        for other in (concept, *(one for one in shared if one is not concept)):
            whose = "its own" if other is concept else f"{other.name}'s"
            same, near = trained[other.name].saw(concept.held_out)
            compared = f"of the pictures that attacks on {concept.name} are compared with are"
            if same:
                found.append(
                    f"{same} {compared} among {whose} training pictures: an attack that copies "
                    "them looks like one that learned."
                )
            if near:
                found.append(
                    f"{near} {compared} nearly the same pictures as some of {whose} training "
                    "pictures: an attack that copies these looks like one that learned."
                )
    return found


def _level_of(pictures: Sequence[Picture]) -> Level:
    """What somebody saw who saw some pictures."""
    names, signatures = (frozenset(map(of, pictures)) for of in (digest, signature))
    return Level(pictures=names, signatures=signatures)


def lent(
    grid: Sequence[Attack],
    config: GridConfig,
    targets: Mapping[str, Concept],
    others: Mapping[str, Concept],
) -> list[Concept]:
    """Concepts whose pictures attacks on other concepts train on."""
    preparations = {attack.preparation for attack in grid}
    mixed = any(attack.images == "mixed" for attack in grid)
    benign = mixed or config.repair_steps > 0 or not preparations.isdisjoint(NEEDS_OTHERS)
    return [
        *(targets.values() if "merge" in preparations else ()),
        *(others.values() if benign else ()),
    ]


def record_of(model: Any) -> dict[str, Any] | None:
    """What a model's folder says of how it was made; None of a model that has no folder.

    Raises:
        MimaError: no path, or the record is damaged.
    """
    source = source_of(model)
    return None if source is None else read_record(expanded(source.model))


def seen_by(model: Any) -> Seen:
    """What is on record of how a model was immunized; nothing of a pipeline in memory.

    Raises:
        MimaError: the record is damaged.
    """
    record = record_of(model)
    if record is None:
        return Seen(known=False)
    # a whole model that was made of a delta says so of the delta
    origin = record.get("origin")
    if isinstance(origin, dict):
        record = origin
    try:
        levels = TypeAdapter(dict[str, Level]).validate_python(record.get("saw", {}))
    except ValidationError as error:
        raise MimaError(f"{model}: saw is damaged: {one_line(error)}") from error
    config = record.get("config")
    seed = config.get("seed") if isinstance(config, dict) else None
    number = seed if isinstance(seed, int) else None
    return Seen(levels=levels, seed=number, known="saw" in record)


def benign_prompts(captions: Sequence[str], seen: Seen, count: int) -> tuple[list[str], list[str]]:
    """Ordinary prompts to measure on, and a sentence where the immunization saw them.

    They come from the captions that no immunization draws class pictures from. Where it saw these
    all the same, others take their place; where it saw every caption, there is nothing else.
    """
    _, left = divided(captions)
    unseen = [caption for caption in left if not seen.said(caption)]
    if len(unseen) < count:
        rest = [c for c in captions if not seen.said(c) and c not in unseen]
        unseen += spread(rest, count - len(unseen))
    if unseen or not count:
        return spread(unseen, count), []
    return spread(left, count), [
        "The immunization saw every ordinary prompt that there is: the two models' pictures are "
        "compared on prompts that are not held out."
    ]


def _plain(text: str) -> str:
    """A text without what does not change what it says: case, spaces."""
    return " ".join(text.casefold().split())
