"""Whose folder a checkpoint folder is: claimed by one run, which alone may go on with it."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mima._version import installed_versions
from mima.errors import MimaError
from mima.storage.checkpoint import RUN_FILE, CheckpointFolder
from mima.storage.plain_data import differences, flat, hashed
from mima.storage.tensor_files import fingerprint

logger = logging.getLogger(__name__)

MAY_CHANGE = frozenset({"steps", "checkpoint_every", "max_skipped", "trackers", "shards"})
"""Settings that a resumed run may change: no gradient depends on them. ``steps`` only where no
schedule stretches over them, and to no fewer than are done."""
SCHEDULES = ("upper.lr_schedule", "schedule", "word_share")
"""The settings that stretch over all steps, of an immunization and of adaptations."""


@contextmanager
def uninterrupted() -> Iterator[Sequence[object]]:
    """Put a Ctrl-C off until the block is done, and yield the signals that wait."""
    arrived: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = signal.signal(signal.SIGINT, lambda *args: arrived.append(args))
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if arrived and callable(before):
        before(*arrived[0])


def describe_run(
    config: Mapping[str, Any],
    concepts: Sequence[Mapping[str, str]],
    weights: Mapping[str, torch.Tensor],
    scheduler: Mapping[str, Any],
    benign: Sequence[Mapping[str, str]] = (),
    captions: Sequence[str] = (),
) -> dict[str, Any]:
    """What a run is, as plain data: settings, concepts, the model's fingerprint, versions.

    Args:
        config: the settings.
        concepts: what `Concept.identity` says of each.
        weights: the model's, under names that do not depend on versions.
        scheduler: its class and settings, of which the loss is made.
        benign: the same of concepts that are to stay learnable.
        captions: the ordinary captions that it reads, from whatever file.
    """
    return {
        "config": config,
        "concepts": [*concepts],
        "benign": [*benign],
        "captions": hashed("\n".join(captions)),
        "model": fingerprint(weights),
        "scheduler": json.loads(json.dumps(scheduler, default=str)),
        "versions": installed_versions(),
    }


def claim(folder: CheckpointFolder, run: Mapping[str, Any], *, resume: bool) -> None:
    """Make a checkpoint folder this run's own, or go on with it.

    Raises:
        MimaError: another run's checkpoint is there, or this run's and ``resume`` is off.
    """
    earlier = folder.read_json(RUN_FILE)
    if earlier is None:
        folder.write_json(RUN_FILE, run)
        return
    if not resume:
        raise MimaError(
            f"checkpoint: {folder.path} holds an unfinished run; go on with it (resume), "
            "or remove it (overwrite)"
        )
    if not _is_description(earlier):
        raise MimaError(
            f"checkpoint: {folder.path / RUN_FILE} is damaged: it describes no run; remove the "
            "folder to begin anew (overwrite)"
        )
    before, now = (
        {"model": r["model"], "the captions": r.get("captions"), **_settings(r)}
        for r in (earlier, run)
    )
    scheduled = any(now.get(name, "constant") != "constant" for name in SCHEDULES)
    if isinstance(earlier.get("scheduler"), dict):
        # checkpoints of before say nothing of it
        then, today = _scheduler(earlier), _scheduler(run)
        if earlier["versions"].get("diffusers") != run["versions"].get("diffusers"):
            # another version may name further settings of the same schedule
            then = {name: value for name, value in then.items() if name in today}
            today = {name: today[name] for name in then}
        before, now = before | then, now | today
    problems = [
        f"{name}: {said}"
        for name, said in differences(before, now).items()
        if name not in MAY_CHANGE or (scheduled and name == "steps")
    ]
    if problems:
        raise MimaError(
            f"checkpoint: {folder.path} belongs to another run, which differs in "
            + "; ".join(problems)
        )
    if earlier["versions"] != run["versions"]:
        logger.warning(
            "resuming under other versions: %s, now %s", *(r["versions"] for r in (earlier, run))
        )
    folder.write_json(RUN_FILE, run)


def _is_description(run: Mapping[str, Any]) -> bool:
    kinds = {"config": dict, "concepts": list, "model": str, "versions": dict}
    return all(isinstance(run.get(name), kind) for name, kind in kinds.items())


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    concepts = {
        f"{kind}.{n}": concept
        for kind in ("concepts", "benign")
        for n, concept in enumerate(run.get(kind, []))
    }
    return flat(run["config"]) | flat(concepts)


def _scheduler(run: Mapping[str, Any]) -> dict[str, Any]:
    return flat({"scheduler": run["scheduler"]})


def default_folder(output: Path) -> Path:
    """Where the checkpoints of a run go that writes its model to ``output``."""
    return output.with_name(f"{output.name}.checkpoint")


def logs_folder(output: Path) -> Path:
    """Where the trackers of such a run write files, which stay: they are no part of the model."""
    return output.with_name(f"{output.name}.logs")
