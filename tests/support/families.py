"""A small model of every kind that families tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import builders, tiny

from mima.families import Family, family_of

PROMPTS = ["a photo of a red cat", "a dog"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def _sd(folder: Path) -> Path:
    return tiny.save_tiny_stable_diffusion(folder)


def _sd_v(folder: Path) -> Path:
    """Like Stable Diffusion 2: v-prediction, padding by a token of its own."""
    pipeline = tiny.tiny_stable_diffusion(
        folder.with_name("v-tokenizer"), prediction_type="v_prediction"
    )
    pipeline.tokenizer.pad_token = "!"
    pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
    pipeline.save_pretrained(folder)
    return folder


def _built(kind: Any, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: builders.save(kind, folder, **options)


KINDS: dict[str, Callable[[Path], Path]] = {
    "sd": _sd,
    "sd-v": _sd_v,
    "sdxl": _built(builders.sdxl),
    "pixart-alpha": _built(builders.pixart),
    "pixart-sigma": _built(builders.pixart, sigma=True),
    "sd3": _built(builders.sd3),
    "sd3-no-t5": _built(builders.sd3, with_t5=False),
    "flux-dev": _built(builders.flux),
    "flux-schnell": _built(builders.flux, guidance=False),
    "sana": _built(builders.sana),
    "lumina2": _built(builders.lumina2),
    "qwen-image": _built(builders.qwen_image),
}
DDPM = ("sd", "sd-v", "sdxl", "pixart-alpha", "pixart-sigma")
FLOW = ("sd3", "sd3-no-t5", "flux-dev", "flux-schnell")


def open_family(folder: Path, **options: Any) -> Family:
    return family_of(builders.opened(folder, **options))


def of(kinds: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("family", kinds, indirect=True)
