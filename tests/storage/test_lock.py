"""One run at a time for an output, whatever becomes of the run."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from mima.errors import MimaError
from mima.storage.lock import locked
from mima.storage.output import check_file, check_folder, fresh_folder

HOLDER = """
import sys, time
from pathlib import Path
from mima.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    return holder


def close(holder):
    holder.stdin.close()
    holder.stdout.close()
    return holder.wait()


def test_another_process_is_refused_and_named(tmp_path):
    holder = hold(tmp_path / "out")
    message = rf"out is in use by another run \(process {holder.pid}\)"
    with pytest.raises(MimaError, match=message), locked(tmp_path / "out"):
        raise AssertionError
    with pytest.raises(MimaError, match=message), fresh_folder(tmp_path / "out", overwrite=True):
        raise AssertionError
    # another output is free
    with locked(tmp_path / "other"):
        pass
    assert close(holder) == 0
    assert os.listdir(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path):
    holder = hold(tmp_path / "out")
    holder.kill()
    holder.wait()
    close(holder)
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_thread_may_lock_again_and_another_may_not(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path / "out"):
                pass
        except MimaError as error:
            refused.append(error)

    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other()
    assert len(refused) == 1


def test_many_processes_take_turns(tmp_path):
    """No two are ever inside together, also while the file of the lock comes and goes."""
    code = """
import sys, time
from pathlib import Path
from mima.errors import MimaError
from mima.storage.lock import locked
inside = Path(sys.argv[1]) / "inside"
done = 0
while done < 30:
    try:
        with locked(Path(sys.argv[1]) / "out"):
            inside.mkdir()
            inside.rmdir()
            done += 1
    except MimaError:
        time.sleep(0.0005)
"""
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_refused_early_and_left_as_it_was(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = (
        rf"output {tmp_path}/out cannot be locked: Function not implemented; its file system has "
        r"none \(Lustre: mount option flock\)"
    )
    with pytest.raises(MimaError, match=message):
        check_folder(tmp_path / "out", overwrite=False)
    with pytest.raises(MimaError, match=message), locked(tmp_path / "out"):
        raise AssertionError
    check_file(tmp_path / "page.html", overwrite=False)
    assert os.listdir(tmp_path) == []
