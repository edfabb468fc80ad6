"""A concept: its name, its prompt, its pictures; and those that ship with the package."""

from __future__ import annotations

import copy
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mima.assets import assets
from mima.concepts.description import (
    DESCRIPTION_NAMES,
    FOLDERS,
    KEYS,
    PICTURE_KEYS,
    PictureSource,
    attributes_of,
    check_keys,
    is_concept_folder,
    pictures_from,
    read_description,
    warn_of_unread,
    with_base,
)
from mima.concepts.naming import names
from mima.concepts.picture_folders import only_file
from mima.concepts.pictures import Picture, PictureError, check_pictures, digest
from mima.errors import MimaError, counted, nearest, quoted
from mima.storage.inputs import expanded
from mima.storage.plain_data import hashed

logger = logging.getLogger(__name__)

Kind = Literal["object", "style", "instance", "benign"]
"""What a concept is: an object, a style, a new instance, or something that must stay learnable."""


@dataclass(frozen=True, init=False)
class Concept:
    """A concept with its reference pictures, all of them readable.

    Pictures are given as a folder, a file, a PIL image, a `Picture`, or a sequence of the last
    three. All are decoded once. Of a folder, its pictures and captions are read, and nothing else
    that `from_folder` would find there.

    Attributes:
        name: what tables and file names call it.
        prompt: the text that asks for it, and the caption of pictures that come without one.
        images: reference pictures that adaptation and immunization train on.
        class_prompt: what the concept is one of, for prior preservation, and the caption of class
            images that come without one; may be empty.
        held_out: further reference pictures, for measuring only.
        class_images: pictures of the class, for prior preservation.
        kind: an object, a style, a new instance, or something that must stay learnable: one of
            "object", "style", "instance", "benign".
        token: a new word that stands for an instance, as in "photo of a <new1> castle"; it must
            occur in `prompt` and in the captions of `images`.
        initializer: an ordinary word whose embedding the new word starts from.
        description: a sentence for people.
        validation_prompt: the prompt for sample pictures; by default `prompt`.

    Raises:
        MimaError: no name, one with control characters, no prompt, no pictures, a prompt without
            the token, or a text that cannot be written as UTF-8, as the name of a folder may be.
        PictureError: pictures that cannot be read, all of them listed.

    Examples:
        >>> Concept("cat", "a photo of a cat", "pictures/cat", class_prompt="a photo of an animal")
    """

    name: str
    prompt: str
    images: tuple[Picture, ...]
    class_prompt: str
    held_out: tuple[Picture, ...]
    class_images: tuple[Picture, ...]
    kind: Kind
    token: str | None
    initializer: str | None
    description: str
    validation_prompt: str

    def __init__(
        self,
        name: str,
        prompt: str,
        images: PictureSource,
        class_prompt: str = "",
        held_out: PictureSource = (),
        class_images: PictureSource = (),
        kind: Kind = "object",
        token: str | None = None,
        initializer: str | None = None,
        description: str = "",
        validation_prompt: str = "",
    ) -> None:
        texts: dict[str, Any] = {
            "name": name,
            "prompt": prompt,
            "class_prompt": class_prompt,
            "kind": kind,
            "token": token,
            "initializer": initializer,
            "description": description,
            "validation_prompt": validation_prompt or prompt,
        }
        for key, value in texts.items():
            optional = key in ("token", "initializer") and value is None
            if not isinstance(value, str) and not optional:
                raise TypeError(f"Concept: {key} must be a string, got {value!r}")
            if value is not None and not _is_text(value):
                hint = "; give the concept a name" if key == "name" else ""
                raise MimaError(f"Concept: {key} {quoted(value)} cannot be written as UTF-8{hint}")
        if not name.strip():
            raise MimaError("Concept: name is empty")
        where = f"concept {quoted(name)}"
        if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
            raise MimaError(f"{where}: its name holds a control character, such as a line's end")
        if kind not in get_args(Kind):
            raise MimaError(
                f"{where}: kind {quoted(kind)} is unknown; {nearest(kind, get_args(Kind))}"
            )
        pictures = {
            "images": pictures_from(images, prompt),
            "held_out": pictures_from(held_out, prompt),
            "class_images": pictures_from(class_images, class_prompt, "class_prompt"),
        }
        warn_of_unread(where, images, [key for key in FOLDERS if not pictures[key]])
        if not pictures["images"]:
            raise MimaError(f"{where} has no pictures: images is empty")
        if not prompt.strip():
            raise MimaError(f"{where}: prompt is empty")
        if token is not None:
            _check_token(where, token, prompt, pictures["images"])
        odd = [one for group in pictures.values() for one in group if not _is_text(one.prompt)]
        if odd:
            raise MimaError(
                f"{where}: the caption {quoted(odd[0].prompt)} of {quoted(odd[0].label)} cannot be "
                "written as UTF-8"
            )
        problems = check_pictures(picture for group in pictures.values() for picture in group)
        if problems:
            unread = counted(len(problems), "picture")
            raise PictureError(f"{where}: {unread} cannot be read:", problems)
        for key, value in {**texts, **pictures}.items():
            object.__setattr__(self, key, value)

    def identity(self) -> dict[str, str]:
        """What a run reads of the concept, as plain data; of pictures a hash of all, with captions.

        Two concepts of the same identity are trained on alike.
        """

        def of(pictures: Iterable[Picture]) -> str:
            return hashed(json.dumps([f"{digest(p)} {p.prompt}" for p in pictures]))

        return {
            "name": self.name,
            "prompt": self.prompt,
            "class_prompt": self.class_prompt,
            "token": self.token or "",
            "initializer": self.initializer or "",
            "images": of(self.images),
            "class_images": of(self.class_images),
        }

    def trained_on(self, images: Iterable[Picture]) -> Concept:
        """The concept with other reference pictures, decoded already, among which may be others'.

        Captions of what it does not show need not hold its token.
        """
        other = copy.copy(self)
        object.__setattr__(other, "images", tuple(images))
        return other

    def without(self, others: Iterable[Concept]) -> Concept:
        """The concept without those of its pictures whose captions name another concept.

        An object's pictures may be drawn in a style that is immunized against: whether the object
        can still be learned is then a question for its other pictures.

        Args:
            others: concepts whose names are looked for, as words, in whatever case.

        Returns:
            The concept itself where no caption names any of them.

        Raises:
            MimaError: no picture is left to learn from.
        """
        called = [other.name for other in others]

        def left(pictures: Iterable[Picture]) -> tuple[Picture, ...]:
            return tuple(p for p in pictures if not any(names(p.prompt, name) for name in called))

        groups: dict[str, Any] = {key: left(getattr(self, key)) for key in PICTURE_KEYS}
        if not groups["images"]:
            raise MimaError(
                f"concept {self.name!r}: every picture's caption names one of: {', '.join(called)}"
            )
        same = all(len(group) == len(getattr(self, key)) for key, group in groups.items())
        return self if same else replace(self, **groups)

    @classmethod
    def from_folder(cls, folder: str | Path, **overrides: Any) -> Concept:
        """Read a concept from a folder of pictures.

        The folder holds the pictures; captions in `metadata.csv` or `metadata.jsonl` or in text
        files beside them; optionally `concept.yaml` (or .json) with any of the attributes, and the
        sub-folders `held_out` and `class_images`.

        Args:
            folder: its name is the concept's name unless something else says it.
            **overrides: attributes of `Concept` that win over what the folder says.

        Returns:
            The concept. Where nothing says its prompt, that is the commonest caption.

        Raises:
            MimaError: a missing or empty folder, neither a prompt nor captions, captions that do
                not fit, unknown attributes.
            PictureError: pictures that cannot be read, all of them listed.
        """
        folder = expanded(folder)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise MimaError(f"concept folder {folder} {what}")
        description: dict[str, object] = {
            "name": Path(os.path.abspath(folder)).name,
            "images": str(folder),
        }
        for key in FOLDERS:
            if (folder / key).is_dir():
                description[key] = str(folder / key)
        described = only_file(folder, DESCRIPTION_NAMES)
        if described is not None:
            given = read_description(described)
            if not isinstance(given, Mapping):
                raise MimaError(f"{described}: expected the attributes of one concept")
            check_keys(str(described), given, KEYS)
            description |= with_base(given, folder)
        check_keys("from_folder", overrides, KEYS)
        return Concept(**attributes_of({**description, **overrides}, str(folder)))


