"""Damage files of every kind that mima reads, and count how its readers take it.

    python tools/fuzz.py --inputs 10000            # every parser
    python tools/fuzz.py --inputs 500 YAML PNG     # some of them

`tests/support/fuzzing.py` says what is damaged how, and what the outcomes are. A model folder,
which takes a second to open, is given a 160th of the inputs for each of its files. Inputs that
were not taken well are kept in `--keep`; those that showed something are in `tests/corpus`, which
the tests read again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.fuzzing import OUTCOMES, Parser, damaged, outcome_of, parsers

from mima.console import quiet_third_parties


def fuzz(name: str, parser: Parser, inputs: int, seed: int, keep: Path | None) -> Counter[str]:
    """Read damaged inputs and count the outcomes; of each kind of accident, print the first."""
    draw, found, seen = random.Random(f"{name} {seed}"), Counter[str](), set[str]()
    for number in range(-(-inputs // parser.cost)):
        data = damaged(parser, draw)
        outcome, problem = outcome_of(parser, data)
        found[outcome] += 1
        if outcome in ("ok", "refused"):
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
            (place / f"{seed}-{number}-{outcome}").write_bytes(data)
    return found


def main() -> None:
    """Print a table of outcomes, and exit with 1 if anything was not taken well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parsers", nargs="*")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    quiet_third_parties()
    warnings.simplefilter("ignore")
    bad = 0
    print("| parser | inputs |", " | ".join(OUTCOMES), "|\n|---|---|" + "---|" * len(OUTCOMES))
    with tempfile.TemporaryDirectory() as place:
        known = parsers(Path(place))
        for name in arguments.parsers or known:
            found = fuzz(name, known[name](), arguments.inputs, arguments.seed, arguments.keep)
            counts = (found.total(), *(found[outcome] for outcome in OUTCOMES))
            print(f"| {name} |", " | ".join(map(str, counts)), "|", flush=True)
            bad += sum(found[outcome] for outcome in OUTCOMES[2:])
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
