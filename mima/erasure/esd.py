"""Erase concepts by fine-tuning a model against its own knowledge of them.

After Erased Stable Diffusion (ESD, Gandikota et al., ICCV 2023, arXiv 2303.07345). θ* is the model
as it was, c a prompt that names the concept, c₀ that prompt without the name, and x_t a picture of
c that the model as it is now has drawn as far as noise level t:

    min_θ  E ‖ε_θ(x_t, c, t) − [ε_θ*(x_t, c₀, t) − η (ε_θ*(x_t, c, t) − ε_θ*(x_t, c₀, t))]‖²

so that the concept's prompt comes to lead away from the concept. In the publication c is the name
alone, and c₀ therefore the empty prompt. ε is whatever the denoiser predicts: noise, velocity or
flow, in all of which guidance has the same form.
"""

# B = batch, C H W = latent channels and size

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mima.adaptation.base import require_full_precision
from mima.adapters.adapter import check_unadapted
from mima.choices import LARGEST_SEED, MOST, MOST_AT_ONCE
from mima.concepts import Concept
from mima.erasure.uce import Edit, edit_groups
from mima.errors import MimaError, bounded, check_settings
from mima.families import Conditioning, Family, family_of
from mima.families.pipelines import Pipeline, with_modules


@dataclass(frozen=True, kw_only=True)
class ESD:
    """Settings of one erasure by fine-tuning; the defaults are the published ones.

    Examples:
        >>> erased = ESD(steps=500).erase(pipeline, [van_gogh])
        >>> erased = ESD(parameters="not_cross_attention").erase(pipeline, [nudity])  # ESD-u
    """

    parameters: str = "cross_attention"
    """What is trained, as for `Family.parameter_names`: `cross_attention` is ESD-x, which stays
    with the prompts that name the concept; `not_cross_attention` is ESD-u, which erases it whatever
    the prompt says; `denoiser` is everything."""
    steps: int = 1000
    """Optimiser steps, the concepts taking turns."""
    learning_rate: float = 1e-5
    """Constant learning rate of Adam."""
    batch_size: int = 1
    """Pictures per step, all at one noise level."""
    negative_guidance: float = 1.0
    """η: how far beyond the nameless prompt's prediction the concept's is pushed."""
    start_guidance: float = 3.0
    """Guidance scale with which x_t is drawn; 1 is none, for guidance-distilled models."""
    resolution: int | None = None
    """Side in pixels of the pictures whose noise is predicted; by default what the model was
    trained on."""
    sampling_steps: int = 50
    """Noise levels of the sampler that draws x_t."""
    gradient_checkpointing: bool = False
    """Trade time for memory by recomputing activations."""
    seed: int = 0
    """Of noise, noise levels and the order of prompts."""

    def __post_init__(self) -> None:
        checks = {
            "steps": bounded(self.steps, 1, MOST),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0 and finite"),
            "batch_size": bounded(self.batch_size, 1, MOST_AT_ONCE),
            "seed": bounded(self.seed, 0, LARGEST_SEED),
            "negative_guidance": (
                0 <= self.negative_guidance < math.inf,
                "at least 0 and finite",
            ),
            "start_guidance": (1 <= self.start_guidance < math.inf, "at least 1 and finite"),
            "resolution": (self.resolution is None or self.resolution >= 1, "at least 1"),
            "sampling_steps": bounded(self.sampling_steps, 1, MOST),
        }
        check_settings(self, checks)

    def erase(
        self,
        pipeline: Pipeline,
        concepts: Sequence[Concept | str | Sequence[Edit]],
        *,
        target: str = "",
        on_step: Callable[[int, float], None] | None = None,
    ) -> Any:
        """Erase concepts from a model.

        Args:
            pipeline: a diffusers pipeline in float32, which stays as it is.
            concepts: what to erase, by the concept's prompts that contain its name, or by a name
                alone (see `edits_of`). A list of `Edit`s says exactly: c is the source, c₀ the
                target.
            target: words that take the place of a concept's name in c₀; nothing by default.
            on_step: called after each step with the steps done and the loss.

        Returns:
            A pipeline of the same class with a denoiser of its own; the rest is shared.

        Raises:
            MimaError: a concept whose name is in none of its prompts, an unsupported model, a
                model in half precision, or a loss that is no longer finite.
            TypeError: one concept instead of a list.
            ValueError: no concepts.
        """
        groups = edit_groups("ESD.erase", concepts, (), target)
        require_full_precision(pipeline, "esd")
        frozen = family_of(pipeline, resolution=self.resolution)
        check_unadapted(frozen)
        denoiser = copy.deepcopy(frozen.denoiser).requires_grad_(False).eval()
        erased = with_modules(pipeline, **{frozen.denoiser_name: denoiser})
        family = family_of(erased, resolution=self.resolution)
        parameters = [
            denoiser.get_parameter(name).requires_grad_(True)
            for name in family.parameter_names(self.parameters)
        ]
        if self.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        encoded = [[_encode(family, edit) for edit in group] for group in groups]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            group = encoded[step % len(encoded)]
            prompt, neutral = group[int(torch.randint(len(group), (), generator=generator))]
            loss = self._loss(frozen, family, prompt, neutral, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if not torch.isfinite(loss):
                raise MimaError(
                    f"esd: the loss is {loss.item()} at step {step + 1}; "
                    f"lower learning_rate ({self.learning_rate})"
                )
            if on_step is not None:
                on_step(step + 1, loss.item())
        if self.gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        denoiser.requires_grad_(False)
        return erased

    def _loss(
        self,
        frozen: Family,
        family: Family,
        prompt: Conditioning,
        neutral: Conditioning,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The objective on one batch that the model as it is draws."""
        size = self.batch_size
        prompt, neutral = _repeated(prompt, size), _repeated(neutral, size)
        levels = family.sampling_timesteps(self.sampling_steps)
        stop = int(torch.randint(len(levels), (), generator=generator))
        with torch.no_grad():
            noisy = self._draw(family, prompt, neutral, levels[: stop + 1], generator)
            timesteps = levels[stop].expand(size)
            named = frozen.predict(noisy, timesteps, prompt)
            unnamed = frozen.predict(noisy, timesteps, neutral)
            target = unnamed - self.negative_guidance * (named - unnamed)
        return F.mse_loss(family.predict(noisy, timesteps, prompt), target)

    def _draw(
        self,
        family: Family,
        prompt: Conditioning,
        neutral: Conditioning,
        levels: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """x_t [B, C, H, W] at the last of `levels`, from noise at the first."""
        # drawn on the CPU, so that a seed means the same on every device
        noisy = torch.randn(family.latent_shape(self.batch_size), generator=generator).to(
            family.device, family.dtype
        )
        both = {name: torch.cat([neutral[name], prompt[name]]) for name in prompt}
        for now, following in itertools.pairwise(levels):
            if self.start_guidance == 1:
                prediction = family.predict(noisy, now.expand(len(noisy)), prompt)
            else:
                twice = torch.cat([noisy, noisy])
                unnamed, named = family.predict(twice, now.expand(len(twice)), both).chunk(2)
                prediction = unnamed + self.start_guidance * (named - unnamed)
            now, following = now.expand(len(noisy)), following.expand(len(noisy))
            noisy = family.denoise(noisy, prediction, now, following)
        return noisy


VARIANTS = {
    "esd-x": ESD(),
    "esd-u": ESD(parameters="not_cross_attention"),
    "esd-full": ESD(parameters="denoiser"),
}
"""The published variants by their names on the command line."""


def _encode(family: Family, edit: Edit) -> tuple[Conditioning, Conditioning]:
    """One row each for the prompt and its neutral counterpart."""
    both = family.encode_prompts([edit.source, edit.target])
    return ({n: v[:1] for n, v in both.items()}, {n: v[1:] for n, v in both.items()})


def _repeated(rows: Conditioning, size: int) -> Conditioning:
    return {name: value.repeat_interleave(size, dim=0) for name, value in rows.items()}
