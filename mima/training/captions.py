"""Ordinary captions: what the merge leaves alone and class pictures are drawn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mima.assets import assets
from mima.errors import MimaError
from mima.families import Family
from mima.families.pipelines import Pipeline
from mima.storage.atomic import reason_of
from mima.storage.inputs import expanded
from mima.storage.plain_data import read_json
from mima.training.batches import chunks, seeded

logger = logging.getLogger(__name__)

MEASURED_EVERY = 4
"""One caption in so many is left for measurements."""


def ordinary_captions(path: Path | None) -> list[str]:
    """Captions, one per line, of a file or those that ship with mima, which are about emoji.

    Raises:
        MimaError: unreadable, or no caption in it.
    """
    path = expanded(path) if path else assets() / "captions.txt"
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no ordinary file")
        captions = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MimaError(f"captions: cannot read {path}: {reason_of(error)}") from error
    captions = [caption for caption in captions if caption]
    if not captions:
        raise MimaError(f"captions: {path} holds no caption")
    return captions


def warn_of_emoji(pipeline: Pipeline, path: Path | None) -> None:
    """Warn of the captions that ship with mima where the model has not the embedded one's words."""
    if path is None and not is_of_emoji(pipeline):
        logger.warning(
            "captions: those that ship with mima are about emoji, for the embedded model; give a "
            "file of what this model draws"
        )


def is_of_emoji(pipeline: Pipeline) -> bool:
    """Whether a model knows the embedded one's words: it, or one that was made of it."""
    own = read_json((assets() / "model/tokenizer/vocab.json").read_text(encoding="utf-8"))
    return bool(own.keys() <= pipeline.tokenizer.get_vocab().keys())


def divided(captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Captions to draw class pictures from, and those that are left for measuring benign quality.

    Every fourth caption is left; fewer than four are not divided, and both parts are all of them.
    Repeated ones count once.
    """
    distinct = list(dict.fromkeys(captions))
    measured = distinct[MEASURED_EVERY - 1 :: MEASURED_EVERY]
    if not measured:
        return distinct, distinct
    left = set(measured)
    return [caption for caption in distinct if caption not in left], measured


def drawn_captions(
    captions: Sequence[str], count: int, seed: int, step: int | None = None
) -> list[str]:
    """Up to ``count`` of some captions, drawn by the seed, or for one step of a run."""
    key = (seed, "captions") if step is None else (seed, "captions", step)
    order = torch.randperm(len(captions), generator=seeded(*key))
    return [captions[i] for i in order[:count].tolist()]


def regular_tokens(family: Family, path: Path | None, count: int, seed: int) -> torch.Tensor:
    """C_reg [R, D]: embeddings of ``count`` ordinary captions' tokens, drawn by the seed."""
    chosen = drawn_captions(ordinary_captions(path), count, seed)
    return torch.cat([family.token_embeddings(chunk) for chunk in chunks(chosen)])
