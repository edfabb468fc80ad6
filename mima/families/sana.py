"""SANA: a Gemma text encoder, a linear transformer with cross-attention, rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from mima.families.base import Conditioning, Family
from mima.families.rectified_flow import RectifiedFlow

# tokens that the pipeline reads by default
GEMMA_TOKENS = 300


class Sana(RectifiedFlow):
    """``SanaPipeline``.

    Keys and values read the transformer's ``caption_norm`` of its ``caption_projection`` of
    Gemma's output, which ``read_text`` therefore returns; see ``PixArt`` for what follows from
    that. Prompts are read as they are, in training and in sampling: the pipeline's instruction to
    enhance them is left out, as in diffusers' script.
    """

    pipeline_names = ("SanaPipeline",)
    training_defaults: ClassVar[Mapping[str, Any]] = {
        **RectifiedFlow.training_defaults,
        "max_sequence_length": GEMMA_TOKENS,
    }
    text_weights = Family.text_weights
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        made = self.pipeline.text_encoder.config.hidden_size
        return [("text", self._config["caption_channels"], made)]

    def _posterior_mean(self, pixels: torch.Tensor) -> torch.Tensor:
        # an autoencoder without a posterior
        latents: torch.Tensor = self.pipeline.vae.encode(pixels).latent
        return latents

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            max_sequence_length=self._max_tokens(self.training.max_sequence_length),
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def read_text(self, conditioning: Conditioning) -> torch.Tensor:
        transformer = self.pipeline.transformer
        projected = transformer.caption_projection(conditioning["encoder_hidden_states"])
        text: torch.Tensor = transformer.caption_norm(projected)
        return text

    def token_text(self, prompt: str) -> str:
        text: str = self.pipeline._text_preprocessing([prompt], clean_caption=False)[0]
        return text

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        length = self._max_tokens(self.training.max_sequence_length)
        self.pipeline.tokenizer.padding_side = "right"
        return self._mask(self.pipeline.tokenizer, [*map(self.token_text, prompts)], length)

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
