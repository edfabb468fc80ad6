"""Similarities of picture files, each looked at once: kept by the hash of the file."""

# A, B = pictures, D = features

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mima.choices import PictureProtocol
from mima.concepts.pictures import Picture
from mima.errors import MimaError, one_line
from mima.evaluation.encoders import (
    ImageEncoder,
    PairwiseSimilarity,
    embed_files,
    similarity,
)

Array = np.ndarray[Any, np.dtype[np.float32]]


class CachedSimilarity:
    """A similarity model that remembers every picture, or pair of pictures, it has seen.

    Kept are the features of an encoder, or the values of a pairwise similarity, in a file that
    several processes may share; without a path, in this object alone.
    """

    def __init__(
        self,
        model: ImageEncoder | PairwiseSimilarity,
        *,
        name: str,
        protocol: PictureProtocol = "standard",
        path: Path | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self._prefix = f"{model.name}|{protocol}|"
        self._path = path
        self._known: dict[str, Array] = {}

    def table(self, a: Sequence[Path], b: Sequence[Path]) -> torch.Tensor:
        """Similarities [A, B] of two sets of picture files.

        Raises:
            ValueError: one of them is empty.
        """
        if not a or not b:
            raise ValueError(f"{self.name}: needs pictures on both sides, got {len(a)}, {len(b)}")
        if isinstance(self.model, ImageEncoder):
            return similarity(self.features(a), self.features(b))
        return self._pairs(a, b)

    def fresh(self, images: Sequence[Image.Image], b: Sequence[Path]) -> torch.Tensor:
        """Similarities [A, B] of pictures that are not kept with picture files."""
        if isinstance(self.model, ImageEncoder):
            return similarity(self.model.embed(images), self.features(b))
        return self.model.pairs(images, [_load(file) for file in b])

    def features(self, files: Sequence[Path]) -> torch.Tensor:
        """Normalised features [A, D] of picture files.

        Raises:
            TypeError: the model has none.
        """
        if not isinstance(self.model, ImageEncoder):
            raise TypeError(f"{self.name} has no features")
        keys = [self._prefix + _digest(file) for file in files]
        self._recall(keys)
        fresh = {key: file for key, file in zip(keys, files, strict=True) if key not in self._known}
        if fresh:
            rows = embed_files(self.model, [Picture(f, "") for f in fresh.values()]).numpy()
            self._keep(dict(zip(fresh, rows, strict=True)))
        return torch.from_numpy(np.stack([self._known[key] for key in keys]))

    def _pairs(self, a: Sequence[Path], b: Sequence[Path]) -> torch.Tensor:
        assert isinstance(self.model, PairwiseSimilarity)
        hashes_a, hashes_b = (list(map(_digest, files)) for files in (a, b))
        keys = [[f"{self._prefix}{x}|{y}" for y in hashes_b] for x in hashes_a]
        self._recall([key for row in keys for key in row])
        fresh = [i for i, row in enumerate(keys) if any(key not in self._known for key in row)]
        if fresh:
            images_b = [_load(file) for file in b]
            values = self.model.pairs([_load(a[i]) for i in fresh], images_b).numpy()
            self._keep(
                {
                    key: value.reshape(1)
                    for i, row in zip(fresh, values, strict=True)
                    for key, value in zip(keys[i], row, strict=True)
                }
            )
        return torch.from_numpy(np.stack([[self._known[key][0] for key in row] for row in keys]))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        assert self._path is not None
        try:
            # another process may be writing
            with closing(sqlite3.connect(self._path, timeout=60)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, value BLOB)")
                yield file
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise MimaError(
                f"evaluation: cannot use {self._path}: {one_line(error)}; it may be removed"
            ) from error

    def _recall(self, keys: Sequence[str]) -> None:
        wanted = [key for key in dict.fromkeys(keys) if key not in self._known]
        if self._path is None or not wanted:
            return
        with self._open() as file:
            for key in wanted:
                row = file.execute("SELECT value FROM seen WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    self._known[key] = np.frombuffer(row[0], np.float32)

    def _keep(self, values: dict[str, Array]) -> None:
        self._known |= values
        if self._path is None:
            return
        rows = [(key, value.astype(np.float32).tobytes()) for key, value in values.items()]
        with self._open() as file:
            file.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?)", rows)


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _load(file: Path) -> Image.Image:
    return Picture(file, "").load()
