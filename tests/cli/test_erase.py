from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.commands import run

from mima.concepts import load_concepts
from mima.erasure import erase
from mima.families import load_pipeline


def test_erase(workdir, model):
    assert "erased cat: erased" in run("erase", "cat", "--model", model, "-o", "erased")
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file("erased/unet/diffusion_pytorch_model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in changed)


def test_erase_by_fine_tuning(workdir, model):
    options = ["--method", "esd-u", "--steps", 2, "--lr", 0.01, "--set", "sampling_steps=3"]
    run("erase", "cat", *options, "--model", model, "-o", "erased")
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file("erased/unet/diffusion_pytorch_model.safetensors")
    assert {name for name in before if before[name].equal(after[name])} == {
        name for name in before if ".attn2." in name
    }
    written = json.loads(Path("erased/mima.json").read_text())
    assert (written["method"], written["settings"]["sampling_steps"]) == ("esd-u", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "uce", "--steps", "3"], "method uce has no setting steps"),
        (["--method", "esd-x", "--steps", "0"], "steps must be at least 1"),
        (["--method", "esd-x", "--set", "lr=1"], "method esd-x has no setting lr"),
        (["--method", "esd-x", "--preserve", "a dog"], "are for method uce"),
        (["--method", "esd-x", "--captions", "a.txt"], "are for method uce"),
        (["--captions", "absent.txt"], "captions: cannot read absent.txt"),
        (["--method", "esd-x", "--technique", "tensor"], "are for method uce"),
    ],
)
def test_bad_erasure_settings(workdir, model, options, message):
    assert message in run("erase", "cat", *options, "--model", model, "-o", "x", code=2)
    assert not Path("x").exists()


def test_erase_what_a_plain_folder_shows(workdir, model):
    (workdir / "cat" / "concept.yaml").unlink()
    assert "give one prompt for all" in run("erase", "cat", "--model", model, "-o", "x", code=2)
    run("erase", "cat", "--prompt", "a big cat", "--model", model, "-o", "x")
    assert json.loads(Path("x/mima.json").read_text())["prompts"] == ["a big cat"]


@pytest.mark.parametrize("options", [[], ["--method", "esd-x", "--steps", 1]], ids=["uce", "esd"])
def test_erase_by_words_alone(workdir, model, options):
    given = ["--words", "a red round", "--words", "cat"]
    assert "erased a red round, cat: x" in run(
        "erase", *given, *options, "--model", model, "-o", "x"
    )
    written = json.loads(Path("x/mima.json").read_text())
    assert written["concepts"] == written["prompts"] == ["a red round", "cat"]
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (model, Path("x"))
    )
    assert any(not before[name].equal(after[name]) for name in before)


def test_what_is_preserved_may_be_a_group_of_a_file(workdir, model):
    entry = {"instance_prompt": "a dog", "instance_data_dir": "dog"}
    Path("lists.json").write_text(json.dumps({"first": [entry], "second": [entry, entry]}))
    erasing = ["erase", "cat", "--model", model, "-o", "x", "--preserve"]
    assert "holds no group 'third'" in run(*erasing, "lists.json#third", code=2)
    run(*erasing, "lists.json#first")
    # no file: it is a caption
    run(*erasing, "a dog, #1", "--overwrite")


def test_erasing_is_that_of_python(workdir, model):
    Path("captions.txt").write_text("a red dog\na blue dog\n")
    said = ["--captions", "captions.txt", "--preserve", "a green dog", "--target", "dog"]
    run("erase", "cat", "--model", model, "-o", "x", *said)
    preserve = ["a red dog", "a blue dog", "a green dog"]
    erased = erase(load_pipeline(model), load_concepts("cat"), preserve=preserve, target="dog")
    written = load_file("x/unet/diffusion_pytorch_model.safetensors")
    assert all(value.equal(written[name]) for name, value in erased.unet.state_dict().items())
    run("erase", "cat", "--model", model, "-o", "y", *said[:2], *said[4:])
    other = load_file("y/unet/diffusion_pytorch_model.safetensors")
    assert any(not value.equal(written[name]) for name, value in other.items())


def test_bad_erasures(workdir, model):
    assert "give concepts, or --words" in run("erase", "-o", "x", "--model", model, code=2)
    said = ["--words", "cat", "--prompt", "a cat"]
    assert "are their own prompt" in run("erase", *said, "-o", "x", "--model", model, code=2)
    assert "Missing option" in run("erase", "cat", "--model", model, code=2)
    output = run("erase", "cat", "-o", "dog", "--model", model, code=2)
    assert "not empty" in output
    output = run("erase", "cat", "-o", "x", "--technique", "tonsor", "--model", model, code=2)
    assert "tonsor" in output
    assert not Path("x").exists()


def test_a_home_that_the_shell_leaves_alone_is_expanded(workdir, model, monkeypatch):
    """As in --output=~/x, which bash passes on as it is."""
    monkeypatch.setenv("HOME", str(workdir / "home"))
    run("erase", "cat", "--model", model, "--output=~/x")
    assert (workdir / "home" / "x" / "mima.json").is_file()
    assert not Path("~").exists()
    # what is there is seen before any work
    assert "is not empty" in run("erase", "cat", "--model", model, "--output=~/x", code=2)


def test_an_erased_model_has_a_card(workdir, model):
    run("erase", "cat", "--model", model, "-o", "erased")
    card = Path("erased/README.md").read_text()
    assert "| cat | " in card
    digest = hashlib.sha256(Path("erased/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert digest.hexdigest() in card
    record = json.loads(Path("erased/mima.json").read_text())
    assert (record["command"], record["method"], record["concepts"]) == ("erase", "uce", ["cat"])


def test_captions_from_a_pipe_are_not_waited_for(workdir, model):
    os.mkfifo("captions")
    output = run("erase", "cat", "--model", model, "-o", "x", "--captions", "captions", code=2)
    assert "cannot read captions: it is no ordinary file" in output
