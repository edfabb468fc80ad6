"""The pictures of a report: curves of similarity, and a grid of what the models drew."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from mima.evaluation.trajectory import AttackCurve

# Okabe and Ito's palette: told apart with any kind of colour vision, and in grey
ORIGINAL = "#D55E00"
IMMUNIZED = "#0072B2"
# further immunized models of a comparison, after IMMUNIZED
RUN_COLOURS = (IMMUNIZED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CEILING = "#6B6B6B"
INK = "#1F2328"
MUTED = "#656D76"
RULE = "#D8DEE4"

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


def plot_curves(
    attacks: Sequence[tuple[AttackCurve, AttackCurve]],
    path: str | Path,
    *,
    labels: tuple[str, str] = ("original", "immunized"),
    ceiling: Mapping[str, float] | None = None,
    ceiling_label: str = "before erasing",
    notes: Mapping[str, str] | None = None,
    columns: int = 3,
) -> Path:
    """Draw similarity against adaptation step, one panel for each concept.

    Bands span the lowest and highest sampling seed.

    Args:
        attacks: for each concept, the attack on the original and on the immunized model.
        path: a .png, .svg or .pdf file; its folder must exist.
        labels: what to call the two models.
        ceiling: a level to draw as a dashed line, by concept: what the model reached that knew it.
        ceiling_label: what to call that level.
        notes: a line under the panel's title, by concept.
        columns: panels side by side, at most.

    Returns:
        `path`.

    Raises:
        ValueError: no attacks, or a pair that cannot be compared.
    """
    if not attacks:
        raise ValueError("plot_curves: attacks is empty")
    ceiling, notes = ceiling or {}, notes or {}
    width = min(columns, len(attacks))
    height = math.ceil(len(attacks) / width)
    with house_style():
        figure = Figure(figsize=(3.9 * width + 0.6, 3.3 * height + 0.75), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03, hspace=0.05)  # type: ignore[union-attr, call-arg]
        FigureCanvasAgg(figure)
        panels = figure.subplots(height, width, squeeze=False, sharey=True)
        for index, panel in enumerate(panels.flat):
            if index >= len(attacks):
                panel.set_visible(False)
                continue
            _panel(panel, attacks[index], labels, ceiling, ceiling_label, notes)
            if index % width == 0:
                panel.set_ylabel("similarity to held-out references")
            if index + width >= len(attacks):
                panel.set_xlabel("adaptation step")
        entries: dict[str, Any] = {}
        for panel in panels.flat[: len(attacks)]:
            handles, names = panel.get_legend_handles_labels()
            entries.update(zip(names, handles, strict=True))
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=len(entries),
            frameon=False,
            fontsize=10.5,
            handlelength=2.2,
        )
        figure.savefig(path, dpi=160, facecolor="white")
    return Path(path)


def _panel(
    panel: Axes,
    pair: tuple[AttackCurve, AttackCurve],
    labels: tuple[str, str],
    ceiling: Mapping[str, float],
    ceiling_label: str,
    notes: Mapping[str, str],
) -> None:
    # here, since it brings torch, which the pages of a report do without
    from mima.evaluation.trajectory import compare

    gap = compare(*pair)
    markers = ("o", "s")
    for curve, label, colour, marker in zip(
        pair, labels, (ORIGINAL, IMMUNIZED), markers, strict=True
    ):
        seeds = curve.by_seed
        panel.fill_between(
            curve.steps, seeds.min(axis=1), seeds.max(axis=1), color=colour, alpha=0.15, linewidth=0
        )
        panel.plot(
            curve.steps,
            curve.similarity,
            color=colour,
            marker=marker,
            markersize=5.5,
            markeredgecolor="white",
            linewidth=2.2,
            label=label,
        )
    if gap.concept in ceiling:
        panel.axhline(
            ceiling[gap.concept],
            color=CEILING,
            linewidth=1.3,
            linestyle=(0, (4, 3)),
            label=ceiling_label,
        )
    subtitle = f"mean SGR {gap.mean:+.2f}, at step {gap.steps[-1]} {gap.final:+.2f}"
    if gap.concept in notes:
        subtitle = f"{notes[gap.concept]}\n{subtitle}"
    lines = subtitle.count("\n") + 1
    panel.set_title(gap.concept, loc="left", fontsize=12, fontweight="bold", pad=9 + 12.5 * lines)
    panel.annotate(
        subtitle,
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=9.5,
        color=MUTED,
    )
    panel.set_xticks(gap.steps)
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.margins(x=0.05, y=0.08)


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


def line_panel(
    lines: Sequence[Line], *, title: str, subtitle: str, quantity: str, limits: tuple[float, float]
) -> Figure:
    """A small panel of lines against adaptation steps, each named at its end.

    Args:
        lines: at least one.
        title: bold, above the panel.
        subtitle: below the title.
        quantity: what the y axis shows.
        limits: of the y axis, so that panels beside each other can be compared.

    Returns:
        A figure to save.

    Raises:
        ValueError: no lines.
    """
    if not lines:
        raise ValueError("line_panel: lines is empty")
    with house_style():
        figure = Figure(figsize=(4.0, 2.9))
        FigureCanvasAgg(figure)
        panel = figure.add_axes((0.125, 0.155, 0.635, 0.61))
        for line in lines:
            panel.fill_between(
                line.steps, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0
            )
            panel.plot(
                line.steps,
                line.values,
                color=line.colour,
                marker=line.marker,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linewidth=2,
                clip_on=False,
            )
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
                _cut(line.label, 13),
                (line.steps[-1], line.values[-1]),
                (1.045, (end - limits[0]) / spread),
                textcoords="axes fraction",
                va="center",
                fontsize=9.5,
                annotation_clip=False,
            )
        figure.text(0.02, 0.975, _cut(title, 44), fontsize=11, fontweight="bold", va="top")
        figure.text(
            *(0.02, 0.885), _cut(f"{quantity} · {subtitle}", 62), fontsize=9, color=MUTED, va="top"
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
    """SGR of every attack in rows, the worst of each row ringed, with its mean and interval.

    Args:
        strips: from top to bottom, at least one.
        quantity: what the x axis shows.

    Returns:
        A figure to save.

    Raises:
        ValueError: no rows, or a row without attacks.
    """
    if not strips or not all(len(strip.values) for strip in strips):
        raise ValueError("strip_chart: needs rows with at least one attack each")
    with house_style():
        height = 0.95 + 0.5 * len(strips)
        figure = Figure(figsize=(7.2, height))
        FigureCanvasAgg(figure)
        panel = figure.add_axes((0.22, 0.56 / height, 0.75, 1 - 0.68 / height))
        panel.grid(visible=False)
        panel.grid(visible=True, axis="x")
        panel.axvline(0, color=CEILING, linewidth=1.2)
        rng = np.random.default_rng(0)
        for row, strip in enumerate(strips):
            values = np.asarray(strip.values)
            heights = row + (rng.uniform(-0.2, 0.2, len(values)) if len(values) > 1 else 0)
            heights = np.broadcast_to(heights, values.shape)
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
        panel.set_yticks(range(len(strips)), [_cut(strip.label, 17) for strip in strips])
        panel.tick_params(axis="y", labelsize=10, labelcolor=INK)
        panel.spines["left"].set_visible(False)
        panel.set_xlabel(quantity, fontsize=9.5, loc="left")
    return figure


def save_figure(figure: Figure, path: Path) -> str:
    """Write a figure as PNG and as SVG, and give back the SVG.

    Args:
        figure: what to write.
        path: without an ending; its folder must exist.

    Returns:
        The SVG's text, the same for the same figure and name.
    """
    # a salt of its own keeps ids of two figures on one page apart
    with house_style(), mpl.rc_context({"svg.hashsalt": path.name}):
        svg = StringIO()
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=160, facecolor="white")
    path.with_name(f"{path.name}.svg").write_text(svg.getvalue(), encoding="utf-8")
    return svg.getvalue()


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved so that neighbours are at least a gap apart, and no further than needed."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    # blocks of labels that touch, each centred on the mean of what it holds
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


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class GridColumn:
    """One column of an image grid.

    Attributes:
        heading: what the pictures show, for instance the prompt.
        group: neighbouring columns of one group get a common heading, for instance the concept.
        images: one picture for each row; None leaves a place empty.
        scores: a number under each picture; None leaves it out.
    """

    heading: str
    images: Sequence[Image.Image | None]
    group: str = ""
    scores: Sequence[float | None] = ()


ATTACK_ROWS = (
    "Original\nbefore erasing",
    "Erased, then attacked",
    "Erased, immunized, attacked",
    "Reference\nnever shown to the attack",
)


def attack_columns(
    pair: tuple[AttackCurve, AttackCurve],
    before: Sequence[Sequence[Image.Image]],
    *,
    prompts: int = 2,
    seed_index: int = 0,
) -> list[GridColumn]:
    """Columns for `image_grid` with the rows `ATTACK_ROWS`, at the last step of an attack.

    Args:
        pair: the attack on the erased and on the immunized model.
        before: what the original model drew for the attack's prompts and seeds,
            [prompt][seed]: `sampler(original, pair[0].prompts, pair[0].seeds)`.
        prompts: how many of the prompts to show, at most.
        seed_index: which seed to show.

    Returns:
        One column for each prompt shown.
    """
    erased, immunized = pair
    return [
        GridColumn(
            heading=prompt,
            group=erased.concept,
            images=(
                before[index][seed_index],
                erased.images[-1][index][seed_index],
                immunized.images[-1][index][seed_index],
                erased.references[index][0],
            ),
            scores=(
                None,
                float(erased.scores[-1, index, seed_index]),
                float(immunized.scores[-1, index, seed_index]),
                None,
            ),
        )
        for index, prompt in enumerate(erased.prompts[:prompts])
    ]


def image_grid(
    rows: Sequence[str],
    columns: Sequence[GridColumn],
    path: str | Path,
    *,
    size: int = 192,
) -> Path:
    """Draw pictures in labelled rows and columns.

    Args:
        rows: labels; a line break starts a smaller second line.
        columns: from left to right.
        path: a .png file; its folder must exist.
        size: side of each picture in the grid, in pixels. Small pictures are enlarged by a whole
            factor without blurring, then fitted.

    Returns:
        `path`.

    Raises:
        ValueError: no rows or columns, or a column without one picture for each row.
    """
    if not rows or not columns:
        raise ValueError(f"image_grid: got {len(rows)} rows and {len(columns)} columns")
    for column in columns:
        if len(column.images) != len(rows):
            raise ValueError(
                f"image_grid: column {column.heading!r} has {len(column.images)} images "
                f"for {len(rows)} rows"
            )
        if column.scores and len(column.scores) != len(rows):
            raise ValueError(
                f"image_grid: column {column.heading!r} has {len(column.scores)} scores "
                f"for {len(rows)} rows"
            )
    unit = size / 160
    fonts = {
        name: _font(round(points * unit), bold=bold)
        for name, points, bold in (
            ("group", 19, True), ("heading", 14, False), ("row", 17, True), ("note", 14, False)
        )
    }  # fmt: skip
    gap, group_gap, margin = round(8 * unit), round(26 * unit), round(22 * unit)
    label_width = round(190 * unit)
    caption = round(20 * unit) if any(column.scores for column in columns) else 0

    lefts, x = [], margin + label_width
    for index, column in enumerate(columns):
        if index:
            x += size + (gap if column.group == columns[index - 1].group else group_gap)
        lefts.append(x)
    width = x + size + margin
    characters = max(8, int(size / fonts["heading"].getlength("n")))
    headings = [textwrap.wrap(column.heading, characters) for column in columns]
    line = round(18 * unit)
    group_height = round(40 * unit) if any(column.group for column in columns) else 0
    top = margin + group_height + line * max(map(len, headings)) + gap
    pitch = size + caption + gap
    canvas = Image.new("RGB", (width, top + pitch * len(rows) - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)

    for index, (column, left) in enumerate(zip(columns, lefts, strict=True)):
        if column.group and (index == 0 or columns[index - 1].group != column.group):
            last = index
            while last + 1 < len(columns) and columns[last + 1].group == column.group:
                last += 1
            right = lefts[last] + size
            name = _fitted(column.group, fonts["group"], right - left)
            draw.text((left, margin), name, INK, fonts["group"])
            rule = margin + group_height - round(14 * unit)
            draw.line((left, rule, right, rule), INK, max(1, round(2 * unit)))
        lines = headings[index]
        for number, text in enumerate(lines):
            y = top - gap - line * (len(lines) - number)
            draw.text((left, y), text, MUTED, fonts["heading"])
    for number, label in enumerate(rows):
        y = top + number * pitch
        _row_label(draw, label, (margin, y, label_width - 2 * gap, size), fonts)
        for column, left in zip(columns, lefts, strict=True):
            picture = column.images[number]
            if picture is None:
                continue
            canvas.paste(_enlarged(picture, size), (left, y))
            draw.rectangle((left - 1, y - 1, left + size, y + size), outline=RULE)
            value = column.scores[number] if column.scores else None
            if value is not None:
                draw.text((left, y + size + 2), f"{value:.2f}", MUTED, fonts["note"])
    canvas.save(path)
    return Path(path)


def _row_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    box: tuple[int, int, int, int],
    fonts: Mapping[str, ImageFont.FreeTypeFont],
) -> None:
    """A bold first line and a plain second one, wrapped and centred on the row's height."""
    left, top, width, height = box
    first, _, second = label.partition("\n")
    placed = []
    for text, font, colour in ((first, fonts["row"], INK), (second, fonts["note"], MUTED)):
        characters = max(6, int(width / font.getlength("n")))
        placed += [(line, font, colour) for line in textwrap.wrap(text, characters)]
    heights = [round(font.size * 1.3) for _, font, _ in placed]
    y = top + (height - sum(heights)) // 2
    for (text, font, colour), step in zip(placed, heights, strict=True):
        draw.text((left, y), text, colour, font)
        y += step


def _enlarged(image: Image.Image, size: int) -> Image.Image:
    image = image.convert("RGB")
    factor = -(-size // max(image.size))
    if factor > 1:
        # whole factor first: edges of small pictures stay sharp, and nothing rings
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    scale = size / max(image.size)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.LANCZOS,
    )
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(points: int, *, bold: bool) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font, so labels look the same on every machine
    properties = font_manager.FontProperties(
        family="DejaVu Sans", weight="bold" if bold else "normal"
    )
    return ImageFont.truetype(font_manager.findfont(properties), points)
