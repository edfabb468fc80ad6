"""Benign quality: do pictures show what was asked for, and are they like the old model's?"""

# B = images, A = other images, D = features

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from mima.evaluation.encoders import TextImageEncoder


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
    return (encoder.embed(images) * text_features(prompts, encoder)).sum(dim=-1)


def text_features(prompts: Sequence[str], encoder: TextImageEncoder) -> torch.Tensor:
    """Normalised features [B, D] of texts, each distinct one embedded once."""
    unique = list(dict.fromkeys(prompts))
    texts_UD = encoder.embed_text(unique)
    return texts_UD[torch.tensor([unique.index(prompt) for prompt in prompts])]


def cmmd(
    a_AD: torch.Tensor, b_BD: torch.Tensor, *, sigma: float = 10.0, scale: float = 1000.0
) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al., CVPR 2024) of two sets of pictures.

    ``scale · (mean k(a, a') + mean k(b, b') − 2 mean k(a, b))`` with the Gaussian kernel
    ``k(x, y) = exp(−‖x − y‖² / (2 σ²))``, all pairs counted, a picture with itself too: the
    squared distance of the sets' mean embeddings, at least 0, and 0 for equal sets. Of one picture
    on each side it is ``scale · 2 (1 − k(a, b))``. Published values are of CLIP ViT-L/14 at 336
    pixels; those of other encoders compare with each other only.

    Args:
        a_AD: features of unit length, A ≥ 1.
        b_BD: features of unit length, B ≥ 1.
        sigma: width of the kernel.
        scale: what the distance is multiplied by.

    Returns:
        The distance, ≥ 0.

    Raises:
        ValueError: no pictures, or features of different length.
    """
    if not len(a_AD) or not len(b_BD) or a_AD.shape[1:] != b_BD.shape[1:]:
        raise ValueError(
            f"cmmd: needs [A, D] and [B, D] with A, B at least 1, got {list(a_AD.shape)} "
            f"and {list(b_BD.shape)}"
        )
    # float64: the kernel of unit vectors lies in [0.98, 1], and its differences are the answer
    a, b = a_AD.double(), b_BD.double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        square = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.exp(-square / (2 * sigma**2)).mean()

    return max(0.0, scale * float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)))