def embedded_names() -> list[str]:
    """The names by which `embedded_concept` knows the shipped concepts."""
    root = assets() / "concepts"
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if is_concept_folder(path))


def embedded_concept(name: str) -> Concept:
    """One of the concepts that ship with the package.

    Args:
        name: one of `embedded_names`, such as "unseen-fox", or the `Concept.name`, such as
            "unseen fox".

    Returns:
        The concept with its reference and held-out pictures.

    Raises:
        MimaError: there is none of that name; the message says which there are.
    """
    folder = embedded_folder(name)
    if folder is None:
        raise MimaError(
            f"no embedded concept is named {quoted(name)}; {nearest(name, embedded_names())}"
        )
    return Concept.from_folder(folder)


def embedded_folder(name: str) -> Path | None:
    """The folder of the shipped concept whose folder, or else whose description, has that name."""
    root = assets() / "concepts"
    if name in embedded_names():
        return root / name
    for folder_name in embedded_names():
        described = read_description(root / folder_name / DESCRIPTION_NAMES[0])
        if isinstance(described, Mapping) and described.get("name") == name:
            return root / folder_name
    return None


def embedded_concepts() -> list[Concept]:
    """All concepts that ship with the package, in the order of their names."""
    return [embedded_concept(name) for name in embedded_names()]


def _is_text(value: str) -> bool:
    """Whether UTF-8 can write it, and so records and tokenizers; a file's name may be any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_token(where: str, token: str, prompt: str, images: Iterable[Picture]) -> None:
    if not token.strip():
        raise MimaError(f"{where}: token is empty")
    if token not in prompt:
        raise MimaError(
            f"{where}: the prompt {quoted(prompt)} does not contain the token {quoted(token)}"
        )
    without = sorted({image.prompt for image in images if token not in image.prompt})
    if without:
        raise MimaError(
            f"{where}: {len(without)} captions do not contain the token {quoted(token)}, "
            f"the first is {quoted(without[0])}"
        )


def learnable(concepts: Iterable[Concept], targets: Sequence[Concept]) -> list[Concept]:
    """Concepts that must stay learnable, without their pictures that show a target.

    Pictures of a tiger of which some are in an immunized style, and say so, tell of that style's
    immunity as much as of the tiger. Those that are left out, or cannot be, are warned of.
    """
    found = []
    for concept in concepts:
        try:
            left = concept.without(targets)
        except MimaError as error:
            logger.warning("%s, which must not be learned: it tells little of the others", error)
            left = concept
        fewer = len(concept.images) - len(left.images)
        if fewer:
            logger.warning(
                "concept %r: %d of its %d pictures are left out, whose captions name what must "
                "not be learned",
                *(concept.name, fewer, len(concept.images)),
            )
        found.append(left)
    return found
