"""How soon the command line answers: help, mistakes, and the demonstration's first line.

    python -m benchmarks.start_up [--runs 5]

Prints the best and the median of the runs, each a process of its own, and the least that one
computed, which depends less on what else the machine is doing. Exits with 1 where a best one is
over its target. Each answer is checked before its time counts.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

MIMA = (sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "mima")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A command line and what it answers."""

    arguments: tuple[str, ...]
    says: str
    code: int | None
    """Exit status; None: killed after its first line."""
    seconds: float = 0.7
    """The target."""


ANSWERS = (
    Answer(arguments=("--help",), says="Usage", code=0),
    Answer(arguments=("immunize", "--help"), says="Usage", code=0),
    Answer(arguments=("evaluate", "--help"), says="Usage", code=0),
    Answer(arguments=("--version",), says="mima", code=0),
    Answer(arguments=("smaple", "x"), says="No such command", code=2),
    Answer(arguments=("sample", "x", "--sedd", "3"), says="No such option", code=2),
    Answer(arguments=("sample", "x", "--seed", "three"), says="valid integer", code=2),
    Answer(arguments=("immunize", "absent.yaml"), says="absent.yaml", code=2),
    Answer(arguments=("adapt", "absent", "-o", "out"), says="absent", code=2),
    Answer(arguments=("sample", "x", "--model", "absent.safetensors"), says="absent", code=2),
    Answer(arguments=("report", "absent"), says="absent", code=2),
    Answer(arguments=("demo", "-o", "out"), says="results in out", code=None, seconds=1.0),
)


def seconds_of(answer: Answer) -> tuple[float, float]:
    """How long one run took, from its start to its end or its first line, and computed.

    Raises:
        RuntimeError: it said something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            [*MIMA, *answer.arguments],
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        with process:
            text = process.stdout.readline() if answer.code is None else process.stdout.read()
            if answer.code is not None:
                process.wait()
            took = time.perf_counter() - began
            process.kill()
    if answer.says not in text or answer.code not in (None, process.returncode):
        raise RuntimeError(f"mima {' '.join(answer.arguments)}: {process.returncode}: {text}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, print a table, and return 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args(arguments).runs
    print("| command | best s | median s | computed s | target s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    missed = False
    for answer in ANSWERS:
        took, computed = zip(*(seconds_of(answer) for _ in range(runs)), strict=True)
        missed |= min(took) > answer.seconds
        command = "mima " + " ".join(answer.arguments)
        times = (min(took), statistics.median(took), min(computed), answer.seconds)
        print(f"| `{command}` | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
