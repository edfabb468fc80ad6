"""Erased models that others made, as they are published: weights of a denoiser, or some of them."""

from __future__ import annotations

from pathlib import Path

from mima.adapters.merge import MergedAdapters, merge_adapters
from mima.errors import MimaError
from mima.families.pipelines import Pipeline
from mima.storage.inputs import expanded


def load_erased(pipeline: Pipeline, checkpoint: str | Path) -> MergedAdapters:
    """The model with a checkpoint's weights in the place of its own.

    Args:
        pipeline: the model that the checkpoint was made from, which stays as it is.
        checkpoint: a file with all or some weights of the denoiser (``.safetensors``, or ``.pt``,
            ``.bin``, ``.ckpt``, read with ``weights_only``), as ESD and UCE are published, under
            the names of diffusers; a folder with a denoiser or a whole model; a delta of mima; or
            a LoRA that erases.

    Returns:
        What ``merge_adapters`` makes of it alone: ``pipeline`` is the erased model, ``changed``
        names the weights that the checkpoint sets.

    Raises:
        MimaError: nothing there, damaged, of no known kind, not of this model, or it brings words.

    Examples:
        >>> erased = load_erased(pipeline, "esd-vangogh-unet.pt").pipeline
    """
    if not expanded(checkpoint).exists():
        raise MimaError(f"erased: {checkpoint} does not exist")
    try:
        found = merge_adapters(pipeline, [checkpoint], method="weighted")
    except MimaError as error:
        raise MimaError(f"erased: {error}") from error
    if found.words:
        raise MimaError(f"erased: {checkpoint} brings new words, which is no erased model")
    return found
