"""Flux.1: T5 tokens and pooled CLIP text, joint attention, rectified flow on packed latents."""

# B = batch, S = text tokens, C H W = latent channels and size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mima.errors import MimaError
from mima.families.joint_attention import PackedLatents, pack
from mima.families.text import Conditioning

# T5 tokens that the pipeline reads by default
T5_TOKENS = 512
# what the pipeline tells guidance-distilled models by default
GUIDANCE = 3.5


class Flux(PackedLatents):
    """``FluxPipeline``, guidance-distilled (dev) or not (schnell)."""

    pipeline_names = ("FluxPipeline",)
    training_defaults = PackedLatents.training_defaults | {
        "guidance_scale": GUIDANCE,
        "max_sequence_length": T5_TOKENS,
    }
    parts = (
        *("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        "scheduler",
    )

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        pipeline, config = self.pipeline, self._config
        return [
            ("text", config["joint_attention_dim"], pipeline.text_encoder_2.config.d_model),
            (
                "pooled text",
                config["pooled_projection_dim"],
                pipeline.text_encoder.config.hidden_size,
            ),
        ]

    @property
    def _stream_tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, pooled, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            max_sequence_length=self._tokens_read,
        )
        return {"encoder_hidden_states": hidden_BSD, "pooled_projections": pooled}

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        return self._mask(self._stream_tokenizer, prompts, self._tokens_read)

    def _guidance(self, count: int, scale: float | None, negative: str) -> dict[str, Any]:
        if negative:
            raise MimaError(
                "Sampler: Flux is distilled for guidance, which has no negative prompt; leave "
                "negative_prompt out"
            )
        return super()._guidance(count, scale, negative)

    def _sampling(self) -> dict[str, Any]:
        return {"max_sequence_length": self._max_tokens(T5_TOKENS), "guidance_scale": GUIDANCE}

    def lora_targets(self) -> list[str]:
        """Every attention projection and, as in diffusers' script, both streams' feed-forward."""
        feed_forward = self.parameter_names(r"\.ff(_context)?\.net\.(0\.proj|2)\.weight$")
        return [*super().lora_targets(), *feed_forward]

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        rows, columns = (side // self._patch for side in noisy.shape[-2:])
        text = conditioning["encoder_hidden_states"]
        # a token's place: (0, row, column) in the picture, the origin for text
        row, column = torch.meshgrid(
            torch.arange(rows, device=noisy.device),
            torch.arange(columns, device=noisy.device),
            indexing="ij",
        )
        places = torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3)
        guidance = None
        if self._config["guidance_embeds"]:
            scale = self.training.guidance_scale
            assert scale is not None
            guidance = torch.full((len(noisy),), scale, device=noisy.device)
        return {
            "hidden_states": pack(noisy),
            "timestep": timesteps / self.num_train_timesteps,
            "guidance": guidance,
            "img_ids": places.to(noisy.dtype),
            "txt_ids": noisy.new_zeros(text.shape[1], 3),
            **conditioning,
        }
