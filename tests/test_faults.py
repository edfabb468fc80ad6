"""Nothing is lost and nothing is left behind, whenever a process dies or a picture goes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from support import faults, tiny

from mima.adaptation import METHODS, LoRA
from mima.adaptation.resumable import adapt
from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation import evaluate

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
    return tiny.save_tiny_stable_diffusion(folder / "model")


@pytest.mark.parametrize("work", WORK)
def test_killed_at_random_points_it_ends_as_if_it_had_not_been(work, model, tmp_path, processes):
    doing, detail, timed = WORK[work]
    faults.killed_and_resumed(processes, doing, model, tmp_path, detail, kills=2, timed=timed)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_killed_twenty_times_it_ends_as_if_it_had_not_been(work, model, tmp_path, processes):
    doing, detail, timed = WORK[work]
    faults.killed_and_resumed(processes, doing, model, tmp_path, detail, kills=20, timed=timed)


def test_a_picture_that_goes_missing_after_it_was_checked_is_named(model, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        tiny.picture("red", "round").save(file)
    concept = Concept("cat", "a cat", files)
    files[2].unlink()
    with pytest.raises(MimaError, match=r"2\.png: no such file"):
        adapt(str(model), [concept], LoRA(steps=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Deadly(Picture):
    """Kills the process that reads it, unless that is the test's own."""

    def load(self):
        if os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load()


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
