"""Checkpoints that are whole or not there, each with checksums; the one before is kept, too."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mima.errors import MimaError, one_line, quoted
from mima.storage.atomic import (
    WRITING_ERRORS,
    beside,
    reason_of,
    recover,
    remove,
    sha256_of,
    staged,
)
from mima.storage.inputs import expanded
from mima.storage.plain_data import read_json
from mima.storage.tensor_files import mapped_if_intact, save_checked, save_tensors

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""What says whose run the folder is."""
WHOLE_FILE = "state.safetensors"
"""The tensors of a checkpoint that one process wrote."""
SHARDS_FILE = ".metadata"
"""What torch.distributed.checkpoint says of those that several processes wrote in shards."""
SUMS_FILE = "SHA256SUMS"
"""Checksums of a checkpoint's files, in the form that ``sha256sum -c`` reads."""

Save = Callable[[Path, Mapping[str, torch.Tensor]], Mapping[str, str]]
Load = Callable[[Path], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood after a step.

    Attributes:
        step: steps done.
        tensors: parameters and optimizer states, by name.
        state: the rest, as plain data.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """A folder with the last two checkpoints of a run, and what is costly to compute again.

    It is made when something is first written. Nothing in it is ever half-written: a process may be
    killed, or the disk may fill, at any moment. Every checkpoint has checksums; where the last one
    is damaged, the one before is used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path).absolute()
        self._intact: Path | None = None

    def __truediv__(self, name: str) -> CheckpointFolder:
        """A folder inside, for one part of a run."""
        return CheckpointFolder(self.path / name)

    def exists(self) -> bool:
        """Whether a run has been here, for longer than it takes to say whose the folder is."""
        # what a run leaves that is killed while it writes this first
        begun, _ = beside(self.path / RUN_FILE)
        return self.path.is_dir() and any(entry != begun for entry in self.path.iterdir())

    def check_own(self) -> None:
        """Refuse a folder that holds files which no run wrote: `remove` would take them along.

        Raises:
            MimaError: it does, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise MimaError(f"checkpoint: {self.path} is a file, expected a folder")
        if self.exists() and not (self.path / RUN_FILE).is_file():
            raise MimaError(
                f"checkpoint: {self.path} holds files that no run wrote, and would be removed at "
                "its end; name an empty folder, or one that does not exist"
            )

    def remove(self) -> None:
        """Remove all that is in the folder, and the folder unless it is a link.

        What says whose it is goes last: where a removal is cut short, or something cannot be
        removed, which a warning names, no other run takes a step of this one for its own.
        """
        if not self.path.is_dir():
            return
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name == RUN_FILE)
        if all(map(_removed, entries)) and not self.path.is_symlink():
            _removed(self.path, Path.rmdir)

    def write(self, checkpoint: Checkpoint, save: Save | None = None) -> None:
        """Write a checkpoint; of the earlier ones, the last is kept.

        One that cannot be removed, as where another machine reads it, stays, with a warning.

        Args:
            checkpoint: what is written.
            save: writes the tensors to a folder and returns checksums of the files that it has
                read already, by name; by default to one safetensors file.

        Raises:
            MimaError: the disk is full or the folder is not writable; the checkpoints that are
                there are as they were.
        """
        final = self.path / f"step-{checkpoint.step:08d}"
        if final == self._intact:
            return
        # remove, or complete, checkpoints that a killed process was writing
        for stale in self.path.glob(".step-*.partial"):
            _removed(self.path / stale.name.removeprefix(".").removesuffix(".partial"), recover)

        def fill(folder: Path) -> None:
            folder.mkdir()
            known = (save or _save_whole)(folder, checkpoint.tensors)
            text = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1)
            _write_text(folder / "state.json", text)
            sums = [
                f"{known.get(file.name) or sha256_of(file)}  {file.name}"
                for file in sorted(folder.iterdir())
            ]
            _write_text(folder / SUMS_FILE, "\n".join(sums))

        self._put(final, fill)
        before = [] if self._intact is None else [self._intact]
        self._intact = final
        # keep the new one and the last that could be read
        for other in self._steps():
            if other not in (final, *before):
                _removed(other)

    def latest(self, load: Load | None = None) -> Checkpoint | None:
        """The last checkpoint that is intact, or None where there is none at all.

        A damaged one is named in a warning.

        Args:
            load: reads the tensors from the checkpoint's folder, whose files are intact; by default
                all of them, whole, whichever way they were written.

        Raises:
            MimaError: all are damaged.
        """
        found = latest_of_all([self], load)
        return None if found is None else found[0]

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Refuse a checkpoint that is whole, but holds something else than what is looked for.

        Raises:
            MimaError: the block lacked a name in it, or found a value of another kind.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, MimaError):
                raise
            raise MimaError(
                f"checkpoint: {self._intact} holds no such run: {one_line(repr(error))}; "
                f"remove {self.path} to begin anew (overwrite)"
            ) from error

    def write_json(self, name: str, value: object) -> None:
        """Write plain data to a file of this folder."""
        self._put(self.path / name, lambda path: _write_text(path, json.dumps(value, indent=1)))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What ``write_json`` wrote of a mapping, or None.

        Raises:
            MimaError: it cannot be read, or is no mapping.
        """
        path = self.path / name
        return _read_mapping(path) if path.is_file() else None

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors to a file of this folder, with a checksum."""
        self._put(self.path / name, lambda path: save_checked(path, tensors))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """What ``write_tensors`` wrote, mapped from the file rather than kept in memory, or None.

        Where it is damaged, it is None with a warning.
        """
        return mapped_if_intact(self.path / name)

    def _steps(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))

    def _put(self, final: Path, fill: Callable[[Path], None]) -> None:
        try:
            with staged(final) as partial:
                fill(partial)
        except WRITING_ERRORS as error:
            kept = self._steps()
            hint = f"; {kept[-1].name} is intact" if kept else ""
            raise MimaError(
                f"checkpoint: cannot write {final}: {reason_of(error)}{hint}"
            ) from error


