"""Stable Diffusion XL: two CLIP text encoders, pooled text and picture sizes as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mima.errors import MimaError, one_line
from mima.families.pipelines import Pipeline
from mima.families.stable_diffusion import StableDiffusion
from mima.families.text import Conditioning, TextReader


class StableDiffusionXL(StableDiffusion):
    """``StableDiffusionXLPipeline``, base models.

    Cross-attention reads the two encoders' embeddings of a token side by side. The added time ids
    are those of each picture; without any, pictures count as uncropped and of the size that they
    have, as in the pipeline's call.
    """

    pipeline_names = ("StableDiffusionXLPipeline",)
    added_conditions = "text_time"
    training_defaults = StableDiffusion.training_defaults | {"picture_sizes": True}
    parts = (
        *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        "scheduler",
    )

    def __init__(self, pipeline: Pipeline) -> None:
        unet, encoder = pipeline.unet, pipeline.text_encoder_2
        if pipeline.text_encoder is None:
            raise MimaError(
                f"model: this {type(pipeline).__name__} has no text_encoder, as the SDXL refiner; "
                "SDXL base models are supported"
            )
        if unet is not None and encoder is not None:
            pooled = encoder.config.projection_dim
            expected = unet.config.projection_class_embeddings_input_dim
            given = pooled + 6 * (unet.config.addition_time_embed_dim or 0)
            if expected != given:
                raise MimaError(
                    "model: this is the SDXL refiner or another model whose unet reads other "
                    f"conditions (width {one_line(expected)}) than pooled text and six sizes "
                    f"({given}); SDXL base models are supported"
                )
        super().__init__(pipeline)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._scaled(latents)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return super()._scaled((latents - mean) / std)

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline = self.pipeline
        hidden_BSD, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"encoder_hidden_states": hidden_BSD, "text_embeds": pooled}

    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        # the tokenizers differ in padding alone, unless a token was added to one of them
        first, second = (
            self._mask(tokenizer, prompts, tokenizer.model_max_length)
            for tokenizer in (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        )
        return first | second

    def text_readers(self) -> list[TextReader]:
        """Keys and values, and the columns of the added conditions' embedding that pooled text has.

        The other columns of that weight embed the picture's sizes.
        """
        columns = self.pipeline.text_encoder_2.config.projection_dim
        pooled = self._pooled_reader("add_embedding.linear_1.weight", "text_embeds", columns)
        return [*super().text_readers(), pooled]

    def picture_conditions(self, places: torch.Tensor) -> Conditioning:
        """Time ids [P, 6]: original size, top left corner of the crop, size that is trained on."""
        if not self.training.picture_sizes:
            return {}
        side = places.new_tensor([self.resolution] * 2).expand(len(places), 2)
        return {"time_ids": torch.cat([places, side], dim=1)}

    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
        pooled = conditioning["text_embeds"]
        time_ids = conditioning.get("time_ids")
        if time_ids is None:
            sizes = pooled.new_tensor([height, width, 0, 0, height, width])
            time_ids = sizes.expand(len(pooled), 6)
        return {
            "sample": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "added_cond_kwargs": {
                "text_embeds": pooled,
                "time_ids": time_ids.to(pooled),
            },
        }
