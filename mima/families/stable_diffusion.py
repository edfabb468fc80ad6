"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from mima.errors import MimaError, quoted
from mima.families.ddpm import DDPM
from mima.families.pipelines import Pipeline
from mima.families.text import Conditioning

# settings of a UNet that change what it reads besides latents, time and text
UNSUPPORTED = {
    "time_cond_proj_dim": "guidance-distilled (latent consistency) models are not supported",
    "encoder_hid_dim_type": "text is projected once more before cross-attention",
    "only_cross_attention": "its attn1 reads text, too",
    "class_embed_type": "it reads classes beside the text",
    "num_class_embeds": "it reads classes beside the text",
}


class StableDiffusion(DDPM):
    """``StableDiffusionPipeline``: ε, v or sample prediction, as its scheduler says."""

    added_conditions: ClassVar[str | None] = None
    """``addition_embed_type`` of the UNets of this family."""

    pipeline_names = ("StableDiffusionPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        for name, reason in UNSUPPORTED.items():
            value = self._config.get(name)
            if value not in (None, False):
                raise MimaError(f"model: {name} of the unet is {quoted(value)}: {reason}")
        added = self._config.get("addition_embed_type")
        if added != self.added_conditions:
            raise MimaError(
                f"model: addition_embed_type of the unet is {quoted(added)}, expected "
                f"{self.added_conditions!r} in a {type(pipeline).__name__}"
            )

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        pipeline = self.pipeline
        encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
        made = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
        return [("text", self._config["cross_attention_dim"], made)]

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"encoder_hidden_states": hidden_BSD}

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer = self.pipeline.tokenizer
        return self._mask(tokenizer, prompts, tokenizer.model_max_length)

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        return {"sample": noisy, "timestep": timesteps, **conditioning}
