"""What every command does alike: help, messages, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.commands import run, write_config
from typer.testing import CliRunner

import mima
from mima.cli import app
from mima.errors import MimaError


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


REFUSED = {
    "immunize, no file": ["immunize", "absent.yaml"],
    "immunize, a setting": ["immunize", "run.yaml", "--set", "stpes=3", "-o", "out"],
    "immunize, a full folder": ["immunize", "run.yaml", "-o", "dog"],
    "demo": ["demo", "--output", "dog"],
    "adapt": ["adapt", "cat", "--output", "dog"],
    "erase, nothing": ["erase", "-o", "out"],
    "erase, a full folder": ["erase", "cat", "-o", "dog"],
    "merge": ["merge", "a", "b", "-o", "out", "--weights", "half"],
    "apply": ["apply", "delta", "-o", "dog"],
    "push": ["push", "absent", "me/model"],
    "sample": ["sample", "x", "-o", "x.gif"],
    "an option": ["sample", "x", "--sedd", "3"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_before_anything_heavy_is_imported(workdir, case):
    write_config(workdir / "run.yaml")
    code = (
        "import sys\n"
        "from mima.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *REFUSED[case]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr


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


BUGS = [RuntimeError("no [such] thing"), ValueError("ours"), TypeError("ours"), KeyError("x")]


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("arguments", [["doctor"], ["--debug", "doctor"]], ids=["plain", "debug"])
def test_a_bug_is_a_traceback_and_a_line_that_says_so(monkeypatch, error, arguments):
    failing(monkeypatch, error)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    *trace, last = result.output.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == f"{type(error).__name__}: {error}"
    assert any("in fail" in line for line in trace)
    assert last.startswith("error: this is a bug in mima")


def test_a_users_mistake_is_a_line_and_with_debug_a_traceback_too(monkeypatch):
    failing(monkeypatch, MimaError("no [such] thing"))
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.output) == (2, "error: no [such] thing\n")
    # people append it to the command that has just failed
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "in fail" in result.output
        assert result.output.endswith("error: no [such] thing\n")


def test_an_interrupt(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 130
    assert "interrupted" in result.output
