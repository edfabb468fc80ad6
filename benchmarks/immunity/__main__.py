"""The commands of the study: see `benchmarks.immunity`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import benchmarks.immunity
from benchmarks.immunity import report
from benchmarks.immunity.cells import CUTS
from benchmarks.immunity.study import Study, estimate
from mima.errors import MimaError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        "benchmarks.immunity",
        description=benchmarks.immunity.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("cells", "run", "all", "status", "keep", "report"))
    parser.add_argument("cell", nargs="?", help="of run: a name that cells prints")
    parser.add_argument("-o", "--output", type=Path, default=Path("immunity-study"))
    parser.add_argument("--cut", choices=sorted(CUTS), default="small")
    parser.add_argument(
        "--ceilings",
        type=Path,
        help="models trained without the targets, each named as a problem; default those shipped",
    )
    parser.add_argument("--processes", type=int, help="attacks at a time; default one per core")
    parser.add_argument("--docs", type=Path, help="of report: write the tables into this text too")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    study = Study(args.output, CUTS[args.cut], ceilings=args.ceilings, processes=args.processes)
    try:
        _do(args, study)
    except MimaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _do(args: argparse.Namespace, study: Study) -> None:
    processes = args.processes or len(os.sched_getaffinity(0))
    match args.command:
        case "cells":
            print("\n".join(estimate(study, study.cells(), processes)))
        case "run":
            if args.cell is None:
                raise MimaError("run: name a cell; cells prints them")
            study.run(study.cut.cell(args.cell))
        case "all":
            left = [cell for cell in study.cells() if study.status(cell) not in report.FINISHED]
            print("\n".join(estimate(study, left, processes)), flush=True)
            problems = []
            for cell in left:
                try:
                    study.run(cell)
                except MimaError as error:
                    # the others have nothing to do with it
                    problems.append(f"{cell.name}: {error}")
            if problems:
                raise MimaError("\n".join(problems))
        case "status":
            for cell in study.cells():
                print(f"{cell.name}: {study.status(cell)}")
        case "keep":
            for cell in study.cells():
                if study.status(cell) == "done":
                    print(study.keep(cell))
        case "report":
            print("\n".join(map(str, report.write(study, args.docs))))


if __name__ == "__main__":
    sys.exit(main())
