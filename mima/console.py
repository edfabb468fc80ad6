"""What commands print: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mima.errors import cut

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    Bars: TypeAlias = "Progress | Lines"
    """Tasks under way: bars on a terminal, lines elsewhere."""

LONGEST_LINE = 2000
"""Characters of one line of a message; libraries may repeat in theirs whatever a file holds."""
LONG_WAITS = ("mima.training.class_images",)
"""Loggers whose notices show that a long wait is no hang; others only warn on a terminal."""


def stdout() -> Console:
    """For results."""
    return _console(stderr=False)


def say(message: str) -> None:
    """A line of results, without the control characters that a name in it may hold."""
    stdout().print(_printable(message))


def stderr() -> Console:
    """For everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            # rich would send stdout nowhere, and end the program
            raise

    # paths and prompts hold brackets and colons: [red], :cat:
    return Lasting(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def tell(said: str | Text, console: Console | None = None) -> None:
    """Print to stderr, where that takes it: no run ends because its log does.

    The log's disk may be full, or its reader gone.
    """
    with suppress(OSError):
        (console or stderr()).print(said)


def drop_unwritten() -> None:
    """Drop what was not taken, before Python tries again and ends with a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed from the start
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command(*words: object) -> str:
    """A mima command that can be pasted into a shell."""
    return shlex.join(["mima", *map(str, words)])


def show_error(message: str) -> None:
    """One red message."""
    from rich.text import Text

    tell(Text("error: ", style="bold red") + Text(_shown(message), style="red"))


def _say(message: str, style: str) -> None:
    from rich.text import Text

    tell(Text(_shown(message), style=style))


def _shown(message: str) -> str:
    """A message as a terminal may have it: without control characters, its lines not too long."""
    return "\n".join(cut(_printable(line), LONGEST_LINE) for line in message.split("\n"))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}", "yellow")


class _OneLine(logging.Handler):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in LONG_WAITS

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            _say(record.getMessage(), "dim")
        else:
            _say(f"{record.levelname.lower()}: {record.getMessage()}", "yellow")


def yield_cores() -> None:
    """Let threads that wait for work sleep, so that other programs on the machine can compute.

    The OpenMP runtimes that torch may bring spin by default: on cores that are shared, each then
    waits for the other's spinning. They read these variables when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def quiet_third_parties() -> None:
    """Leave the terminal to mima: no other library's progress bars, notices and warnings.

    Only commands call this; whoever imports mima keeps their own settings. It must come before
    those libraries are imported, since they read these variables once.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers raises its errors as exceptions, too
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"mima(\.|$)")
    warnings.showwarning = _show_warning
    logger = logging.getLogger("mima")
    if not logger.handlers:
        logger.addHandler(_OneLine())
        logger.propagate = False
        for name in LONG_WAITS:
            logging.getLogger(name).setLevel(logging.INFO)


@dataclass
class _Task:
    description: str
    total: float | None
    note: str
    tenths: int = 0


class Lines:
    """Progress where output is no terminal: a line for each tenth of a task."""

    FEWEST = 10
    """Tasks of fewer parts are over before their lines would tell anything."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: list[_Task] = []

    def add_task(self, description: str, *, total: float | None = None, note: str = "") -> Any:
        """As rich's ``Progress``."""
        self._tasks.append(_Task(description, total, note))
        return len(self._tasks) - 1

    def update(
        self,
        task_id: int,
        *,
        completed: float | None = None,
        total: float | None = None,
        note: str | None = None,
    ) -> None:
        """As rich's ``Progress``."""
        shown = self._tasks[task_id]
        shown.total = shown.total if total is None else total
        shown.note = shown.note if note is None else note
        if completed is None or shown.total is None or shown.total < self.FEWEST:
            return
        tenths = int(10 * completed / shown.total)
        if tenths > shown.tenths:
            shown.tenths = tenths
            said = f"{shown.description}: {completed:g} of {shown.total:g}"
            tell(f"{said} · {shown.note}" if shown.note else said, self._console)


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first on, as have room in a line."""
    text = ""
    for part in parts:
        longer = f"{text} · {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


@contextmanager
def progress() -> Iterator[Bars]:
    """Progress with work done and time left on stderr, or a line for each tenth of the work."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = stderr()
    # torchrun's other processes would draw over the main one's
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield bars
