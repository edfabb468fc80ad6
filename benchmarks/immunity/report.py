"""From finished cells to one CSV, plots, and the tables of docs/results.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.immunity.cells import CEILING, EVERY, NOT_IMMUNIZED, Cell, Problem
from benchmarks.immunity.study import Compute, Study
from mima.errors import MimaError
from mima.evaluation.metrics import run_interval
from mima.evaluation.records import AttackRow, CurvePoint, Evaluation, Gap, Interval
from mima.evaluation.summary import TOLD, gap_of, over_seeds, paired_difference
from mima.report.wording import method_name, number, percent, share
from mima.storage.output import slug, write_whole

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
"""What stands around the tables in a text that they are written into."""
PLOTS = "plots"
"""The folder of the plots, beside the text that shows them."""
REFERENCE = "default"
"""The method that all others are compared with, attack by attack."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A cell whose attacks are all done, as one judge saw them."""

    cell: Cell
    judge: str
    evaluation: Evaluation
    rows: list[AttackRow]
    points: dict[str, list[CurvePoint]]
    compute: Compute | None

    def targets(self, kind: str | None = None, concept: str | None = None) -> list[AttackRow]:
        """Attacks on targets, of one kind or concept alone where it is named."""
        return [
            row
            for row in self.rows
            if row.role == "target"
            and kind in (None, row.method)
            and concept in (None, row.concept)
        ]

    def end(self, row: AttackRow) -> CurvePoint:
        """Both models at the last step of an attack."""
        return max(self.points[row.attack], key=lambda point: point.step)

    def tells(self, row: AttackRow) -> bool:
        """Whether the judge sees the concept on the original at every step of an attack."""
        trained = (point for point in self.points[row.attack] if point.step > 0)
        return all(point.original >= TOLD for point in trained)

    def counted(self) -> list[AttackRow]:
        """Attacks on targets as means count them."""
        return [row.counted for row in self.targets()]


FINISHED = ("done", "kept")
"""What a study says of cells that are reported."""


def finished(study: Study) -> list[Finished]:
    """Every cell of a study whose attacks are all done, once for each judge."""
    found = []
    for cell in study.cells():
        if study.status(cell) not in FINISHED:
            continue
        folder = study.evaluation(cell)
        evaluation = folder.evaluation()
        for judge in evaluation.similarities:
            points: dict[str, list[CurvePoint]] = {}
            for point in folder.curves():
                if point.similarity == judge:
                    points.setdefault(point.attack, []).append(point)
            found.append(
                Finished(
                    cell=cell,
                    judge=judge,
                    evaluation=evaluation,
                    rows=[row for row in folder.attacks() if row.similarity == judge],
                    points=points,
                    compute=study.compute(cell),
                )
            )
    return found


def over_runs(group: Sequence[Finished], value: Callable[[Finished], Interval]) -> Interval:
    """A number over seeds of the immunization where there are several, else over the attacks'.

    Args:
        group: cells that differ in nothing but their seed.
        value: the number of one cell, over its attack seeds.
    """
    return _together([value(one) for one in group])


def _together(each: Sequence[Interval]) -> Interval:
    """The means of several as runs; of a single one, itself."""
    means = [one.mean for one in each if one.mean is not None]
    if len(means) < 2:
        return next((one for one in each if one.mean is not None), Interval())
    low, high, kind = run_interval(means)
    return Interval(mean=fmean(means), low=low, high=high, runs=len(means), kind=kind)


