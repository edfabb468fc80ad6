"""Model families: how to open a model, and what differs between kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from mima.errors import MimaError
from mima.families.base import Conditioning, Family, Params
from mima.families.stable_diffusion import StableDiffusion

FAMILIES: tuple[type[Family], ...] = (StableDiffusion,)

__all__ = ["FAMILIES", "Conditioning", "Family", "Params", "family_of", "load_pipeline"]


def family_of(pipeline: Any) -> Family:
    """Wrap a diffusers pipeline in the family that knows it.

    Raises:
        MimaError: the pipeline's class belongs to no supported family.
    """
    name = type(pipeline).__name__
    for family in FAMILIES:
        if name in family.pipeline_names:
            return family(pipeline)
    supported = ", ".join(n for family in FAMILIES for n in family.pipeline_names)
    raise MimaError(f"model: {name} is not supported; supported pipelines are {supported}")


def load_pipeline(
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Open a model in one dtype on one device, in evaluation mode and without gradients.

    Args:
        model: a diffusers pipeline (moved, not copied), a diffusers folder, a single
            ``.safetensors`` checkpoint, a hub id, or ``"embedded"`` for the model that mima ships.
        dtype: dtype of every module.
        device: where to put it.
        revision: the hub's branch, tag or commit.
        variant: file variant such as ``"fp16"``.

    Raises:
        MimaError: nothing there, or not a text-to-image pipeline; the message says which.
    """
    if isinstance(model, DiffusionPipeline):
        pipeline = model
    elif model == "embedded":
        from mima.embedded import load_embedded

        pipeline = load_embedded()
    else:
        pipeline = _open(str(model), dtype, revision, variant)
    family_of(pipeline)
    pipeline.to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(dtype).requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _open(model: str, dtype: torch.dtype, revision: str | None, variant: str | None) -> Any:
    path = Path(model).expanduser()
    keywords = {"torch_dtype": dtype}
    try:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise MimaError(f"model: {path} is a file; only .safetensors files are opened")
            return StableDiffusionPipeline.from_single_file(str(path), **keywords)
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise MimaError(f"model: {path} has no model_index.json: not a diffusers folder")
            return DiffusionPipeline.from_pretrained(str(path), variant=variant, **keywords)
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise MimaError(
                f"model: {model!r} is neither a folder, a .safetensors file, 'embedded', "
                "nor a hub id of the form owner/name"
            )
        return DiffusionPipeline.from_pretrained(
            model, revision=revision, variant=variant, **keywords
        )
    except (OSError, KeyError) as error:
        raise MimaError(f"model: cannot open {model!r}: {error}") from error
