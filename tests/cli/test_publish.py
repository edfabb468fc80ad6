from __future__ import annotations

from pathlib import Path

from support.commands import run


def test_bad_deltas(workdir, model):
    assert "delta absent does not exist" in run("apply", "absent", "-o", "out", code=2)
    assert "delta cat/" in run("apply", "cat", "-o", "out", code=2)
    assert "not empty" in run("apply", "cat", "-o", "dog", code=2)
    assert not Path("out").exists()


def test_bad_pushes(workdir, model):
    assert "absent is not a folder" in run("push", "absent", "me/model", code=2)
    assert "cat holds nothing that mima wrote" in run("push", "cat", "me/model", code=2)
    assert "offline mode is on" in run("push", model, "me/model", code=2)
