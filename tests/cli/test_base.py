"""What every command does alike: help, messages, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.commands import run
from typer.testing import CliRunner

import mima
from mima.cli import app


def test_version():
    assert run("--version") == f"mima {mima.__version__}"


@pytest.mark.parametrize(
    "command",
    [
        *([], ["demo"], ["immunize"], ["adapt"], ["erase"], ["merge"], ["apply"], ["evaluate"]),
        *(["sample"], ["push"], ["doctor"]),
    ],
)
def test_help_for_everything(command):
    assert "Usage" in run(*command, "--help")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, mima.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy', 'pydantic', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_runs_too():
    done = subprocess.run(
        [sys.executable, "-m", "mima", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mima {mima.__version__}\n"


def test_a_reader_that_has_read_enough():
    command = [sys.executable, "-m", "mima", "immunize", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_unknown_command_or_option():
    assert "No such command 'samlpe'" in run("samlpe", code=2)
    assert "No such option" in run("sample", "x", "--sedd", "3", code=2)


def failing(monkeypatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mima.cli.diagnosis.show", fail)


def test_an_accident_is_short_unless_debug_is_asked_for(monkeypatch, capfd):
    failing(monkeypatch, RuntimeError("no [such] thing"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "RuntimeError: no [such] thing" in result.output
    assert "--debug shows where" in result.output
    assert "Traceback" not in result.output
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.output
        assert "in fail" in result.output


def test_another_librarys_value_error_is_an_accident(monkeypatch):
    def fail() -> None:
        json.loads("{")

    monkeypatch.setattr("mima.cli.diagnosis.show", fail)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "--debug" in result.output


def test_an_interrupt(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 130
    assert "interrupted" in result.output
