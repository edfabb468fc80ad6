"""A small model and LoRAs of it."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline
from support import tiny
from support.loras import KV, lora_config, save_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def base(folder):
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """Three files: other ranks, other alphas, other targets, one rank-stabilised."""
    folder = tmp_path_factory.mktemp("loras")
    configs = [
        lora_config(3, 6.0),
        lora_config(5, 2.0, use_rslora=True),
        lora_config(2, 1.0, KV, rank_pattern={"attn2.to_k": 4}),
    ]
    return [
        save_lora(base, folder / f"lora-{n}", config, seed=n) for n, config in enumerate(configs)
    ]
