"""The small text-to-image model and the sample concepts that ship inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mima.errors import MimaError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline


def assets() -> Path:
    """The folder of shipped assets."""
    # wheels and editable installs both unpack to real folders, which diffusers needs
    return Path(str(resources.files("mima"))) / "assets"


def load_embedded(
    *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Load the embedded Stable Diffusion-format model.

    Args:
        dtype: of the weights; default float32 (they are stored in float16).
        device: where the model goes; default the CPU.

    Returns:
        A `diffusers.StableDiffusionPipeline` without a safety checker.

    Raises:
        MimaError: this installation came without its assets.
    """
    import torch

    from mima.families import load_pipeline

    folder = assets() / "model"
    if not (folder / "model_index.json").is_file():
        raise MimaError(f"the embedded model is missing from this installation ({folder})")
    loaded = load_pipeline(str(folder), dtype=dtype or torch.float32, device=device)
    # as diffusers gives it: ready to be trained, though in evaluation mode
    for component in loaded.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(True)
    pipeline: StableDiffusionPipeline = loaded
    return pipeline
