"""1 − LPIPS, a similarity of pictures that is not a cosine."""

# A, B = images, C = channels

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file

from mima.choices import PictureProtocol
from mima.errors import MimaError, first_line
from mima.evaluation.discriminants import OFFLINE
from mima.evaluation.preprocessing import PUBLISHED_SIDE, squares
from mima.families.model_files import LOADING_ERRORS
from mima.storage.inputs import expanded

LPIPS_SIDE = 224


class Lpips:
    """1 − LPIPS (Zhang et al., CVPR 2018) with AlexNet, through the package lpips.

    In (−∞, 1]; 1 for equal pictures. Pictures are squeezed to 224×224 (64×64 when published).

    Args:
        model: ``"lpips"`` for the published weights (torchvision fetches AlexNet's), or a hub id or
            folder with the state dict of ``lpips.LPIPS(net="alex")`` as ``model.safetensors``.
        device: where it runs.
        batch_size: images per forward pass.
        protocol: how pictures are prepared; see `mima.evaluation.preprocessing`.

    Raises:
        MimaError: the package or the weights are missing.
    """

    def __init__(
        self,
        model: str | Path = "lpips",
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        protocol: PictureProtocol = "standard",
    ) -> None:
        try:
            import lpips
        except ImportError as error:
            raise MimaError(
                f"similarity lpips: {error.name} is not installed; pip install 'mima[lpips]'"
            ) from error
        if batch_size < 1:
            raise ValueError(f"lpips: batch_size must be at least 1, got {batch_size}")
        self.name = str(model)
        if self.name == "lpips":
            try:
                net = lpips.LPIPS(net="alex", verbose=False)
            except (URLError, OSError) as error:
                raise MimaError(
                    f"similarity lpips: cannot fetch AlexNet: {error}; name a folder with all of "
                    f"its weights (lpips:FOLDER), or use {OFFLINE}"
                ) from error
        else:
            net = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
            try:
                net.load_state_dict(load_file(_weights_file(self.name)))
            except LOADING_ERRORS as error:
                raise MimaError(
                    f"similarity lpips: cannot open {self.name!r}: {first_line(error)}"
                ) from error
        self.model: Any = net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.protocol = protocol

    @torch.inference_mode()
    def pairs(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> torch.Tensor:
        """Similarities [A, B] float32 on the CPU."""
        if not a or not b:
            raise ValueError(f"{self.name}: images is empty")
        table = torch.empty(len(a), len(b))
        for row in range(0, len(a), self.batch_size):
            layers_a = self._layers(a[row : row + self.batch_size])
            for column in range(0, len(b), self.batch_size):
                layers_b = self._layers(b[column : column + self.batch_size])
                for index in range(len(layers_a[0])):
                    one = [layer[index] for layer in layers_a]
                    table[row + index, column : column + self.batch_size] = 1 - self._distances(
                        one, layers_b
                    )
        return table

    def _layers(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """AlexNet's five feature maps [B, C, H, W], of unit length at each place."""
        if self.protocol == "published":
            pixels = squares(images, PUBLISHED_SIDE)
        else:
            pixels = squares(images, LPIPS_SIDE) * 2 - 1
        maps = self.model.net(self.model.scaling_layer(pixels.to(self.device)))
        # the package's own 1e-10 keeps places without any feature from dividing by zero
        return [m / (m.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for m in maps]

    def _distances(self, one: list[torch.Tensor], many: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(len(many[0]), device=self.device)
        for a, b, lin in zip(one, many, self.model.lins, strict=True):
            total += lin((a - b).square()).mean(dim=(1, 2, 3))
        return total.cpu()


def _weights_file(source: str) -> str:
    folder = expanded(source)
    if folder.is_dir():
        return str(folder / "model.safetensors")
    return hf_hub_download(source, "model.safetensors")
