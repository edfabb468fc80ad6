"""Damage files of every kind that mima reads, and count how its readers take it.

    python tools/fuzz.py                                   # ten thousand inputs for every parser
    python tools/fuzz.py --inputs 500 YAML PNG             # fewer, for some of them
    python tools/fuzz.py --results r.json --seconds 60     # a minute of it, then go on another time
    python tools/fuzz.py --results r.json --write docs/security.md

`tests/support/fuzzing.py` says what is damaged how, and what the outcomes are. Inputs are drawn in
slices, each from the parser's name, the seed and its own number. Finished slices stand in
`--results` and are not run again, unless something in them was not taken well. Inputs that were not
taken well are kept in `--keep`; those that showed something are in `tests/corpus`, which the tests
read again. `TMPDIR=/dev/shm` makes it faster: folders are made for each input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diffusers.utils.logging
import transformers.utils.logging
from support.fuzzing import OUTCOMES, Parser, damaged, outcome_of, parsers

from mima.console import quiet_third_parties

ROOT = Path(__file__).parents[1]
SLICE = 500
BAD = OUTCOMES[2:]
BEGIN, END = "<!-- written by tools/fuzz.py -->", "<!-- until here -->"

Results: TypeAlias = "dict[str, dict[str, dict[str, int]]]"
"""By parser, and by a slice's seed, number and size: how many inputs had each outcome."""


def fuzz(
    name: str, parser: Parser, inputs: int, seed: int, number: int, keep: Path | None
) -> Counter[str]:
    """Read a slice of damaged inputs and count outcomes; of each kind of accident, print one."""
    draw, found, seen = random.Random(f"{name} {seed} {number}"), Counter[str](), set[str]()
    for index in range(inputs):
        data = damaged(parser, draw)
        outcome, problem = outcome_of(parser, data)
        found[outcome] += 1
        if outcome not in BAD:
            continue
        where = str(problem)
        if isinstance(problem, BaseException):
            frames = traceback.extract_tb(problem.__traceback__)
            own = [frame for frame in frames if "/mima/" in frame.filename] or frames
            where = f"{type(problem).__name__} at {own[-1].filename}:{own[-1].lineno}"
        if where in seen:
            continue
        seen.add(where)
        print(f"{name}: {outcome}: {where}: {str(problem)[:200]}", file=sys.stderr, flush=True)
        if keep is not None:
            place = keep / name.replace("/", "-").replace(" ", "-")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{seed}-{number * SLICE + index}-{outcome}").write_bytes(data)
    return found


def table(results: Results) -> str:
    """Outcomes by parser, in Markdown."""
    lines = [
        "| " + " | ".join(("parser", "inputs", *OUTCOMES)) + " |",
        "|---|---|" + "---|" * len(OUTCOMES),
    ]
    for name, slices in results.items():
        found = Counter[str]()
        for counts in slices.values():
            found.update(counts)
        cells = (name, found.total(), *(found[outcome] for outcome in OUTCOMES))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(page: Path, results: Results) -> None:
    """Put the table into a page, in place of the one that the page has."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    names = ("torch", "diffusers", "transformers", "safetensors", "pillow", "pyyaml")
    told = (
        f"Written on {datetime.now(tz=timezone.utc):%Y-%m-%d} at commit {commit}, Python "
        f"{sys.version.split()[0]}, {', '.join(f'{name} {version(name)}' for name in names)}."
    )
    page.write_text(f"{before}{BEGIN}\n{told}\n\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print a table of outcomes, and exit with 1 if anything was not taken well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parsers", nargs="*", help="by default all")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for inputs that were not taken well")
    parser.add_argument("--results", type=Path, help="a file that keeps the counts of slices")
    parser.add_argument("--seconds", type=float, help="begin no slice after so much computing")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    arguments = parser.parse_args()
    quiet_third_parties()
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    file = arguments.results
    results: Results = {}
    if file is not None and file.exists():
        results = json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as place:
        known = parsers(Path(place))
        unknown = [name for name in arguments.parsers if name not in known]
        if unknown:
            parser.error(f"no parser {', '.join(unknown)}; there are {', '.join(known)}")
        results = {name: results.get(name, {}) for name in known}
        made: dict[str, Parser] = {}
        # in turns, so that a run that is stopped has read about as much of each
        for start in range(0, arguments.inputs, SLICE):
            inputs, number = min(SLICE, arguments.inputs - start), start // SLICE
            key = f"{arguments.seed}-{number}-{inputs}"
            for name in arguments.parsers or known:
                earlier = results[name].get(key)
                if earlier is not None and not any(earlier.get(outcome) for outcome in BAD):
                    continue
                if arguments.seconds is not None and time.process_time() > arguments.seconds:
                    break
                if name not in made:
                    made[name] = known[name]()
                found = fuzz(name, made[name], inputs, arguments.seed, number, arguments.keep)
                results[name][key] = dict(found)
                if file is not None:
                    aside = file.with_suffix(".new")
                    aside.write_text(json.dumps(results, indent=1))
                    os.replace(aside, file)
    results = {name: slices for name, slices in results.items() if slices}
    print(table(results))
    if arguments.write is not None:
        write(arguments.write, results)
    counts = [counts for slices in results.values() for counts in slices.values()]
    sys.exit(any(found.get(outcome) for found in counts for outcome in BAD))


if __name__ == "__main__":
    main()
