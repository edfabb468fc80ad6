"""What can go wrong with a disk, and with a process."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support import immunizing, tiny

from mima.adaptation import configure
from mima.adaptation.resumable import adapt
from mima.concepts import Concept
from mima.evaluation import evaluate
from mima.storage.output import fresh_folder

SAMPLER = {"steps": 2, "batch_size": 16}
GRID = {
    "methods": {"lora": {"rank": 2, "learning_rate": 3e-3, "steps": 4}},
    "lr_factors": (1.0,),
    "seeds": (0, 1),
    "evaluations": 2,
    "max_prompts": 1,
    "benign_prompts": 0,
    "sampler": SAMPLER,
}


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def learn(model: Path, output: Path, method: str) -> None:
    """Adapt a tiny model by a method, or go on with it."""
    torch.set_num_threads(1)
    chosen = configure(method, {"steps": 8, "seed": 0, "num_class_images": 4})
    pictures = [tiny.picture("red", "round", seed=number) for number in range(4)]
    words = {"token": "<new1>", "initializer": "castle"}
    concept = Concept("castle", "a red <new1> castle", pictures, class_prompt="a castle", **words)
    options = {"checkpoint_every": 2, "sample_every": 0, "resume": True}
    adapt(str(model), [concept], chosen, output, **options)


def attack(model: Path, output: Path, _: str) -> None:
    """Evaluate a tiny model against itself, or go on with it."""
    torch.set_num_threads(1)
    concepts, encoder = [tiny.concept()], str(model.with_name("encoder"))
    options = {"similarities": [encoder], "settings": GRID, "processes": 1}
    evaluate(str(model), str(model), concepts, output=output, **options)


def defend(model: Path, output: Path, _: str) -> None:
    """Immunize a tiny model, or go on with it."""
    config = immunizing.settings(model.parent, steps=4, checkpoint_every=1)
    immunizing.run(model, config, output=output, resume=True)


def write(_: Path, output: Path, __: str) -> None:
    """Write a folder of files, as every command does at its end."""
    with fresh_folder(output, overwrite=True) as staging:
        for number in range(40):
            (staging / f"{number}.bin").write_bytes(bytes([number]) * 20_000)
        (staging / "mima.json").write_text("{}")


def contents(folder: Path, timed: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file of a folder, but for those that say how long something took."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name not in timed}


def killed_and_resumed(
    context: Any,
    work: Callable[[Path, Path, str], None],
    model: Path,
    place: Path,
    detail: str,
    *,
    kills: int,
    timed: tuple[str, ...] = (),
) -> None:
    """Kill a piece of work at random points, let it end, and compare with one left alone.

    Args:
        context: makes processes.
        work: called with ``model``, an output and ``detail``; goes on where it was stopped.
        model: the model.
        place: a folder for the outputs.
        detail: of the work.
        kills: how often; where the work ends before, it begins again, and all ends are compared.
        timed: files that differ from run to run, by name.
    """

    def start(output: Path) -> Any:
        process = context.Process(target=work, args=(model, output, detail))
        process.start()
        return process

    began = time.perf_counter()
    alone = start(place / "alone")
    alone.join()
    length = time.perf_counter() - began
    assert alone.exitcode == 0
    expected = contents(place / "alone", timed)

    chance, done, number = random.Random(f"{work.__name__} {detail}"), 0, 0
    fresh = True
    while True:
        output = place / f"killed-{number}"
        began = time.perf_counter()
        process = start(output)
        if done < kills:
            process.join(chance.uniform(0, length))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            done += 1
            # the last write is one renaming: killed after it, all is done but for tidying up
            if contents(output, timed) != expected:
                fresh = False
                continue
        else:
            assert process.exitcode == 0
            assert contents(output, timed) == expected
            if fresh:
                # where the first run was slow, kills would come after the end
                length = min(length, time.perf_counter() - began)
            left = {path.name for path in place.iterdir()}
            assert not any(name.startswith(f".{output.name}") for name in left)
        number += 1
        fresh = True
        if done == kills:
            return