def latest_of_all(
    folders: Sequence[CheckpointFolder], load: Load | None = None
) -> list[Checkpoint] | None:
    """The intact checkpoints of the last step of which every folder has one; None without such.

    Damaged ones are named in a warning, and so are folders that have checkpoints, but none of the
    same step, as those of runs that were stopped before all had written their first.

    Raises:
        MimaError: all that there are of a step in every folder are damaged.
    """
    steps = [{step.name for step in folder._steps()} for folder in folders]
    problems: list[tuple[CheckpointFolder, str]] = []
    for name in sorted(set.intersection(*steps), reverse=True):
        found = []
        for folder in folders:
            try:
                found.append(_read(folder.path / name, load or load_whole))
            except MimaError as error:
                problems.append((folder, str(error)))
                break
        else:
            for _, problem in problems:
                logger.warning("%s; going on from %s", problem, name)
            for folder in folders:
                folder._intact = folder.path / name
            return found
    if problems:
        folder, problem = problems[0]
        raise MimaError(f"{problem}; remove {folder.path} to begin anew (overwrite)")
    if any(steps):
        logger.warning(
            "checkpoint: %s have none of the same step; beginning anew",
            ", ".join(str(folder.path) for folder in folders),
        )
    return None


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, also of one that several processes wrote in shards."""
    if (folder / WHOLE_FILE).is_file():
        # copies: a mapped file must not be what an optimizer writes into
        return {name: value.clone() for name, value in load_file(folder / WHOLE_FILE).items()}
    kept = kept_in_shards(folder)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in kept.items()}
    with warnings.catch_warnings():
        # torch warns of no_dist, by which this process reads alone on purpose
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        distributed_checkpoint().load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def kept_in_shards(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype, by name, of what several processes wrote in shards."""
    metadata = distributed_checkpoint().FileSystemReader(folder).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }


def distributed_checkpoint() -> Any:
    """``torch.distributed.checkpoint``, whose import takes a second."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _removed(path: Path, how: Callable[[Path], None] = remove) -> bool:
    """Remove something, or warn that it stays."""
    try:
        how(path)
    except OSError as error:
        logger.warning("checkpoint: cannot remove %s: %s", path, reason_of(error))
        return False
    return True


def _save_whole(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    save_tensors(folder / WHOLE_FILE, tensors)
    return {}


def _read(step: Path, load: Load) -> Checkpoint:
    """Read a checkpoint whose files are what was written.

    Raises:
        MimaError: they are not, or cannot be read.
    """
    try:
        lines = (step / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        there = {file.name for file in step.iterdir()} - {SUMS_FILE}
        needed = {"state.json", SHARDS_FILE if SHARDS_FILE in there else WHOLE_FILE}
        if missing := (needed | wanted.keys()) - there:
            raise MimaError(f"checkpoint: {step} is damaged: it lacks {quoted(min(missing))}")
        for name in sorted(there):
            if sha256_of(step / name) != wanted.get(name):
                raise MimaError(f"checkpoint: {step / name} is damaged: its checksum is another")
        tensors = load(step)
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise MimaError(f"checkpoint: cannot read {step}: {reason_of(error)}") from error
    state = _read_mapping(step / "state.json")
    if state.get("step") != int(step.name.removeprefix("step-")):
        raise MimaError(f"checkpoint: {step / 'state.json'} is of another step")
    return Checkpoint(state.pop("step"), tensors, state)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MimaError(f"checkpoint: cannot read {path}: {reason_of(error)}") from error
    except MimaError as error:
        raise MimaError(f"checkpoint: cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise MimaError(f"checkpoint: {path} is damaged: expected a mapping")
    return value


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
