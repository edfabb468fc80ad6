"""The folder of an evaluation: how its files are written and read.

It holds ``evaluation.json``, ``attacks.csv``, ``curves.csv``, of which `mima.evaluation.records`
says what is in them, and ``images/``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from mima.errors import MimaError, one_line
from mima.evaluation.records import FORMAT, AttackRow, CsvRow, CurvePoint, Evaluation, Side
from mima.storage.inputs import evaluation_file, expanded
from mima.storage.names import EVALUATION_FILE
from mima.storage.output import LONGEST_NAME, write_whole

ATTACKS_FILE = "attacks.csv"
CURVES_FILE = "curves.csv"

RowT = TypeVar("RowT", bound=CsvRow)


def read_rows(path: Path, kind: type[RowT]) -> list[RowT]:
    """The rows of a CSV file; no file, no rows.

    Raises:
        MimaError: damaged.
    """
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        raise MimaError(f"evaluation: cannot read {path}: no ordinary file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [kind.model_validate(row) for row in csv.DictReader(file)]
    except (OSError, csv.Error, ValueError) as error:
        raise MimaError(f"evaluation: cannot read {path}: {one_line(error)}") from error


def write_rows(path: Path, kind: type[RowT], rows: Iterable[RowT]) -> None:
    """Write a CSV file whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(kind.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    write_whole(path, text.getvalue().encode())


class EvaluationFolder:
    """The folder of one evaluation.

    Files are replaced whole, never changed in place, and ``curves.csv`` before ``attacks.csv``: an
    attack counts as done once it has rows there.

    Examples:
        >>> folder = EvaluationFolder("results")
        >>> folder.evaluation().summary["clip"].worst_attack.sgr
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)

    def exists(self) -> bool:
        """Whether an evaluation has been here."""
        return (self.path / EVALUATION_FILE).is_file()

    def evaluation(self) -> Evaluation:
        """Read ``evaluation.json``.

        Raises:
            MimaError: missing, damaged, or of another format.
        """
        path = evaluation_file(self.path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MimaError(f"evaluation: cannot read {path}: {one_line(error)}") from error
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise MimaError(
                f"evaluation: {path} has format {one_line(raw.get('format'))}; "
                f"this version reads {FORMAT}"
            )
        try:
            return Evaluation.model_validate(raw)
        except ValidationError as error:
            raise MimaError(f"evaluation: {path} is damaged: {one_line(error)}") from error

    def attacks(self) -> list[AttackRow]:
        """Read ``attacks.csv``; no file, no rows.

        Raises:
            MimaError: damaged, or an attack is there twice by one similarity model.
        """
        rows = read_rows(self.path / ATTACKS_FILE, AttackRow)
        for (attack, similarity), count in Counter((r.attack, r.similarity) for r in rows).items():
            if count > 1:
                raise MimaError(
                    f"evaluation: {self.path / ATTACKS_FILE} is damaged: it holds "
                    f"{one_line(attack)} by {one_line(similarity)} {count} times"
                )
        return rows

    def curves(self) -> list[CurvePoint]:
        """Read ``curves.csv``, without what an interrupted run left of unfinished attacks."""
        done = {row.attack for row in self.attacks()}
        points = read_rows(self.path / CURVES_FILE, CurvePoint)
        return [point for point in points if point.attack in done]

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
        return self.path / "images" / self._name(attack) / side / f"{step:05d}"

    def reference_folder(self, slug: str) -> Path:
        """Where `references` are."""
        return self.path / "images" / "references" / self._name(slug)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write ``evaluation.json``."""
        text = evaluation.model_dump_json(indent=2)
        write_whole(self.path / EVALUATION_FILE, f"{text}\n".encode())

    def write_rows(self, attacks: Sequence[AttackRow], curves: Sequence[CurvePoint]) -> None:
        """Write ``curves.csv`` and ``attacks.csv``."""
        write_rows(self.path / CURVES_FILE, CurvePoint, curves)
        write_rows(self.path / ATTACKS_FILE, AttackRow, attacks)

    def _name(self, name: str) -> str:
        """A folder's name, which leads nowhere else."""
        too_long = len(name.encode(errors="replace")) > LONGEST_NAME
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or too_long:
            raise MimaError(f"evaluation: {self.path} names a folder {one_line(name)!r}")
        return name

    @staticmethod
    def _pictures(folder: Path) -> list[Path]:
        own = [path for path in folder.glob("*.png") if re.fullmatch("[0-9]{1,9}", path.stem)]
        return sorted(own, key=lambda path: int(path.stem))
