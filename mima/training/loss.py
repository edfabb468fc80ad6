"""The diffusion training loss and the pictures it reads."""

# B = batch, C H W = latent channels and size

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from mima.families.base import Conditioning, Family, Params

if TYPE_CHECKING:
    from mima.concepts import Picture


def pixels(pictures: Sequence[Picture], resolution: int) -> torch.Tensor:
    """Load pictures as squares: the shorter side is scaled to ``resolution``, the rest cropped.

    Args:
        pictures: pictures of any size and mode.
        resolution: side in pixels.

    Returns:
        [B, 3, resolution, resolution] float32 in [-1, 1].
    """
    squares = []
    for picture in pictures:
        image = picture.load()
        scale = resolution / min(image.size)
        if scale != 1:
            size = [max(resolution, round(side * scale)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        left, top = ((side - resolution) // 2 for side in image.size)
        image = image.crop((left, top, left + resolution, top + resolution))
        squares.append(torch.from_numpy(np.asarray(image, dtype=np.float32)))
    return torch.stack(squares).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def prediction_and_target(
    family: Family,
    latents: torch.Tensor,
    conditioning: Conditioning,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    params: Params | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sides of the training loss at given noise levels.

    Args:
        family: the model.
        latents: [B, C, H, W] clean latents.
        conditioning: B rows of what ``family.encode_prompts`` returns.
        timesteps: [B].
        noise: [B, C, H, W] standard normal.
        params: denoiser parameters that replace its own, differentiable.

    Returns:
        What the denoiser predicts and what it should, each [B, C, H, W], in float32 at least.
    """
    noisy = family.add_noise(latents, noise, timesteps)
    prediction = family.predict(noisy, timesteps, conditioning, params)
    target = family.target(latents, noise, timesteps)
    accumulate = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(accumulate), target.to(accumulate)
