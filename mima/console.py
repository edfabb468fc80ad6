"""What commands print: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LONG_WAITS = ("mima.training.class_images",)
"""Loggers whose notices show that a long wait is no hang; others only warn on a terminal."""


def stdout() -> Console:
    """For results."""
    return _console(stderr=False)


def stderr() -> Console:
    """For everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    # paths and prompts hold brackets and colons: [red], :cat:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def command(*words: object) -> str:
    """A mima command that can be pasted into a shell."""
    return shlex.join(["mima", *map(str, words)])


def show_error(message: str) -> None:
    """One red message."""
    from rich.text import Text

    stderr().print(Text("error: ", style="bold red") + Text(message, style="red"))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    from rich.text import Text

    stderr().print(Text(f"warning: {message}", style="yellow"))


class _OneLine(logging.Handler):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in LONG_WAITS

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        if record.levelno < logging.WARNING:
            stderr().print(Text(record.getMessage(), style="dim"))
        else:
            level = record.levelname.lower()
            stderr().print(Text(f"{level}: {record.getMessage()}", style="yellow"))


def quiet_third_parties() -> None:
    """Leave the terminal to mima: no other library's progress bars, notices and warnings.

    Only commands call this; whoever imports mima keeps their own settings. It must come before
    those libraries are imported, since they read these variables once.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # its errors come as exceptions, too
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


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars with work done and time left, on stderr; nothing where that is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = stderr()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield bars
