"""Ordinary captions: what the merge leaves alone and class pictures are drawn from."""

from __future__ import annotations

from pathlib import Path

import torch

from mima.assets import assets
from mima.errors import MimaError
from mima.families import Family
from mima.training.batches import CHUNK, seeded


def ordinary_captions(path: Path | None) -> list[str]:
    """Captions, one per line, of a file or those that ship with mima.

    Raises:
        MimaError: unreadable, or no caption in it.
    """
    path = path or assets() / "captions.txt"
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise MimaError(f"captions: cannot read {path}: {error.strerror}") from error
    captions = [caption for caption in captions if caption]
    if not captions:
        raise MimaError(f"captions: {path} holds no caption")
    return captions


def regular_tokens(family: Family, path: Path | None, count: int, seed: int) -> torch.Tensor:
    """C_reg [R, D]: embeddings of ``count`` ordinary captions' tokens, drawn by the seed."""
    captions = ordinary_captions(path)
    order = torch.randperm(len(captions), generator=seeded(seed, "captions"))
    chosen = [captions[i] for i in order[:count].tolist()]
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    return torch.cat([family.token_embeddings(chunk) for chunk in chunks])
