"""Encoded pictures and the seeded batches drawn from them."""

# P = pictures, B = batch

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F

from mima.families import Conditioning, Family
from mima.merging import Params
from mima.training.loss import pixels, places, prediction_and_target

if TYPE_CHECKING:
    from mima.concepts.pictures import Picture

T = TypeVar("T")

CHUNK = 16
"""Pictures, or prompts, that are encoded at once."""


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """Pictures or prompts in parts that are encoded at once."""
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone: the same draws in any pass, rank or rerun."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Encoded:
    """Pictures and their prompts as the denoiser reads them, encoded once.

    The tensors stay in the CPU's memory, or mapped from a file where they are large:
    ``Batch.draw`` moves to the model's device what a step needs.

    Attributes:
        latents: [P, C, H, W].
        prompts: T rows of each conditioning tensor, one per distinct prompt.
        prompt: [P] the row that each picture's prompt has.
        pictures: P rows of what is conditioned on the picture, not on its prompt.
    """

    latents: torch.Tensor
    prompts: Conditioning
    prompt: torch.Tensor
    pictures: Conditioning = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        family: Family,
        latents: torch.Tensor,
        prompts: Sequence[str],
        pictures: Sequence[Picture] = (),
    ) -> Encoded:
        """Put latents [P, C, H, W] and P prompts together; each distinct prompt is encoded.

        ``pictures`` are the P that the latents were encoded from; none where the model drew them,
        which are uncropped and of its resolution.
        """
        distinct = list(dict.fromkeys(prompts))
        encoded = [family.encode_prompts(chunk) for chunk in chunks(distinct)]
        return cls(
            latents.cpu(),
            {name: torch.cat([part[name] for part in encoded]).cpu() for name in encoded[0]},
            torch.tensor([distinct.index(prompt) for prompt in prompts]),
            _picture_conditions(family, len(latents), pictures),
        )

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def conditioning(self) -> Conditioning:
        """P rows of each conditioning tensor."""
        return {name: value[self.prompt] for name, value in self.prompts.items()} | self.pictures

    def rows(self, index: torch.Tensor) -> Encoded:
        """The pictures at ``index`` [B], repetitions allowed."""
        pictures = {name: value[index] for name, value in self.pictures.items()}
        return Encoded(self.latents[index], self.prompts, self.prompt[index], pictures)

    @property
    def rows_of_prompts(self) -> int:
        """T, how many distinct prompts there are."""
        return len(next(iter(self.prompts.values())))

    def with_prompts(self, family: Family, prompts: Sequence[str]) -> Encoded:
        """The same, with a row of ``prompts`` for each of more, which no picture has."""
        more = [family.encode_prompts(some) for some in chunks(prompts)]
        rows = {
            name: torch.cat([kept, *(part[name].cpu() for part in more)])
            for name, kept in self.prompts.items()
        }
        return replace(self, prompts=rows)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """As named tensors, for a file."""
        named = {f"prompts.{name}": value for name, value in self.prompts.items()}
        named |= {f"pictures.{name}": value for name, value in self.pictures.items()}
        tensors = {"latents": self.latents, "prompt": self.prompt, **named}
        # safetensors does not store strides, and a convolution's rounding depends on its input's
        return {name: value.contiguous() for name, value in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Encoded:
        """The inverse of ``to_tensors``."""
        parts: dict[str, Conditioning] = {"prompts": {}, "pictures": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
        return cls(tensors["latents"], parts["prompts"], tensors["prompt"], parts["pictures"])


def _picture_conditions(family: Family, count: int, pictures: Sequence[Picture]) -> Conditioning:
    side = family.resolution
    whole = torch.tensor([[side, side, 0, 0]]).expand(count, 4)
    conditions = family.picture_conditions(whole)
    # only for families with conditions: their sizes cost opening every picture once more
    return (
        family.picture_conditions(places(pictures, side)) if conditions and pictures else conditions
    )


def encode_images(family: Family, pictures: Sequence[Picture]) -> torch.Tensor:
    """Latents [P, C, H, W] of pictures, encoded without a graph, a few at a time."""
    side = family.resolution
    return torch.cat([family.encode_images(pixels(some, side)) for some in chunks(pictures)])


def encode(family: Family, pictures: Sequence[Picture]) -> Encoded:
    """Encode pictures and prompts without a graph, a few at a time."""
    latents = encode_images(family, pictures)
    return Encoded.of(family, latents, [picture.prompt for picture in pictures], pictures)


@dataclass(frozen=True)
class Batch:
    """One draw of pictures, noise levels and noise: L(batch; θ) is then a function of θ alone.

    Attributes:
        latents: [B, C, H, W].
        conditioning: B rows of each conditioning tensor.
        timesteps: [B].
        noise: [B, C, H, W].
        prompt: [B] the row of ``Encoded.prompts`` that each picture's prompt has.
    """

    latents: torch.Tensor
    conditioning: Conditioning
    timesteps: torch.Tensor
    noise: torch.Tensor
    prompt: torch.Tensor

    @classmethod
    def draw(
        cls,
        family: Family,
        pictures: Encoded,
        size: int,
        generator: torch.Generator,
        among: torch.Tensor | None = None,
    ) -> Batch:
        """Draw B = ``size`` pictures (without repetition while they last), noise levels and noise.

        ``among`` are the indices of the pictures that may be drawn; None for all.
        """
        count = len(pictures) if among is None else len(among)
        order = torch.cat(
            [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
        )[:size]
        chosen = pictures.rows(order if among is None else among[order])
        timesteps = family.sample_timesteps(size, generator)
        noise = torch.randn(chosen.latents.shape, generator=generator, dtype=torch.float32)
        return cls.of(family, chosen, timesteps, noise)

    @classmethod
    def of(
        cls, family: Family, pictures: Encoded, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> Batch:
        """All of ``pictures`` at given noise levels, on the model's device."""
        device = family.device
        return cls(
            pictures.latents.to(device),
            {name: value.to(device) for name, value in pictures.conditioning.items()},
            timesteps.to(device),
            noise.to(device, pictures.latents.dtype),
            pictures.prompt,
        )


def predictions(
    family: Family, batches: Sequence[Batch], params: Params | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prediction and target [B, C, H, W] of each batch, in float32 at least, all from one forward.

    Batches may differ in size. ``params`` replace the denoiser's own, and are differentiable.
    """
    prediction, target = prediction_and_target(
        family,
        torch.cat([batch.latents for batch in batches]),
        {
            name: torch.cat([batch.conditioning[name] for batch in batches])
            for name in batches[0].conditioning
        },
        torch.cat([batch.timesteps for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        params,
    )
    sizes = [len(batch.latents) for batch in batches]
    return list(zip(prediction.split(sizes), target.split(sizes), strict=True))


def losses(
    family: Family, batches: Sequence[Batch], params: Params | None = None
) -> list[torch.Tensor]:
    """L(x, c; θ) of each batch, the mean squared error, a scalar; arguments of `predictions`."""
    return [F.mse_loss(*pair) for pair in predictions(family, batches, params)]
