"""A command as a person types it, and a config file to type it with."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml
from typer.testing import CliRunner

from mima.cli import app


def run(*arguments: object, code: int = 0) -> str:
    """Run a command, check its exit code, and give back what it printed, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    # usage errors come in a box
    return " ".join(result.output.replace("│", " ").split())


_RUN_ALL = """
import contextlib, io, json, os, sys
from mima.cli import main
ended = []
for arguments, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    sys.argv[1:], said = arguments, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            ended.append((end.code, said.getvalue().strip()))
print(json.dumps(ended))
"""


def in_a_process(
    *given: tuple[Sequence[object], Mapping[str, str]], cwd: Path, **environment: str
) -> list[tuple[int, str]]:
    """Run commands in a process of their own, all in one: to start it takes longer than they take.

    Args:
        given: arguments of each command, and what it changes of the environment.
        cwd: working directory.
        environment: what the process has beside this one's.

    Returns:
        The exit code and the output of each.
    """
    commands = [([str(word) for word in words], dict(changed)) for words, changed in given]
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, json.dumps(commands)],
        env={**os.environ, "COLUMNS": "200", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout)]


def run_script(script: Path, folder: Path, said: Path) -> None:
    """Run a script in this process as users do, in a folder, which is also its argument.

    What it prints goes to a file.
    """
    # users do not set it
    os.environ.pop("MIMA_STRICT", None)
    os.chdir(folder)
    sys.argv[:] = [str(script), str(folder)]
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise


def write_config(path: Path, **changes: object) -> Path:
    settings = {
        "steps": 2,
        "num_captions": 8,
        "num_class_images": 2,
        "hypergradient": "first_order",
        "lower": {"steps": 1},
    }
    config = {"model": "model", "concepts": ["cat", "dog"], "immunize": settings, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path