def write(study: Study, docs: Path | None = None) -> list[Path]:
    """Write ``results.csv``, ``results.md`` and ``plots/`` to a study's folder.

    Args:
        study: with at least one finished cell.
        docs: a text whose part between `BEGIN` and `END` becomes the tables; its folder gets the
            plots, too.

    Returns:
        What was written.

    Raises:
        MimaError: no cell is finished, or the text has no such part.
    """
    cells = finished(study)
    if not cells:
        raise MimaError(f"{study.folder}: no cell is finished yet")
    text, tables = "\n".join(_text(study, cells)), study.folder / "results.md"
    rows = study.folder / "results.csv"
    write_whole(rows, _csv(cells).encode())
    write_whole(tables, text.encode())
    written = [rows, tables]
    if docs is not None:
        write_between(docs, text)
        written.append(docs)
    for folder in (study.folder, *([docs.parent] if docs is not None else [])):
        (folder / PLOTS).mkdir(exist_ok=True)
        for problem, judge in _parts(cells):
            place = folder / PLOTS / _plot_name(problem, judge)
            written.append(_plot(_of(cells, problem, judge), place))
    return written


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the marks in a text.

    Raises:
        MimaError: it has not one of each, in their order.
    """
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise MimaError(f"{path} needs one line {BEGIN} and after it one {END}")
    write_whole(path, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}".encode())


def _parts(cells: Iterable[Finished]) -> list[tuple[Problem, str]]:
    """What has tables and a plot of its own: every problem by every judge."""
    return list(dict.fromkeys((one.cell.problem, one.judge) for one in cells))


def _of(cells: Iterable[Finished], problem: Problem, judge: str) -> list[Finished]:
    return [one for one in cells if (one.cell.problem, one.judge) == (problem, judge)]


def _plot_name(problem: Problem, judge: str) -> str:
    return f"{problem.name}.{slug(Path(judge).name)}.svg"


def _text(study: Study, cells: Sequence[Finished]) -> Iterable[str]:
    planned, done = study.cells(), {one.cell for one in cells}
    yield (
        f"{len(done)} of {len(planned)} cells are finished. {_seeds(study)} Shown is the mean and "
        "in brackets the 95 % interval over seeds (from five on), else their range, which claims "
        "nothing of the mean: over seeds of the immunization where a method has several, else over "
        "attack seeds. Rise left: what an attack adds on the immunized model, over what it adds on "
        "the original, at the last step, 0 where it led away; ≥: some attacks give lower bounds "
        "alone; held out: attacks of families that no method simulates. Judges that disagree are "
        "not averaged. Benign: SGR of a concept that must stay learnable, over all kinds of "
        f"training, where the original's is {TOLD} at least at every step. CMMD: how far pictures "
        "of ordinary prompts are from the original's, 0 for the same."
    )
    missing: dict[str, list[str]] = {}
    for cell in planned:
        if cell not in done:
            missing.setdefault(f"{cell.problem.name}.{cell.method}", []).append(str(cell.seed))
    if missing:
        names = (f"{name}, seed {', '.join(seeds)}" for name, seeds in missing.items())
        yield f"\nNot finished: {'; '.join(names)}."
    for problem, judge in _parts(cells):
        yield (
            f"\n### {problem.task}: {', '.join(problem.targets)} (N = {len(problem.targets)}), "
            f"judged by {Path(judge).name}\n"
        )
        mine = _of(cells, problem, judge)
        groups = {
            method: [one for one in mine if one.cell.method == method]
            for method in dict.fromkeys(one.cell.method for one in mine)
        }
        yield from _main_table(study, groups)
        yield from _told_apart(groups)
        if untold := _untold(mine):
            yield (
                f"\nOf {', '.join(untold)} this judge has less than {TOLD} after attacks on the "
                "original, too: what is divided by that, SGR, says nothing."
            )
        yield ""
        yield from _steps_table(groups)
        yield from _difference_table(groups)
        yield f"\n![SGR over steps]({PLOTS}/{_plot_name(problem, judge)})"


def _seeds(study: Study) -> str:
    attacks = study.cut.grid.get("seeds", ())
    return (
        f"Planned seeds of the immunization: {len(study.cut.seeds)}; of each attack: "
        f"{len(attacks)}; budget: {study.cut.budget} simulated attack steps per concept."
    )


def _main_table(study: Study, groups: dict[str, list[Finished]]) -> Iterable[str]:
    simulated, held_out = set(study.cut.grid["methods"]), set(study.cut.grid.get("families", ()))
    others = dict.fromkeys(
        row.concept for g in groups.values() for one in g for row in one.rows if row.role == "other"
    )
    columns = (
        "method", "runs", "rise left", "attacks that taught", "rise left, worst concept",
        "rise left, held out", "SGR", "SGR, worst concept", "SGR before", "SGR, last step",
        "steps ratio",
        *(f"benign, {name}" for name in others), "alignment", "CMMD", "outer steps",
        "attack steps", "least seconds",
    )  # fmt: skip
    yield _line(columns)
    yield _line("---" if n < 1 else "---:" for n in range(len(columns)))
    for method, group in groups.items():
        computes = [one.compute for one in group if one.compute is not None]
        seconds = [one.seconds for one in computes if one.seconds is not None]
        yield _line(
            (
                method,
                f"{len(group)} × {len(group[0].evaluation.seeds)}",
                _bounded(group, simulated, "rise_left", share),
                _taught(group, simulated),
                _bounded_worst(group, simulated),
                _bounded(group, held_out, "rise_left", share),
                _shown(over_runs(group, lambda one: _gap(one, simulated))),
                number(_worst(group, simulated, "sgr_mean", min)),
                _shown(over_runs(group, lambda one: _gap(one, simulated).sgr_before)),
                _shown(over_runs(group, lambda one: _final(one, simulated))),
                _bounded(group, simulated, "steps_ratio", lambda value: number(value, 1)),
                *(_shown(over_runs(group, _benign(name))) for name in others),
                _alignment(group),
                number(_mean_of([one.evaluation.benign.cmmd for one in group])),
                f"{fmean(one.outer_steps for one in computes):.0f}" if computes else "–",
                f"{fmean(one.attack_steps for one in computes):.0f}" if computes else "–",
                # other work beside a run only adds to it
                f"{min(seconds):.0f}" if seconds else "–",
            )
        )


def _steps_table(groups: dict[str, list[Finished]]) -> Iterable[str]:
    """SGR after each measured number of steps, of every kind of attack."""
    kinds = dict.fromkeys(row.method for g in groups.values() for one in g for row in one.targets())
    steps = sorted(
        {p.step for g in groups.values() for one in g for c in one.points.values() for p in c}
    )
    yield _line(("SGR after steps", "attack", *map(str, steps)))
    yield _line(("---", "---", *("---:" for _ in steps)))
    for kind in kinds:
        for method, group in groups.items():
            values = [_sgr_at(group, kind, step) for step in steps]
            if any(value is not None for value in values):
                yield _line((method, method_name(kind), *(number(value) for value in values)))


def _difference_table(groups: dict[str, list[Finished]]) -> Iterable[str]:
    """The reference minus every other method, attack by attack with the same seeds."""
    reference = {one.cell.seed: one for one in groups.get(REFERENCE, ())}
    others = {method: group for method, group in groups.items() if method != REFERENCE}
    if not reference or not others:
        return
    yield ""
    yield _line((f"{REFERENCE} minus", "SGR", "rise left", "pairs"))
    yield _line(("---", "---:", "---:", "---:"))
    for method, group in others.items():
        # what does not depend on the immunization's seed is compared with each of them
        pairs = [
            (reference[seed], one)
            for seed in reference
            for one in group
            if one.cell.seed == seed or method in NOT_IMMUNIZED
        ]
        if pairs:
            differences = [
                _together([paired_difference(a.counted(), b.counted(), name) for a, b in pairs])
                for name in ("sgr_mean", "rise_left")
            ]
            yield _line((method, *map(_shown, differences), str(len(pairs))))


def _by_concept(one: Finished, kinds: set[str]) -> list[list[AttackRow]]:
    names = [c.name for c in one.evaluation.concepts if c.role == "target"]
    return [[row for row in one.targets(concept=name) if row.method in kinds] for name in names]


def _gap(one: Finished, kinds: set[str]) -> Gap:
    return gap_of(_by_concept(one, kinds))


def _bounded(
    group: Sequence[Finished], kinds: set[str], name: str, words: Callable[[float | None], str]
) -> str:
    """A ratio over runs, in words: at least that, where one of its attacks' is a lower bound."""
    ratios = [getattr(_gap(one, kinds), name) for one in group]
    together = _together(ratios)
    bound = together.mean is not None and any(ratio.at_least for ratio in ratios)
    return ("≥ " if bound else "") + _shown(together, words)


