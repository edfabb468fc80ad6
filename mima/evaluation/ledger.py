"""The folder of an evaluation that goes on: what is done, what is left, and the summary so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from mima.errors import MimaError
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import Attack
from mima.evaluation.records import AttackRow, Benign, CurvePoint, Evaluation
from mima.evaluation.summary import summarize
from mima.evaluation.worker import Outcome
from mima.storage.atomic import remove
from mima.storage.names import EVALUATION_FILE
from mima.storage.output import check_folder
from mima.storage.plain_data import differences, flat

logger = logging.getLogger(__name__)

JUDGES = "judges"
"""In a record's configuration: a hash of each judge's assets, by name."""
PICTURES = "pictures"
"""In a record's configuration: a hash of each concept's pictures, by slug and kind."""
PROMPTS = "prompts"
"""In a record's configuration: a hash of the ordinary prompts."""
TEXTS = "texts"
"""In a record's configuration: a hash of each concept's further texts, by slug."""
ENCODERS = "encoders"
"""In a record's configuration: a hash of each model's text encoders and VAE, by side and part."""
SCHEDULERS = "schedulers"
"""In a record's configuration: a hash of each model's noise schedule, by side."""
CONFIGURATIONS = "configurations"
"""In a record's configuration: a hash of each part's settings and words, by side and part."""
PLAIN = ("grid", "sampler")
"""In a record's configuration: settings as they were given."""
READERS = {SCHEDULERS: ("diffusers",), CONFIGURATIONS: ("diffusers", "transformers")}
"""Libraries that say what these are."""


def check(folder: EvaluationFolder, *, overwrite: bool) -> None:
    """Make sure that the folder is new, or an earlier evaluation's."""
    if overwrite or not folder.exists():
        check_folder(folder.path, overwrite=overwrite, in_place=True)


def claim(folder: EvaluationFolder, *, overwrite: bool) -> None:
    """Make the folder, or discard what an earlier evaluation left there."""
    check(folder, overwrite=overwrite)
    if folder.exists() and not overwrite:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    # the description last: what is left where this is cut short is still an evaluation's
    for entry in sorted(folder.path.iterdir(), key=lambda entry: entry.name == EVALUATION_FILE):
        remove(entry)


def refuse_other_settings(folder: EvaluationFolder, now: Evaluation) -> None:
    """Refuse to mix two evaluations in one folder.

    Raises:
        MimaError: what is there was made with other settings, each of which is named.
    """
    if not folder.exists():
        return
    then = folder.evaluation()
    same = ["protocol", "similarities", "seeds", "concepts"]
    if ENCODERS not in then.config:
        # later ones know models by their hashes, wherever these are and however paths are written
        same.append("models")
    differing = [name for name in same if getattr(then, name) != getattr(now, name)]
    hashes = (PICTURES, PROMPTS, TEXTS, ENCODERS, SCHEDULERS, CONFIGURATIONS)
    unknown = [key for key in hashes if key not in then.config]
    # by name, where their files are, which their hashes tell better
    skipped = {JUDGES, "similarities", *unknown}
    for key, readers in READERS.items():
        # another version may name further settings of the same schedule or part
        if any(then.versions.get(name) != now.versions.get(name) for name in readers):
            skipped.add(key)
    for key, value in now.config.items():
        before = then.config.get(key)
        if key not in skipped and before != value:
            apart = differences(flat({key: before}), flat({key: value})) if key in PLAIN else {}
            differing += [f"{name} ({said})" for name, said in apart.items()] or [key]
    known = then.config.get(JUDGES)
    differing += [
        f"assets of the judge {name}"
        for name, digest in now.config[JUDGES].items()
        if name in then.similarities and (not isinstance(known, dict) or known.get(name) != digest)
    ]
    if differing:
        raise MimaError(
            f"output {folder.path} holds an evaluation with other {', '.join(differing)}; "
            "choose another folder, or use --overwrite"
        )
    if unknown:
        logger.warning(
            "%s was written by an earlier version, which did not keep a hash of %s: they are taken "
            "to be the same",
            folder.path,
            ", ".join(unknown),
        )
    if then.versions != now.versions:
        logger.warning("going on under other versions: %s, now %s", then.versions, now.versions)


@dataclass
class Ledger:
    """The rows so far, on disk after every attack."""

    folder: EvaluationFolder
    evaluation: Evaluation
    grid: Sequence[Attack]
    rows: list[AttackRow] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take over what an earlier call has finished of this grid.

        An attack that lacks the row of a judge, as a damaged table may, is done again.
        """
        judges: dict[str, set[str]] = {attack.id: set() for attack in self.grid}
        found = [row for row in self.folder.attacks() if row.attack in judges]
        for row in found:
            judges[row.attack].add(row.similarity)
        ids = {attack for attack, seen in judges.items() if seen >= {*self.evaluation.similarities}}
        self.rows = [row for row in found if row.attack in ids]
        self.points = [point for point in self.folder.curves() if point.attack in ids]

    def pending(self) -> list[Attack]:
        """Attacks without rows."""
        done = {row.attack for row in self.rows}
        return [attack for attack in self.grid if attack.id not in done]

    def add(self, outcome: Outcome) -> None:
        """Write down a finished attack."""
        self.rows += outcome.rows
        self.points += outcome.points
        self.write()

    def write(self, benign: Benign | None = None) -> Evaluation:
        """Write rows, in the order of the grid, and their summary: complete with `benign`.

        Raises:
            MimaError: it would be complete, but an attack has no rows.
        """
        if benign is not None and (pending := self.pending()):
            raise MimaError(
                f"evaluate: nothing came back of {len(pending)} of {len(self.grid)} attacks, as "
                f"{pending[0].id}; the same command does these"
            )
        order = {attack.id: place for place, attack in enumerate(self.grid)}
        self.rows.sort(key=lambda row: order[row.attack])
        self.points.sort(key=lambda point: order[point.attack])
        self.folder.write_rows(self.rows, self.points)
        update = {"complete": benign is not None, "benign": benign or self.evaluation.benign}
        self.evaluation = summarized(
            self.evaluation.model_copy(update=update), self.rows, self.points
        )
        self.folder.write_evaluation(self.evaluation)
        return self.evaluation


def summarized(
    evaluation: Evaluation, rows: Sequence[AttackRow], points: Sequence[CurvePoint]
) -> Evaluation:
    """The evaluation with what its rows and curves come to."""
    concepts, judges = evaluation.concepts, evaluation.similarities
    summary = {judge: summarize(rows, concepts, judge, points) for judge in judges}
    primary = summary[judges[0]].sgr
    adaptability = {c.name: primary[c.name].mean for c in concepts if c.role == "other"}
    benign = evaluation.benign.model_copy(update={"adaptability": adaptability})
    return evaluation.model_copy(update={"summary": summary, "benign": benign})
