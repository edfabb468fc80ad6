"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, joint attention, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mima.families.joint_attention import JointAttention
from mima.families.text import Conditioning

# T5 tokens that the pipeline reads by default
T5_TOKENS = 256


class StableDiffusion3(JointAttention):
    """``StableDiffusion3Pipeline``, with T5 or without.

    The text stream is the CLIP tokens, both encoders side by side, followed by the T5 tokens; the
    real tokens of a prompt therefore occur twice. Without T5 its places are zeros, not tokens.
    """

    pipeline_names = ("StableDiffusion3Pipeline",)
    training_defaults = JointAttention.training_defaults | {
        "weighting_scheme": "logit_normal",
        "precondition_outputs": True,
        "max_sequence_length": 77,
    }
    parts = (
        *("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        "scheduler",
    )

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        pipeline, config = self.pipeline, self._config
        clip = (pipeline.text_encoder, pipeline.text_encoder_2)
        pooled = sum(encoder.config.projection_dim for encoder in clip)
        widths = [("pooled text", config["pooled_projection_dim"], pooled)]
        if pipeline.text_encoder_3 is not None:
            widths.append(
                ("text", config["joint_attention_dim"], pipeline.text_encoder_3.config.d_model)
            )
        return widths

    @property
    def _stream_tokenizer(self) -> Any:
        return None if self.pipeline.text_encoder_3 is None else self.pipeline.tokenizer_3

    @property
    def _text_stream(self) -> list[tuple[Any, int | None]]:
        # both CLIP encoders' tokens stand side by side
        clip = (self.pipeline.tokenizer, self.pipeline.tokenizer_max_length)
        return [clip] if self._stream_tokenizer is None else [clip, *super()._text_stream]

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens_read,
        )
        return {"encoder_hidden_states": hidden_BSD, "pooled_projections": pooled}

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        pipeline = self.pipeline
        first, second = (
            self._mask(tokenizer, prompts, pipeline.tokenizer_max_length)
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
        )
        if self._stream_tokenizer is None:
            # how many zeros stand in T5's place depends on the version of diffusers
            length = self.encode_prompts(prompts)["encoder_hidden_states"].shape[1]
            t5 = torch.zeros(len(prompts), length - first.shape[1], dtype=torch.bool)
        else:
            t5 = self._mask(self._stream_tokenizer, prompts, self._tokens_read)
        return torch.cat([first | second, t5], dim=1)

    def _sampling(self) -> dict[str, Any]:
        return {"max_sequence_length": self._max_tokens(T5_TOKENS)}

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        return {"hidden_states": noisy, "timestep": timesteps, **conditioning}
