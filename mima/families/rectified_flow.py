"""Families of transformers that are trained by rectified flow."""

# B = batch, C H W = latent channels and size

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mima.errors import MimaError
from mima.families.base import Family
from mima.families.pipelines import Pipeline
from mima.options import TrainingOptions
from mima.reference import wide


class RectifiedFlow(Family):
    """``x_σ = (1 − σ) x + σ ε``, target ``ε − x`` (Liu et al. 2023; Esser et al. 2024).

    Noise levels are given as timesteps ``σ · num_train_timesteps``, floating point. Training draws
    them as diffusers' scripts do: a place u in [0, 1] by the weighting scheme, and there the level
    of the scheduler's own training schedule, which has the scheduler's constant shift, and no shift
    where it shifts by resolution when it samples.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
    }

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        config = pipeline.scheduler.config
        if "shift" not in config and not config.get("use_flow_sigmas"):
            raise MimaError(
                f"scheduler: {type(pipeline.scheduler).__name__} has no shift; "
                f"{type(pipeline).__name__} is supported with flow-matching schedulers "
                "(FlowMatchEulerDiscreteScheduler)"
            )

    @property
    def num_train_timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @property
    def _patch(self) -> int:
        return int(self._config["patch_size"])

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._scaled(latents - (self.pipeline.vae.config.get("shift_factor") or 0.0))

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw [batch] noise levels of the schedule, float32 in (0, num_train_timesteps]."""
        u = density(self.training, batch, generator)
        index = (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return self._schedule[index].to(self.device)

    @cached_property
    def _schedule(self) -> torch.Tensor:
        """The timesteps that training draws from, descending, whatever sampling has set since."""
        config = dict(self.pipeline.scheduler.config)
        schedule: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        timesteps: torch.Tensor = schedule.timesteps
        return timesteps

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        return flow_weights(self.training, timesteps / self.num_train_timesteps)

    def _shift(self, sigmas: torch.Tensor) -> torch.Tensor:
        scheduler, config = self.pipeline.scheduler, self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            shift = float(config["shift"] if "shift" in config else config["flow_shift"])
            return shift * sigmas / (1 + (shift - 1) * sigmas)
        # a straight line through (base_image_seq_len, base_shift), (max_image_seq_len, max_shift)
        side = self.latent_shape(1)[-1] // self._patch
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (side**2 - config.base_image_seq_len)
        shifted: torch.Tensor = scheduler.time_shift(mu, 1.0, sigmas)
        return shifted

    def _sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return (timesteps.to(like) / self.num_train_timesteps).view(-1, 1, 1, 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        x, eps = wide(latents), wide(noise)
        sigmas = self._sigmas(timesteps, x)
        return ((1 - sigmas) * x + sigmas * eps).to(latents.dtype)

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        return (wide(noise) - wide(latents)).to(latents.dtype)

    def sampling_timesteps(self, steps: int) -> torch.Tensor:
        """Euler's: evenly spaced before the shift, as the pipeline's scheduler has them."""
        sigmas = self._shift(torch.linspace(1, 0, steps + 1)[:-1])
        return (sigmas * self.num_train_timesteps).to(self.device)

    def denoise(
        self,
        noisy: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        following: torch.Tensor,
    ) -> torch.Tensor:
        """Euler's step along the predicted flow."""
        x, flow = wide(noisy), wide(prediction)
        step = self._sigmas(following, x) - self._sigmas(timesteps, x)
        return (x + step * flow).to(noisy.dtype)


def density(options: TrainingOptions, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Where in a rectified flow's schedule a batch is drawn: [B] float32 in [0, 1], 0 is noise."""
    scheme = options.weighting_scheme
    if scheme == "logit_normal":
        assert options.logit_mean is not None
        assert options.logit_std is not None
        normal = torch.randn(batch, generator=generator)
        return (options.logit_mean + options.logit_std * normal).sigmoid()
    u = torch.rand(batch, generator=generator)
    if scheme == "mode":
        assert options.mode_scale is not None
        u = 1 - u - options.mode_scale * ((math.pi * u / 2).cos().square() - 1 + u)
    return u.clamp(0, 1)


def flow_weights(options: TrainingOptions, sigmas: torch.Tensor) -> torch.Tensor | None:
    """What the squared error of a flow counts at noise levels σ [B] in (0, 1]; None: 1 at all."""
    weights = None
    if options.weighting_scheme == "sigma_sqrt":
        weights = sigmas**-2
    elif options.weighting_scheme == "cosmap":
        weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    if options.precondition_outputs:
        weights = sigmas**2 if weights is None else weights * sigmas**2
    return weights
