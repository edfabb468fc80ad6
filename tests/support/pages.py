"""A page about evaluations, read back."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report import write_report

SMALL = {"adaptations": ("lora",), "seeds": (0,), "similarities": ("clip",)}


class Page(HTMLParser):
    """Elements, texts by element, and table rows of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *cells: str) -> list[str]:
        """The one row that starts with these cells."""
        (found,) = (row for row in self.rows if row[: len(cells)] == list(cells))
        return found


def told(source, path, rows, **changes):
    """Headline and text of a page about changed rows, or with changes to the summary."""
    evaluation = source.evaluation()
    summary = summarize(rows, evaluation.concepts, "clip").model_copy(update=changes)
    other = EvaluationFolder(path)
    other.write_evaluation(evaluation.model_copy(update={"summary": {"clip": summary}}))
    other.write_rows(rows, source.curves())
    page = Page(write_report([other.path]))
    return re.findall("<h1>(.*?)</h1>", page.source)[0], page.text
