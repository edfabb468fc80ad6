"""Bad input is one clear error, before anything is encoded, drawn or trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import tiny
from support.immunizing import concepts, settings

from mima.adaptation import METHODS, CustomDiffusion, DreamBooth, LoRA, TextualInversion
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Family, family_of
from mima.immunization.algorithm import immunize
from mima.immunization.recipes import unnamed
from mima.storage.output import check_file, check_folder, fresh_folder

TOKEN = "<new1>"


@pytest.fixture
def _no_work(monkeypatch):
    """Whatever takes long fails the test."""

    def work(*_, **__):
        pytest.fail("long work was started")

    for name in ("encode_images", "sample_latents", "predict"):
        monkeypatch.setattr(Family, name, work)


def learned(**changes):
    told = {"prompt": f"a {TOKEN} cat", "token": TOKEN, "initializer": "cat"} | changes
    return Concept("my cat", images=[tiny.picture("red", "round")], **told)


FIRST = learned(prompt="a <new0> cat", token="<new0>")
RUNS = {
    "token-in-the-vocabulary": (
        {"new_words": True, "token_steps": 9},
        [FIRST, learned(token="cat")],
        "token 'cat' is in the model's vocabulary already",
    ),
    "initializer-of-several-tokens": (
        {"new_words": True, "token_steps": 9},
        [FIRST, learned(initializer="cat dog")],
        "initializer 'cat dog' must be one token of the vocabulary, it is 2",
    ),
    "one-token-twice": (
        {"new_words": True},
        [learned(), learned(initializer="dog")],
        f"another concept has the token '{TOKEN}' too",
    ),
    "resolution": (
        {"resolution": 30},
        None,
        "30 pixels do not fit the vae of this StableDiffusionPipeline, which needs a multiple of "
        "8, such as 32",
    ),
    "nothing-to-erase": (
        {"erase_first": True},
        [learned(token=None, initializer=None)],
        "none of its prompts contains its name",
    ),
    "no-such-parameters": ({"upper": {"parameters": "nowhere"}}, None, "'nowhere' matches no"),
    "no-such-captions": ({"captions": Path("absent.txt")}, None, "cannot read absent.txt"),
}


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("case", RUNS)
def test_immunize(pipeline, tmp_path, case):
    changes, given, message = RUNS[case]
    with pytest.raises(MimaError, match=message) as caught:
        immunize(pipeline, given or concepts(), settings(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_no_work")
def test_immunize_a_missing_model(tmp_path):
    with pytest.raises(MimaError, match="'absent' is neither a folder"):
        immunize("absent", concepts(), settings(tmp_path))


ADAPTATIONS = {
    "no-token": (TextualInversion(), {"token": None}, "has no token"),
    "token-in-the-vocabulary": (TextualInversion(), {"token": "cat"}, "vocabulary already"),
    "initializer-of-several-tokens": (
        CustomDiffusion(),
        {"initializer": "cat dog"},
        "must be one token of the vocabulary, it is 2",
    ),
    "no-class": (DreamBooth(prior_weight=1.0), {}, "needs class_images, or a class_prompt"),
    "no-such-layers": (LoRA(target_modules=("nowhere",)), {}, "nowhere"),
}


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("case", ADAPTATIONS)
def test_adapt(pipeline, case):
    method, changes, message = ADAPTATIONS[case]
    with pytest.raises(MimaError, match=message):
        method.start(pipeline, learned(**changes))


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("method", METHODS)
def test_adapt_at_a_resolution_that_does_not_fit(pipeline, method):
    settings = dataclasses.replace(METHODS[method](), resolution=102)
    with pytest.raises(MimaError, match="102 pixels do not fit the vae"):
        settings.start(pipeline, learned(class_prompt="a cat"))


def test_a_resolution_that_fits_is_used(pipeline):
    run = LoRA(resolution=48, steps=1).start(pipeline, learned())
    assert run._images.pictures.latents.shape[-2:] == (12, 12)
    run.advance(1)
    assert family_of(pipeline).resolution == 32
    assert family_of(pipeline, resolution=48).resolution == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a cat"}, f"the prompt 'a cat' does not contain the token '{TOKEN}'"),
        ({"images": []}, "has no pictures"),
        ({"images": "absent"}, "absent"),
        ({"token": " "}, "token is empty"),
    ],
)
def test_a_concept(changes, message):
    told = {"prompt": f"a {TOKEN}", "token": TOKEN, "images": [tiny.picture("red", "round")]}
    with pytest.raises(MimaError, match=message):
        Concept("cat", **(told | changes))


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_an_output_that_cannot_be_written(tmp_path, check):
    (tmp_path / "file").write_text("x")
    # where not even root may write
    for path, message in (
        (tmp_path / "file" / "out", "is not writable: Not a directory|there is no folder"),
        (Path("/proc/out"), "out cannot be made: /proc is not writable"),
        (tmp_path / ("x" * 201), "the name is longer than 200 bytes"),
    ):
        with pytest.raises(MimaError, match=message):
            check(path, overwrite=False)
    check(tmp_path / "out", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_results_do_not_take_the_place_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for path in (".", "..", tmp_path / "inside", "../inside/"):
        with pytest.raises(MimaError, match="is or holds the working directory"):
            check_folder(Path(path), overwrite=True)
    check_folder(Path("out"), overwrite=False)


def test_results_do_not_take_the_place_of_a_mount_point(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    for path in (Path("/proc"), tmp_path / "link"):
        with pytest.raises(MimaError, match=rf"output {path} is a mount point; name a folder in"):
            check_folder(path, overwrite=True)


def test_an_output_that_is_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to("large")
    for overwrite in (False, True):
        with fresh_folder(tmp_path / "out", overwrite=overwrite) as staging:
            (staging / "mima.json").write_text(str(overwrite))
        assert (tmp_path / "large" / "mima.json").read_text() == str(overwrite)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]
    assert (tmp_path / "out").is_symlink()


def test_personalization_without_a_word_is_refused():
    with pytest.raises(MimaError, match="new_words: no concept has a token"):
        immunize("absent", [tiny.concept()], unnamed("personalize"))
