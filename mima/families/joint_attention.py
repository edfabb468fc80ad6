"""Families of transformers with joint attention: a text stream beside the picture's."""

# B = batch, S = tokens, D = width of the text stream, C H W = latent channels and size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mima.families.base import Family
from mima.families.rectified_flow import RectifiedFlow
from mima.families.text import TextReader


class JointAttention(RectifiedFlow):
    """Where text reaches the denoiser of SD3, Flux, Qwen-Image and the like.

    A text stream runs beside the picture's; its ``add_k_proj`` and ``add_v_proj`` play the part of
    cross-attention's keys and values, and the preset ``cross_attention`` is the text stream's
    attention: ``add_q_proj``, ``add_k_proj``, ``add_v_proj``, their norms and ``to_add_out``. What
    they read is not the text encoders' output: it is embedded, updated block by block, and each
    block normalises and modulates it by the noise level and the pooled text. ``text_embeddings`` is
    therefore one point of it: *what the first block reads at the middle noise level* (σ = ½). The
    merge plan made of it meets its constraint exactly there, and approximately in later blocks and
    at other noise levels. Flux's single-stream blocks have no weights for text alone; they are
    merged like any other weight.
    """

    reads_text_alone = False
    text_weights = r"\.attn\.add_[kv]_proj\.weight$"
    presets = Family.presets | {
        "cross_attention": r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    }

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, S, D] that the first block's text projections read at σ = ½, padding included."""
        # the picture reaches the text stream in the first block's attention, after its projections
        size = (len(prompts), self._latent_channels, self._patch, self._patch)
        smallest = torch.zeros(size, device=self.device, dtype=self.dtype)
        middle = torch.full((len(prompts),), self.num_train_timesteps / 2, device=self.device)
        inputs = self.projection_inputs(smallest, middle, self.encode_prompts(prompts))
        return inputs[self.text_projections()[0]]

    def text_readers(self) -> list[TextReader]:
        """The embedding of the text encoders' tokens, and that of the pooled text.

        What the text projections read depends on the picture; what these two read does not, and
        text reaches the denoiser through them alone.
        """
        return [
            TextReader(
                ["context_embedder.weight"],
                lambda prompts: self.encode_prompts(prompts)["encoder_hidden_states"],
                self._text_stream,
            ),
            self._pooled_reader(
                "time_text_embed.text_embedder.linear_1.weight", "pooled_projections"
            ),
        ]

    @property
    def _text_stream(self) -> list[tuple[Any, int | None]]:
        """Tokenizers of the text stream, as ``TextReader.tokenizers``."""
        return [(self._stream_tokenizer, None)]


class PackedLatents(JointAttention):
    """Flux and Qwen-Image, whose transformers read 2×2 latents as one token.

    Latents are [B, C, H, W] everywhere but within ``predict``.
    """

    @property
    def _latent_channels(self) -> int:
        return super()._latent_channels // self._patch**2

    @property
    def _sample_size(self) -> Any:
        return self.pipeline.default_sample_size

    @property
    def _patch(self) -> int:
        # of the packing: patch_size is 1 in Flux's transformer
        return 2

    def _sampled(self, latents: torch.Tensor) -> torch.Tensor:
        return self._unpacked(latents, self.latent_shape(len(latents)))

    def _prediction(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return self._unpacked(output, noisy.shape)

    def _unpacked(self, tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Tokens [B, H/2 · W/2, 4C] as latents of a shape [B, C, H, W]."""
        return F.pixel_shuffle(tokens.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to tokens [B, H/2 · W/2, 4C]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT
