"""Evaluations and a page about one, for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.evaluations import write_evaluation
from support.pages import SMALL, Page

from mima.report import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_evaluation(
        tmp_path_factory.mktemp("one") / "run",
        adaptations=("lora",),
        lr_factors=(1, 10),
        seeds=(0, 1),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """One attack on each of two concepts: three figures."""
    return write_evaluation(tmp_path_factory.mktemp("small") / "run", **SMALL)


@pytest.fixture(scope="module")
def page(folder) -> Page:
    path = write_report([folder])
    assert path == folder / "report.html"
    return Page(path)
