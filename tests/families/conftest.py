"""Models to open, to ask and to spoil, for the tests of families."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support import tiny
from support.families import KINDS, open_family

from mima.families import Family


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of each kind, made when it is asked for and left as it is."""

    @cache
    def build(kind: str) -> Path:
        return KINDS[kind](tmp_path_factory.mktemp(kind) / "model")

    return build


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Family:
    return open_family(folder_of(request.param))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "model")