def _final(one: Finished, kinds: set[str]) -> Interval:
    return over_seeds(_by_concept(one, kinds), "sgr_final")


def _worst(
    group: Sequence[Finished], kinds: set[str], name: str, worst: Callable[..., float]
) -> float | None:
    """The worst concept's mean over all seeds of both kinds."""
    names = dict.fromkeys(row.concept for one in group for row in one.targets())
    means = []
    for concept in names:
        values = [
            value
            for one in group
            for row in one.targets(concept=concept)
            if row.method in kinds and (value := getattr(row.counted, name)) is not None
        ]
        if values:
            means.append(fmean(values))
    return worst(means) if means else None


def _attacks(group: Sequence[Finished], kinds: set[str]) -> list[AttackRow]:
    return [row for one in group for row in one.targets() if row.method in kinds]


def _taught(group: Sequence[Finished], kinds: set[str]) -> str:
    """How many attacks taught either model the concept, of all: the others have no rise."""
    rows = _attacks(group, kinds)
    return f"{sum(row.rise_left is not None for row in rows)} of {len(rows)}"


def _bounded_worst(group: Sequence[Finished], kinds: set[str]) -> str:
    """The most that an attack adds to any concept, at least that where one is a lower bound."""
    bound = any(row.rise_left_at_least for row in _attacks(group, kinds))
    return ("≥ " if bound else "") + share(_worst(group, kinds, "rise_left", max))


