from __future__ import annotations

from pathlib import Path

from support.commands import run


def test_bad_demos(workdir):
    assert "dog" in run("demo", "--output", "dog", code=2)
    assert "dog" in run("demo", "--output", "dog", "--overwrite", code=2)
    assert sorted(path.name for path in Path("dog").glob("*.png"))[0] == "0.png"
    assert "'--seed'" in run("demo", "--seed", "-1", code=2)
    assert "cat/0.png" in run("demo", "--output", "cat/0.png", code=2)
