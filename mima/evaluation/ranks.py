"""Share an evaluation out among the processes that torchrun started, through its folder.

Whoever is free takes the next task: it makes a file that nobody else can make. Pictures are in the
folder anyway, so that all processes have to see it. The main process takes over what others have
finished after each task of its own, and what the folder does not show it yet when all tasks are
done, for another machine's files may be late, from the others themselves. What it had not taken
over when it was killed, it finds later.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError

from mima.distributed import ALONE, Ranks, join
from mima.errors import MimaError
from mima.evaluation.bench import Bench, Task
from mima.evaluation.records import AttackRow, CurvePoint
from mima.evaluation.tuning import TrialRow
from mima.evaluation.worker import Advance, Outcome, Result, Worker
from mima.storage.output import write_whole

SHARED = "shared"
"""The folder, in that of the evaluation, of what is taken and of what others than the main process
have finished."""
PATIENCE = timedelta(days=30)
"""How long a process waits for the others' attacks; one that died is noticed by its pulse, long
before."""


def join_patiently(device: str) -> Ranks:
    """Join the other processes that torchrun started, if it did, to wait for each other's attacks.

    Raises:
        MimaError: they cannot be reached.
    """
    ranks = join(torch.device(device))
    if ranks.size == 1:
        return ALONE
    return Ranks(ranks.rank, ranks.size, dist.new_group(timeout=PATIENCE, backend="gloo"))


class SharedFolder:
    """What the processes of one evaluation tell each other, in its folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SHARED

    def clear(self) -> None:
        """Forget what is there, and make it anew."""
        self.remove()
        self._path.mkdir(parents=True)

    def remove(self) -> None:
        """Leave nothing of it."""
        shutil.rmtree(self._path, ignore_errors=True)

    def take(self, stage: int, count: int) -> Iterator[int]:
        """Numbers of a stage's tasks that nobody has taken, each taken as it is yielded."""
        for number in range(count):
            try:
                taken = os.open(
                    self._path / f"taken-{stage}-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY
                )
            except FileExistsError:
                continue
            os.close(taken)
            yield number

    def put(self, stage: int, number: int, result: Result) -> None:
        """Hand a finished task's result to the main process."""
        text = json.dumps(_plain(result))
        write_whole(self._path / f"{stage}-{number}.json", text.encode())

    def arrived(self, stage: int | None = None) -> Iterator[tuple[int, Result]]:
        """Results that others have handed over since the last call, and their numbers.

        Args:
            stage: that of the tasks; None for all.

        Raises:
            MimaError: one is damaged.
        """
        for file in sorted(self._path.glob(f"{'*' if stage is None else stage}-*.json")):
            try:
                result = _result(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
                raise MimaError(f"evaluation: {file} is damaged: {error}") from error
            yield int(file.stem.partition("-")[2]), result
            file.unlink()


def over_ranks(
    ranks: Ranks,
    shared: SharedFolder,
    bench: Bench,
    worker: Worker,
    tasks: deque[Task],
    advance: Advance,
) -> Iterator[tuple[Task, Result]]:
    """Run tasks in all processes; the main one gets each with its result as it learns of it.

    The main process' tasks alone count. It may append more meanwhile, which begin when everything
    before them is done. ``advance`` is called there with the work of tasks that others did.
    """
    stage = 0
    while staged := ranks.broadcast(list(tasks)):
        tasks.clear()
        mine: dict[int, Result] = {}
        left = dict(enumerate(staged))
        for number in shared.take(stage, len(staged)):
            mine[number] = worker.run(staged[number])
            if ranks.main:
                yield left.pop(number), mine[number]
                yield from _others(shared.arrived(stage), left, bench, advance)
            else:
                shared.put(stage, number, mine[number])
        everyone = ranks.all_gather(mine)
        if ranks.main:
            told = (result for results in everyone for result in results.items())
            yield from _others(told, left, bench, advance)
        stage += 1


def _others(
    results: Iterable[tuple[int, Result]], left: dict[int, Task], bench: Bench, advance: Advance
) -> Iterator[tuple[Task, Result]]:
    for number, result in results:
        if number in left:
            task = left.pop(number)
            advance(bench.work(task))
            yield task, result


def _plain(result: Result) -> dict[str, object]:
    match result:
        case Outcome():
            rows = [row.model_dump(mode="json") for row in result.rows]
            return {"rows": rows, "points": [p.model_dump(mode="json") for p in result.points]}
        case TrialRow():
            return {"trial": result.model_dump(mode="json")}
        case None:
            return {}


def _result(plain: dict[str, list[object]]) -> Result:
    if "trial" in plain:
        return TrialRow.model_validate(plain["trial"])
    if not plain:
        return None
    return Outcome(
        [AttackRow.model_validate(row) for row in plain["rows"]],
        [CurvePoint.model_validate(point) for point in plain["points"]],
    )
