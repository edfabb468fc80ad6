"""One outer step set up for measurement: random latents, real text.

On the embedded model, or on one of Stable Diffusion 1.x's architecture with random weights, which
take as long as trained ones.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.bilevel.outer import OuterGradient, naive_outer_gradient
from mima.concepts import Concept
from mima.families import family_of
from mima.families.loading import load_embedded
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.encoding import ConceptData
from mima.immunization.levels import Problem
from mima.immunization.merge import merge_layer
from mima.immunization.progress import peak_memory
from mima.training.batches import Encoded, seeded

NOUNS = (
    *("cat", "dog", "bird", "fish", "tree", "house", "castle", "car"),
    *("boat", "moon", "sun", "apple", "pizza", "robot", "rose", "chair"),
)
SD1 = {
    # as published: 860 M parameters, 512 px
    "sd1": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        "text": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "tokens": 77,
    },
    # the same blocks, small enough for any machine
    "sd1-tiny": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": (32, 32, 64, 64),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
        },
        "text": {
            "vocab_size": 49408,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "tokens": 16,
    },
}
"""Stable Diffusion 1.x's configurations, and a small one of the same structure."""


def sd1_pipeline(size: str, device: str | torch.device) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion 1.x's structure with random weights, float32.

    The tokenizer is the embedded model's, with fewer words and the length of the original's; the
    autoencoder, which no step calls once latents are there, only has the original's factor of 8.
    """
    sizes = SD1[size]
    tokenizer = load_embedded().tokenizer
    tokenizer.model_max_length = sizes["tokens"]
    with torch.device(device):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**sizes["unet"])
        text_encoder = CLIPTextModel(
            CLIPTextConfig(max_position_embeddings=sizes["tokens"], **sizes["text"])
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
        )
    pipeline = StableDiffusionPipeline(
        unet=unet.eval(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device)


def make_problem(
    concepts: int,
    *,
    batch: int = 2,
    device: str | torch.device = "cpu",
    model: str = "embedded",
    times: int = 1,
    **config: Any,
) -> Problem:
    """A problem of 1 to 16 concepts, K = 1, SGD below, cross-attention on both levels.

    Args:
        concepts: N.
        batch: pictures per concept, step and level.
        device: where the model goes.
        model: "embedded", or a key of `SD1`.
        times: the pictures' side, in sides that the model was trained on.
        config: further settings of the run.
    """
    if model == "embedded":
        family = family_of(load_embedded(device=device))
    else:
        family = family_of(sd1_pipeline(model, device))
    # as a run has it: the engine differentiates by tensors of its own
    family.denoiser.requires_grad_(False)
    if times > 1:
        family.resolution = family.resolution * times
    settings = ImmunizeConfig(
        lower=LowerConfig(optimizer="sgd", lr=1e-3, batch_size=batch),
        upper=UpperConfig(batch_size=batch),
        **config,
    )
    white = Image.new("RGB", (8, 8), "white")
    named = [Concept(noun, f"a photo of a {noun}", [white]) for noun in NOUNS[:concepts]]
    side = family.resolution // family.pipeline.vae_scale_factor
    channels = family.denoiser.config.in_channels
    data = []
    for concept in named:
        draws = seeded(concept.name)
        latents = torch.randn(8, channels, side, side, generator=draws)
        images = Encoded.of(family, latents, [concept.prompt] * 8)
        ordinary = Encoded.of(family, latents.flip(0), ["a photo"] * 8)
        data.append(ConceptData(concept.name, images, ordinary))
    return Problem(family, data, settings, merge_layer(family, named, settings))


def forget_peak_memory(device: torch.device) -> int:
    """Bytes in use; ``peak_memory`` counts from here on, not from what loading the model took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # what loading freed and the allocator keeps would hide what a step takes of that
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def two_pass(problem: Problem) -> OuterGradient:
    """The engine's gradient."""
    levels = problem.lower_levels(0), problem.upper_levels(0)
    return problem.hypergradient(problem.theta(), *levels)


def naive(problem: Problem) -> OuterGradient:
    """The same gradient (`exact`) with every concept's graph held at once."""
    assert problem.merge is not None
    with twice_differentiable_attention():
        return naive_outer_gradient(
            problem.theta(),
            list(problem.lower_levels(0)),
            problem.merge,
            list(problem.upper_levels(0)),
            wrt=problem.upper_names,
        )
