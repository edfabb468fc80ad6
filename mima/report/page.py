"""`report.html`: what evaluations found, as one page that needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mima._version import __version__
from mima.errors import MimaError, counted
from mima.report import wording
from mima.report.content import Report
from mima.report.figures import (
    CEILING,
    INK,
    MUTED,
    ORIGINAL,
    RULE,
    RUN_COLOURS,
)
from mima.report.runs import load_runs
from mima.report.verdict import verdict
from mima.storage.atomic import reason_of
from mima.storage.inputs import expanded
from mima.storage.output import check_file, write_whole

MARK = '<meta name="generator" content="mima '

PICTURE_BUDGET = 3_000_000
"""Bytes of encoded pictures in a page."""

# the page's colours by name: as figures draw them, and what takes their place in dark mode
_COLOURS = {
    "card": ("#ffffff", "#191e25"),
    "ink": (INK, "#e9ecef"),
    "muted": (MUTED, "#a5afba"),
    "rule": (RULE, "#343d48"),
    "ceiling": (CEILING, "#8d97a3"),
    "original": (ORIGINAL, "#ff8a3d"),
    **{
        f"run-{index}": pair
        for index, pair in enumerate(
            zip(RUN_COLOURS, ("#58aef0", "#2fc796", "#e7a3c9", "#f2b632", "#8fd0f7"), strict=True)
        )
    },
}


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    picture_budget: int = PICTURE_BUDGET,
) -> Path:
    """Write a page about one evaluation, or about several beside each other.

    The page is one file that loads nothing, with every figure beside it as PNG and SVG, in a folder
    named after it. An earlier page of mima's is replaced.

    Args:
        folders: what `mima evaluate` left; the same concept and attack settings are compared.
        output: the page; default `report.html` in the folder, or for several folders in the
            working directory.
        picture_budget: bytes of encoded pictures in the page; what does not fit is left out, the
            best attacks last, and the page says so.

    Returns:
        The page's path.

    Raises:
        MimaError: no folders, more than there are colours, one that cannot be read, an
            output that is called otherwise than a page, or a file in its place that is not mima's.
    """
    if not folders:
        raise MimaError("report: give at least one folder that mima evaluate wrote")
    if len(folders) > len(RUN_COLOURS):
        raise MimaError(
            f"report: {len(folders)} folders; at most {len(RUN_COLOURS)} can be told apart"
        )
    if output is None:
        output = Path(folders[0]) / "report.html" if len(folders) == 1 else "report.html"
    path = expanded(output)
    runs = load_runs(folders)
    _check_output(path)
    figures = path.with_name(f"{path.stem}-figures")
    try:
        figures.mkdir(parents=True, exist_ok=True)
        report = Report(runs, figures, picture_budget)
        page = _render(report)
        report.write_sheets()
    except OSError as error:
        raise MimaError(f"report: cannot write {figures}: {reason_of(error)}") from error
    write_whole(path, page.encode())
    return path


def _check_output(path: Path) -> None:
    check_file(path, overwrite=True)
    if path.exists() and not path.is_file():
        raise MimaError(f"report: output {path} is no ordinary file")
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:4000]:
        raise MimaError(f"report: {path} is not a report of mima's; choose another output")
    if path.suffix.lower() not in (".html", ".htm"):
        raise MimaError(f"report: output {path} is a page; give it a name that ends in .html")


def _render(report: Report) -> str:
    environment = Environment(
        loader=PackageLoader("mima.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "counted": counted,
        "number": wording.number,
        "percent": wording.percent,
        "share": wording.share,
        "share_left": wording.share_left,
        "ratio": wording.ratio,
        "steps_to_half": wording.steps_to_half,
        "interval": wording.interval_words,
        "untold": wording.untold_sentences,
        "hardly_trained": wording.hardly_trained_sentences,
        "method": wording.method_name,
        "parts": wording.part_sentences,
    }
    colours = {name: (pair[0].lower(), pair[1]) for name, pair in _COLOURS.items()}
    style = environment.get_template("report.css").render(
        colours=colours, similarities=report.similarities
    )
    script = environment.get_template("report.js").render()
    title, sentences = verdict(report.runs, report.primary)
    return environment.get_template("report.html").render(
        report=report,
        title=title,
        sentences=sentences,
        strips=report.strips(),
        curves=report.curves(),
        cards=report.cards(),
        rows=report.rows(),
        wholeness=report.wholeness(),
        tuned=report.tuned(),
        pictures=wording.PICTURES,
        settings=report.settings_table(),
        left_out=report.left_out,
        variants=wording.VARIANTS,
        preparations=wording.PREPARATIONS,
        mark=Markup(MARK),
        version=__version__,
        # package files, which hold nobody's input
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
