"""The rooms of the package stand on each other in one order: nothing leans on what is above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mima

ROOT = Path(mima.__file__).parent

FLOORS = (
    ("_version", "errors", "choices"),
    ("console", "settings", "options", "distributed", "storage", "assets", "reference"),
    ("ops",),
    ("kernels",),
    ("merging", "concepts"),
    ("families",),
    ("training", "release"),
    ("adapters",),
    ("sampling", "bilevel"),
    ("adaptation",),
    ("erasure",),
    ("immunization",),
    ("evaluation",),
    ("report",),
    ("demo", "config"),
    ("cli",),
    ("__main__",),
)
"""Rooms, folders and files of ``mima/``, from the ground up; those of a floor are strangers."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from, within functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mima":
            found |= {f"mima.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    rooms = {name.split(".")[1] for name in found if name.startswith("mima.")}
    return rooms - {"__version__"}


def files() -> dict[str, list[Path]]:
    """The files of each room; the package's own __init__ loads what it names on demand."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            rooms.setdefault(room, []).append(path)
    return rooms


def test_every_room_has_a_floor():
    assert files().keys() - FLOOR.keys() == set()


@pytest.mark.parametrize("room", sorted(set(FLOOR) & set(files())))
def test_a_room_stands_only_on_those_below_it(room):
    above = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files()[room]
        for other in imports(path)
        if other != room and FLOOR[other] >= FLOOR[room]
    }
    assert above == set()


def test_what_reads_the_layout_would_see_a_wrong_import(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from mima.cli.base import app\n    return app\n")
    assert imports(file) == {"cli"}
    assert FLOOR["cli"] > FLOOR["ops"]
