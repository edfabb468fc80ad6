from __future__ import annotations

import os
from pathlib import Path

from support.commands import run
from support.evaluations import write_evaluation

from mima.errors import MimaError
from mima.storage.inputs import expanded


def test_bad_demos(workdir):
    assert "dog" in run("demo", "--output", "dog", code=2)
    assert "dog" in run("demo", "--output", "dog", "--overwrite", code=2)
    assert sorted(path.name for path in Path("dog").glob("*.png"))[0] == "0.png"
    for seed in ("-1", str(2**60)):
        assert "'--seed'" in run("demo", "--seed", seed, code=2)
    assert "cat/0.png" in run("demo", "--output", "cat/0.png", code=2)


def test_the_demo_says_first_what_it_will_do(workdir, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise MimaError("enough")

    monkeypatch.setattr("mima.demo.run_demo", stop)
    said, _, error = run("demo", "--quick", "-o", "out", code=2).partition("error: ")
    assert "about two minutes; results in out" in said
    assert error == "enough"


def test_the_demo_reads_its_results_where_it_wrote_them(workdir, monkeypatch):
    home = workdir / "home"
    monkeypatch.setenv("HOME", str(home))

    def write(output: Path, **_: object) -> None:
        write_evaluation(expanded(output) / "evaluation")

    monkeypatch.setattr("mima.demo.run_demo", write)
    said = run("demo", "--quick", "--output=~/demo")
    assert f"pictures, curves and all numbers: {home / 'demo'}" in said
    assert not Path("~").exists()


def test_threads_of_commands_sleep_while_they_wait_unless_told_otherwise(workdir, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    run("demo", "-o", "dog", code=2)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "7"
