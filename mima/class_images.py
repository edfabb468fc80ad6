"""Class pictures for prior preservation: drawn by the model itself, once, and kept on disk."""

# P = pictures, C H W = latent channels and size

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import __version__ as diffusers_version

from mima.batches import CHUNK
from mima.checkpoint import CheckpointFolder, fingerprint
from mima.families import Family

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where mima keeps what it can compute again: `MIMA_CACHE`, default `~/.cache/mima`."""
    return Path(os.environ.get("MIMA_CACHE") or "~/.cache/mima").expanduser()


class ClassPictures:
    """Pictures of some prompts by one model, or those that an earlier run drew.

    They are kept in `class-images/` of `cache_folder`, one file for each model (weights of denoiser
    and text encoders, scheduler), list of prompts and state of the generator.

    Args:
        family: the model. Its weights are read once and must not change between calls.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    def latents(self, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Draw or read pictures.

        Args:
            prompts: P texts, one per picture.
            generator: draws the noise; unchanged where the pictures are read.

        Returns:
            [P, C, H, W] scaled latents on the CPU.

        Raises:
            MimaError: the cache cannot be written, or holds a damaged file.
        """
        cache = CheckpointFolder(cache_folder() / "class-images")
        name = f"{self._key(prompts, generator)}.safetensors"
        kept = cache.read_tensors(name)
        if kept is not None:
            logger.info("class pictures from %s", cache.path / name)
            return kept["latents"]
        chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
        drawn = torch.cat([self._family.sample_latents(chunk, generator) for chunk in chunks])
        drawn = drawn.cpu().contiguous()
        cache.write_tensors(name, {"latents": drawn})
        return drawn

    def _key(self, prompts: Sequence[str], generator: torch.Generator) -> str:
        scheduler = self._family.pipeline.scheduler
        said = (type(scheduler).__name__, sorted(scheduler.config.items(), key=str), list(prompts))
        digest = hashlib.sha256(self._model.encode())
        digest.update(repr((said, self._family.resolution, diffusers_version)).encode())
        digest.update(generator.get_state().numpy().data)
        return digest.hexdigest()[:32]

    @cached_property
    def _model(self) -> str:
        """What the weights are; gigabytes are read for it."""
        parts = []
        for name, module in sorted(self._family.pipeline.components.items()):
            if module is not self._family.denoiser and not name.startswith("text_encoder"):
                continue
            if module is not None:
                state = module.state_dict()
                dtypes = sorted({str(value.dtype) for value in state.values()})
                parts.append(f"{name} {dtypes} {fingerprint(state)}")
        return " ".join(parts)
