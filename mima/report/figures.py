"""The figures of a report: curves of similarity, and sheets of what the models drew."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mima.concepts.pictures import Picture
from mima.errors import cut

# Okabe and Ito's palette: told apart with any kind of colour vision, and in grey
ORIGINAL = "#D55E00"
IMMUNIZED = "#0072B2"
# further immunized models of a comparison, after IMMUNIZED
RUN_COLOURS = (IMMUNIZED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CEILING = "#6B6B6B"
INK = "#1F2328"
MUTED = "#656D76"
RULE = "#D8DEE4"

# what people name things may hold characters that no XML file may
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    # names and prompts are text, whatever dollar signs they hold
    "text.parse_math": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of every figure here, undone at the end."""
    with mpl.rc_context(_STYLE):
        yield


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel, with its band.

    Attributes:
        label: what stands at its end.
        steps: S adaptation steps, ascending.
        values: S similarities.
        low: S lower ends of the band.
        high: S upper ends of the band.
        colour: as matplotlib names it.
        marker: likewise.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str
    marker: str = "o"


def _draw_line(panel: Axes, line: Line) -> Any:
    """Draw a line and its band; the immunized models' lines are dashed over the original's.

    Where both models score alike, the dashes let the line below show through.
    """
    panel.fill_between(line.steps, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
    original = line.colour == ORIGINAL
    (drawn,) = panel.plot(
        line.steps,
        line.values,
        color=line.colour,
        marker=line.marker,
        markersize=7.5 if original else 4.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=3.2 if original else 2,
        linestyle="solid" if original else (0, (3, 1.2)),
        clip_on=False,
    )
    return drawn


def line_panel(
    lines: Sequence[Line], *, title: str, subtitle: str, quantity: str, limits: tuple[float, float]
) -> Figure:
    """A small panel of at least one line against adaptation steps, each named at its end.

    ``quantity`` is what the y axis shows, within limits that let panels be compared.
    """
    with house_style():
        figure = Figure(figsize=(4.0, 2.9))
        panel = figure.add_axes((0.125, 0.155, 0.635, 0.61))
        for line in lines:
            _draw_line(panel, line)
        panel.set_ylim(*limits)
        steps = sorted({step for line in lines for step in line.steps})
        panel.set_xlim(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
        panel.set_xticks(
            steps if len(steps) <= 6 else [steps[0], steps[len(steps) // 2], steps[-1]]
        )
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.tick_params(labelsize=9)
        panel.set_xlabel("adaptation step", fontsize=9, loc="left")
        spread = limits[1] - limits[0]
        ends = _apart([line.values[-1] for line in lines], 0.11 * spread)
        for line, end in zip(lines, ends, strict=True):
            panel.annotate(
                cut(line.label, 13),
                (line.steps[-1], line.values[-1]),
                (1.045, (end - limits[0]) / spread),
                textcoords="axes fraction",
                va="center",
                fontsize=9.5,
                annotation_clip=False,
            )
        figure.text(0.02, 0.975, cut(title, 44), fontsize=11, fontweight="bold", va="top")
        figure.text(
            *(0.02, 0.885), cut(f"{quantity} · {subtitle}", 62), fontsize=9, color=MUTED, va="top"
        )
    return figure


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of a strip chart: every attack a dot, their mean beside the worst.

    Attributes:
        label: left of the row.
        values: SGR of each attack, at least one.
        worst: which of them is ringed.
        mean: where the mean is marked; None leaves it out.
        interval: ends of the mean's confidence interval; None leaves it out.
        colour: as matplotlib names it.
    """

    label: str
    values: Sequence[float]
    worst: int
    mean: float | None
    interval: tuple[float, float] | None
    colour: str


def strip_chart(strips: Sequence[Strip], *, quantity: str) -> Figure:
    """SGR of every attack in rows from the top, the worst of each ringed, with mean and interval.

    ``quantity`` is what the x axis shows; there is at least one row.
    """
    with house_style():
        height = 0.95 + 0.5 * len(strips)
        figure = Figure(figsize=(7.2, height))
        panel = figure.add_axes((0.22, 0.56 / height, 0.75, 1 - 0.68 / height))
        panel.grid(visible=False)
        panel.grid(visible=True, axis="x")
        panel.axvline(0, color=CEILING, linewidth=1.2)
        rng = np.random.default_rng(0)
        for row, strip in enumerate(strips):
            values = np.asarray(strip.values)
            heights = np.full(values.shape, float(row))
            if len(values) > 1:
                heights += rng.uniform(-0.2, 0.2, len(values))
            panel.scatter(values, heights, s=22, color=strip.colour, alpha=0.45, linewidths=0)
            panel.scatter(
                *(values[strip.worst], heights[strip.worst]),
                s=75,
                facecolors="none",
                edgecolors=INK,
                linewidths=1.5,
                clip_on=False,
            )
            if strip.interval is not None:
                panel.plot(strip.interval, (row, row), color=INK, linewidth=2.2)
            if strip.mean is not None:
                panel.plot(strip.mean, row, marker="D", markersize=6.5, color=INK)
        everything = [value for strip in strips for value in strip.values]
        panel.set_xlim(min(0.0, *everything) - 0.04, max(0.1, *everything) + 0.04)
        panel.set_ylim(len(strips) - 0.5, -0.5)
        panel.set_yticks(range(len(strips)), [cut(strip.label, 17) for strip in strips])
        panel.tick_params(axis="y", labelsize=10, labelcolor=INK)
        panel.spines["left"].set_visible(False)
        panel.set_xlabel(quantity, fontsize=9.5, loc="left")
    return figure


def save_figure(figure: Figure, path: Path) -> str:
    """Write a figure as PNG and as SVG, at a path without an ending in a folder that exists.

    Returns:
        The SVG's text, the same for the same figure and name.
    """
    # a salt of its own keeps ids of two figures on one page apart
    with house_style(), mpl.rc_context({"svg.hashsalt": path.name}):
        svg = StringIO()
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=160, facecolor="white")
    text = _NOT_XML.sub("\ufffd", svg.getvalue())
    path.with_name(f"{path.name}.svg").write_text(text, encoding="utf-8")
    return text


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved so that neighbours are at least a gap apart, and no further than needed."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    # blocks of labels that touch; a block is centred on the mean of its values
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1:
            lower, upper = blocks[-2:]
            if _start(lower, values, gap) + gap * len(lower) <= _start(upper, values, gap):
                break
            blocks[-2:] = [lower + upper]
    out = list(values)
    for block in blocks:
        for place, index in enumerate(block):
            out[index] = _start(block, values, gap) + gap * place
    return out


def _start(block: Sequence[int], values: Sequence[float], gap: float) -> float:
    return sum(values[index] for index in block) / len(block) - gap * (len(block) - 1) / 2


def curve_sheet(panels: Sequence[tuple[str, Sequence[Line]]], *, quantity: str) -> Figure:
    """All panels of lines against adaptation steps on one sheet, with one legend.

    Args:
        panels: title and lines of each, at least one.
        quantity: what the y axes show.

    Returns:
        A figure to save.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("curve_sheet: panels is empty")
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    with house_style():
        figure = Figure(figsize=(3.9 * width + 0.6, 2.9 * height + 0.75), layout="constrained")
        grid = figure.subplots(height, width, squeeze=False, sharey=True)
        entries: dict[str, Any] = {}
        for index, panel in enumerate(grid.flat):
            if index >= len(panels):
                panel.set_visible(False)
                continue
            title, lines = panels[index]
            for line in lines:
                entries[line.label] = _draw_line(panel, line)
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
            panel.set_xticks(lines[0].steps)
            if index % width == 0:
                panel.set_ylabel(quantity)
            if index + width >= len(panels):
                panel.set_xlabel("adaptation step")
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=len(entries),
            frameon=False,
        )
    return figure


def picture_sheet(
    rows: Sequence[str], columns: Sequence[tuple[str, Sequence[Path | None]]]
) -> Figure:
    """Pictures in labelled rows and columns.

    Args:
        rows: labels, from top to bottom, at least one.
        columns: heading and one picture file for each row, None for an empty place.

    Returns:
        A figure to save.

    Raises:
        ValueError: no rows or columns, or a column without one place for each row.
    """
    if not rows or not columns or any(len(files) != len(rows) for _, files in columns):
        raise ValueError(
            f"picture_sheet: got {len(rows)} rows and columns of "
            f"{[len(files) for _, files in columns]}"
        )
    with house_style():
        figure = Figure(
            figsize=(1.5 * len(columns) + 1.9, 1.5 * len(rows) + 0.7), layout="constrained"
        )
        places = figure.subplots(len(rows), len(columns), squeeze=False)
        for y, label in enumerate(rows):
            for x, (heading, files) in enumerate(columns):
                place = places[y, x]
                place.set_xticks([])
                place.set_yticks([])
                place.grid(visible=False)
                file = files[y]
                if file is not None:
                    # edges of small pictures stay sharp
                    place.imshow(np.asarray(Picture(file, "").load()), interpolation="nearest")
                if y == 0:
                    place.set_title(heading, fontsize=9)
                if x == 0:
                    place.set_ylabel(
                        label, rotation=0, ha="right", va="center", fontsize=10, color=INK
                    )
    return figure
