"""What attacks and trials showed on an original model, kept for other evaluations of that model.

Immunized models are compared on equal terms when the same attacks meet the same original: what
these show there is then the same every time. An entry is named by everything that it depends on:
weights, method, settings, seed, pictures, prompts, sampler, judge of trials, device and versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from mima._version import installed_versions
from mima.errors import MimaError, one_line
from mima.storage.atomic import reason_of, staged_by_several
from mima.storage.inputs import expanded, resolved
from mima.storage.plain_data import read_json

CONTENT = "entry.json"
FILES = "files"
"""In an entry's data: the names of its files."""

Content = TypeVar("Content")
"""What an entry says, such as a row or a mapping."""


def originals_folder(path: str | Path | None) -> Path | None:
    """Where what attacks show on an original model is kept; None where it is not.

    Raises:
        MimaError: no folder can be there.
    """
    if path is None:
        return None
    folder = resolved(expanded(path))
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise MimaError(f"originals {path}: {place} is no folder")
    return folder


class Originals:
    """A folder of entries about a model, by its fingerprint; several processes may add to it."""

    def __init__(self, folder: Path, model: str, device: str) -> None:
        self._folder = folder
        self._common = repr((model, device, sorted(installed_versions().items())))

    def entry(self, *parts: object) -> Entry:
        """The place of what depends on some values, which all have to say themselves in repr."""
        name = hashlib.sha256(repr((self._common, parts)).encode()).hexdigest()[:32]
        return Entry(self._folder / name)


class Entry:
    """One kept result, plain data and files by name; its folder exists once it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, kind: type[Content], files: Mapping[str, Path]) -> Content | None:
        """Copy the files of a complete entry to their places, and give back its data.

        Files that were not kept are left alone. None if there is no such entry yet.

        Args:
            kind: what the data are, which pydantic checks.
            files: by name, where to copy them; pictures of a training by step, the first one first.

        Raises:
            MimaError: it is damaged, or lacks a file that was kept.
        """
        if not self._path.is_dir():
            return None
        try:
            content = read_json((self._path / CONTENT).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"{CONTENT} holds no mapping")
            kept = [name for name in files if (self._path / name).is_file()]
            if FILES in content:
                expected = content.pop(FILES)
            else:
                expected = _of_an_older_entry(files, kept, diverged=bool(content.get("diverged")))
            if not isinstance(expected, list) or not all(isinstance(one, str) for one in expected):
                raise ValueError(f"its {FILES} are no names")
            lost = [name for name in expected if not (self._path / name).is_file()]
            if lost:
                raise ValueError(f"{lost[0]} is missing")
            said = TypeAdapter(kind).validate_python(content)
            for name in kept:
                files[name].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._path / name, files[name])
        except (OSError, ValueError) as error:
            raise MimaError(
                f"originals: {self._path} is damaged: {one_line(error)}; remove it"
            ) from error
        return said

    def write(self, content: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Keep data and copies of files, all or nothing; an entry that exists stays."""
        try:
            with staged_by_several(self._path) as building:
                building.mkdir()
                for name, file in files.items():
                    shutil.copyfile(file, building / name)
                text = json.dumps({**content, FILES: list(files)})
                (building / CONTENT).write_text(text, encoding="utf-8")
        except OSError as error:
            raise MimaError(f"originals: cannot write {self._path}: {reason_of(error)}") from error

    @property
    def kept(self) -> bool:
        """Whether there is such an entry."""
        return self._path.is_dir()


def _of_an_older_entry(files: Iterable[str], kept: Sequence[str], *, diverged: bool) -> list[str]:
    """What an entry without a list of its files must hold, by what is asked for and what is there.

    A training that diverged has the steps up to some step, each of them whole; any other has all.
    """
    names = list(files)
    if not diverged or not kept:
        return names
    step, _, _ = kept[-1].partition("-")
    first = names[: names.index(kept[-1])]
    return [name for name in names if name in first or name.startswith(f"{step}-")]
