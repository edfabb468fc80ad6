"""Class pictures for prior preservation: drawn by the model itself, once, and kept on disk."""

# P = pictures, C H W = latent channels and size

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import __version__ as diffusers_version

from mima.errors import MimaError
from mima.families import Family
from mima.families.pipelines import networks, scheduler_settings
from mima.storage.atomic import WRITING_ERRORS, reason_of, staged_by_several
from mima.storage.inputs import expanded
from mima.storage.tensor_files import fingerprint, mapped_if_intact, save_checked
from mima.training.batches import chunks

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where mima keeps what it can compute again: `MIMA_CACHE`, default `~/.cache/mima`.

    Raises:
        MimaError: it is no path, as where there is no home folder.
    """
    return expanded(os.environ.get("MIMA_CACHE") or "~/.cache/mima")


class ClassPictures:
    """Pictures of some prompts by one model, or those that an earlier run drew.

    They are kept in `class-images/` of `cache_folder`, one file for each batch: its model (weights
    of denoiser and text encoders, scheduler), prompts and state of the generator name it. A
    warning says where they cannot be kept.

    Args:
        family: the model. Its weights are read once and must not change between calls.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._folder: Path | None = None
        try:
            self._folder = cache_folder() / "class-images"
        except MimaError as error:
            logger.warning("class pictures are not kept (MIMA_CACHE): %s", error)

    def latents(self, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Draw or read P pictures; stopped, it goes on after the last batch that is kept.

        The generator draws the noise; in the end it is as if all had been drawn, also where they
        are read. Returns scaled latents [P, C, H, W] on the CPU.
        """
        done, latents = 0, []
        for batch in chunks(prompts):
            latents.append(self._batch(batch, generator))
            done += len(batch)
            logger.info("class pictures: %d of %d", done, len(prompts))
        return torch.cat(latents)

    def _batch(self, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        path = self._folder and self._folder / f"{self._key(prompts, generator)}.safetensors"
        kept = path and mapped_if_intact(path)
        if not kept:
            latents = self._family.sample_latents(prompts, generator).cpu().contiguous()
            kept = {"latents": latents, "generator": generator.get_state()}
            if path:
                self._keep(path, kept)
        generator.set_state(kept["generator"].clone())
        return kept["latents"]

    def _keep(self, path: Path, drawn: Mapping[str, torch.Tensor]) -> None:
        try:
            with staged_by_several(path) as partial:
                save_checked(partial, drawn)
        except WRITING_ERRORS as error:
            reason = reason_of(error)
            logger.warning(
                "class pictures are not kept in %s (MIMA_CACHE): %s", path.parent, reason
            )
            self._folder = None

    def _key(self, prompts: Sequence[str], generator: torch.Generator) -> str:
        noise = sorted(scheduler_settings(self._family.pipeline).items())
        named = (noise, list(prompts))
        digest = hashlib.sha256(self._model.encode())
        digest.update(repr((named, self._family.resolution, diffusers_version)).encode())
        digest.update(generator.get_state().numpy().data)
        return digest.hexdigest()[:32]

    @cached_property
    def _model(self) -> str:
        """What the weights are; gigabytes are read for it."""
        parts = []
        for name, module in sorted(networks(self._family.pipeline).items()):
            if module is self._family.denoiser or name.startswith("text_encoder"):
                state = module.state_dict()
                dtypes = sorted({str(value.dtype) for value in state.values()})
                parts.append(f"{name} {dtypes} {fingerprint(state)}")
        return " ".join(parts)
