"""Checkpoints are whole; a damaged one is noticed, and the one before is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.faults import small_files

from mima.errors import MimaError
from mima.storage.checkpoint import RUN_FILE, Checkpoint, CheckpointFolder
from mima.storage.runs import claim


def checkpoint(step, size=8):
    return Checkpoint(step, {"x": torch.full((size,), float(step))}, {"note": f"step {step}"})


def names(folder):
    return sorted(os.listdir(folder.path))


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, as another process finds it."""
    for step in (1, 9, 10):
        folder = CheckpointFolder(tmp_path / "c")
        folder.latest()
        folder.write(checkpoint(step))
    return CheckpointFolder(tmp_path / "c")


def test_the_last_two_checkpoints_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path / "c")
    assert folder.latest() is None
    for step in (1, 9, 10):
        folder.write(checkpoint(step))
    kept = folder.latest()
    assert (kept.step, kept.state) == (10, {"note": "step 10"})
    assert torch.equal(kept.tensors["x"], torch.full((8,), 10.0))
    assert names(folder) == ["step-00000009", "step-00000010"]


def test_a_folder_is_found_from_home_and_no_path_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CheckpointFolder("~/c").path == tmp_path / "c"
    for path in ("~nobody-of-this-name/c", "c\0"):
        with pytest.raises(MimaError, match="is no path"):
            CheckpointFolder(path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "c")
    folder.write(checkpoint(1))
    with small_files(4096), pytest.raises(MimaError, match=r"cannot write .*step-00000001 is int"):
        folder.write(checkpoint(2, size=10_000))
    assert folder.latest().step == 1
    assert names(folder) == ["step-00000001"]
    folder.write(checkpoint(2, size=10_000))
    assert folder.latest().step == 2


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    folder = CheckpointFolder(tmp_path / "c")
    folder.write(checkpoint(1))
    for name in (".step-00000002.partial", ".step-00000007.partial"):
        (folder.path / name).mkdir()
        (folder.path / name / "state.safetensors").write_bytes(b"half")
    assert folder.latest().step == 1
    folder.write(checkpoint(2))
    assert names(folder) == ["step-00000001", "step-00000002"]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "halved": halve,
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip,
    "gone": lambda path: path.unlink(),
    "binary": lambda path: path.write_bytes(b"\xff\xfe" * 99),
    "other json": lambda path: path.write_text("[1, 2]"),
}


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(two, caplog, file, damage):
    DAMAGES[damage](two.path / "step-00000010" / file)
    with caplog.at_level(logging.WARNING, "mima"):
        kept = two.latest()
    assert (kept.step, kept.state) == (9, {"note": "step 9"})
    (warning,) = caplog.messages
    assert "step-00000010" in warning
    assert warning.endswith("going on from step-00000009")
    # the step comes again, and is written in the damaged one's place
    two.write(checkpoint(10))
    assert CheckpointFolder(two.path).latest().step == 10
    assert names(two) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_one_line_says_so(two, damage):
    for step in (9, 10):
        DAMAGES[damage](two.path / f"step-{step:08d}" / "state.safetensors")
    with pytest.raises(MimaError, match=r"step-00000010.*to begin anew \(overwrite\)") as caught:
        two.latest()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_step_is_damaged(two):
    (two.path / "step-00000010").rename(two.path / "step-00000011")
    assert two.latest().step == 9


