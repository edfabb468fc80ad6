"""Files and folders that appear whole or not at all: written aside, flushed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mima.errors import one_line

WRITING_ERRORS = (OSError, SafetensorError)
"""What writing raises where the disk is full or read-only; safetensors has an error of its own."""

_OF_THE_DISK = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.EBUSY, errno.EXDEV),
    }
)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Make a file or folder appear whole, in place of the one that was there.

    If the block raises, ``final`` is as it was, and nothing is left beside it. A process that is
    killed may leave ``.NAME.partial`` or ``.NAME.replaced``; the next ``staged`` clears both. The
    folder that it is in is made where it does not exist.

    Yields:
        A path beside it, where the block writes the file or makes the folder.

    Raises:
        OSError: it cannot be written.
    """
    partial, replaced = beside(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    try:
        yield partial
        flush(partial)
        # a folder cannot be renamed onto one that holds files; an empty one of a container's image
        # cannot be renamed itself
        if final.is_dir() and any(final.iterdir()):
            final.rename(replaced)
        try:
            partial.replace(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        flush_names(final.parent)
        remove(replaced)
    finally:
        remove(partial)


@contextmanager
def staged_by_several(final: Path) -> Iterator[Path]:
    """Make a file or folder appear whole where other processes may be making the same.

    Each has a name of its own beside it. A file takes the place of the one that was there; a folder
    that was there stays. If the block raises, nothing is left; a process that is killed may leave
    ``.NAME.*.partial``.

    Yields:
        A path beside it, where the block writes the file or makes the folder.

    Raises:
        OSError: it cannot be written.
    """
    partial, _ = beside(final.with_name(f"{final.name}.{uuid.uuid4().hex}"))
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        flush(partial)
        try:
            partial.replace(final)
        except OSError:
            # a folder cannot be renamed onto one that holds files: another process was quicker
            if not final.is_dir():
                raise
        flush_names(final.parent)
    finally:
        remove(partial)


def recover(final: Path) -> None:
    """Clear what a killed ``staged`` left; a folder that it had moved away comes back."""
    partial, replaced = beside(final)
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    remove(replaced)
    remove(partial)


def beside(final: Path) -> tuple[Path, Path]:
    """What a killed ``staged`` may leave: of the new one, and of the one that was there."""
    return (
        final.with_name(f".{final.name}.partial"),
        final.with_name(f".{final.name}.replaced"),
    )


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk itself."""
    if path.is_dir():
        for entry in path.iterdir():
            flush(entry)
    flush_names(path)


def flush_names(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_of_the_disk(error: Exception) -> bool:
    """Whether a disk is full, read-only or broken, rather than a program wrong."""
    return not isinstance(error, OSError) or error.errno in _OF_THE_DISK


def reason_of(error: Exception) -> str:
    """Why something could not be read or written, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def sha256_of(path: Path) -> str:
    """A file's SHA-256, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
