"""Random changes to pictures for the encoder and the classifier."""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common import autocast

# B = pictures in a batch


def uniform(rng: torch.Generator, count: int, low: float, high: float) -> torch.Tensor:
    """[count, 1, 1, 1] numbers from low to high."""
    return torch.rand(count, 1, 1, 1, generator=rng) * (high - low) + low


def move(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Rotate by up to 10 degrees, scale by 0.85 to 1.1, shift by up to 4 pixels, on white."""
    count = len(images)
    angle = uniform(rng, count, -10, 10).flatten() * math.pi / 180
    zoom = 1 / uniform(rng, count, 0.85, 1.1).flatten()
    shift = (torch.rand(count, 2, generator=rng) - 0.5) * (16 / images.shape[-1])
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    affine = torch.cat([rotation * zoom[:, None, None], shift[:, :, None]], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # grid_sample pads with 0, so white (1) is moved to 0 and back
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def recolour(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Small changes of saturation, contrast and of each channel's strength; white stays white."""
    count = len(images)
    ink = 1 - images
    grey = ink.mean(1, keepdim=True)
    ink = grey + (ink - grey) * uniform(rng, count, 0.75, 1.25)
    channels = 1 + 0.12 * (torch.rand(count, 3, 1, 1, generator=rng) - 0.5)
    return 1 - ink * uniform(rng, count, 0.85, 1.1) * channels


def degrade(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blur some of the pictures, add a little noise to all."""
    count = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    choice = torch.rand(count, 1, 1, 1, generator=rng)
    images = torch.where(choice < 0.25, blurred, torch.where(choice < 0.4, coarse, images))
    return images + torch.randn(images.shape, generator=rng) * uniform(rng, count, 0.0, 0.08)


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """All of it, [B, 3, H, W] in [-1, 1]."""
    return degrade(recolour(move(images, rng), rng), rng).clamp(-1, 1)


@torch.no_grad()
def blurry_copies(vae: AutoencoderKL, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] as an imperfect sample shows them: encoded, disturbed, decoded."""
    copies = []
    for batch in images.contiguous(memory_format=torch.channels_last).split(64):
        with autocast():
            latents = vae.encode(batch).latent_dist.mean
            latents = latents + 0.25 * torch.randn(latents.shape, generator=rng)
            copies.append(vae.decode(latents).sample.float().clamp(-1, 1))
    return torch.cat(copies)
