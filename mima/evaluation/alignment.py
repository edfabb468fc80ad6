"""Prompt alignment: does a picture show what its prompt asked for?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from mima.evaluation.similarity import TextImageEncoder


def prompt_alignment(
    images: Sequence[Image.Image], prompts: Sequence[str], encoder: TextImageEncoder
) -> torch.Tensor:
    """Cosine between each image and its own prompt (the CLIP score without its factor of 100).

    Args:
        images: B pictures.
        prompts: B texts; repeated ones are encoded once.
        encoder: embeds pictures and texts into one space.

    Returns:
        [B] in [−1, 1]; take the mean for a model's alignment.

    Raises:
        ValueError: no images, or not one prompt for each image.
        TypeError: the encoder has no text side.
    """
    if len(images) != len(prompts) or not images:
        raise ValueError(
            "prompt_alignment: needs one prompt for each image, got "
            f"{len(images)} images and {len(prompts)} prompts"
        )
    if not isinstance(encoder, TextImageEncoder):
        raise TypeError(
            f"prompt_alignment: encoder {encoder.name} embeds no texts; use a CLIP model"
        )
    unique = list(dict.fromkeys(prompts))
    texts_UD = encoder.embed_text(unique)
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    return (encoder.embed(images) * texts_UD[rows]).sum(dim=-1)
