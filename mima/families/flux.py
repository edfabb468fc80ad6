"""Flux.1: T5 tokens and pooled CLIP text, joint attention, rectified flow on packed latents."""

# B = batch, S = text tokens, C H W = latent channels and size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from mima.families.base import Conditioning
from mima.families.joint_attention import JointAttention

# T5 tokens that the pipeline reads by default
T5_TOKENS = 512
# what the pipeline tells guidance-distilled models by default
GUIDANCE = 3.5


class Flux(JointAttention):
    """``FluxPipeline``, guidance-distilled (dev) or not (schnell).

    Latents are [B, C, H, W] everywhere; 2×2 of them become one token of the transformer in
    ``predict`` alone.
    """

    pipeline_names = ("FluxPipeline",)
    training_defaults: ClassVar[Mapping[str, Any]] = {
        **JointAttention.training_defaults,
        "guidance_scale": 3.5,
        "max_sequence_length": 512,
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
    def _latent_channels(self) -> int:
        return super()._latent_channels // self._patch**2

    @property
    def _sample_size(self) -> Any:
        return self.pipeline.default_sample_size

    @property
    def _patch(self) -> int:
        # packing; the transformer's own patch_size is 1
        return 2

    @property
    def _stream_tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, pooled, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            max_sequence_length=self._max_tokens(self.training.max_sequence_length),
        )
        return {"encoder_hidden_states": hidden_BSD, "pooled_projections": pooled}

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        length = self._max_tokens(self.training.max_sequence_length)
        return self._mask(self._stream_tokenizer, prompts, length)

    def _sampling(self) -> dict[str, Any]:
        return {"max_sequence_length": self._max_tokens(T5_TOKENS), "guidance_scale": GUIDANCE}

    def _sampled(self, latents: torch.Tensor) -> torch.Tensor:
        side = self.resolution // self.pipeline.vae_scale_factor // self._patch
        return unpack(latents, side, side)

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

    def _prediction(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        rows, columns = (side // self._patch for side in noisy.shape[-2:])
        return unpack(output, rows, columns)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to tokens [B, H/2 · W/2, 4C]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens [B, rows · columns, 4C] to [B, C, 2 · rows, 2 · columns]."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), 2)
