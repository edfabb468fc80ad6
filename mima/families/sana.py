"""SANA: a Gemma text encoder, a linear transformer with cross-attention, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mima.families.masked_text import MaskedText
from mima.families.rectified_flow import RectifiedFlow
from mima.families.text import Conditioning

# tokens that the pipeline reads by default
GEMMA_TOKENS = 300


class Sana(MaskedText, RectifiedFlow):
    """``SanaPipeline``.

    Keys and values read the transformer's ``caption_norm`` of its ``caption_projection`` of
    Gemma's output, which ``read_text`` therefore returns; see ``PixArt`` for what follows from
    that. Prompts are read as they are, in training and in sampling: the pipeline's instruction to
    enhance them is left out, as in diffusers' script.
    """

    pipeline_names = ("SanaPipeline",)
    training_defaults = RectifiedFlow.training_defaults | {"max_sequence_length": GEMMA_TOKENS}

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        made = self.pipeline.text_encoder.config.hidden_size
        return [("text", self._config["caption_channels"], made)]

    def _posterior_mean(self, pixels: torch.Tensor) -> torch.Tensor:
        # an autoencoder without a posterior
        latents: torch.Tensor = self.pipeline.vae.encode(pixels).latent
        return latents

    def read_text(self, conditioning: Conditioning) -> torch.Tensor:
        transformer = self.pipeline.transformer
        projected = transformer.caption_projection(conditioning["encoder_hidden_states"])
        text: torch.Tensor = transformer.caption_norm(projected)
        return text

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        # as the pipeline sets it when it encodes prompts
        self.pipeline.tokenizer.padding_side = "right"
        return super().token_mask(prompts)

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self._max_tokens(GEMMA_TOKENS),
            "complex_human_instruction": None,
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        scale = self._config["timestep_scale"]
        return {"hidden_states": noisy, "timestep": timesteps * scale, **conditioning}
