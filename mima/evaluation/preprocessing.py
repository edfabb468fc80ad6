"""How pictures are prepared for an image encoder.

Two protocols. ``standard`` prepares pictures as each model's own preprocessor says. ``published``
repeats the evaluation script released with IMMA (arXiv 2311.18815), flaws included, so that its
numbers can be compared with: pictures are squeezed to 64×64; for CLIP and DINO their [0, 1] values
are "un-normalised" as if they were in [−1, 1], x ↦ (x + 1)/2, enlarged again, and normalised with
CLIP's constants (for DINO, too); LPIPS reads [0, 1] where it expects [−1, 1]. Only the pairing
differs: that script compares the i-th reference with the i-th picture by LPIPS, here all pairs are.
"""

# B = images

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mima.errors import MimaError, quoted

PUBLISHED_SIDE = 64
LARGEST_SIDE = 4096
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessor:
    """Resize, crop, rescale and normalise as a `preprocessor_config.json` says.

    Written out here with Pillow because transformers' own processors resize differently between
    versions and with torchvision installed, and measured similarities should not.

    Args:
        settings: the parsed configuration of a CLIP, ViT or BiT image processor.

    Raises:
        MimaError: a setting that is not understood.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.shorter_side: int | None = None
        self.exact: tuple[int, int] | None = None
        self.crop: tuple[int, int] | None = None
        if settings.get("do_resize", True):
            size = settings.get("size", 224)
            if isinstance(size, int):
                if settings.get("do_center_crop"):
                    self.shorter_side = size
                else:
                    self.exact = (size, size)
            elif "shortest_edge" in size and "longest_edge" not in size:
                self.shorter_side = int(size["shortest_edge"])
            elif "height" in size and "width" in size:
                self.exact = (int(size["width"]), int(size["height"]))
            else:
                raise MimaError(f"encoder: preprocessor size {quoted(size)} is not understood")
        if settings.get("do_center_crop"):
            crop = settings.get("crop_size", 224)
            self.crop = (
                (crop, crop) if isinstance(crop, int) else (int(crop["width"]), int(crop["height"]))
            )
        sides = (self.shorter_side, *(self.exact or ()), *(self.crop or ()))
        if not all(0 < side <= LARGEST_SIDE for side in sides if side is not None):
            raise MimaError(
                f"encoder: the preprocessor's sizes must be from 1 to {LARGEST_SIDE} pixels"
            )
        self.resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        mean, std = [0.0] * 3, [1.0] * 3
        if settings.get("do_normalize", True):
            if "image_mean" not in settings or "image_std" not in settings:
                raise MimaError("encoder: the preprocessor has no image_mean or no image_std")
            mean, std = settings["image_mean"], settings["image_std"]
        # (scale·x − mean) / std as one multiplication and one addition
        self.gain = torch.tensor([scale / s for s in std]).view(3, 1, 1)
        self.bias = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixel values [B, 3, height, width] float32."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        if self.exact is not None:
            image = image.resize(self.exact, self.resample)
        elif self.shorter_side is not None:
            width, height = image.size
            scale = self.shorter_side / min(width, height)
            # the longer side is truncated, as transformers does
            size = (int(width * scale), int(height * scale))
            image = image.resize(
                (max(size[0], self.shorter_side), max(size[1], self.shorter_side)), self.resample
            )
        if self.crop is not None:
            left, top = (
                (side - crop) // 2 for side, crop in zip(image.size, self.crop, strict=True)
            )
            image = image.crop((left, top, left + self.crop[0], top + self.crop[1]))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        return pixels * self.gain + self.bias


class PublishedPreprocessor:
    """What IMMA's evaluation script does to pictures before CLIP and DINO; see the module."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
        self.std = torch.tensor(CLIP_STD).view(3, 1, 1)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixel values [B, 3, side, side] float32."""
        wrong = (squares(images, PUBLISHED_SIDE) + 1) / 2
        enlarged = F.interpolate(wrong, size=self.side, mode="bicubic")
        return (enlarged - self.mean) / self.std


def squares(images: Sequence[Image.Image], side: int) -> torch.Tensor:
    """Pictures squeezed to [B, 3, side, side] float32 in [0, 1], bilinearly."""
    return squeezed(images, side, Image.Resampling.BILINEAR) / 255


def squeezed(images: Sequence[Image.Image], side: int, resample: Image.Resampling) -> torch.Tensor:
    """[B, 3, side, side] float32 in [0, 255]."""
    resized = [image.convert("RGB").resize((side, side), resample) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in resized]))
    return pixels.permute(0, 3, 1, 2)
