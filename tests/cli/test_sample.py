from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import run


def test_sample(workdir, model):
    output = run("sample", "A cat, red!", "--model", model, "--steps", 2)
    assert output.endswith("a-cat-red.png")
    assert Image.open("a-cat-red.png").size == (32, 32)
    first = Path("a-cat-red.png").read_bytes()
    run("sample", "A cat, red!", "--model", model, "--steps", 2, "--overwrite")
    assert Path("a-cat-red.png").read_bytes() == first
    run("sample", "A cat, red!", "--model", model, "--steps", 2, "--seed", 1, "-o", "other.png")
    assert Path("other.png").read_bytes() != first


def test_a_long_prompt_makes_a_short_name(workdir, model):
    # three bytes each
    output = run("sample", "猫" * 100, "--model", model, "--steps", 1)
    assert output.endswith(f"{'猫' * 26}.png")
    assert [path.stem for path in workdir.glob("*.png")] == ["猫" * 26]


def test_sample_several(workdir, model):
    run("sample", "a cat", "--model", model, "--steps", 2, "--num", 3, "-o", "x.png", "--seed", 4)
    names = ["x-1.png", "x-2.png", "x-3.png"]
    assert sorted(path.name for path in workdir.glob("x*.png")) == names
    run("sample", "a cat", "--model", model, "--steps", 2, "--seed", 5, "-o", "y.png")
    assert Path("x-2.png").read_bytes() == Path("y.png").read_bytes()


def test_a_model_that_does_not_say_its_size(workdir, model):
    """Adapting at a resolution draws at it, too, when the steps are done."""
    shutil.copytree(model, "sizeless")
    config = json.loads(Path("sizeless/unet/config.json").read_text())
    Path("sizeless/unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    options = ["--model", "sizeless", "--resolution", 40]
    run("adapt", "cat", *options, "--steps", 1, "-o", "out")
    assert Image.open("out/samples/00001/0.png").size == (40, 40)
    run("sample", "a cat", *options, "--steps", 1, "-o", "cat.png", "--lora", "out")
    assert Image.open("cat.png").size == (40, 40)
    assert "must be said" in run("sample", "a cat", *options[:2], "-o", "no.png", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "30"], "30 pixels do not fit the vae"),
        (["--steps", "-3"], "'--steps'"),
        (["--steps", "two"], "'--steps'"),
        (["--guidance", "-1"], "'--guidance'"),
        (["--num", "0"], "'--num'"),
        (["--seed", "-1"], "'--seed'"),
        (["--output", "x.txt"], "expected a file ending in .png"),
        (["--output", "cat"], "expected a file ending in .png"),
        (["--output", "absent/x.png"], "there is no folder"),
        (["--output", "cat/0.png"], "exists; choose another, or use --overwrite"),
        (["--model", "absent"], "absent"),
        (["--model", "cat"], "not a diffusers folder"),
        (["--model", "cat/0.png"], "only .safetensors files"),
        (["--device", "gpu"], "device 'gpu' is unknown; a GPU is cuda"),
        (["--adapter", "absent"], "no such adapter: absent"),
        (["--lora", "cat"], "adapter cat holds no adapter"),
    ],
)
def test_bad_samples(workdir, model, options, message):
    before = sorted(workdir.rglob("*"))
    defaults = [] if "--model" in options else ["--model", model]
    assert message in run("sample", "a cat", *defaults, *options, code=2)
    assert sorted(workdir.rglob("*")) == before


def test_an_empty_prompt(workdir, model):
    assert "the prompt is empty" in run("sample", " ", "--model", model, code=2)


def test_a_damaged_model(workdir, model, tmp_path):
    shutil.copytree(model, "damaged")
    weights = next(Path("damaged/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in run("sample", "a cat", "--model", "damaged", code=2)
    assert not list(workdir.glob("*.png"))


def test_pictures_that_are_not_of_finite_numbers_are_refused(workdir, model):
    shutil.copytree(model, "broken")
    (weights,) = Path("broken/unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    options = ["--model", "broken", "--steps", 1, "--num", 2, "-o", "x.png"]
    said = run("sample", "a cat", *options, code=2)
    assert "broken: 2 of 2 pictures (seeds 0, 1) are not of finite numbers" in said
    assert not list(workdir.glob("x*.png"))


def test_guidance_is_the_pipelines(workdir, model):
    run("sample", "a cat", "--model", model, "--steps", 2, "--guidance", 2.5, "-o", "cat.png")
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    drawn = [
        pipeline(
            "a cat",
            num_inference_steps=2,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        for guidance in (2.5, 4.0)
    ]
    assert [np.array_equal(Image.open("cat.png"), one) for one in drawn] == [True, False]
