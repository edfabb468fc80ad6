"""Output folders that appear whole or not at all, and never cost anybody's files."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mima.errors import MimaError
from mima.storage.atomic import WRITING_ERRORS, is_of_the_disk, reason_of, recover, staged
from mima.storage.inputs import expanded, resolved
from mima.storage.lock import check_locks, locked
from mima.storage.names import EVALUATION_FILE
from mima.storage.record import RECORD_FILE

if TYPE_CHECKING:
    from PIL import Image

LONGEST_NAME = 200
OUR_FILES = (RECORD_FILE, EVALUATION_FILE)
"""A folder with none of these is not ours to replace: models and adapters of others have the names
that ours have."""


def check_folder(
    path: Path, *, overwrite: bool, resume: bool = False, in_place: bool = False
) -> None:
    """Refuse an output folder before any long work starts.

    With ``overwrite``, earlier results there may be replaced; a finished run cannot be resumed.
    What is written ``in_place``, file by file, may be in a mount point.

    Raises:
        MimaError: it is a file or a mount point, holds files that may not be replaced, or cannot be
            written.
    """
    path = _checked_name(path)
    if path.exists() and not path.is_dir():
        raise MimaError(f"output {path} is a file, expected a folder")
    # writing replaces the folder: a shell within would stand in a deleted one
    if resolved(path) in (Path.cwd(), *Path.cwd().parents):
        raise MimaError(f"output {path} is or holds the working directory; name a folder in it")
    if not in_place and resolved(path).is_mount():
        raise MimaError(f"output {path} is a mount point; name a folder in it")
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if resume and RECORD_FILE in held and not overwrite:
        raise MimaError(
            f"output folder {path} holds a finished run, there is nothing to resume; "
            "choose another, or use --overwrite to do it again"
        )
    if held and not overwrite:
        raise MimaError(f"output folder {path} is not empty; choose another, or use --overwrite")
    if held and not any((path / name).exists() for name in OUR_FILES):
        raise MimaError(
            f"output folder {path} holds files that mima did not write ({held[0]}, ...); "
            "choose another, or remove it yourself"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    _check_writable(path, parent, locks=True)


def check_file(path: Path, *, overwrite: bool) -> None:
    """The same as `check_folder` for one output file."""
    path = _checked_name(path)
    if path.is_dir():
        raise MimaError(f"output {path} is a folder, expected a file")
    if path.exists() and not overwrite:
        raise MimaError(f"output {path} exists; choose another, or use --overwrite")
    if not path.absolute().parent.is_dir():
        raise MimaError(f"output {path}: there is no folder {path.absolute().parent}")
    _check_writable(path, path.absolute().parent)


def _checked_name(path: Path) -> Path:
    path = expanded(path)
    # the folder that is written beside it, and then renamed, has a longer name
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise MimaError(f"output {path}: the name is longer than {LONGEST_NAME} bytes")
    if resolved(path).is_symlink():
        raise MimaError(f"output {path}: its links lead in a circle")
    return path


def _check_writable(path: Path, parent: Path, *, locks: bool = False) -> None:
    """Write beside an output: permissions do not say all, of root and of some file systems."""
    try:
        with tempfile.TemporaryDirectory(prefix=".mima-", dir=parent) as folder:
            if locks:
                check_locks(path, Path(folder))
    except OSError as error:
        raise MimaError(
            f"output {path} cannot be made: {parent} is not writable: {reason_of(error)}"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of a results folder, which appears or is replaced whole.

    Raises:
        MimaError: it cannot be written.
    """
    try:
        with staged(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise MimaError(f"cannot write {path}: {reason_of(error)}") from error


def write_picture(path: Path, image: Image.Image, kind: str = "PNG") -> None:
    """Write a picture of a results folder, as `write_whole`; `kind` is Pillow's name for it."""
    data = io.BytesIO()
    image.save(data, format=kind)
    write_whole(path, data.getvalue())


@contextmanager
def fresh_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write results to, which takes its place when the block ends without an error.

    What was at `path` stays there until then, and stays for good if the block raises. No other run
    can write there meanwhile.

    Yields:
        An empty folder beside `path`.

    Raises:
        MimaError: as for `check_folder`; another run is writing there; or the disk is full.
    """
    # a link to a folder stays one
    path = resolved(expanded(path))
    check_folder(path, overwrite=overwrite)
    with locked(path):
        # a killed run may have moved the folder away
        recover(path)
        check_folder(path, overwrite=overwrite)
        try:
            with staged(path) as staging:
                staging.mkdir()
                yield staging
        except WRITING_ERRORS as error:
            if not is_of_the_disk(error):
                raise
            raise MimaError(f"output: cannot write {path}: {reason_of(error)}") from error


def slug(text: str, *, longest: int = 80, default: str = "picture") -> str:
    """A file name of at most so many bytes from words: letters and digits of any script, dashes.

    Where nothing is left of the words, it is the default.
    """
    name = re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-")
    # a character cut in half is left out
    return name.encode()[:longest].decode(errors="ignore").strip("-") or default
