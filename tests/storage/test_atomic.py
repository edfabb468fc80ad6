"""What is written appears whole or not at all, whatever happens to the writer."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from mima.errors import MimaError
from mima.storage.atomic import recover, sha256_of, staged, staged_by_several
from mima.storage.output import fresh_folder, slug, write_whole
from mima.storage.tensor_files import read_header, save_tensors

WRITER = """
import itertools, sys
from pathlib import Path
from mima.storage.atomic import staged
for n in itertools.count(int(sys.argv[2])):
    with staged(Path(sys.argv[1])) as folder:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(str(n) * 1000)
    print(n, flush=True)
"""


def test_a_folder_is_whole_after_a_kill_at_any_moment(tmp_path):
    final, chance, last = tmp_path / "out", random.Random(3), 0
    for _ in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(final), str(last)], stdout=subprocess.PIPE, text=True
        )
        writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
        said = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.stdout.close()
        recover(final)
        assert os.listdir(tmp_path) == ["out"]
        texts = {path.read_text() for path in final.iterdir()}
        assert len(texts) == 1
        (text,) = texts
        number = int(text[: len(text) // 1000])
        # what was said to be done is done
        assert number >= max(said, default=last)
        last = number


@pytest.mark.parametrize("made", [staged, staged_by_several])
def test_a_block_that_raises_changes_nothing(tmp_path, made):
    final = tmp_path / "out"
    write_whole(final, b"old")

    def fail():
        with made(final) as partial:
            partial.write_bytes(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert final.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_of_several_that_make_one_folder_the_first_stays(tmp_path):
    final = tmp_path / "new" / "out"
    with staged_by_several(final) as slow:
        slow.mkdir()
        (slow / "by").write_text("slow")
        with staged_by_several(final) as quick:
            quick.mkdir()
            (quick / "by").write_text("quick")
    assert (final / "by").read_text() == "quick"
    assert os.listdir(final.parent) == ["out"]


def test_of_several_that_make_one_file_the_last_stays(tmp_path):
    final = tmp_path / "out"
    final.write_text("damaged")
    with staged_by_several(final) as partial:
        partial.write_text("whole")
    assert final.read_text() == "whole"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EBUSY, errno.EXDEV],
)
def test_a_disk_that_takes_no_more_is_one_line(tmp_path, code):
    with (
        pytest.raises(MimaError, match=f"output: cannot write .*out: {os.strerror(code)}$"),
        fresh_folder(tmp_path / "out", overwrite=False),
    ):
        raise OSError(code, os.strerror(code), "somewhere")
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_system_are_not_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError), fresh_folder(tmp_path / "out", overwrite=False):
        (tmp_path / "gone").read_text()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_a_killed_run_moved_away_comes_back(tmp_path, overwrite):
    moved = tmp_path / ".out.replaced"
    moved.mkdir()
    (moved / "mima.json").write_text("{}")
    (tmp_path / ".out.partial").mkdir()
    if overwrite:
        with fresh_folder(tmp_path / "out", overwrite=True) as staging:
            (staging / "mima.json").write_text("[]")
    else:
        with (
            pytest.raises(MimaError, match="is not empty"),
            fresh_folder(tmp_path / "out", overwrite=False),
        ):
            raise AssertionError
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "mima.json").read_text() == ("[]" if overwrite else "{}")


def test_tensors_have_the_same_bytes_each_time(tmp_path):
    metadata = {name: f'{name}: "quoted"\n\x01 ü 🦊' for name in map(str, range(8))}
    tensors = {"b": torch.arange(3.0), "a": torch.zeros(2, 2)}
    sums = set()
    for n in range(8):
        path = tmp_path / f"{n}.safetensors"
        save_tensors(path, tensors, dict(random.Random(n).sample(sorted(metadata.items()), 8)))
        sums.add(sha256_of(path))
    assert len(sums) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"])
        assert torch.equal(file.get_tensor("a"), tensors["a"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 9) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 9) + b'{"a": {}}',
    ],
)
def test_a_header_that_is_none_is_one_line(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(MimaError, match=r"cannot read .*safetensors: ") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A photo of a cat!", "a-photo-of-a-cat"),
        ("Кот  & 猫", "кот-猫"),
        ("../..", "picture"),
        ("猫" * 50, "猫" * 26),
        ("x" * 90, "x" * 80),
    ],
)
def test_names_of_files_from_words(text, name):
    assert slug(text) == name


def test_a_name_cut_short_ends_with_no_dash():
    assert slug("one two three", longest=8) == "one-two"
    assert slug("?", default="concept") == "concept"
