"""Tiny randomly initialised models, built from diffusers' and transformers' own classes.

Every builder is deterministic in its seed and returns an object that `save_pretrained` writes, so
that tests exercise the code that loads real models. Nothing is fetched.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.families import family_of
from mima.training.loss import pixels, prediction_and_target

WORDS = (
    *("a", "an", "in", "of", "on", "the", "style", "photo", "picture", "emoji", "person"),
    *("cat", "dog", "bird", "fish", "tree", "house", "castle"),
    *("red", "green", "blue", "yellow", "noto", "mono", "round", "square"),
)
MAX_TOKENS = 16
RESOLUTION = 32
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 210),
    "yellow": (230, 200, 40),
}


def _byte_alphabet() -> list[str]:
    """The printable characters that byte-level BPE writes for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair merges after which each of `words` is one token."""
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in splits.values() for pair in itertools.pairwise(parts))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in splits.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            splits[word] = joined


def tiny_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer that knows each of `words` as one token; writes its files."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    merges = _merges(words)
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    )
    settings = {
        "model_max_length": MAX_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_stable_diffusion(
    folder: Path, *, seed: int = 0, prediction_type: str = "epsilon", blocks: int = 2
) -> StableDiffusionPipeline:
    """Stable Diffusion for 32×32 pictures, 0.4 M parameters; `folder` holds the tokenizer.

    `blocks` are those of the UNet, and one less than those of the VAE.
    """
    tokenizer = tiny_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, width=32, layers=blocks))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * (blocks + 1),
            up_block_types=("UpDecoderBlock2D",) * (blocks + 1),
            block_out_channels=(*[8] * blocks, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=RESOLUTION,
        )
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 4,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * blocks,
            up_block_types=("CrossAttnUpBlock2D",) * blocks,
            block_out_channels=(16, 32)[:blocks],
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=2,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_stable_diffusion(
    folder: Path, *, seed: int = 0, prediction_type: str = "epsilon", blocks: int = 2
) -> Path:
    """The pipeline of `tiny_stable_diffusion` as a diffusers folder, `folder` itself."""
    shutil.copytree(_saved(seed, prediction_type, blocks).name, folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _saved(seed: int, prediction_type: str, blocks: int) -> tempfile.TemporaryDirectory[str]:
    """Each is made once in a process: to copy a folder takes a tenth of the time."""
    made = tempfile.TemporaryDirectory()
    pipeline = tiny_stable_diffusion(
        Path(made.name, "tokenizer"), seed=seed, prediction_type=prediction_type, blocks=blocks
    )
    pipeline.save_pretrained(made.name)
    return made


def save_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel folder with tokenizer and image processor, 32×32 pictures, 16 features."""
    tokenizer = tiny_tokenizer(folder)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "projection_dim": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = _text_config(tokenizer, width=16).to_dict()
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.eval().save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    CLIPImageProcessor(size={"shortest_edge": RESOLUTION}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pair(folder: Path, original: str = "original") -> Path:
    """Two models that differ, the other `immunized`, and an encoder, `clip`, within `folder`."""
    save_tiny_stable_diffusion(folder / original, blocks=1)
    save_tiny_stable_diffusion(folder / "immunized", seed=1, blocks=1)
    save_tiny_clip(folder / "clip")
    return folder


def save_tiny_dino(folder: Path, *, seed: int = 0, version: int = 1) -> Path:
    """A DINO (ViTModel) or DINOv2 (Dinov2Model) folder with an image processor, 32×32 pictures."""
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": RESOLUTION,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if version == 1:
            model = ViTModel(ViTConfig(intermediate_size=32, **shape), add_pooling_layer=False)
        else:
            model = Dinov2Model(Dinov2Config(mlp_ratio=2, **shape))
    model.eval().save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def picture(colour: str, shape: str, *, size: int = RESOLUTION, seed: int = 0) -> Image.Image:
    """A coloured disc ("round") or square ("square") at a seeded place on white."""
    random = np.random.default_rng(seed)
    centre = random.uniform(0.4, 0.6, size=2) * size
    radius = random.uniform(0.22, 0.32) * size
    rows, columns = np.mgrid[:size, :size]
    distance = np.stack([np.abs(rows + 0.5 - centre[0]), np.abs(columns + 0.5 - centre[1])])
    inside = np.hypot(*distance) < radius if shape == "round" else distance.max(0) < radius
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[inside] = COLOURS[colour]
    return Image.fromarray(pixels)


def concept(colour: str = "red", shape: str = "round", *, images: int = 4) -> Concept:
    """`images` pictures to learn from, two held out, two of the class without a colour."""

    def pictures(count: int, first_seed: int, prompt: str) -> tuple[Picture, ...]:
        seeds = range(first_seed, first_seed + count)
        return tuple(Picture(picture(colour, shape, seed=seed), prompt) for seed in seeds)

    prompt = f"a {colour} {shape} emoji"
    return Concept(
        name=f"{colour} {shape}",
        prompt=prompt,
        images=pictures(images, 0, prompt),
        held_out=pictures(2, 100, prompt),
        class_prompt=f"a {shape} emoji",
        class_images=pictures(2, 200, f"a {shape} emoji"),
    )


def training_loss(pipeline: StableDiffusionPipeline, concept: Concept) -> float:
    """The training loss on a concept's pictures, always with the same noise and timesteps."""
    family = family_of(pipeline)
    generator = torch.Generator().manual_seed(7)
    latents = family.encode_images(pixels(concept.images, RESOLUTION)).repeat(8, 1, 1, 1)
    text = family.encode_prompts([concept.prompt] * len(latents))
    steps = family.sample_timesteps(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    with torch.no_grad():
        sides = prediction_and_target(family, latents, text, steps, noise)
        return torch.nn.functional.mse_loss(*sides).item()
