"""What an evaluation leaves in its folder: the files' fields, and how they are written and read.

A folder holds ``evaluation.json`` (`Evaluation`), ``attacks.csv`` (one `AttackRow` per attack and
similarity), ``curves.csv`` (one `CurvePoint` per attack, similarity and step) and ``images/``.
Every number is finite; what could not be measured is null in JSON and empty in CSV.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mima.errors import MimaError
from mima.settings import Method
from mima.storage.output import write_whole

FORMAT: Literal[1] = 1
EVALUATION_FILE = "evaluation.json"
ATTACKS_FILE = "attacks.csv"
CURVES_FILE = "curves.csv"

Role = Literal["target", "other"]
Side = Literal["original", "immunized"]
SIDES: tuple[Side, Side] = ("original", "immunized")
PromptVariant = Literal["name", "description", "token"]
Pictures = Literal["same", "other"]
Preparation = Literal["none", "merge", "benign"]


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelPair(_Record):
    """Something said of both models."""

    original: str
    immunized: str


class ScorePair(_Record):
    """A number of each model; None where it could not be measured."""

    original: float | None = None
    immunized: float | None = None


class ConceptRecord(_Record):
    """A concept that was attacked."""

    name: str
    slug: str
    """The name as a file name: pictures are in ``images/references/<slug>``."""
    kind: str
    prompt: str
    role: Role
    """A target was immunized against; an other must stay learnable."""
    references: Literal["held_out", "images"] = "held_out"
    """What adapted models are compared with: pictures that no attack trains on, or, where a concept
    has none, those that all attacks train on."""


class Interval(_Record):
    """A mean and its bootstrap confidence interval over seeds."""

    mean: float | None
    low: float | None
    high: float | None


class WorstAttack(_Record):
    """The target attack with the lowest SGR among those that learned on the original model."""

    sgr: float | None
    attack: str | None


class WorstConcept(_Record):
    """The target concept with the lowest SGR."""

    sgr: float | None
    concept: str | None


class ConceptGap(Interval):
    """SGR of one concept over its attacks: means of their mean, final and highest SGR."""

    final: float | None
    max: float | None


class SimilaritySummary(_Record):
    """The headline numbers by one similarity model."""

    msgr: Interval
    worst_attack: WorstAttack
    worst_concept: WorstConcept
    mrsgr: float | None
    """MSGR minus the mean SGR of the others; None without any."""
    sgr: dict[str, ConceptGap]
    """By concept, others included."""


class Benign(_Record):
    """What immunization cost."""

    prompt_alignment: ScorePair = ScorePair()
    """Mean cosine between pictures of ordinary prompts and their prompts."""
    cmmd: float | None = None
    """Distance between both models' pictures of ordinary prompts; 0 is none."""
    adaptability: dict[str, float | None] = Field(default_factory=dict)
    """SGR of the concepts that were not immunized against; near 0 wanted."""


class Evaluation(_Record):
    """``evaluation.json``."""

    format: Literal[1] = FORMAT
    name: str
    """Label of the run."""
    method: Method | None
    """How the model was immunized, where that is known."""
    models: ModelPair
    preset: str
    protocol: Literal["standard", "published"]
    similarities: tuple[str, ...]
    """The first is the primary one."""
    seeds: tuple[int, ...]
    concepts: tuple[ConceptRecord, ...]
    benign: Benign = Benign()
    summary: dict[str, SimilaritySummary] = Field(default_factory=dict)
    """By similarity."""
    config: dict[str, Any]
    versions: dict[str, str]
    complete: bool
    """Whether every attack of the grid has its rows."""


