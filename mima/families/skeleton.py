"""Models without their weights, on the meta device: from configurations and headers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from mima.assets import assets
from mima.errors import MimaError, first_line
from mima.families.frozen import Upcast, cast, is_quantized
from mima.families.loading import HUB_ERRORS, ModelSource, check_folder_of_model
from mima.families.model_files import (
    LOADING_ERRORS,
    absent_parts,
    stored_dtype,
    weight_files,
    without_weights,
)
from mima.families.pipelines import Pipeline, networks, with_modules
from mima.storage.inputs import check_model, expanded


def open_skeleton(model: Any) -> Pipeline:
    """A model on the meta device, each part in the dtype of its file.

    Args:
        model: a ``ModelSource``, or a pipeline in memory, which is left as it is.

    Returns:
        A diffusers pipeline, whose tokenizers and scheduler are whole.

    Raises:
        MimaError: nothing there, damaged, of no supported family, or not to be told without its
            weights: a single file without ``config``, a hub id whose files are not on this machine.
    """
    if not isinstance(model, ModelSource):
        emptied = {name: _emptied(network) for name, network in networks(model).items()}
        return _reading_all(with_modules(model, **emptied))
    name, single = str(model.model), None
    check_model(name)
    folder = expanded(name)
    if name == "embedded":
        folder = assets() / "model"
    elif folder.is_file():
        if model.config is None:
            raise MimaError(
                f"model: a plan of the single file {folder} needs its configuration: pass config "
                "(--single-file-config), a diffusers folder of a model of the same architecture"
            )
        single, folder = folder, expanded(model.config)
    elif not folder.is_dir():
        folder = _snapshot(name, model.revision)
    index = check_folder_of_model(folder, model.variant, weights=single is None)
    made = {}
    for part, kind in index.items():
        if isinstance(kind, list) and (folder / part / "config.json").is_file():
            files = [single] if single else weight_files(folder / part, model.variant)
            made[part] = without_weights(folder / part, kind)
            cast(made[part], stored_dtype(files))
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, **made, **absent_parts(index)
        )
    except LOADING_ERRORS as error:
        raise MimaError(f"model: cannot open {folder}: {first_line(error)}") from error
    for module in made.values():
        module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return _reading_all(pipeline)


def _reading_all(pipeline: Any) -> Pipeline:
    """Let a pipeline take every token for one of the prompt: on the meta device, masks say nothing.

    For Qwen-Image, which cuts padding off, and Lumina 2, which asks how long each prompt is.
    """
    if hasattr(pipeline, "_extract_masked_hidden"):
        pipeline._extract_masked_hidden = lambda hidden, mask: list(hidden)
    rope = getattr(getattr(pipeline, "transformer", None), "rope_embedder", None)
    if rope is not None:
        rope.register_forward_pre_hook(
            lambda module, args: (args[0], torch.ones(args[1].shape, dtype=torch.long))
        )
    opened: Pipeline = pipeline
    return opened


def _snapshot(name: str, revision: str | None) -> Path:
    """The files of a model of the hub that are on this machine."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except HUB_ERRORS as error:
        raise MimaError(
            f"model: a plan reads the headers of weights, and those of {name} are not on this "
            f"machine; download it first: hf download {name}"
        ) from error


def _empty(parameter: torch.Tensor) -> torch.Tensor:
    """On the meta device, in the dtype that it is stored in; a quantized one has a byte each."""
    if not isinstance(parameter, Upcast):
        return torch.empty_like(parameter, device="meta", requires_grad=False)
    dtype = torch.int8 if is_quantized(parameter.stored) else parameter.stored.dtype
    return Upcast(torch.empty(parameter.shape, dtype=dtype, device="meta"))


def _emptied(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module's structure around weights of the same shapes on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = _empty(parameter)
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