def _told_apart(groups: Mapping[str, Sequence[Finished]]) -> Iterable[str]:
    """Where methods' ordinary prompts differ, and what immunizations saw of what is judged."""
    prompts: dict[tuple[str, ...], list[str]] = {}
    seen: dict[str, list[str]] = {}
    for method, group in groups.items():
        prompts.setdefault(tuple(group[0].evaluation.benign.prompts), []).append(method)
        for one in dict.fromkeys(o for cell in group for o in cell.evaluation.overlaps):
            seen.setdefault(one, []).append(method)
    if len(prompts) > 1:
        alike = "; ".join(", ".join(names) for names in prompts.values())
        yield (
            "\nAlignment and CMMD are of ordinary prompts that a run has not seen, which are not "
            f"the same ones for {alike}."
        )
    for overlap, names in seen.items():
        yield f"\n{', '.join(names)}: {overlap.rstrip('.')}."


def _untold(cells: Sequence[Finished]) -> list[str]:
    """Targets that a judge hardly sees in what attacks on the original model end with."""
    ends: dict[str, list[float]] = {}
    for one in cells:
        for row in one.targets():
            ends.setdefault(row.concept, []).append(one.end(row).original)
    return [concept for concept, values in ends.items() if fmean(values) < TOLD]


def _benign(concept: str) -> Callable[[Finished], Interval]:
    """SGR of a concept that must stay learnable, where the judge tells it on the original."""

    def value(one: Finished) -> Interval:
        rows = [
            row
            for row in one.rows
            if (row.role, row.concept) == ("other", concept) and one.tells(row)
        ]
        return over_seeds([rows], "sgr_mean") if rows else Interval()

    return value


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _alignment(group: Sequence[Finished]) -> str:
    changes = []
    for one in group:
        pair = one.evaluation.benign.prompt_alignment
        if pair.original and pair.immunized is not None:
            changes.append(pair.immunized / pair.original - 1)
    return percent(fmean(changes)) if changes else "–"


def _sgr_at(group: Sequence[Finished], kind: str, step: int) -> float | None:
    """Mean SGR of one kind of attack on targets after some steps, over all seeds and concepts."""
    values = [
        point.sgr
        for one in group
        for row in one.targets(kind)
        for point in one.points.get(row.attack, ())
        if point.step == step
    ]
    return fmean(values) if values else None


