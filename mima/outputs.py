"""Folders that a run writes: never overwritten by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

from mima.errors import MimaError


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Make a new, empty folder for a run's results.

    Args:
        folder: it may exist if it is empty.
        overwrite: empty it first, if it looks like results of mima or of diffusers.

    Raises:
        MimaError: it holds files and may not be emptied, or it cannot be made.
    """
    folder = Path(folder).expanduser()
    try:
        if folder.exists() and not folder.is_dir():
            raise MimaError(f"output: {folder} exists and is not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            if not overwrite:
                raise MimaError(f"output: {folder} is not empty; use --overwrite to replace it")
            if not any((folder / mark).exists() for mark in ("results.json", "model_index.json")):
                raise MimaError(
                    f"output: {folder} does not look like earlier results, so it is not "
                    "overwritten; choose another folder"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".mima-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MimaError(f"output: cannot write {folder}: {error.strerror}") from error
    return folder
