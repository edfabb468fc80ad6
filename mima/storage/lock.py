"""One run at a time for an output: a lock on a file beside it, which the system drops at death."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mima.errors import MimaError
from mima.storage.atomic import reason_of
from mima.storage.inputs import resolved

WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""What a file system that has no locks says."""

_held: set[tuple[str, int]] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs from an output while the block lasts; a thread may lock it again within.

    Args:
        path: a file or folder, which need not exist; its folder is made where it does not.

    Raises:
        MimaError: another run has the lock, or the file system has none.
    """
    path = resolved(path)
    key = str(path), threading.get_ident()
    if key in _held:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(path, lock)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        # removed while it is locked: whoever waits for this very file sees that it is gone
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def check_locks(path: Path, folder: Path) -> None:
    """Lock a file in a folder, which stays there, on behalf of an output.

    Raises:
        MimaError: its file system has no locks.
    """
    os.close(_acquire(path, folder / "lock"))


def _acquire(path: Path, lock: Path) -> int:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise MimaError(f"output {path} cannot be locked: {reason_of(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise MimaError(
                f"output {path} is in use by another run (process {owner or 'unknown'}); wait for "
                "it, or choose another output"
            ) from None
        except OSError as error:
            # nobody else can have locked it
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            hint = "; its file system has none (Lustre: mount option flock)"
            raise MimaError(
                f"output {path} cannot be locked: {reason_of(error)}"
                f"{hint if error.errno in WITHOUT_LOCKS else ''}"
            ) from error
        # the run that had the lock removed the file between opening and locking
        os.close(descriptor)


def _same_file(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False
