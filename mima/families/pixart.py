"""PixArt-α and PixArt-Σ: a T5 text encoder, a transformer with cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from mima.families.ddpm import DDPM
from mima.families.masked_text import MaskedText
from mima.families.text import Conditioning

# tokens that the pipelines read by default
MAX_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


class PixArt(MaskedText, DDPM):
    """``PixArtAlphaPipeline`` and ``PixArtSigmaPipeline``.

    Keys and values read the transformer's ``caption_projection`` of T5's output, which
    ``read_text`` therefore returns. It is part of the denoiser: where a run trains it
    (``denoiser``), the merge plan holds for the projection as it was at the start. Keys and values
    have biases, which are averaged like any other parameter.

    The half of the output that predicts a variance is not trained and not returned.
    """

    pipeline_names = tuple(MAX_TOKENS)
    training_defaults = DDPM.training_defaults | {"max_sequence_length": None}

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        read = self._config["caption_channels"] or self._config["cross_attention_dim"]
        return [("text", read, self.pipeline.text_encoder.config.d_model)]

    @property
    def _patch(self) -> int:
        return int(self._config["patch_size"])

    def _max_tokens(self, wanted: int | None = None) -> int:
        return super()._max_tokens(wanted or MAX_TOKENS[type(self.pipeline).__name__])

    def read_text(self, conditioning: Conditioning) -> torch.Tensor:
        hidden = conditioning["encoder_hidden_states"]
        projection = self.pipeline.transformer.caption_projection
        return hidden if projection is None else projection(hidden)

    def _sampling(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self._max_tokens(),
            # as in training, whether or not the cleaner's packages are installed
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        added: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.pipeline.transformer.use_additional_conditions:
            height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
            batch = len(noisy)
            added["resolution"] = noisy.new_tensor([height, width]).expand(batch, 2)
            added["aspect_ratio"] = noisy.new_tensor([height / width]).expand(batch, 1)
        return {
            "hidden_states": noisy,
            "timestep": timesteps,
            "added_cond_kwargs": added,
            **conditioning,
        }

    def _prediction(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return output[:, : noisy.shape[1]]
