"""`mima.json`: what made a folder, which also marks the folder as mima's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mima._version import __version__
from mima.errors import MimaError, one_line
from mima.storage.plain_data import read_json

RECORD_FILE = "mima.json"


def write_record(
    folder: Path,
    command: str,
    *,
    model: str | None,
    opened_with: Mapping[str, str],
    concepts: Sequence[str],
    prompts: Sequence[str],
    details: Mapping[str, Any],
) -> None:
    """Write down where a folder came from: by which command, from which model.

    The model is None if it was built in memory; ``ModelSource.options`` are what it was opened
    with. The prompts ask for the concepts; the details, plain data, are the command's own.
    """
    record = {
        "command": command,
        "version": __version__,
        "model": model,
        **opened_with,
        "concepts": list(concepts),
        "prompts": list(prompts),
        **details,
    }
    (folder / RECORD_FILE).write_text(record_text(record), encoding="utf-8")


def record_text(record: Mapping[str, Any]) -> str:
    """What the file of a record holds; what UTF-8 cannot write, as in a path, is escaped."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    # Python's escapes of lone surrogates are JSON's
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What ``write_record`` wrote to a folder; None where there is nothing.

    Raises:
        MimaError: the file is damaged.
    """
    path = folder / RECORD_FILE
    try:
        record = read_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MimaError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, MimaError) as error:
        raise MimaError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise MimaError(f"{path} is damaged: expected a mapping")
    return record


def without_thumbnails(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is published: pictures that a run saw are named by their hashes alone.

    Their signatures show them, if only at 12 × 12 points, and may be of people.
    """
    saw = record.get("saw")
    if not isinstance(saw, Mapping):
        return dict(record)
    levels = {
        name: {part: value for part, value in level.items() if part != "signatures"}
        if isinstance(level, Mapping)
        else level
        for name, level in saw.items()
    }
    return {**record, "saw": levels}


def prompt_of(folder: Path) -> str | None:
    """The prompt of the one concept that a folder is about, where its record says so."""
    prompts = (read_record(folder) or {}).get("prompts")
    match prompts:
        case [str(prompt)]:
            return prompt
    return None
