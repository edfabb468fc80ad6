"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler

from mima.families.base import Conditioning, Family


class StableDiffusion(Family):
    """``StableDiffusionPipeline``: epsilon, v or sample prediction, as its scheduler says."""

    pipeline_names = ("StableDiffusionPipeline",)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)

    def _denoiser(self) -> torch.nn.Module:
        return self.pipeline.unet

    @property
    def resolution(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def num_train_timesteps(self) -> int:
        return self.schedule.config.num_train_timesteps

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return (posterior.mean * vae.config.scaling_factor).to(self.device, self.dtype)

    def _tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer = self.pipeline.tokenizer
        batch = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids.to(self.pipeline.text_encoder.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        hidden_BSD = self.pipeline.text_encoder(self._tokens(prompts))[0]
        return {"encoder_hidden_states": hidden_BSD.to(self.device, self.dtype)}

    def token_embeddings(self, prompt: str) -> torch.Tensor:
        ids = self._tokens([prompt])[0]
        end = (ids == self.pipeline.tokenizer.eos_token_id).nonzero()[0].item()
        return self.encode_prompts([prompt])["encoder_hidden_states"][0, 1 : end + 1]

    def text_projections(self) -> list[str]:
        return [
            name
            for name, _ in self.denoiser.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        ]

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        steps = torch.randint(self.num_train_timesteps, (batch,), generator=generator)
        return steps.to(self.device)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        kind = self.schedule.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        if kind == "sample":
            return latents
        raise ValueError(
            f"scheduler: prediction_type must be epsilon, v_prediction or sample, got {kind!r}"
        )

    def _keywords(self, conditioning: Conditioning) -> dict[str, Any]:
        return dict(conditioning)
