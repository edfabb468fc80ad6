"""The programs of benchmarks/, for the tests of them."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    # a folder beside the package, not a part of it
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
