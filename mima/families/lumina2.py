"""Lumina Image 2.0: a Gemma text encoder, one stream of text and picture, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mima.families.masked_text import MaskedText
from mima.families.rectified_flow import RectifiedFlow
from mima.families.text import Conditioning

# tokens that the pipeline reads by default
GEMMA_TOKENS = 256


class Lumina2(MaskedText, RectifiedFlow):
    """``Lumina2Pipeline``.

    Text and picture share every weight of the blocks; before them, text alone passes
    ``caption_embedder`` and ``context_refiner``. The embedder's weight, which reads the normalised
    output of Gemma and nothing else, plays the part of cross-attention's keys and values, and
    ``cross_attention`` is all that text alone passes. The system prompt is read before each prompt;
    its tokens do not count as the prompt's.

    Inside, the model counts time and flow backwards, from noise to picture. diffusers' script
    draws its levels on that scale: with the scheduler's shift, most of them near the picture.
    """

    pipeline_names = ("Lumina2Pipeline",)
    training_defaults = RectifiedFlow.training_defaults | {"max_sequence_length": GEMMA_TOKENS}
    text_weights = r"caption_embedder\.1\.weight$"
    presets = RectifiedFlow.presets | {
        "attention": r"\.attn\.|caption_embedder|context_refiner",
        "cross_attention": r"caption_embedder|context_refiner",
    }

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        made = self.pipeline.text_encoder.config.hidden_size
        return [("text", self._config["cap_feat_dim"], made)]

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        return self.num_train_timesteps - super().sample_timesteps(batch, generator)

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        return super().loss_weights(self.num_train_timesteps - timesteps)

    def read_text(self, conditioning: Conditioning) -> torch.Tensor:
        norm = self.pipeline.transformer.time_caption_embed.caption_embedder[0]
        text: torch.Tensor = norm(conditioning["encoder_hidden_states"])
        return text

    def token_text(self, prompt: str) -> str:
        return f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        mask = super().token_mask(prompts)
        # the words before a prompt's own end with a space, which may be part of its first token
        before = self.pipeline.tokenizer(self.token_text("").rstrip()).input_ids
        mask[:, : len(before)] = False
        return mask

    def _sampling(self) -> dict[str, Any]:
        return {"max_sequence_length": self._max_tokens(GEMMA_TOKENS)}

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        backwards = 1 - timesteps / self.num_train_timesteps
        return {"hidden_states": noisy, "timestep": backwards, **conditioning}

    def _prediction(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return -output
