"""What can be said against a model, an adapter or a folder before anything heavy is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mima.errors import MimaError, quoted
from mima.storage.names import DELTA_FILE, EVALUATION_FILE, MODEL_INDEX

LONGEST_PATH = 4095
"""Bytes that Linux takes."""

_HUB_ID = re.compile(r"\b[\w\-.]{1,96}\b/\b[\w\-.]{1,96}\b", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form owner/name and what the hub allows."""
    allowed = _HUB_ID.fullmatch(name) is not None
    return allowed and "--" not in name and ".." not in name and not name.endswith(".git")


def expanded(path: str | Path) -> Path:
    """A path as people write it, `~` for somebody's home.

    Raises:
        MimaError: no file can be called so.
    """

    def no_path(why: object) -> MimaError:
        return MimaError(f"{quoted(str(path), 80)} is no path: {why}")

    try:
        names = [os.fsencode(part) for part in Path(path).parts]
        found = Path(path).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:
        raise no_path(error) from error
    if any(b"\0" in name for name in names):
        raise no_path("it holds a NUL")
    if any(len(name) > 255 for name in names):
        raise no_path("a name in it is longer than 255 bytes")
    if len(os.fsencode(found)) > LONGEST_PATH:
        raise no_path(f"it is longer than {LONGEST_PATH} bytes")
    return found


def resolved(path: Path) -> Path:
    """A path from the root on, links followed; those that lead in a circle stay.

    ``Path.resolve`` raises RuntimeError for such links before Python 3.13.
    """
    return Path(os.path.realpath(path))


def check_model(name: str | Path) -> None:
    """Refuse a model that is not there; whether a hub has it shows when it is fetched.

    Raises:
        MimaError: no folder, file or possible hub id; a file or a folder of another kind.
    """
    path = expanded(name)
    if name == "embedded":
        return
    if path.is_file():
        if path.suffix != ".safetensors":
            raise MimaError(f"model: {path} is a file; only .safetensors files are opened")
    elif path.is_dir():
        if not (path / MODEL_INDEX).is_file():
            raise MimaError(f"model: {path} has no {MODEL_INDEX}: not a diffusers folder")
    elif not is_hub_id(str(name)):
        raise MimaError(
            f"model: {str(name)!r} is neither a folder, a .safetensors file, 'embedded', "
            "nor a hub id of the form owner/name"
        )


def check_adapters(adapters: Iterable[str | Path]) -> None:
    """Refuse adapters that are not there, all in one error.

    Raises:
        MimaError: names them.
    """
    absent = [str(adapter) for adapter in adapters if not expanded(adapter).exists()]
    if absent:
        raise MimaError(f"no such adapter: {', '.join(absent)}")


def delta_file(path: str | Path) -> Path:
    """The file of a delta, from itself or from the folder that holds it.

    Raises:
        MimaError: there is none.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / DELTA_FILE
    if not path.is_file():
        raise MimaError(f"delta {path} does not exist")
    return path


def evaluation_file(folder: Path) -> Path:
    """The file that says what a folder's evaluation found.

    Raises:
        MimaError: there is none.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        raise MimaError(f"{folder} holds no {EVALUATION_FILE}: mima evaluate writes such folders")
    return path
