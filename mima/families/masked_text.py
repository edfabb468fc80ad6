"""Families whose one text encoder, T5 or Gemma, marks padding with a mask."""

# B = batch, S = tokens

from __future__ import annotations

from collections.abc import Sequence

import torch

from mima.families.base import Family
from mima.families.text import Conditioning


class MaskedText(Family):
    """What PixArt, SANA and Lumina 2 have in common: how they read prompts."""

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, mask_BS, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            max_sequence_length=self._tokens_read,
        )
        return {"encoder_hidden_states": hidden_BSD, "encoder_attention_mask": mask_BS}

    def token_text(self, prompt: str) -> str:
        text: str = self.pipeline._text_preprocessing([prompt], clean_caption=False)[0]
        return text

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        texts = [self.token_text(prompt) for prompt in prompts]
        return self._mask(self.pipeline.tokenizer, texts, self._tokens_read)