@pytest.mark.parametrize("damage", [*DAMAGES, "others"])
def test_kept_tensors_that_are_damaged_are_made_again(tmp_path, caplog, damage):
    folder, kept = CheckpointFolder(tmp_path / "c"), {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    folder.write_tensors("x.safetensors", kept)
    read = folder.read_tensors("x.safetensors")
    assert read.keys() == kept.keys()
    assert all(torch.equal(read[name], value) for name, value in kept.items())
    assert not caplog.messages
    file = folder.path / "x.safetensors"
    if damage == "others":
        save_file({"b": torch.ones(3)}, file)
    else:
        DAMAGES[damage](file)
    assert folder.read_tensors("x.safetensors") is None
    if damage == "gone":
        assert not caplog.messages
    else:
        (warning,) = caplog.messages
        assert re.fullmatch(
            r".*x\.safetensors(: .*| is damaged| has no checksum); it is made again", warning
        )


RUN = {"config": {"steps": 1}, "concepts": [], "model": "x", "versions": {}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "{}", "[" * 100_000, '{"config": 1, "config": 2}']
    + [json.dumps({**RUN, name: 3}) for name in RUN]
    + [json.dumps({name: value for name, value in RUN.items() if name != left}) for left in RUN],
)
def test_a_damaged_description_of_the_run_is_one_line(tmp_path, content):
    folder = CheckpointFolder(tmp_path / "c")
    claim(folder, RUN, resume=False)
    claim(folder, RUN, resume=True)
    (folder.path / "run.json").write_text(content)
    with pytest.raises(MimaError, match=r"checkpoint: .*run\.json") as caught:
        claim(folder, RUN, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_killed_while_it_says_whose_the_folder_is_was_never_there(tmp_path):
    (tmp_path / ".run.json.partial").write_text('{"con')
    folder = CheckpointFolder(tmp_path)
    folder.check_own()
    assert not folder.exists()
    (tmp_path / "picture.png").touch()
    with pytest.raises(MimaError, match="no run wrote"):
        folder.check_own()


def test_a_removal_that_is_cut_short_leaves_whose_the_folder_is(two, monkeypatch):
    two.write_json(RUN_FILE, {"config": {}})
    remove = shutil.rmtree
    removed = []

    def cut_short(path, **options):
        remove(path, **options)
        removed.append(path)
        if len(removed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        two.remove()
    assert (two.path / RUN_FILE).is_file()
    monkeypatch.undo()
    two.remove()
    assert not two.path.exists()


def test_a_link_to_a_folder_stays_one_that_another_run_can_use(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "c").symlink_to("large")
    for _ in range(2):
        folder = CheckpointFolder(tmp_path / "c")
        claim(folder, RUN, resume=False)
        folder.write(checkpoint(1))
        folder.remove()
        assert names(folder) == []
    assert folder.path.is_symlink()


def test_what_cannot_be_removed_is_named_and_still_the_runs(two, monkeypatch, caplog):
    claim(two, RUN, resume=False)

    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        two.remove()
    (warning,) = caplog.messages
    assert re.fullmatch(r"checkpoint: cannot remove .*/c/step-\d+: .* busy", warning)
    assert (two.path / RUN_FILE).is_file()
    two.remove()
    assert not two.path.exists()


def test_another_version_of_diffusers_may_name_further_settings_of_a_schedule(tmp_path, caplog):
    folder, schedule = CheckpointFolder(tmp_path / "c"), {"class": "DDPM", "snr": False, "beta": 1}
    then = RUN | {"scheduler": {"class": "DDPM", "beta": 1, "old": 1}, "versions": {"diffusers": 1}}
    now = RUN | {"scheduler": schedule, "versions": {"diffusers": 2}}
    claim(folder, then, resume=False)
    with pytest.raises(MimaError, match=r"which differs in scheduler\.old: .* scheduler\.snr: "):
        claim(folder, now | {"versions": {"diffusers": 1}}, resume=True)
    with pytest.raises(MimaError, match=r"which differs in scheduler\.beta: 1 then, 2 now$"):
        claim(folder, now | {"scheduler": schedule | {"beta": 2}}, resume=True)
    claim(folder, now, resume=True)
    assert "resuming under other versions" in caplog.text


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(two, monkeypatch, caplog):
    """As one that another machine reads, on a network file system."""
    (two.path / ".step-00000011.partial").mkdir()

    def refuse(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "state.json")

    assert two.latest().step == 10
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        two.write(checkpoint(12))
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        f"cannot remove {two.path}/step-{step:08d}: Directory not empty" for step in (11, 9)
    ]
    two.write(checkpoint(13))
    assert names(two) == ["step-00000012", "step-00000013"]
