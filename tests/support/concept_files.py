"""Pictures, folders and files that describe concepts."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image

from mima.concepts import Picture


def save(path: Path, color=(255, 0, 0), size=(8, 6), **options) -> Path:
    Image.new("RGB", size, color).save(path, **options)
    return path


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("0.png", "1.png"):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / name)
    return folder


def names(group: tuple[Picture, ...]) -> list[str]:
    return [picture.image.name for picture in group if isinstance(picture.image, Path)]


def write(path: Path, content: object) -> Path:
    text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return path
