"""Encoded pictures and the seeded batches drawn from them."""

# P = pictures, B = batch

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mima.diffusion import diffusion_loss, pixels
from mima.families.base import Conditioning, Family, Params

if TYPE_CHECKING:
    from mima.pictures import Picture


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone: the same draws in any pass, rank or rerun."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Encoded:
    """Pictures and their prompts as the denoiser reads them, encoded once.

    Attributes:
        latents: [P, C, H, W].
        conditioning: P rows of each conditioning tensor.
    """

    latents: torch.Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: torch.Tensor) -> Encoded:
        """The pictures at ``index`` [B], repetitions allowed."""
        index = index.to(self.latents.device)
        return Encoded(
            self.latents[index], {name: value[index] for name, value in self.conditioning.items()}
        )


def encode(family: Family, pictures: Sequence[Picture], *, chunk: int = 16) -> Encoded:
    """Encode pictures and prompts without a graph, ``chunk`` at a time."""
    latents, conditioning = [], []
    for start in range(0, len(pictures), chunk):
        part = pictures[start : start + chunk]
        latents.append(family.encode_images(pixels(part, family.resolution)))
        conditioning.append(family.encode_prompts([picture.prompt for picture in part]))
    return Encoded(
        torch.cat(latents),
        {name: torch.cat([c[name] for c in conditioning]) for name in conditioning[0]},
    )


@dataclass(frozen=True)
class Batch:
    """One draw of pictures, noise levels and noise: L(batch; θ) is then a function of θ alone."""

    pictures: Encoded
    timesteps: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def draw(
        cls, family: Family, pictures: Encoded, size: int, generator: torch.Generator
    ) -> Batch:
        """Draw ``size`` pictures (without repetition while they last), noise levels and noise."""
        order = [
            torch.randperm(len(pictures), generator=generator)
            for _ in range(-(-size // len(pictures)))
        ]
        chosen = pictures.rows(torch.cat(order)[:size])
        timesteps = family.sample_timesteps(size, generator)
        noise = torch.randn(chosen.latents.shape, generator=generator, dtype=torch.float32)
        return cls(chosen, timesteps, noise.to(chosen.latents))

    def loss(self, family: Family, params: Params | None = None) -> torch.Tensor:
        """The diffusion training loss of this batch, a scalar."""
        return diffusion_loss(
            family,
            self.pictures.latents,
            self.pictures.conditioning,
            self.timesteps,
            self.noise,
            params,
        )
