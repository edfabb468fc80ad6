"""Families trained with the variance-preserving process of DDPM (Ho et al. 2020)."""

# B = batch, C H W = latent channels and size

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler

from mima.errors import MimaError, quoted
from mima.families.base import Family
from mima.families.pipelines import Pipeline
from mima.reference import wide

# what determines the training process; the rest of a scheduler's settings concerns sampling
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DDPM(Family):
    """``x_t = √ᾱ_t x + √(1 − ᾱ_t) ε`` with the betas of the pipeline's scheduler.

    Zero terminal signal-to-noise ratio (``rescale_betas_zero_snr``) is followed: at the last noise
    level ``x_t = ε`` exactly.

    Attributes:
        schedule: the training process as a DDPM scheduler, whatever the pipeline samples with.
    """

    training_defaults: ClassVar[dict[str, Any]] = {"snr_gamma": None}

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        scheduler = pipeline.scheduler
        kind, config = type(scheduler).__name__, scheduler.config
        if "beta_start" not in config:
            raise MimaError(
                f"scheduler: {kind} has no betas; {type(pipeline).__name__} is supported with "
                "schedulers of the DDPM process (DDIM, PNDM, Euler, DPM-Solver and the like)"
            )
        if config.get("timestep_type") == "continuous":
            raise MimaError(
                f"scheduler: {kind} tells the model continuous noise levels, which is not supported"
            )
        settings = {name: config[name] for name in SCHEDULE if name in config}
        schedule: Any = DDPMScheduler(**settings)
        self.schedule = schedule
        prediction = schedule.config["prediction_type"]
        if prediction not in PREDICTIONS:
            raise MimaError(
                f"scheduler: prediction_type of {kind} must be one of {', '.join(PREDICTIONS)}, "
                f"got {quoted(prediction)}"
            )

    @property
    def _multiple(self) -> int:
        # these pipelines draw no other sides, whatever the VAE's factor
        return math.lcm(super()._multiple, 8)

    @property
    def num_train_timesteps(self) -> int:
        return int(self.schedule.config["num_train_timesteps"])

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw [batch] noise levels uniformly."""
        steps = torch.randint(self.num_train_timesteps, (batch,), generator=generator)
        return steps.to(self.device)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        x, eps = wide(latents), wide(noise)
        signal, sigma = self._levels(timesteps, x)
        return (signal * x + sigma * eps).to(latents.dtype)

    def _levels(
        self, timesteps: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), each [B, 1, 1, 1]."""
        # moved to the device once, as the scheduler's own methods do
        self.schedule.alphas_cumprod = self.schedule.alphas_cumprod.to(like.device)
        variance = self.schedule.alphas_cumprod.to(like.dtype)[timesteps].view(-1, 1, 1, 1)
        return variance.sqrt(), (1 - variance).sqrt()

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """ε, ``v = √ᾱ_t ε − √(1 − ᾱ_t) x`` or x, as the scheduler's prediction_type says."""
        kind = self.schedule.config["prediction_type"]
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return latents
        x, eps = wide(latents), wide(noise)
        signal, sigma = self._levels(timesteps, x)
        return (signal * eps - sigma * x).to(latents.dtype)

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        gamma = self.training.snr_gamma
        if gamma is None:
            return None
        variance: torch.Tensor = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = variance / (1 - variance)
        kind = self.schedule.config["prediction_type"]
        if kind == "sample":
            return snr.clamp(max=gamma)
        if kind == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        # min(SNR, γ) / SNR, also where there is no signal
        return (gamma / snr).clamp(max=1)

    def sampling_timesteps(self, steps: int) -> torch.Tensor:
        """DDIM's: evenly spaced, rounded, int64."""
        levels = torch.linspace(self.num_train_timesteps - 1, 0, steps + 1)[:-1]
        return levels.round().long().to(self.device)

    def denoise(
        self,
        noisy: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        following: torch.Tensor,
    ) -> torch.Tensor:
        """DDIM (Song et al. 2021, η = 0): the same x and ε, mixed for another noise level."""
        x_t, predicted = wide(noisy), wide(prediction)
        signal, sigma = self._levels(timesteps, x_t)
        kind = self.schedule.config["prediction_type"]
        if kind == "epsilon":
            x, eps = (x_t - sigma * predicted) / signal, predicted
        elif kind == "sample":
            x, eps = predicted, (x_t - signal * predicted) / sigma
        else:
            x = signal * x_t - sigma * predicted
            eps = sigma * x_t + signal * predicted
        return self.add_noise(x, eps, following).to(noisy.dtype)
