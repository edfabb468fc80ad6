"""Two runs of a command with one seed, in two processes, write the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import write_config

ADAPT = ["adapt", "cat", "--model", "MODEL", "--steps", "2", "--lr", "0.01"]
COMMANDS = {
    "lora": [*ADAPT, "--rank", "2", "-o", "OUT"],
    "whole dreambooth": [*ADAPT, "--method", "dreambooth", "--whole", "-o", "OUT"],
    "immunize": ["immunize", "run.yaml", "-o", "OUT"],
    "delta": ["immunize", "run.yaml", "--delta", "-o", "OUT"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_two_runs_write_the_same_bytes(workdir, model, name):
    write_config(workdir / "run.yaml", model=str(model))
    written = []
    for seed in ("1", "2"):
        arguments = [
            {"MODEL": str(model), "OUT": "out"}.get(argument, argument)
            for argument in COMMANDS[name]
        ]
        # sets of texts have another order in each process
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mima", *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        files = [path for path in Path("out").rglob("*") if path.is_file()]
        written.append({str(path): path.read_bytes() for path in files})
        Path("out").rename(f"out-{seed}")
    first, second = written
    assert first.keys() == second.keys()
    assert len(first) > 1
    assert [path for path in first if first[path] != second[path]] == []
