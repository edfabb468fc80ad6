"""Checkpoints that are whole or not there: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mima.errors import MimaError


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
    """A folder with the last checkpoint of a run, and what is costly to compute again.

    Nothing in it is ever half-written: a process may be killed, or the disk may fill, at any
    moment. The last checkpoint is removed only once the next one is on disk.

    Args:
        path: made when something is first written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def __truediv__(self, name: str) -> CheckpointFolder:
        """A folder inside, for one part of a run."""
        return CheckpointFolder(self.path / name)

    def exists(self) -> bool:
        """Whether a run has been here."""
        return self.path.is_dir() and any(self.path.iterdir())

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in place of the last one.

        Raises:
            MimaError: the disk is full or the folder is not writable; the last checkpoint, if any,
                is as it was.
        """
        final = self.path / f"step-{checkpoint.step:08d}"
        if final.exists():
            return
        # of steps that a killed process did not finish writing
        for stale in self.path.glob(".step-*.partial"):
            _remove(stale)

        def fill(folder: Path) -> None:
            folder.mkdir()
            _save_tensors(folder / "state.safetensors", checkpoint.tensors)
            text = json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1)
            _save_text(folder / "state.json", text)

        self._put(final, fill)
        for older in self._steps()[:-1]:
            shutil.rmtree(older)

    def latest(self) -> Checkpoint | None:
        """The last checkpoint, or None.

        Raises:
            MimaError: it is damaged.
        """
        steps = self._steps()
        if not steps:
            return None
        try:
            tensors = load_file(steps[-1] / "state.safetensors")
            state = json.loads((steps[-1] / "state.json").read_text(encoding="utf-8"))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise MimaError(f"checkpoint: cannot read {steps[-1]}: {error}") from error
        # copies: a mapped file must not be what an optimizer writes into
        return Checkpoint(
            state.pop("step"), {name: value.clone() for name, value in tensors.items()}, state
        )

    def write_json(self, name: str, value: object) -> None:
        """Write plain data to a file of this folder."""
        self._put(self.path / name, lambda path: _save_text(path, json.dumps(value, indent=1)))

    def read_json(self, name: str) -> Any:
        """What ``write_json`` wrote, or None."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise MimaError(f"checkpoint: cannot read {path}: {error}") from error

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors to a file of this folder."""
        self._put(self.path / name, lambda path: _save_tensors(path, tensors))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """What ``write_tensors`` wrote, mapped from the file rather than read, or None."""
        path = self.path / name
        return mapped(path) if path.is_file() else None

    def _steps(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))

    def _put(self, final: Path, fill: Callable[[Path], None]) -> None:
        """Make ``final`` appear whole: what ``fill`` writes aside is flushed, then renamed."""
        partial = final.with_name(f".{final.name}.partial")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # left by a process that was killed
            _remove(partial)
            fill(partial)
            if partial.is_dir():
                _flush(partial)
            partial.replace(final)
            _flush(self.path)
        except (OSError, SafetensorError) as error:
            _remove(partial)
            kept = self._steps()
            hint = f"; {kept[-1].name} is intact" if kept else ""
            raise MimaError(
                f"checkpoint: cannot write {final}: {reason_of(error)}{hint}"
            ) from error


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, mapped: pages are read when they are first used.

    Raises:
        MimaError: unreadable or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MimaError(f"cannot read {path}: {error}") from error


def spill(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move tensors to a file without a name, and map it: it goes when they do.

    Raises:
        MimaError: the disk of temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="mima-") as folder:
        path = Path(folder) / "spilled.safetensors"
        try:
            _save_tensors(path, tensors)
        except (OSError, SafetensorError) as error:
            raise MimaError(f"cannot write {path}: {reason_of(error)}") from error
        return mapped(path)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    _flush(path)


def _save_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    """Why something could not be read or written, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
