"""The code and the commands of each tutorial run, on small models and in few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from support import tiny
from support.commands import run
from support.faults import GRID, SAMPLER

from mima.adaptation import METHODS
from mima.evaluation import Sampler, attack
from mima.families import loading

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"

SMALL = {
    "immunize": [
        *("--set", "steps=1", "--set", "lower.steps=5", "--set", "num_class_images=1"),
        *("--set", "upper.path_every=2", "--set", "num_captions=8"),
    ],
    "erase": [],
    "sample": ["--steps", "2"],
    "evaluate": [
        *("--preset", "quick", "--processes", "1"),
        *(
            part
            for name, value in GRID.items()
            for part in ("--set", f"{name}={json.dumps(value)}")
        ),
    ],
    "report": [],
}
"""What a command is told besides, so that it takes seconds."""


def blocks(tutorial: str, language: str) -> list[str]:
    text = (TUTORIALS / f"{tutorial}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The models and pictures that the tutorials speak of, small."""
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "base", "theirs"):
        tiny.save_tiny_stable_diffusion(tmp_path / name, blocks=1)
    for number, name in enumerate(("cat", "cat-held-out", "mono", "dog")):
        place = tmp_path / "pictures" / name
        place.mkdir(parents=True)
        for index in range(2):
            tiny.picture("red", "round", seed=10 * number + index).save(place / f"{index}.png")
    return tmp_path


@pytest.fixture
def encoder(files, monkeypatch) -> str:
    """A small encoder that answers to the names of the large ones."""
    folder = str(tiny.save_tiny_dino(files / "encoder"))
    monkeypatch.setattr("mima.evaluation.encoders.DINO_DEFAULT", folder)
    clip = str(tiny.save_tiny_clip(files / "clip"))
    monkeypatch.setattr("mima.evaluation.encoders.CLIP_DEFAULT", clip)
    return folder


def type_in(line: str) -> str:
    """Run a command of a page as it stands there, made small."""
    _, name, *words = shlex.split(line)
    if name == "evaluate":
        words = [word for word in words if word not in ("--preset", "headline", "standard")]
    return run(name, *words, *SMALL[name])


def write_down(tutorial: str) -> None:
    """The files that a page shows, each under the name in its first line."""
    for block in blocks(tutorial, "yaml"):
        Path(re.match(r"# (\S+)", block)[1]).write_text(block)


def commands(tutorial: str) -> list[str]:
    given = [block.replace("\\\n", "") for block in blocks(tutorial, "bash")]
    return [line for block in given for line in block.splitlines()]


def test_your_own_checkpoint(files, encoder):
    write_down("own-checkpoint")
    (files / "captions.txt").write_text("a red thing\na blue thing\n" * 4)
    *lines, push = commands("own-checkpoint")
    said = [type_in(line) for line in lines]
    assert "erased cat, mono" in said[0]
    assert "immunized against cat, mono" in said[1]
    assert (files / "tree.png").is_file()
    assert (files / "results" / "report.html").is_file()
    # nothing is published from a test
    assert push == "mima push immunized owner/name --private"


def test_somebodys_claim(files, encoder, monkeypatch, capsys):
    compute, swap, read = blocks("claim", "python")

    def quick(*args, steps, **more):
        small = {"sampler": Sampler(**SAMPLER), "max_prompts": 1, "seeds": (0,)}
        return attack(*args, steps=(0, 1), **small, **more)

    names: dict[str, object] = {}
    monkeypatch.setattr("mima.evaluation.attack", quick)
    exec(compute, names)
    exec(swap, names)
    exec(read, names)
    parts = {part.name for part in (files / "their-denoiser").iterdir() if part.is_dir()}
    assert parts >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert set(names["gaps"]) == {"lora", "dreambooth"}
    assert capsys.readouterr().out.count("share of the rise left") == 2
    # the two are one model here
    assert all(gap.sgr == (0, 0) for gap in names["gaps"].values())
    write_down("claim")
    for line in commands("claim"):
        type_in(line)
    assert (files / "claim" / "report.html").is_file()


@pytest.mark.parametrize("tutorial", ["attack", "family", "objective"])
def test_what_is_added(tutorial, files, monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", loading.FAMILIES)
    names: dict[str, object] = {"__name__": "__main__"}
    code = blocks(tutorial, "python")
    assert len(code) == 2
    with mock.patch.dict(METHODS):
        for block in code:
            exec(block, names)