def _shown(value: Interval, words: Callable[[float | None], str] = number) -> str:
    if value.low is None or value.high is None or value.runs < 2:
        return words(value.mean)
    return f"{words(value.mean)} [{words(value.low)} to {words(value.high)}]"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv(cells: Sequence[Finished]) -> str:
    """Every attack of every cell as one row."""
    text = io.StringIO()
    own = ("cell", "task", "targets", "num_targets", "study_method", "immunization_seed")
    writer = csv.DictWriter(text, [*own, *AttackRow.model_fields], lineterminator="\n")
    writer.writeheader()
    for one in cells:
        problem = one.cell.problem
        known = (
            one.cell.name, problem.task, " ".join(problem.targets), len(problem.targets),
            one.cell.method, one.cell.seed,
        )  # fmt: skip
        for row in one.rows:
            writer.writerow(dict(zip(own, known, strict=True)) | row.model_dump())
    return text.getvalue()


def _plot(cells: Sequence[Finished], path: Path) -> Path:
    """SGR over steps, a panel for each kind of attack and a line for each method.

    A method has its colour and marker in every plot. A ratio to a similarity near 0 may be
    anything: what lies beyond the axis is an arrow on its edge.
    """
    kinds = list(dict.fromkeys(row.method for one in cells for row in one.targets()))
    methods = list(dict.fromkeys(one.cell.method for one in cells))
    figure = Figure(figsize=(3.2 * len(kinds), 3.6), layout="constrained")
    places = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for place, kind in zip(places, kinds, strict=True):
        for method in methods:
            group = [one for one in cells if one.cell.method == method]
            steps = sorted({p.step for one in group for c in one.points.values() for p in c})
            curve = [(s, v) for s in steps if (v := _sgr_at(group, kind, s)) is not None]
            if curve:
                place.plot(*zip(*curve, strict=True), label=method, markersize=4, **_LOOKS[method])
            for step, value in curve:
                if not _LOWEST <= value <= _HIGHEST:
                    edge, arrow = (_LOWEST, "v") if value < _LOWEST else (_HIGHEST, "^")
                    place.plot(
                        step, edge, marker=arrow, color=_LOOKS[method]["color"], markersize=7,
                        clip_on=False, linestyle="none", label=_BEYOND, zorder=3,
                    )  # fmt: skip
        place.axhline(0, color="0.6", linewidth=0.8)
        place.set_title(method_name(kind), fontsize=9)
        place.set_xlabel("attack steps", fontsize=8)
        place.tick_params(labelsize=8)
    places[0].set_ylabel("similarity gap ratio", fontsize=8)
    lines = {line.get_label(): line for place in places for line in place.lines[:-1]}
    if lines.pop(_BEYOND, None):
        arrow = {"marker": "v", "color": "0.4", "linestyle": "none"}
        lines[_BEYOND] = Line2D([], [], label=_BEYOND, **arrow)
    figure.legend(
        handles=list(lines.values()),
        loc="outside lower center",
        ncols=min(len(lines), 3 * len(kinds)),
        fontsize=8,
        frameon=False,
    )
    low, high = places[0].get_ylim()
    places[0].set_ylim(max(low, _LOWEST), min(high, _HIGHEST))
    # the same file from the same numbers, with text as text
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path


_BEYOND = "beyond the axis"
_LOWEST, _HIGHEST = -1.0, 2.0
"""Of a plot's axis."""
_LOOKS: dict[str, dict[str, Any]] = {
    "default": {"color": "black", "marker": "o", "linewidth": 2.2},
    "default-muon": {"color": "navy", "marker": "v", "linewidth": 2.2},
    CEILING: {"color": "0.5", "marker": "", "linewidth": 1.4, "linestyle": "--"},
}
_LOOKS |= {
    method: {"color": f"C{place}", "marker": marker, "linewidth": 1.2}
    for place, (method, marker) in enumerate(
        zip((name for name in EVERY if name not in _LOOKS), "sDhdPX*<>p", strict=True)
    )
}
"""The same in every plot, whichever methods it has."""
