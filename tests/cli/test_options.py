"""Options that several commands have."""

from __future__ import annotations

import os
import re
import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from support import tiny
from support.commands import run, write_config

from mima.release.delta import Delta
from mima.storage.lock import locked


@pytest.mark.parametrize(
    "command",
    [
        "adapt cat --model MODEL",
        "erase cat -o out --model MODEL",
        "merge LORA -o out --model MODEL",
        "apply DELTA -o out --model MODEL",
        "sample x --model MODEL",
        "immunize run.yaml -o out",
        "evaluate MODEL MODEL --concepts cat --similarity embedded -o out",
    ],
)
def test_every_command_opens_revisions_variants_and_single_files(workdir, model, adapters, command):
    """What is said of the model reaches the place that opens it, which refuses all of it here."""
    write_config(workdir / "run.yaml", model=str(model))
    Delta({"unet.conv_in.bias": torch.zeros(16)}).save(workdir / "delta")
    places = {"MODEL": model, "LORA": adapters / "cat-lora", "DELTA": workdir / "delta"}
    words = [places.get(word, word) for word in command.split()]
    for option, message in (
        ("--revision", "revision: only models of the hub have revisions"),
        ("--variant", "holds no 'nope' weights"),
        ("--single-file-config", "config: only a single file needs one"),
    ):
        assert message in run(*words, option, "nope", code=2)
    if command.startswith("evaluate"):
        for option in ("--revision", "--variant"):
            output = run(*words, f"--immunized{option.removeprefix('-')}", "nope", code=2)
            assert option.removeprefix("--") in output
    if command.startswith("immunize"):
        for name, message in (("revision", "models of the hub"), ("variant", "no 'nope' weights")):
            write_config(workdir / "run.yaml", model=str(model), **{name: "nope"})
            assert message in run(*words, code=2)


@pytest.mark.parametrize(
    "command",
    [
        "sample x --model MODEL --resolution N",
        "adapt cat --model MODEL --resolution N",
        "erase cat --model MODEL --method esd-x --set resolution=N",
        "immunize run.yaml --set resolution=N",
        "evaluate MODEL MODEL --concepts cat --similarity CLIP --set methods.lora.resolution=N",
        "evaluate MODEL MODEL --concepts cat --similarity CLIP --set sampler.size=N",
    ],
)
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (100_000, "at most 128 pixels, 4 times what this StableDiffusionPipeline was"),
        (30, "30 pixels do not fit the vae of this StableDiffusionPipeline"),
        (0, "1, got 0|resolution: 0 pixels do not fit"),
        (-32, "1, got -32|resolution: -32 pixels do not fit"),
    ],
)
def test_every_command_that_takes_a_resolution_bounds_it(workdir, model, command, pixels, message):
    write_config(workdir / "run.yaml", model=str(model))
    clip = tiny.save_tiny_clip(workdir / "clip")
    before = sorted(workdir.rglob("*"))
    words = (
        command.replace("MODEL", str(model)).replace("CLIP", str(clip)).replace("N", str(pixels))
    )
    output = run(*words.split(), "-o", "out.png", code=2)
    assert "resolution" in output
    assert re.search(message, output)
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "adapt cat --model MODEL --steps 1 --resume",
        "immunize run.yaml --resume",
        "evaluate MODEL MODEL --concepts cat --similarity CLIP --processes 1",
    ],
)
def test_an_output_that_another_run_writes_is_refused(workdir, model, command):
    write_config(workdir / "run.yaml", model=str(model))
    clip = tiny.save_tiny_clip(workdir / "clip")
    before = sorted(workdir.rglob("*"))
    held, ended = threading.Event(), threading.Event()

    def other_run():
        with locked(workdir / "out"):
            held.set()
            ended.wait()

    thread = threading.Thread(target=other_run)
    thread.start()
    try:
        assert held.wait(60)
        words = command.replace("MODEL", str(model)).replace("CLIP", str(clip)).split()
        output = run(*words, "-o", "out", code=2)
    finally:
        ended.set()
        thread.join()
    assert f"out is in use by another run (process {os.getpid()})" in output
    assert sorted(workdir.rglob("*")) == before


def test_half_precision(workdir, model, adapters):
    """Of the computation, and of what is written."""
    run("erase", "cat", "--model", model, "-o", "erased", "--dtype", "bfloat16")
    lora = adapters / "cat-lora"
    run("merge", lora, "--model", model, "-o", "merged", "--dtype", "float16", "--weights", 1)
    for folder, dtype in (("erased", torch.bfloat16), ("merged", torch.float16)):
        weights = load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}
    run("sample", "a cat", "--model", model, "--steps", 2, "-o", "cat.png", "--dtype", "bfloat16")
    drawn = np.asarray(Image.open("cat.png"))
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    for dtype in (torch.float32, torch.bfloat16):
        noise = torch.Generator().manual_seed(0)
        picture = pipeline.to(dtype)(
            "a cat", num_inference_steps=2, guidance_scale=4.0, generator=noise
        ).images[0]
        # the two pictures need not be alike: torch 2.9 draws other noise in bfloat16
        assert np.array_equal(drawn, picture) == (dtype == torch.bfloat16)
