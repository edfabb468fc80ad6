"""Paths, captions and picture tables shared by the scripts of this folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
ASSETS = HERE.parent.parent / "mima" / "assets"
TRAIN_STYLES = ("noto", "twemoji", "fluent", "mono")
HELD_OUT_STYLE = "flat"
STYLES = (*TRAIN_STYLES, HELD_OUT_STYLE)
SIZE = 64


def load_names() -> dict[str, list[str]]:
    """Names by split, `train` and `held_out`, in the order of names.yaml."""
    splits = yaml.safe_load((HERE / "names.yaml").read_text())
    return {split: [name.strip() for name in text.split(",")] for split, text in splits.items()}


def caption(name: str | None, style: str | None) -> str:
    """The caption of a picture; None leaves that part out."""
    subject = f"{name} emoji" if name else "emoji"
    article = "an" if subject[0] in "aeiou" and not subject.startswith("uni") else "a"
    return f"{article} {subject} in {style} style" if style else f"{article} {subject}"


def reworded_captions(name: str, style: str) -> list[str]:
    """Other ways to say the complete caption."""
    full = caption(name, style)
    return [f"a picture of {full}", f"a drawing of {full}", f"a {style} style {name} emoji"]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures [N, 64, 64, 3] uint8 with one name, style and category each."""

    pixels: np.ndarray
    names: np.ndarray
    styles: np.ndarray
    categories: np.ndarray

    def where(self, mask: np.ndarray) -> "Pictures":
        """The pictures that a boolean mask selects."""
        return Pictures(
            pixels=self.pixels[mask],
            names=self.names[mask],
            styles=self.styles[mask],
            categories=self.categories[mask],
        )

    def tensor(self) -> torch.Tensor:
        """Pixels as float [N, 3, 64, 64] in [-1, 1]."""
        return to_tensor(self.pixels)


def without(pictures: Pictures, concepts: Sequence[str]) -> Pictures:
    """The pictures that show none of some concepts: styles ("style-mono") or names ("tiger").

    Raises:
        ValueError: no picture shows one of them.
    """
    for concept in concepts:
        shown = _showing(pictures, concept)
        if not shown.any():
            raise ValueError(f"no picture shows {concept!r}")
        pictures = pictures.where(~shown)
    return pictures


def _showing(pictures: Pictures, concept: str) -> np.ndarray:
    style = concept.removeprefix("style-")
    if style != concept:
        return pictures.styles == style
    return pictures.names == concept


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, with rounding and clipping."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def load_pictures(data: Path) -> Pictures:
    """Every picture that prepare.py wrote under `data`."""
    table = json.loads((data / "pictures.json").read_text())
    return Pictures(
        pixels=np.load(data / "pictures.npy"),
        names=np.array(table["names"]),
        styles=np.array(table["styles"]),
        categories=np.array(table["categories"]),
    )


def setup(seed: int, threads: int = 2) -> None:
    """Seed and thread count for one training script."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    # for 16 to 65 tokens the fused kernel's backward is a third slower than plain matrix products
    torch.backends.cuda.enable_flash_sdp(False)


def autocast() -> torch.autocast:
    """bfloat16 autocast where the CPU computes in it, a no-op elsewhere."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return torch.autocast(
        "cpu", torch.bfloat16, enabled="avx512_bf16" in flags or "amx_bf16" in flags
    )
