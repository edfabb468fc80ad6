"""Qwen-Image: a Qwen2.5-VL text encoder, joint attention, rectified flow on packed latents."""

# B = batch, S = text tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mima.errors import MimaError
from mima.families.joint_attention import PackedLatents, pack
from mima.families.pipelines import Pipeline
from mima.families.text import Conditioning, TextReader

# tokens that the pipeline's call reads by default
QWEN_TOKENS = 512
# Qwen-Image's own negative prompt: its tokenizer makes nothing of an empty one
NOTHING = " "


class QwenImage(PackedLatents):
    """``QwenImagePipeline``.

    Prompts stand in a template, whose beginning the pipeline cuts off after Qwen has read it; its
    end is kept. Text is padded to ``max_sequence_length`` with a mask, so that prompts of any
    length are one tensor; the pipeline pads to the longest.
    """

    pipeline_names = ("QwenImagePipeline",)
    training_defaults = PackedLatents.training_defaults | {"max_sequence_length": QWEN_TOKENS}
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        if self._config["guidance_embeds"] or self._config.get("zero_cond_t"):
            raise MimaError(
                "model: this transformer of Qwen-Image is distilled for guidance or reads further "
                "pictures, which is not supported"
            )

    def _text_widths(self) -> list[tuple[str, Any, int]]:
        made = self.pipeline.text_encoder.get_input_embeddings().weight.shape[1]
        return [("text", self._config["joint_attention_dim"], made)]

    @property
    def _vae_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def _posterior_mean(self, pixels: torch.Tensor) -> torch.Tensor:
        # an autoencoder of videos: one frame
        mean: torch.Tensor = self.pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mean
        return mean.squeeze(2)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline, length = self.pipeline, self._tokens_read
        hidden, mask = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=length
        )
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        rest = length - hidden.shape[1]
        return {
            "encoder_hidden_states": F.pad(hidden, (0, 0, 0, rest)),
            "encoder_attention_mask": F.pad(mask, (0, rest)),
        }

    def _max_tokens(self, wanted: int | None) -> int:
        # its pipeline asks no tokenizer
        assert wanted is not None
        return wanted

    def token_ids(self, tokenizer: Any, prompt: str, length: int) -> list[int]:
        start = self.pipeline.prompt_template_encode_start_idx
        template = self.pipeline.prompt_template_encode
        ids: list[int] = tokenizer(template.format(prompt)).input_ids
        return ids[start : start + length]

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer, length = self.pipeline.tokenizer, self._tokens_read
        template = self.pipeline.prompt_template_encode
        start, end = (len(tokenizer(part).input_ids) for part in template.split("{}"))
        # of the template, one token after the prompt counts, its end
        first = max(0, start - self.pipeline.prompt_template_encode_start_idx)
        ends = [len(self.token_ids(tokenizer, p, 10 * length)) - end + 1 for p in prompts]
        place = torch.arange(length)
        mask: torch.Tensor = (place >= first) & (place < torch.tensor(ends).unsqueeze(1))
        return mask

    def text_readers(self) -> list[TextReader]:
        """The embedding of Qwen's tokens, which it reads normalised."""
        norm = self.pipeline.transformer.txt_norm

        def embed(prompts: Sequence[str]) -> torch.Tensor:
            text: torch.Tensor = norm(self.encode_prompts(prompts)["encoder_hidden_states"])
            return text

        return [TextReader(["txt_in.weight"], embed, [(self.pipeline.tokenizer, None)])]

    def _guidance(self, count: int, scale: float | None, negative: str) -> dict[str, Any]:
        # its pipeline guides where it is given a negative prompt, and reads guidance_scale only in
        # distilled models
        guided = bool(negative) if scale is None else scale > 1
        if not guided:
            return {}
        said: dict[str, Any] = {"negative_prompt": [negative or NOTHING] * count}
        return said if scale is None else said | {"true_cfg_scale": scale}

    def _sampling(self) -> dict[str, Any]:
        return {"max_sequence_length": QWEN_TOKENS}

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        rows, columns = (side // self._patch for side in noisy.shape[-2:])
        return {
            "hidden_states": pack(noisy),
            "timestep": timesteps / self.num_train_timesteps,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "encoder_hidden_states_mask": conditioning["encoder_attention_mask"].bool(),
            "img_shapes": [[(1, rows, columns)]] * len(noisy),
        }