class AttackRow(_Record):
    """One attack, seen by one similarity model.

    The three SGRs are None where neither model could be compared: the adaptation diverged before
    the first evaluated step.
    """

    attack: str
    """Safe as a file name."""
    concept: str
    role: Role
    method: str
    lr: float
    lr_factor: float
    steps: int
    prompt_variant: PromptVariant
    images: Pictures
    """Trained on the pictures that immunization saw, or on others of the concept."""
    preparation: Preparation
    """What was done to both models before the attack."""
    seed: int
    similarity: str
    sgr_mean: float | None
    """Mean over the steps after 0."""
    sgr_final: float | None
    """At the last step."""
    sgr_max: float | None
    """Highest over the steps after 0."""
    nearest_original: float | None
    """Mean over the last step's pictures of min(1 − M) to the training pictures: near 0, they are
    copies of them."""
    nearest_immunized: float | None
    """The same of the immunized model."""
    seconds: float
    learned: bool
    """Whether the attack taught the original model the concept: see `metrics.has_learned`."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value


class CurvePoint(_Record):
    """Both models after one attack's training up to a step."""

    attack: str
    similarity: str
    step: int
    original: float
    """Mean similarity to the references."""
    immunized: float
    sgr: float


RowT = TypeVar("RowT", AttackRow, CurvePoint)


class EvaluationFolder:
    """The folder of one evaluation.

    Files are replaced whole, never changed in place, and ``curves.csv`` before ``attacks.csv``: an
    attack counts as done once it has rows there.

    Args:
        path: the folder.

    Example:
        >>> folder = EvaluationFolder("results")
        >>> folder.evaluation().summary["clip"].worst_attack.sgr
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def exists(self) -> bool:
        """Whether an evaluation has been here."""
        return (self.path / EVALUATION_FILE).is_file()

    def evaluation(self) -> Evaluation:
        """Read ``evaluation.json``.

        Raises:
            MimaError: missing, damaged, or of another format.
        """
        path = self.path / EVALUATION_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MimaError(
                f"{self.path} holds no {EVALUATION_FILE}: mima evaluate writes such folders"
            ) from error
        except (OSError, ValueError) as error:
            raise MimaError(f"evaluation: cannot read {path}: {error}") from error
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise MimaError(
                f"evaluation: {path} has format {raw.get('format')!r}; this version reads {FORMAT}"
            )
        try:
            return Evaluation.model_validate(raw)
        except ValidationError as error:
            raise MimaError(f"evaluation: {path} is damaged: {error}") from error

    def attacks(self) -> list[AttackRow]:
        """Read ``attacks.csv``; no file, no rows."""
        return self._read(ATTACKS_FILE, AttackRow)

    def curves(self) -> list[CurvePoint]:
        """Read ``curves.csv``, without what an interrupted run left of unfinished attacks."""
        done = {row.attack for row in self.attacks()}
        return [point for point in self._read(CURVES_FILE, CurvePoint) if point.attack in done]

    def images(self, attack: str, side: Side, step: int) -> list[Path]:
        """Pictures of one model at one step of an attack, in the order of their index.

        The picture of the same index has the same prompt and seed at every step and on both sides.
        """
        return self._pictures(self.image_folder(attack, side, step))

    def references(self, slug: str) -> list[Path]:
        """The pictures that a concept's adapted models are compared with."""
        return self._pictures(self.reference_folder(slug))

    def image_folder(self, attack: str, side: Side, step: int) -> Path:
        """Where `images` are."""
        return self.path / "images" / attack / side / f"{step:05d}"

    def reference_folder(self, slug: str) -> Path:
        """Where `references` are."""
        return self.path / "images" / "references" / slug

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write ``evaluation.json``."""
        text = evaluation.model_dump_json(indent=2)
        write_whole(self.path / EVALUATION_FILE, f"{text}\n".encode())

    def write_rows(self, attacks: Sequence[AttackRow], curves: Sequence[CurvePoint]) -> None:
        """Write ``curves.csv`` and ``attacks.csv``."""
        write_whole(self.path / CURVES_FILE, _table(CurvePoint, curves).encode())
        write_whole(self.path / ATTACKS_FILE, _table(AttackRow, attacks).encode())

    def _read(self, name: str, kind: type[RowT]) -> list[RowT]:
        path = self.path / name
        if not path.is_file():
            return []
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return [kind.model_validate(row) for row in csv.DictReader(file)]
        except (OSError, csv.Error, ValidationError) as error:
            raise MimaError(f"evaluation: cannot read {path}: {error}") from error

    @staticmethod
    def _pictures(folder: Path) -> list[Path]:
        return sorted(folder.glob("*.png"), key=lambda path: int(path.stem))


def _table(kind: type[BaseModel], rows: Iterable[BaseModel]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(kind.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()
