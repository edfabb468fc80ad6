"""Reading a concept's description: its keys, the paths in it, and the pictures it names."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mima.concepts.picture_folders import (
    CAPTION_COLUMNS,
    metadata_file,
    only_file,
    picture_files,
    read_folder,
)
from mima.concepts.pictures import Picture
from mima.errors import MimaError, nearest, quoted
from mima.storage.inputs import expanded, resolved
from mima.storage.plain_data import read_json, read_yaml, yaml_problem

logger = logging.getLogger(__name__)

# a folder, a file, a picture, {file_name: ..., text: ...}, or several of the last three
OnePicture = str | Path | Image.Image | Picture | Mapping[str, object]
PictureSource = OnePicture | Iterable[OnePicture]

DESCRIPTION_NAMES = ("concept.yaml", "concept.yml", "concept.json")

HELD_OUT_FOLDER = "held_out"
CLASS_FOLDER = "class_images"
FOLDERS = (HELD_OUT_FOLDER, CLASS_FOLDER)
TEXT_KEYS = (
    *("name", "prompt", "class_prompt", "kind"),
    *("token", "initializer", "description", "validation_prompt"),
)
PICTURE_KEYS = ("images", "held_out", "class_images")
KEYS = (*TEXT_KEYS, *PICTURE_KEYS)


def is_concept_folder(path: Path) -> bool:
    """Whether a folder holds one concept: its description, captions, or pictures.

    Raises:
        MimaError: it holds several descriptions, or several files of captions.
    """
    return path.is_dir() and (
        only_file(path, DESCRIPTION_NAMES) is not None
        or metadata_file(path) is not None
        or bool(picture_files(path))
    )


def read_description(path: Path) -> object:
    """What a YAML or JSON file holds, as plain data.

    Raises:
        MimaError: it is a file of another kind, or cannot be read as what it is.
    """
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise MimaError(f"{path}: concepts are described in .yaml or .json files, or by folders")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    except MimaError as error:
        raise MimaError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise MimaError(f"{path} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise MimaError(f"{path} is not valid JSON: {error}") from error
    except yaml.YAMLError as error:
        raise MimaError(f"{path} is not valid YAML: {yaml_problem(error)}") from error


def check_keys(where: str, given: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Refuse keys that are not among those known.

    Raises:
        MimaError: one is not; the message says which is nearest.
    """
    for key in given:
        if key not in known:
            raise MimaError(f"{where}: {quoted(key)} is unknown; {nearest(str(key), known)}")


def with_base(given: Mapping[str, object], base: Path) -> dict[str, object]:
    """A description with its paths relative to ``base`` resolved, as ``locate`` does."""

    def resolve(value: object) -> object:
        if isinstance(value, str):
            return str(locate(value, base))
        if isinstance(value, Mapping) and isinstance(value.get("file_name"), str):
            return {**value, "file_name": str(locate(value["file_name"], base))}
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return value

    return {key: resolve(value) if key in PICTURE_KEYS else value for key, value in given.items()}


def locate(name: str, base: Path) -> Path:
    """A path relative to `base`, or to the working directory where only that has it."""
    path = expanded(name)
    if path.is_absolute() or (base / path).exists() or not path.exists():
        return base / path
    return path


def attributes_of(given: Mapping[str, object], where: str) -> dict[str, Any]:
    """What ``Concept`` is made with, from a description whose paths are resolved.

    Args:
        given: attributes of ``Concept``; those that are None count as left out.
        where: what errors call the description.

    Returns:
        The attributes. Where none says them, the prompt is the commonest caption, the name that of
        the pictures' folder, or else the prompt.

    Raises:
        MimaError: unknown or missing attributes, values of another kind, or pictures that have no
            caption.
    """
    check_keys(where, given, KEYS)
    attributes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key in TEXT_KEYS:
        if not isinstance(attributes.get(key, ""), str):
            raise MimaError(f"{where}: {key} must be text, got {quoted(attributes[key])}")
    for key in PICTURE_KEYS:
        value = attributes.get(key, ())
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(part, (str, Path, Mapping, Image.Image, Picture)):
                raise MimaError(
                    f"{where}: {key} must be a folder or a list of files, got {quoted(part)}"
                )
    if "images" not in attributes:
        raise MimaError(f"{where}: images is missing (a folder, or a list of files)")
    prompt = attributes.setdefault("prompt", "")
    images = pictures_from(attributes["images"], prompt)
    unread = [key for key in FOLDERS if key not in given]
    warn_of_unread(where, attributes["images"], unread)
    attributes["images"] = images
    if not prompt and images:
        attributes["prompt"] = Counter(image.prompt for image in images).most_common(1)[0][0]
    attributes.setdefault("name", _default_name(given, attributes["prompt"]))
    return attributes


def _default_name(given: Mapping[str, object], prompt: str) -> str:
    source = given.get("images")
    if isinstance(source, (str, Path)):
        path = resolved(Path(source))
        return path.name if path.is_dir() else path.parent.name
    return prompt


def pictures_from(
    source: PictureSource, prompt: str, setting: str = "prompt"
) -> tuple[Picture, ...]:
    """Pictures from whatever they are given as.

    Args:
        source: see ``PictureSource``.
        prompt: for pictures that have no caption of their own.
        setting: what errors call that prompt, ``prompt`` or ``class_prompt``.

    Raises:
        MimaError: no such file, captions that do not fit, or none for a picture.
        TypeError: neither a folder, nor files, nor pictures.
    """
    if isinstance(source, (str, Path)):
        path = expanded(source)
        if path.is_dir():
            return read_folder(path, prompt, setting=setting)
        if not path.exists():
            raise MimaError(f"{path} is neither a folder nor a picture: no such file")
        return (_picture(path, prompt, setting),)
    if isinstance(source, (Image.Image, Picture, Mapping)):
        return (_picture(source, prompt, setting),)
    if not isinstance(source, Iterable):
        raise TypeError(f"pictures must be a folder, files or PIL images, got {source!r}")
    return tuple(_picture(item, prompt, setting) for item in source)


def _picture(source: OnePicture, prompt: str, setting: str) -> Picture:
    if isinstance(source, Picture):
        return source
    if isinstance(source, Mapping):
        check_keys("a picture", source, ("file_name", *CAPTION_COLUMNS))
        file_name = source.get("file_name")
        captions = [source[key] for key in CAPTION_COLUMNS if key in source]
        if not isinstance(file_name, str) or not all(isinstance(text, str) for text in captions):
            raise MimaError(f"a picture needs a file_name and a text, got {quoted(dict(source))}")
        return _picture(file_name, str(captions[0]) if captions else prompt, setting)
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, Path):
        source = expanded(source)
    picture = Picture(source, prompt)
    if not prompt.strip():
        raise MimaError(
            f"{picture.label} has no caption, and there is no {setting} for all pictures"
        )
    return picture


def warn_of_unread(where: str, images: object, keys: Sequence[str]) -> None:
    """Say which sub-folders of a folder of reference pictures are not read, though so called."""
    if not isinstance(images, (str, Path)):
        return
    unread = [key for key in keys if (expanded(images) / key).is_dir()]
    if unread:
        logger.warning(
            "%s: nothing reads %s in %s; give what is there by that name, or read the folder by "
            "Concept.from_folder",
            *(where, " and ".join(f"{key}/" for key in unread), images),
        )
