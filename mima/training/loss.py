"""The diffusion training loss and the pictures it reads."""

# B = batch, C H W = latent channels and size

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from mima.families import Conditioning, Family
from mima.merging import Params
from mima.reference import wide

if TYPE_CHECKING:
    from mima.concepts import Picture


LONGEST_STRIP = 8
"""Of a picture that is longer in proportion to its shorter side, the ends are cut off first."""


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
        image = _middle(picture.load())
        (width, height), left, top = _square(image.size, resolution)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
        squares.append(torch.from_numpy(np.asarray(image, dtype=np.float32)))
    return torch.stack(squares).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def places(pictures: Sequence[Picture], resolution: int) -> torch.Tensor:
    """Where ``pixels`` finds the squares: [P, 4], as ``Family.picture_conditions`` reads them."""
    found = []
    for picture in pictures:
        size = picture.load().size
        _, left, top = _square(size, resolution)
        found.append([size[1], size[0], top, left])
    return torch.tensor(found)


def _middle(image: Image.Image) -> Image.Image:
    """The part of a long strip that a square of its middle may read.

    All of it, scaled until it is as high as the square, may take gigabytes.
    """
    width, height = image.size
    most = LONGEST_STRIP * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    if not (left or top):
        return image
    return image.crop((left, top, width - left, height - top))


def _square(size: tuple[int, int], resolution: int) -> tuple[tuple[int, int], int, int]:
    """Width and height of a picture that is scaled to be cropped, and left and top of its crop."""
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    return (width, height), (width - resolution) // 2, (height - resolution) // 2


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
        What the denoiser predicts and what it should, each [B, C, H, W], in float32 at least, and
        times the root of the loss's weights: their mean squared error is the weighted loss.
    """
    noisy = family.add_noise(latents, noise, timesteps)
    prediction = wide(family.predict(noisy, timesteps, conditioning, params))
    target = family.target(latents, noise, timesteps).to(prediction.dtype)
    return weighted(family, prediction, timesteps), weighted(family, target, timesteps)


def weighted(family: Family, predicted: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """A side of the training loss [B, C, H, W] times the root of the weights of its noise levels.

    Args:
        family: the model.
        predicted: what the denoiser predicts, or what it should.
        timesteps: [B].
    """
    weights = family.loss_weights(timesteps)
    return (
        predicted if weights is None else weights.to(predicted).sqrt().view(-1, 1, 1, 1) * predicted
    )
