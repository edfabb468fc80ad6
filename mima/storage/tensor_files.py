"""Tensors as files: safetensors whose bytes depend on what they hold alone, hashes, and mapping."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mima.errors import MimaError
from mima.storage.atomic import WRITING_ERRORS, reason_of
from mima.storage.plain_data import read_json

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"
"""The text in a file's header that says what its tensors are."""
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own bound."""


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose bytes depend on its contents alone.

    Tensors may be on any device; the metadata are texts for the file's header.
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(stored, path, None if metadata is None else dict(metadata))
    order_metadata(path)


def order_metadata(path: Path) -> None:
    """Sort the texts in a safetensors file's header, which safetensors writes in any order."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # the header has the same characters in another order; spaces fill it, as safetensors' do
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Names of a safetensors file's tensors with their dtypes, such as ``BF16``, and shapes.

    Raises:
        MimaError: unreadable or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header is said to have {size} bytes")
            header = read_json(file.read(size).decode())
        return {
            name: (told["dtype"], told["shape"])
            for name, told in header.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MimaError(f"cannot read {path}: {reason_of(error)}") from error


def header_texts(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header, by name."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, mapped: pages are read when they are first used.

    Raises:
        MimaError: unreadable or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MimaError(f"cannot read {path}: {reason_of(error)}") from error


def save_checked(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file with a checksum in its header, as `mapped_if_intact` reads."""
    save_tensors(path, tensors, {CHECKSUM: _checksum(tensors)})


def mapped_if_intact(path: Path) -> dict[str, torch.Tensor] | None:
    """What `save_checked` wrote, mapped; None where there is nothing, or it is damaged.

    A damaged one is named in a warning.
    """
    if not os.path.isfile(path):
        return None
    try:
        tensors = mapped(path)
    except MimaError as error:
        logger.warning("%s; it is made again", error)
        return None
    told = header_texts(path).get(CHECKSUM)
    if told == _checksum(tensors):
        return tensors
    # as those of earlier versions
    what = "has no checksum" if told is None else "is damaged"
    logger.warning("%s %s; it is made again", path, what)
    return None


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, types, shapes and values, in whatever order."""
    return fingerprint({f"{n} {x.dtype} {[*x.shape]}": x for n, x in sorted(tensors.items())})


def spill(
    tensors: Mapping[str, torch.Tensor], folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """Move tensors to a file without a name, and map it: it goes when they do.

    It is on the disk of the folder, by default that of temporary files.

    Raises:
        MimaError: the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="mima-", dir=folder) as made:
        path = Path(made) / "spilled.safetensors"
        try:
            save_tensors(path, tensors)
        except WRITING_ERRORS as error:
            raise MimaError(f"cannot write {path}: {reason_of(error)}") from error
        return mapped(path)
