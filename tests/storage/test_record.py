"""`mima.json`: written and read in one place."""

from __future__ import annotations

import json
import os

import pytest

from mima import __version__
from mima.errors import MimaError
from mima.storage.record import RECORD_FILE, prompt_of, read_record, write_record


def write(folder, prompts):
    write_record(
        folder,
        "adapt",
        model="owner/name",
        opened_with={"revision": "v1"},
        concepts=[f"concept {n}" for n in range(len(prompts))],
        prompts=prompts,
        details={"method": "lora"},
    )


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert read_record(tmp_path) is None
    assert prompt_of(tmp_path) is None
    write(tmp_path, ["ein Käse"])
    assert read_record(tmp_path) == {
        "command": "adapt",
        "version": __version__,
        "model": "owner/name",
        "revision": "v1",
        "concepts": ["concept 0"],
        "prompts": ["ein Käse"],
        "method": "lora",
    }
    assert prompt_of(tmp_path) == "ein Käse"
    write(tmp_path, ["a", "b"])
    assert prompt_of(tmp_path) is None


def test_a_path_that_is_no_utf8_is_recorded(tmp_path):
    model = os.fsdecode(b"caf\xe9/\\model")
    write_record(
        *(tmp_path, "adapt"),
        model=model,
        opened_with={},
        concepts=["Käse"],
        prompts=["ein Käse"],
        details={"saw": {model: [model]}},
    )
    record = read_record(tmp_path)
    assert (record["model"], record["saw"]) == (model, {model: [model]})
    assert "ein Käse" in (tmp_path / RECORD_FILE).read_text(encoding="utf-8")


def test_a_file_has_no_record(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"")
    assert read_record(path) is None


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[]", b"3", b'{"a": 1, "a": 2}', b"[" * 100_000, b""]
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(MimaError, match=r"mima\.json is damaged: ") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", [None, "x", [], [3], {"a": 1}, ["a", "b"]])
def test_prompts_of_another_kind_are_none(tmp_path, prompts):
    (tmp_path / RECORD_FILE).write_text(json.dumps({"prompts": prompts}))
    assert prompt_of(tmp_path) is None
