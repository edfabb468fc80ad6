"""Nothing is lost and nothing is left behind, whenever a process dies or a picture goes."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace

import pytest
import torch
from support import faults, immunizing, tiny

from mima.adaptation import METHODS, LoRA
from mima.adaptation.resumable import adapt
from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation import evaluate
from mima.immunization.algorithm import immunize
from mima.storage.checkpoint import CheckpointFolder

WORK = {
    **{f"adapt, {method}": (faults.learn, method, ()) for method in METHODS},
    # how long an attack took is in these
    "evaluate": (faults.attack, "", ("attacks.csv", "evaluation.json")),
    "immunize": (faults.defend, "", ("metrics.jsonl",)),
    "the last write": (faults.write, "", ()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.save_tiny_clip(folder / "encoder")
    return tiny.save_tiny_stable_diffusion(folder / "model", blocks=1)


@pytest.mark.parametrize("work", WORK)
def test_killed_at_random_points_it_ends_as_if_it_had_not_been(work, model, tmp_path, processes):
    doing, detail, timed = WORK[work]
    faults.killed_and_resumed(processes, doing, model, tmp_path, detail, kills=2, timed=timed)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_killed_twenty_times_it_ends_as_if_it_had_not_been(work, model, tmp_path, processes):
    doing, detail, timed = WORK[work]
    faults.killed_and_resumed(processes, doing, model, tmp_path, detail, kills=20, timed=timed)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, whose size and rights can be changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=8k"):
        pytest.skip("mounting a file system needs root")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def layers(tmp_path):
    """An overlay of a layer with an empty folder, `out`, as in a container's image."""
    disk = tmp_path / "disk"
    for name in ("lower/out", "upper", "work", "merged"):
        (disk / name).mkdir(parents=True)
    options = ",".join(f"{name}dir={disk / name}" for name in ("lower", "upper", "work"))
    command = ["mount", "-t", "overlay", "-o", options, "none", str(disk / "merged")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root, and a disk that can be overlaid")
    yield disk / "merged"
    subprocess.run(["umount", "--lazy", disk / "merged"], check=True)


def test_an_empty_folder_of_an_image_is_written_to(layers):
    faults.write(layers, layers / "out", "")
    assert (layers / "out" / "mima.json").is_file()
    assert os.listdir(layers) == ["out"]


@pytest.fixture
def one_thread():
    """As the work sets it, which runs here in the test's own process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# one of each kind: what they share writes their files
ON_DISK = ("adapt, lora", "evaluate", "immunize", "the last write")


@pytest.mark.parametrize("work", ON_DISK)
def test_on_a_full_disk_it_stops_in_one_line_and_goes_on_when_there_is_room(
    work, model, tmp_path, disk, one_thread
):
    doing, detail, timed = WORK[work]
    doing(model, tmp_path / "alone", detail)
    expected = faults.contents(tmp_path / "alone", timed)
    place, remount = disk
    said = []
    # from full at the first file to full at the last
    for kilobytes in (8 * 3**power for power in range(12)):
        assert remount(f"size={kilobytes}k")
        try:
            doing(model, place / "out", detail)
        except MimaError as error:
            said.append(str(error))
        else:
            break
    assert len(said) > 1
    for line in said:
        # as the system says it, and SQLite
        assert "No space left on device" in line or "disk is full" in line
        assert "\n" not in line
    assert faults.contents(place / "out", timed) == expected
    assert not list(place.glob(".*"))


@pytest.mark.parametrize("work", ON_DISK)
def test_a_read_only_disk_is_one_line_before_any_work(work, model, tmp_path, disk, one_thread):
    doing, detail, _ = WORK[work]
    place, remount = disk
    assert remount("ro")
    with pytest.raises(MimaError, match=r"out.*Read-only file system") as caught:
        doing(model, place / "out", detail)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_costs_its_steps_alone(model, tmp_path, monkeypatch, one_thread):
    faults.learn(model, tmp_path / "alone", "lora")
    write, written = CheckpointFolder.write, []

    class Killed(BaseException):
        pass

    def die(folder, checkpoint):
        write(folder, checkpoint)
        written.append(folder.path / f"step-{checkpoint.step:08d}")
        if checkpoint.step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", die)
        with pytest.raises(Killed):
            faults.learn(model, tmp_path / "out", "lora")
    for file in written[-1].iterdir():
        os.truncate(file, file.stat().st_size // 2)
    faults.learn(model, tmp_path / "out", "lora")
    assert faults.contents(tmp_path / "out") == faults.contents(tmp_path / "alone")


def teach(model, concept, output):
    adapt(str(model), [concept], LoRA(steps=1), output)


def protect(model, concept, output):
    settings = immunizing.settings(output.parent, num_class_images=1)
    immunize(str(model), [concept], settings, output=output)


def judge(model, concept, output):
    encoder = str(model.with_name("encoder"))
    options = {"similarities": [encoder], "settings": faults.GRID, "processes": 1}
    evaluate(str(model), str(model), [concept], output=output, **options)


@pytest.mark.parametrize("doing", [teach, protect, judge])
def test_a_picture_that_goes_missing_after_it_was_checked_is_named(doing, model, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        tiny.picture("red", "round").save(file)
    concept = Concept("cat", "a cat", files, class_prompt="an animal")
    files[2].unlink()
    with pytest.raises(MimaError, match=r"2\.png: no such file"):
        doing(model, concept, tmp_path / "out")
    assert not (tmp_path / "out" / "mima.json").exists()


class _Deadly(Picture):
    """Kills the process that reads it, unless that is the test's own."""

    owner = os.getpid()

    def __getattribute__(self, name):
        if name == "image" and os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def test_a_worker_that_dies_is_one_line_and_what_was_done_is_kept(model, tmp_path):
    concept = tiny.concept()
    deadly = []
    for picture in concept.images:
        one = _Deadly(picture.image, picture.prompt)
        object.__setattr__(one, "owner", os.getpid())
        deadly.append(one)
    options = {"similarities": [str(model.with_name("encoder"))], "settings": faults.GRID}
    with pytest.raises(MimaError, match="a process that attacked was killed"):
        evaluate(
            str(model),
            str(model),
            [replace(concept, images=tuple(deadly))],
            output=tmp_path / "out",
            processes=2,
            **options,
        )
