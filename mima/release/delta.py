"""A delta: one safetensors file with the values that differ from a base model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mima.errors import MimaError, one_line, quoted
from mima.families.new_words import with_words
from mima.families.pipelines import Pipeline, own_name, parameter, readers, with_values
from mima.storage.inputs import delta_file, expanded
from mima.storage.names import DELTA_FILE
from mima.storage.plain_data import read_json
from mima.storage.tensor_files import header_texts, save_tensors

_HEADER = "mima_delta"
NEW_WORDS = "new_words"
"""What stands in a delta's file where others have the component's name, before a new word."""


@dataclass(frozen=True)
class Delta:
    """What a model changes of its base.

    Attributes:
        values: new values by component and parameter, as in ``unet.conv_in.weight``.
        words: embeddings [K, D] of new words.
        origin: where it came from, as plain data.
    """

    values: Mapping[str, torch.Tensor]
    words: Mapping[str, torch.Tensor] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipeline: Pipeline, names: Iterable[str], **rest: Any) -> Delta:
        """The pipeline's present values of some parameters, as ``values`` names them."""
        return cls({name: parameter(pipeline, name).detach() for name in names}, **rest)

    def save(self, folder: str | Path) -> Path:
        """Write ``model_delta.safetensors``; what it came from is in the file's metadata.

        Raises:
            MimaError: nothing changed.
        """
        tensors = {
            **self.values,
            **{f"{NEW_WORDS}.{word}": rows for word, rows in self.words.items()},
        }
        if not tensors:
            raise MimaError("delta: nothing was changed, so there is nothing to write")
        folder = expanded(folder)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", _HEADER: json.dumps(dict(self.origin), ensure_ascii=False)}
        save_tensors(folder / DELTA_FILE, tensors, metadata)
        return folder / DELTA_FILE


def read_delta(path: str | Path) -> Delta:
    """Read a delta.

    Args:
        path: the file, or a folder that holds ``model_delta.safetensors``.

    Raises:
        MimaError: nothing there, damaged, or no delta.
    """
    path = delta_file(path)
    try:
        header, tensors = header_texts(path).get(_HEADER), load_file(path)
        origin = None if header is None else read_json(header)
    except (OSError, SafetensorError, json.JSONDecodeError, MimaError) as error:
        raise MimaError(
            f"delta {path} is damaged or no safetensors file: {one_line(error)}"
        ) from error
    if not isinstance(origin, dict):
        raise MimaError(f"delta {path} is no delta that mima wrote")
    prefix = f"{NEW_WORDS}."
    words = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    values = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    return Delta(values, words, origin)


def is_delta(path: Path) -> bool:
    """Whether a safetensors file is a delta of this package."""
    return _HEADER in header_texts(path)


def load_delta(pipeline: Pipeline, path: str | Path) -> Any:
    """Apply a delta to the model that it was made for.

    Args:
        pipeline: the base model, which stays as it is.
        path: as for ``read_delta``.

    Returns:
        A pipeline of the same class; what the delta leaves alone is shared with ``pipeline``.

    Raises:
        MimaError: not a delta, or one that does not fit: of other names or shapes. Of two models
            that are built alike, it cannot say which one it was made for.

    Examples:
        >>> immunized = mima.load_delta(DiffusionPipeline.from_pretrained("base"), "immunized")
    """
    delta = read_delta(path)
    for name, value in (*delta.values.items(), *delta.words.items()):
        # whole numbers would need a scale
        if not value.is_floating_point():
            raise MimaError(
                f"delta {path}: {one_line(name)} is of {value.dtype}, expected numbers of floating "
                "point"
            )
    values = {own_name(pipeline, name): value for name, value in delta.values.items()}
    for name, value in values.items():
        try:
            own: torch.nn.Parameter | None = parameter(pipeline, name)
        except AttributeError:
            own = None
        if own is None or own.shape != value.shape:
            found = "nothing" if own is None else f"a {list(own.shape)}"
            made = delta.origin.get("model")
            hint = f"; it was made from {quoted(made)}" if isinstance(made, str) else ""
            raise MimaError(
                f"delta {path} is not of this model: it holds {name} {list(value.shape)}, the "
                f"model has {found} there{hint}"
            )
        if not _all_finite(value):
            raise MimaError(f"delta {path} is damaged: {name} holds numbers that are not finite")
    width = sum(reader.rows.shape[1] for reader in readers(pipeline))
    for word, rows in delta.words.items():
        if rows.ndim != 2 or rows.shape[1] != width or not _all_finite(rows):
            raise MimaError(
                f"delta {path} is not of this model: its word {quoted(word)} is "
                f"{list(rows.shape)}, the model's words are of {width} finite numbers each"
            )
    return with_words(with_values(pipeline, values), delta.words)


def _all_finite(value: torch.Tensor) -> bool:
    # not all of the 8-bit types can be asked themselves
    return bool(value.float().isfinite().all())
