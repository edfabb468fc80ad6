"""Evaluations as the report reads them: rows by attack setting, curves by attack."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mima.errors import MimaError, counted, quoted, told_apart
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.metrics import has_learned
from mima.evaluation.records import SIDES, AttackRow, Evaluation
from mima.report.figures import RUN_COLOURS
from mima.report.wording import PICTURES, PREPARATIONS, VARIANTS
from mima.storage.names import EVALUATION_FILE

_MARKERS = "osD^v"
_SETTINGS_OF_ATTACKS = {
    "tune": "trials",
    "evaluations": "how often models are sampled",
    "max_prompts": "how many prompts are drawn",
    "pictures_per_prompt": "how many pictures are drawn",
    "preparation_steps": "the length of preparations",
    "rare_token": "the rare token",
}
"""Settings of the grid that change attacks which are called alike, and what a page calls them."""

Pair = tuple[float | None, float | None]
"""A number of the original and of the immunized model; None where it was not measured."""


class Setting(NamedTuple):
    """An attack but for its seed."""

    concept: str
    method: str
    lr_factor: float
    steps: int
    prompt_variant: str
    images: str
    preparation: str

    @property
    def plainness(self) -> tuple[Any, ...]:
        """Sorts the usual attack before its variations."""
        return (
            self.lr_factor != 1,
            self.prompt_variant != "name",
            self.images != "same",
            self.preparation != "none",
            self.steps,
            self.lr_factor,
        )

    @property
    def words(self) -> str:
        """What differs from the usual attack."""
        parts = [counted(self.steps, "step")]
        if self.lr_factor != 1:
            parts.append(f"learning rate ×{self.lr_factor:g}")
        if self.prompt_variant != "name":
            parts.append(VARIANTS[self.prompt_variant])
        if self.images != "same":
            parts.append(PICTURES[self.images])
        if self.preparation != "none":
            parts.append(PREPARATIONS[self.preparation])
        return ", ".join(parts)


def setting(row: AttackRow) -> Setting:
    """What an attack did, without its seed."""
    return Setting(row.concept, *row.setting)


_PARTS = {
    "weights": "the original model",
    "encoders": "the original's text encoders and VAE",
    "schedulers": "the original's noise schedule, by diffusers {diffusers}",
    "configurations": (
        "the original's settings, by diffusers {diffusers} and transformers {transformers}"
    ),
}
"""Hashes that a record keeps of both models, what a page calls the original's, and which versions'
they are: those of others are not to be compared."""


class Run:
    """One evaluation, read and indexed; its place among the runs gives it its colour."""

    def __init__(self, folder: EvaluationFolder, label: str, index: int) -> None:
        self.folder = folder
        self.label = label
        self.index = index
        self.colour = RUN_COLOURS[index]
        self.marker = _MARKERS[index]
        self.evaluation: Evaluation = folder.evaluation()
        self.attacks = folder.attacks()
        if self.evaluation.complete and not self.attacks:
            raise MimaError(f"report: {folder.path} holds no attacks of a complete evaluation")
        if not self.evaluation.similarities:
            raise MimaError(f"report: {folder.path} names no similarities")
        concepts = [concept.name for concept in self.evaluation.concepts]
        for row in self.attacks:
            for key, name, known in (
                ("similarity", row.similarity, self.evaluation.similarities),
                ("concept", row.concept, concepts),
            ):
                if name not in known:
                    raise MimaError(
                        f"report: {folder.path} holds attacks with the {key} {quoted(name)}, "
                        f"which its {EVALUATION_FILE} does not name"
                    )
        named = [("an attack", row.attack) for row in self.attacks]
        named += [("a concept's folder", concept.slug) for concept in self.evaluation.concepts]
        for what, name in named:
            # a damaged or hostile table must not lead out of the folder
            if name != Path(name).name or name in ("", ".", ".."):
                raise MimaError(f"report: {folder.path} names {what} {name!r}")
        self.curves: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
        for point in folder.curves():
            steps = self.curves.setdefault((point.attack, point.similarity), {})
            steps[point.step] = (point.original, point.immunized)
        if self.evaluation.complete and not self.curves:
            raise MimaError(f"report: {folder.path} holds no curves of a complete evaluation")
        self.by_setting: dict[tuple[Setting, str], list[AttackRow]] = {}
        for row in self.attacks:
            self.by_setting.setdefault((setting(row), row.similarity), []).append(row)

    def shares_original(self, other: Run) -> bool:
        """Whether two runs attacked one original model, by all hashes that both know, or its name.

        The same weights may be under two paths, and others under one path.
        """
        mine, theirs = self._hashes(), other._hashes()
        known = mine.keys() & theirs.keys()
        if known:
            return all(mine[name] == theirs[name] for name in known)
        return self.evaluation.models.original == other.evaluation.models.original

    def _hashes(self) -> dict[str, str]:
        """Hashes of the original model by what a page calls them; older records lack some."""
        found = {words: self.evaluation.config.get(name) for name, words in _PARTS.items()}
        versions = defaultdict(lambda: "unknown", self.evaluation.versions)
        return {
            words.format_map(versions): _alike(sides["original"])
            for words, sides in found.items()
            if isinstance(sides, dict) and "original" in sides
        }

    def judge(self, similarity: str) -> str | None:
        """What tells a judge from others of its name; None where the run does not say."""
        known = self.evaluation.config.get("judges")
        return str(known[similarity]) if isinstance(known, dict) and similarity in known else None

    def attacked_with(self) -> dict[str, str]:
        """What makes an attack of some name the same in another run, in words and as values.

        A method and a concept that the run lacks are left out: there is nothing to compare.
        """
        config, grid = self.evaluation.config, self.evaluation.config.get("grid")
        grid = grid if isinstance(grid, dict) else {}
        pictures = config.get("pictures")
        found: dict[str, str] = {"the protocol": self.evaluation.protocol, **self._hashes()}
        found |= {
            words: _alike(grid[name])
            for name, words in _SETTINGS_OF_ATTACKS.items()
            if name in grid
        }
        if "sampler" in config:
            found["the sampler"] = _alike(config["sampler"])
        methods = grid.get("methods")
        if isinstance(methods, dict):
            found |= {f"the method {name}": _alike(methods[name]) for name in methods}
        if isinstance(pictures, dict):
            found |= {
                f"the pictures of {concept.name}": _alike(pictures.get(concept.slug))
                for concept in self.evaluation.concepts
            }
        return found

    def mean(self, chosen: Setting, similarity: str) -> float | None:
        """Mean SGR of a setting over its seeds; None where nothing was measured."""
        rows = self.by_setting.get((chosen, similarity), [])
        values = [row.sgr_mean for row in rows if row.sgr_mean is not None]
        return sum(values) / len(values) if values else None

    def pair(self, chosen: Setting, similarity: str, name: str) -> Pair:
        """Means over seeds of the fields ``<name>_original`` and ``<name>_immunized``."""
        rows = self.by_setting.get((chosen, similarity), [])
        pairs = [[getattr(row, f"{name}_{side}") for side in SIDES] for row in rows]
        return means([pair for pair in pairs if None not in pair])

    def seeds(self, chosen: Setting, similarity: str) -> int:
        """How many of a setting's attacks were measured after their training, one of each seed."""
        rows = self.by_setting.get((chosen, similarity), [])
        return sum(row.sgr_mean is not None for row in rows)

    def last(self, chosen: Setting, similarity: str) -> Pair:
        """Means over seeds of both models' similarity at the last step that was measured.

        Attacks that diverged before any step have none.
        """
        curves = self.curves_of(chosen, similarity)
        return means([curve[max(curve)] for curve in curves if max(curve) > 0])

    def curves_of(self, chosen: Setting, similarity: str) -> list[dict[int, tuple[float, float]]]:
        """The curves of a setting's attacks: one of each seed that has been measured."""
        return [
            self.curves[key]
            for row in self.by_setting.get((chosen, similarity), [])
            if (key := (row.attack, similarity)) in self.curves
        ]

    def learned(self, chosen: Setting, similarity: str) -> bool:
        """Whether the attack taught either model the concept, with any seed."""
        return any(row.taught_either for row in self.by_setting.get((chosen, similarity), []))

    def rise_is_bound(self, row: AttackRow) -> bool:
        """Whether an attack's rise left at the last step is a lower bound; older tables lack it."""
        curve = self.curves.get((row.attack, row.similarity), {})
        if row.rise_left is None or 0 not in curve:
            return False
        return not has_learned([curve[0][0], curve[max(curve)][0]])

    def row(self, attack: str | None, similarity: str) -> AttackRow | None:
        """The row of one attack."""
        found = (r for r in self.attacks if r.attack == attack and r.similarity == similarity)
        return next(found, None)


def means(pairs: Sequence[Sequence[float]]) -> Pair:
    """The mean of each side of some pairs; None without any."""
    if not pairs:
        return None, None
    original, immunized = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return original, immunized


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read evaluations, each under a label of its own.

    Raises:
        MimaError: a folder that cannot be read.
    """
    sources = [EvaluationFolder(folder) for folder in folders]
    labels = told_apart([source.evaluation().name or source.path.name for source in sources])
    return [
        Run(source, label, index)
        for index, (source, label) in enumerate(zip(sources, labels, strict=True))
    ]


def _alike(value: Any) -> str:
    """Plain data as a text that is the same for the same data, in whatever order."""
    return json.dumps(value, sort_keys=True)
