"""What every command does alike: help, messages, exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import get_args

import pytest
from support.commands import run, write_config
from typer.testing import CliRunner

import mima
from mima.choices import AdaptationMethod
from mima.cli import app
from mima.errors import MimaError


def test_version():
    assert run("--version") == f"mima {mima.__version__}"


@pytest.mark.parametrize(
    "command",
    [
        *([], ["demo"], ["immunize"], ["adapt"], ["erase"], ["merge"], ["apply"], ["evaluate"]),
        *(["report"], ["sample"], ["push"], ["doctor"]),
    ],
)
def test_help_for_everything(command):
    assert "Usage" in run(*command, "--help")


def test_the_help_of_adapt_names_every_method():
    said = run("adapt", "--help")
    assert [name for name in get_args(AdaptationMethod) if name not in said] == []


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
    "immunize, no concept": ["immunize", "absent-concept.yaml", "-o", "out"],
    "immunize, no model": ["immunize", "absent-model.yaml", "-o", "out"],
    "adapt, no concept": ["adapt", "absent", "-o", "out"],
    "adapt, no model": ["adapt", "cat", "-o", "out", "--model", "absent"],
    "adapt, no such method": ["adapt", "cat", "-o", "out", "--method", "lroa"],
    "erase, no concept": ["erase", "absent", "-o", "out"],
    "merge, no adapter": ["merge", "absent", "-o", "out"],
    "apply, no delta": ["apply", "absent", "-o", "out"],
    "sample, no model": ["sample", "x", "--model", "absent.safetensors"],
    "sample, a folder that is no model": ["sample", "x", "--model", "dog"],
    "sample, no adapter": ["sample", "x", "--adapter", "absent"],
    "sample, a device": ["sample", "x", "--device", "gpu"],
    "sample, a name that no file has": ["sample", "x", "--model", "n" * 300],
    "evaluate, no model": ["evaluate", "embedded", "absent", "--concepts", "cat", "-o", "out"],
    "evaluate, a preset": [
        *("evaluate", "embedded", "embedded", "--concepts", "cat", "-o", "out"),
        *("--preset", "slow"),
    ],
    "report": ["report", "dog"],
    "sample, a path that no file has": ["sample", "x", "--model", "n/" * 3000],
    "report, a path that no folder has": ["report", "n/" * 3000],
    "immunize, a path that no file has": ["immunize", "n/" * 3000],
    "immunize, links in a circle": ["immunize", "circle"],
    "immunize, no concepts": ["immunize", "odd.yaml", "-o", "out"],
    "adapt, links in a circle": ["adapt", "circle", "-o", "out"],
    "adapt, an output of such links": ["adapt", "cat", "-o", "circle"],
    "adapt, an output within a file": ["adapt", "cat", "-o", "run.yaml/out"],
    "demo, an output of such links": ["demo", "-o", "circle"],
    "sample, an output beyond such links": ["sample", "x", "-o", "circle/x.png"],
    "sample, a seed": ["sample", "x", "--seed", str(2**70)],
}


HELP = {"help": ["--help"], "immunize --help": ["immunize", "--help"], "adapt -h": ["adapt", "-h"]}
HEAVY = {"torch", "diffusers", "transformers", "peft", "matplotlib", "scipy"}


def test_help_and_refusals_come_before_anything_heavy_is_imported(workdir):
    write_config(workdir / "run.yaml")
    write_config(workdir / "absent-concept.yaml", model="embedded", concepts=["absent"])
    write_config(workdir / "absent-model.yaml")
    write_config(workdir / "odd.yaml", concepts=["cat", 1, None])
    (workdir / "circle").symlink_to("circle")
    # all in one process: one that imports too much shows in those after it, too
    code = f"""
import json, sys
from mima.cli import main
found = {{}}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as left:
        found[name] = left.code, sorted({HEAVY} & set(sys.modules))
print(json.dumps(found))
"""
    command = [sys.executable, "-c", code, json.dumps(HELP | REFUSED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        **{name: [0, []] for name in HELP},
        **{name: [2, []] for name in REFUSED},
    }, done.stderr


def test_the_module_runs_too():
    done = subprocess.run(
        [sys.executable, "-m", "mima", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mima {mima.__version__}\n"


def test_a_reader_that_has_read_enough():
    command = [sys.executable, "-m", "mima", "immunize", "--help"]
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


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


@pytest.mark.parametrize("code", [errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_a_path_that_the_system_refuses_is_a_line(monkeypatch, code):
    failing(monkeypatch, OSError(code, os.strerror(code), "a\n/file"))
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.output) == (2, f"error: a /file: {os.strerror(code)}\n")
    # of no path
    failing(monkeypatch, OSError(code, os.strerror(code)))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_a_full_disk_is_a_line(monkeypatch):
    failing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.output) == (
        2,
        "error: cannot write: No space left on device\n",
    )


def test_a_log_that_cannot_be_written_fails_no_command():
    code = """
import mima.cli.diagnosis
from mima import cli, console
mima.cli.diagnosis.show = lambda: console.tell("on the way")
cli.main()
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code, "doctor"], stderr=full)
    assert done.returncode == 0


def test_a_message_is_cut_and_keeps_its_control_characters_to_itself(monkeypatch):
    failing(monkeypatch, MimaError("a\x1b[31m\n" + "b" * 100_000))
    first, second = CliRunner().invoke(app, ["doctor"]).output.splitlines()
    assert first == "error: a [31m"
    assert second == "b" * 1999 + "…"


def test_an_interrupt(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 130
    assert "interrupted" in result.output
