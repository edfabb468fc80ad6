"""What the page about evaluations shows: figures, pictures and tables of some runs."""

# S = evaluated steps

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from mima.concepts.pictures import Picture
from mima.errors import counted
from mima.evaluation.metrics import run_interval
from mima.evaluation.records import AttackRow, ConceptRecord, Side
from mima.evaluation.summary import over_seeds
from mima.report import wording
from mima.report.figures import (
    ORIGINAL,
    Line,
    Strip,
    curve_sheet,
    line_panel,
    picture_sheet,
    save_figure,
    strip_chart,
)
from mima.report.runs import Pair, Run, Setting, setting
from mima.report.svg import inline
from mima.storage.plain_data import flat, hashed

PICTURE_SIDE = 192
"""Longest side of a picture in a page, in pixels."""
LONGEST_NAME = 120
"""Characters of a figure's file name, but for what tells cut ones apart."""
MAX_PICTURES, MAX_FRAMES, MAX_REFERENCES, MAX_ROWS = 4, 12, 4, 600
"""Pictures per model and step, steps, references, and rows of the table of attacks in a page."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure in the page."""

    svg: Markup
    similarity: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model's pictures after one step."""

    label: str
    kind: str
    score: float | None
    images: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One attack's pictures: a frame for each step, in each a column for each model."""

    concept: ConceptRecord
    title: str
    words: str
    gaps: Sequence[tuple[str, float | None]]
    references: Sequence[str]
    frames: Sequence[tuple[int, Sequence[Column]]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What else one setting of an attack showed, by one similarity model, over its seeds."""

    run: Run
    setting: Setting
    similarity: int
    seeds: int
    last: Pair
    objects: Pair
    repaired: Pair


class Report:
    """Everything that the page shows."""

    def __init__(self, runs: Sequence[Run], figures: Path, picture_budget: int) -> None:
        self.runs = runs
        self.figures = figures
        self.budget = picture_budget
        first = runs[0].evaluation
        self.similarities = list(
            dict.fromkeys(name for run in runs for name in run.evaluation.similarities)
        )
        self.primary = first.similarities[0]
        by_name = {c.name: c for run in reversed(runs) for c in run.evaluation.concepts}
        order = dict.fromkeys(c.name for run in runs for c in run.evaluation.concepts)
        self.concepts = sorted((by_name[name] for name in order), key=lambda c: c.role != "target")
        # equally plain settings stay in the order of the attacks
        every = dict.fromkeys(chosen for run in runs for chosen, _ in run.by_setting)
        self.settings = sorted(every, key=lambda s: s.plainness)
        self.left_out: list[str] = []

    def other_judges(self) -> list[str]:
        """Similarities that are of different judges in different runs, as far as is on record."""
        return [
            name
            for name in self.similarities
            if len({run.judge(name) for run in self.runs if name in run.evaluation.similarities})
            > 1
        ]

    def differences(self) -> list[str]:
        """What runs that stand beside each other do not have in common, as far as is on record."""
        if len(self.runs) == 1:
            return []
        by_run = [run.attacked_with() for run in self.runs]
        names = dict.fromkeys(name for values in by_run for name in values)
        return [
            name for name in names if len({values[name] for values in by_run if name in values}) > 1
        ]

    def other_prompts(self) -> bool:
        """Whether ordinary use was measured on other prompts in some runs, or on more of them."""
        return len({run.evaluation.benign.prompts for run in self.runs}) > 1

    def curves(self) -> list[tuple[ConceptRecord, list[Panel]]]:
        """Panels by concept: the usual attack of each method, and the worst variation of it."""
        limits = {name: self._limits(name) for name in self.similarities}
        found = []
        for concept in self.concepts:
            panels = []
            for index, similarity in enumerate(self.similarities):
                for kind, chosen in self._shown(concept.name, similarity):
                    lines = self._lines(chosen, similarity)
                    if not lines:
                        continue
                    method = wording.method_name(chosen.method)
                    subtitle = f"{chosen.words}, {self._seeds(chosen, similarity)}"
                    if kind != "usual":
                        subtitle = f"worst: {subtitle}"
                    figure = line_panel(
                        lines,
                        title=f"{concept.name} · {method}",
                        subtitle=subtitle,
                        quantity=f"{similarity} similarity",
                        limits=limits[similarity],
                    )
                    name = _file_name(concept.slug, chosen.method, similarity, kind)
                    ends = "; ".join(
                        f"{line.label} from {line.values[0]:.2f} at step {line.steps[0]} "
                        f"to {line.values[-1]:.2f} at step {line.steps[-1]}"
                        for line in lines
                    )
                    label = f"{similarity} similarity, {concept.name}, {method}, {subtitle}: {ends}"
                    panels.append(self._panel(figure, name, label, index))
            if panels:
                found.append((concept, panels))
        return found

    def _panel(self, figure: Figure, name: str, label: str, similarity: int) -> Panel:
        """A figure, written beside the page and made fit to stand in it."""
        svg = inline(save_figure(figure, self.figures / name), label=label)
        return Panel(svg=svg, similarity=similarity)

    def strips(self) -> list[Panel]:
        """For each similarity, every attack on a target as a dot."""
        found = []
        for index, similarity in enumerate(self.similarities):
            strips = [strip for run in self.runs for strip in self._strips(run, similarity)]
            if strips:
                figure = strip_chart(
                    strips, quantity=f"similarity gap ratio of each attack ({similarity})"
                )
                ends = "; ".join(
                    f"{s.label}: {counted(len(s.values), 'attack')}, "
                    f"worst {s.values[s.worst]:.2f}, highest {max(s.values):.2f}"
                    for s in strips
                )
                name = _file_name("attacks", similarity)
                found.append(self._panel(figure, name, f"SGR by {similarity}. {ends}", index))
        return found

    def _strips(self, run: Run, similarity: str) -> Iterator[Strip]:
        """One run's attacks on targets: all, and where there is no other run, by method."""
        rows = [
            row
            for row in run.attacks
            if row.similarity == similarity and row.role == "target" and row.sgr_mean is not None
        ]
        groups = {self._label(run, "all attacks"): rows}
        if len(self.runs) == 1:
            for row in rows:
                groups.setdefault(wording.method_name(row.method), []).append(row)
            if len(groups) == 2:
                groups.popitem()
        for label, group in groups.items():
            values = [row.sgr_mean for row in group if row.sgr_mean is not None]
            if not values:
                continue
            # an attack that teaches neither model is no measure
            taught = [index for index, row in enumerate(group) if row.taught_either]
            names = dict.fromkeys(row.concept for row in group)
            over = over_seeds(
                [[row for row in group if row.concept == name] for name in names], "sgr_mean"
            )
            yield Strip(
                label=label,
                values=values,
                worst=min(taught or range(len(values)), key=values.__getitem__),
                mean=over.mean,
                interval=None if over.low is None or over.high is None else (over.low, over.high),
                colour=run.colour,
            )

    def _label(self, run: Run, alone: str) -> str:
        """How a run is called among several, and where it is alone."""
        return run.label if len(self.runs) > 1 else alone

    def _limits(self, similarity: str) -> tuple[float, float]:
        values = [
            value
            for run in self.runs
            for (_, name), steps in run.curves.items()
            if name == similarity
            for pair in steps.values()
            for value in pair
        ]
        if not values:
            return 0.0, 1.0
        margin = 0.06 * (max(values) - min(values)) or 0.05
        return min(values) - margin, max(values) + margin

    def _shown(self, concept: str, similarity: str) -> list[tuple[str, Setting]]:
        """For each method the usual setting, and the one that got furthest if it is another."""
        shown = []
        for method in dict.fromkeys(s.method for s in self.settings):
            settings = [s for s in self.settings if (s.concept, s.method) == (concept, method)]
            if not settings:
                continue
            shown.append(("usual", settings[0]))
            worst = self._worst(settings, similarity)
            if worst is not None and worst != settings[0]:
                shown.append(("worst", worst))
        return shown

    def _worst(self, settings: Iterable[Setting], similarity: str) -> Setting | None:
        """The setting with the lowest mean SGR in any run, of those that learn at all."""
        gaps = [
            (not run.learned(chosen, similarity), gap, chosen)
            for chosen in settings
            for run in self.runs
            if (gap := run.mean(chosen, similarity)) is not None
        ]
        return min(gaps, key=lambda item: item[:2])[2] if gaps else None

    def _seeds(self, chosen: Setting, similarity: str) -> str:
        """Over how many seeds the curves of a setting are, in words."""
        counts = {run.seeds(chosen, similarity) for run in self.runs} - {0}
        number = "–".join(str(count) for count in sorted(counts)) or "0"
        return f"{number} seed{'' if counts == {1} else 's'}"

    def _lines(self, chosen: Setting, similarity: str) -> list[Line]:
        lines = []
        originals: list[Run] = []
        for run in self.runs:
            curves = run.curves_of(chosen, similarity)
            if not curves:
                continue
            if not any(map(run.shares_original, originals)):
                label = "original" if not originals else f"original {len(originals) + 1}"
                lines.append(_line(curves, 0, label, ORIGINAL, "X"))
                originals.append(run)
            label = self._label(run, "immunized")
            lines.append(_line(curves, 1, label, run.colour, run.marker))
        return lines

    def cards(self) -> list[Card]:
        """Pictures of the attack that got furthest on each concept and of the usual ones."""
        names = [concept.name for concept in self.concepts]
        furthest = [
            self._worst((s for s in self.settings if s.concept == name), self.primary)
            for name in names
        ]
        usual = [
            chosen
            for name in names
            for kind, chosen in self._shown(name, self.primary)
            if kind == "usual"
        ]
        by_name = {concept.name: concept for concept in self.concepts}
        cards: list[Card] = []
        spent = 0
        for chosen in dict.fromkeys([*(s for s in furthest if s is not None), *usual]):
            card = self._card(by_name[chosen.concept], chosen)
            if card is None:
                continue
            size = sum(map(len, card.references)) + sum(
                len(image) for _, columns in card.frames for c in columns for image in c.images
            )
            if cards and spent + size > self.budget:
                break
            cards.append(card)
            spent += size
        total = len({(setting(row), row.seed) for run in self.runs for row in run.attacks})
        self.left_out.append(
            f"Pictures of {len(cards)} of {counted(total, 'attack')} are in this page, reduced to "
            f"at most {PICTURE_SIDE} pixels, at most {MAX_PICTURES} for each model and step; all "
            "are in the evaluation's folder under images."
        )
        return sorted(cards, key=lambda card: names.index(card.concept.name))

    def _card(self, concept: ConceptRecord, chosen: Setting) -> Card | None:
        frames: dict[int, list[Column]] = {}
        originals: list[Run] = []
        gaps = []
        references: list[str] = []
        seeds: list[int] = []
        for run in self.runs:
            rows = run.by_setting.get((chosen, self.primary))
            if not rows:
                continue
            row = rows[0]
            curve = run.curves.get((row.attack, self.primary), {})
            gaps.append((run.label, row.sgr_mean))
            seeds.append(row.seed)
            sides: list[tuple[Side, str, str]] = [
                ("immunized", self._label(run, "Immunized"), f"run-{run.index}")
            ]
            if not any(map(run.shares_original, originals)):
                originals.append(run)
                sides.insert(0, ("original", "Original", "original"))
            for step in _thinned(sorted(curve), MAX_FRAMES):
                for side, label, kind in sides:
                    files = run.folder.images(row.attack, side, step)[:MAX_PICTURES]
                    if files:
                        score = curve[step][side == "immunized"]
                        images = [encode(file) for file in files]
                        column = Column(label=label, kind=kind, score=score, images=images)
                        frames.setdefault(step, []).append(column)
            if not references:
                files = run.folder.references(concept.slug)[:MAX_REFERENCES]
                references = [encode(file) for file in files]
        if not frames:
            return None
        return Card(
            concept=concept,
            title=wording.method_name(chosen.method),
            words=f"{chosen.words}, seed {seeds[0]}",
            gaps=gaps,
            references=references,
            frames=sorted(frames.items()),
        )

    def write_sheets(self) -> None:
        """All usual curves on ``curves.png`` and pictures of every method on ``grid.png``."""
        panels, columns = [], []
        for concept in self.concepts:
            for kind, chosen in self._shown(concept.name, self.primary):
                lines = self._lines(chosen, self.primary)
                if kind != "usual" or not lines:
                    continue
                heading = f"{concept.name}\n{wording.method_name(chosen.method)}"
                panels.append((heading.replace("\n", " · "), lines))
                columns.append((heading, self._column(concept, chosen)))
        if not panels:
            return
        rows = ["original", "original,\nattacked"]
        for run in self.runs:
            label = self._label(run, "immunized")
            rows += [label, f"{label},\nattacked"]
        save_figure(
            curve_sheet(panels, quantity=f"{self.primary} similarity"), self.figures / "curves"
        )
        # PNG alone: an SVG would only wrap the pixels
        sheet = picture_sheet([*rows, "reference"], columns)
        sheet.savefig(self.figures / "grid.png", dpi=160, facecolor="white")

    def _column(self, concept: ConceptRecord, chosen: Setting) -> list[Path | None]:
        """One picture of each model before and after an attack, then a reference."""

        def first(run: Run, side: Side) -> list[Path | None]:
            rows = run.by_setting.get((chosen, self.primary))
            steps = sorted(run.curves.get((rows[0].attack, self.primary), ())) if rows else []
            if not rows or not steps:
                return [None, None]
            found = [run.folder.images(rows[0].attack, side, s) for s in (steps[0], steps[-1])]
            return [files[0] if files else None for files in found]

        files = first(self.runs[0], "original")
        for run in self.runs:
            files += first(run, "immunized")
        references = self.runs[0].folder.references(concept.slug)
        return [*files, references[0] if references else None]

    def rows(self) -> list[tuple[Run, int, AttackRow]]:
        """Rows of the table of attacks, the worst first."""
        rows = [
            (run, self.similarities.index(row.similarity), row)
            for run in self.runs
            for row in run.attacks
        ]
        rows.sort(key=lambda item: (item[2].sgr_mean is None, item[2].sgr_mean or 0.0))
        if len(rows) > MAX_ROWS:
            self.left_out.append(
                f"The table shows the {MAX_ROWS} rows with the lowest SGR of {len(rows)}; "
                "all are in attacks.csv."
            )
        return rows[:MAX_ROWS]

    def wholeness(self) -> list[Measured]:
        """Settings of which recognised objects, or pictures after repair, are recorded."""
        found = [
            Measured(
                run=run,
                setting=chosen,
                similarity=index,
                seeds=run.seeds(chosen, similarity),
                last=run.last(chosen, similarity),
                objects=run.pair(chosen, similarity, "objects"),
                repaired=run.pair(chosen, similarity, "repaired"),
            )
            for run in self.runs
            for chosen in self.settings
            for index, similarity in enumerate(self.similarities)
            if (chosen, similarity) in run.by_setting
        ]
        return [one for one in found if one.objects[0] is not None or one.repaired[0] is not None]

    def tuned(self) -> list[tuple[Run, Setting, str, str]]:
        """What trials chose for each setting of an attack on either model.

        Its seeds share it, but for one whose training diverged with it.
        """

        def told(words: Iterable[str | None]) -> str:
            return "; ".join(dict.fromkeys(each or "as configured" for each in words))

        return [
            (
                run,
                chosen,
                told(row.tuned_original for row in rows),
                told(row.tuned_immunized for row in rows),
            )
            for run in self.runs
            for chosen in self.settings
            if (rows := run.by_setting.get((chosen, run.evaluation.similarities[0]), []))
            if any(row.tuned_original or row.tuned_immunized for row in rows)
        ]

    def settings_table(self) -> list[tuple[str, list[tuple[str, list[str], bool]]]]:
        """Groups of (name, one value for each run, whether runs differ)."""
        groups = {
            "What was compared": [
                {
                    "run": run.label,
                    "immunized by": run.evaluation.method or "unknown",
                    "original model": run.evaluation.models.original,
                    "immunized model": run.evaluation.models.immunized,
                    "preset": run.evaluation.preset,
                    "protocol": run.evaluation.protocol,
                    "similarities": ", ".join(run.evaluation.similarities),
                    "seeds": ", ".join(map(str, run.evaluation.seeds)),
                    "complete": "yes" if run.evaluation.complete else "no",
                }
                for run in self.runs
            ],
            "Settings": [
                {
                    name: wording.setting_text(value)
                    for name, value in flat(run.evaluation.config).items()
                }
                for run in self.runs
            ],
            "Versions": [run.evaluation.versions for run in self.runs],
        }
        table = []
        for title, found in groups.items():
            names = dict.fromkeys(name for values in found for name in values)
            cells = {name: [values.get(name, "–") for values in found] for name in names}
            table.append((title, [(n, each, len(set(each)) > 1) for n, each in cells.items()]))
        return table


def _line(
    curves: Sequence[Mapping[int, tuple[float, float]]],
    side: int,
    label: str,
    colour: str,
    marker: str,
) -> Line:
    """Mean over seeds and its `run_interval`, at every step that a seed reached."""
    steps = sorted({step for curve in curves for step in curve})
    values = [[curve[step][side] for curve in curves if step in curve] for step in steps]
    bands = [run_interval(v) for v in values]
    return Line(
        label=label,
        steps=steps,
        values=[sum(v) / len(v) for v in values],
        low=[low for low, _, _ in bands],
        high=[high for _, high, _ in bands],
        colour=colour,
        marker=marker,
    )


def encode(path: Path) -> str:
    """A picture file as a small WebP data URI.

    Raises:
        PictureError: the file is not a picture.
    """
    image = Picture(path, "").load()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"


def _thinned(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the items, evenly spread, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    last = len(items) - 1
    return [items[round(place * last / (limit - 1))] for place in range(limit)]


def _file_name(*parts: str) -> str:
    words = "-".join(parts)
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in words)
    # what is cut off may be all that tells two figures apart
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{hashed(words)[:8]}"
