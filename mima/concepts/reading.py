"""Concepts from folders, YAML and JSON files, and the field's concept lists."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mima.concepts.concept import Concept, embedded_folder, embedded_names
from mima.concepts.description import (
    FOLDERS,
    attributes_of,
    is_concept_folder,
    locate,
    read_description,
    with_base,
)
from mima.concepts.picture_folders import (
    check_picture_folder,
    picture_files,
    read_captions,
    read_folder,
    read_text,
)
from mima.concepts.pictures import Picture, PictureError
from mima.errors import (
    LONGEST_PROBLEM,
    MimaError,
    counted,
    nearest,
    one_line,
    quoted,
    told_apart,
)
from mima.storage.inputs import expanded, resolved

# the entries of concept lists that DreamBooth and Custom Diffusion scripts read
_LIST_KEYS = (
    *("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir"),
    *("prompt_filename", "token", "validation_prompt", "name"),
)

# what is told beside an entry, by the key that it replaces
_TOLD_KEYS = {"instance_prompt": "prompt", "class_prompt": "class_prompt", "token": "token"}

NUMBERED = "{}-{}"
"""What the later ones of alike concepts and groups are called."""

RETRIEVED = ("images.txt", "caption.txt")
"""What Custom Diffusion's scripts write beside a folder ``images`` of pictures they fetched."""

ConceptSource: TypeAlias = str | Path | Concept | Mapping[str, object]
"""What ``load_concepts`` reads one or more concepts from."""


def load_concepts(
    source: ConceptSource | Iterable[ConceptSource],
    *,
    base: str | Path | None = None,
    group: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> list[Concept]:
    """Read concepts from wherever they are described.

    Args:
        source: any of
            a folder of pictures, or a folder of such folders;
            a YAML or JSON file with one concept, a list of them, or groups `{"a+b": [...]}`, either
            with the attributes of `Concept` or with the keys of the field's training scripts
            (`instance_prompt`, `instance_data_dir`, ...); `file.json#a+b` picks a group;
            the name of an embedded concept;
            a mapping with what such a file holds; a `Concept`; a sequence of all these.
        base: what relative paths start from; default the working directory. Paths in a file start
            from the file's folder, or from the working directory where that has no such file.
        group: which group of a file that has several.
        told: attributes of `Concept`, of a single concept, that win over what its description
            says: its prompt is the caption of pictures without one of their own.

    Returns:
        At least one concept, with names made distinct by "-2", "-3" and so on.

    Raises:
        MimaError: nothing there, a description that does not hold together, or something told of
            several concepts.
        PictureError: pictures that cannot be read; those of all concepts in one list.
    """
    concepts: list[Concept] = []
    problems: list[str] = []
    makers = _makers(source, Path(base or "."), group)
    if told and len(makers) > 1:
        raise MimaError(f"{', '.join(told)}: told of one concept, but {len(makers)} are described")
    for make in makers:
        try:
            concepts.append(make(told or {}))
        except PictureError as error:
            problems += error.problems
    if problems:
        raise PictureError(f"{counted(len(problems), 'picture')} cannot be read:", problems)
    if not concepts:
        raise MimaError("no concepts given")
    return _distinct(concepts)


def num_described(source: ConceptSource | Iterable[ConceptSource]) -> int:
    """How many concepts ``load_concepts`` would read; no picture is looked at.

    Raises:
        MimaError: as there, but for what a concept's own description says.
    """
    return len(_makers(source, Path("."), None))


def _from_list_entry(
    entry: Mapping[str, object],
    base: Path,
    where: str,
    name: str | None,
    told: Mapping[str, Any],
) -> Concept:
    """Build a concept from an entry of a DreamBooth or Custom Diffusion concept list."""
    unused = sorted(str(key) for key in entry if key not in _LIST_KEYS)
    if unused:
        warnings.warn(f"{where}: ignored {one_line(', '.join(unused))}", stacklevel=2)
    texts = {key: entry[key] for key in _LIST_KEYS if entry.get(key) is not None}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise MimaError(f"{where}: {key} must be text, got {quoted(value)}")
    values = {key: str(value) for key, value in texts.items()}
    values |= {key: told[own] for key, own in _TOLD_KEYS.items() if own in told}
    if "instance_data_dir" not in values:
        raise MimaError(f"{where}: instance_data_dir is missing")
    folder = locate(values["instance_data_dir"], base)
    prompt = values.get("instance_prompt", "")
    file_name = values.get("prompt_filename")
    templates = _templates(_beside(folder, file_name, base)) if file_name is not None else ()
    if file_name is not None and not templates:
        images = _captions_from(folder, _beside(folder, file_name, base))
    elif texts.get("instance_prompt") and folder.is_dir():
        # these scripts read one prompt for all pictures and know of no metadata
        images = tuple(Picture(path, prompt) for path in picture_files(folder))
    else:
        images = read_folder(folder, prompt)
    if not images:
        raise MimaError(f"{where}: instance_data_dir {folder} holds no pictures")
    class_prompt = values.get("class_prompt", "")
    attributes: dict[str, Any] = {
        "name": values.get("name") or name or resolved(folder).name,
        "prompt": prompt or Counter(image.prompt for image in images).most_common(1)[0][0],
        "images": images,
        "class_prompt": class_prompt,
        "kind": "instance" if "token" in values else "object",
        "token": values.get("token"),
        "validation_prompt": values.get("validation_prompt") or _filled(templates, values, prompt),
    }
    if "class_images" not in told:
        source = values.get("class_data_dir")
        attributes["class_images"] = _class_images(source, class_prompt, base, where)
    return Concept(**{**attributes, **told})


def _templates(path: Path) -> tuple[str, ...]:
    """The lines of a list of prompts for evaluation, ``photo of a {}.``; none of other files."""
    if path.suffix.lower() in (".csv", ".jsonl"):
        return ()
    lines = _lines(path)
    return tuple(lines) if all("{}" in line for line in lines) else ()


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _filled(templates: Sequence[str], values: Mapping[str, str], prompt: str) -> str:
    """The first prompt for evaluation, about the concept; empty where there is none."""
    if not templates:
        return ""
    words = prompt.split()
    token = values.get("token")
    named = " ".join(words[words.index(token) :]) if token in words else words[-1] if words else ""
    return templates[0].replace("{}", named)


def _class_images(
    source: str | None, class_prompt: str, base: Path, where: str
) -> tuple[Picture, ...]:
    if source is None:
        return ()
    path = locate(source, base)
    if path.is_dir():
        if all((path / name).is_file() for name in RETRIEVED):
            return _retrieved(path)
        if not class_prompt:
            raise MimaError(f"{where}: class_data_dir needs a class_prompt")
        return tuple(Picture(file, class_prompt) for file in picture_files(path))
    # no folder yet: prior preservation draws the class images
    return ()


def _retrieved(folder: Path) -> tuple[Picture, ...]:
    """Pictures with captions as the class pictures of Custom Diffusion's scripts are fetched."""
    files, captions = (_lines(folder / name) for name in RETRIEVED)
    if len(files) != len(captions):
        raise MimaError(
            f"{folder}: {RETRIEVED[0]} names {len(files)} pictures, {RETRIEVED[1]} holds "
            f"{len(captions)} captions"
        )
    # the paths start where the script ran
    return tuple(
        Picture(folder / "images" / Path(file).name, caption)
        for file, caption in zip(files, captions, strict=True)
    )


def _beside(folder: Path, file_name: str, base: Path) -> Path:
    inside = folder / expanded(file_name)
    path = inside if inside.is_file() else locate(file_name, base)
    if not path.is_file():
        raise MimaError(f"prompt_filename {file_name} is neither in {folder} nor in {base}")
    return path


def _captions_from(folder: Path, path: Path) -> tuple[Picture, ...]:
    """Captions from a metadata file, or from a text file with one line for each picture."""
    check_picture_folder(folder)
    if path.suffix.lower() in (".csv", ".jsonl"):
        return read_captions(folder, path)
    prompts = _lines(path)
    files = [file for file in picture_files(folder) if file != path]
    if len(prompts) == 1:
        prompts *= len(files)
    if len(prompts) != len(files):
        raise MimaError(
            f"{path} holds {len(prompts)} prompts for the {len(files)} pictures in {folder}"
        )
    return tuple(Picture(file, prompt) for file, prompt in zip(files, prompts, strict=True))


_Maker = Callable[[Mapping[str, Any]], Concept]
"""Makes a concept, and reads its pictures, with what is told beside its description."""


def _makers(
    source: object, base: Path, group: str | None, reading: tuple[Path, ...] = ()
) -> list[_Maker]:
    """Makers of what a source describes; ``reading`` are the files that led to it."""
    if isinstance(source, Concept):
        return [lambda told: replace(source, **told) if told else source]
    if isinstance(source, (str, Path)):
        return _makers_at(source, base, group, reading)
    if isinstance(source, Mapping):
        return _makers_in(source, base, group, "concept description", reading)
    if isinstance(source, Iterable):
        return [make for item in source for make in _makers(item, base, group, reading)]
    raise TypeError(
        "load_concepts: expected a folder, a file, an embedded concept's name, a description or "
        f"a sequence of these, got {source!r}"
    )


def _makers_at(
    source: str | Path, base: Path, group: str | None, reading: tuple[Path, ...]
) -> list[_Maker]:
    path = locate(str(source), base)
    if not path.exists() and "#" in str(source):
        file_name, _, group = str(source).rpartition("#")
        path = locate(file_name, base)
    if path.is_dir():
        return _makers_in_folder(path)
    if path.is_file():
        file = resolved(path)
        if file in reading:
            raise MimaError(
                f"{reading[-1]} names {file}, which is being read: a list in a circle; take that "
                "name out of it"
            )
        return _makers_in(read_description(path), path.parent, group, str(path), (*reading, file))
    name = str(source)
    embedded = embedded_folder(name)
    if embedded is not None:
        return [partial(_from_folder, embedded)]
    raise MimaError(
        f"{name} is neither a folder, nor a file, nor an embedded concept; "
        f"{nearest(name, embedded_names())}"
    )


def _makers_in_folder(folder: Path) -> list[_Maker]:
    if is_concept_folder(folder):
        return [partial(_from_folder, folder)]
    inner = sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in FOLDERS
    )
    if not inner:
        raise MimaError(f"concept folder {folder} holds no pictures and no folders of pictures")
    return [partial(_from_folder, path) for path in inner]


def _from_folder(folder: Path, told: Mapping[str, Any]) -> Concept:
    return Concept.from_folder(folder, **told)


def _makers_in(
    content: object, base: Path, group: str | None, where: str, reading: tuple[Path, ...]
) -> list[_Maker]:
    if isinstance(content, Mapping) and set(content) == {"concepts"}:
        content = content["concepts"]
    if isinstance(content, list) and content and all(isinstance(part, list) for part in content):
        # CustomConcept101's compositions are lists without names; their folders name them
        groups = told_apart(map(_group_name, content), NUMBERED)
        compositions = dict(zip(groups, content, strict=True))
        key, content = _chosen_group(compositions, group, where)
        where = f"{where}, {key}"
    entries: Sequence[object] = content if isinstance(content, list) else [content]
    names: Sequence[str | None] = [None] * len(entries)
    if isinstance(content, Mapping) and _is_grouped(content):
        key, entries = _chosen_group(_named(content, where), group, where)
        where = f"{where}, {key}"
        names = [part.strip() or None for part in key.split("+")]
        if len(names) != len(entries):
            names = [None] * len(entries)
    if not entries:
        raise MimaError(f"{where} describes no concepts")
    return [
        make
        for number, (entry, name) in enumerate(zip(entries, names, strict=True), start=1)
        for make in _makers_of(entry, base, f"{where}, concept {number}", name, reading)
    ]


def _group_name(entries: Sequence[object]) -> str:
    return "+".join(
        Path(str(entry.get("instance_data_dir", ""))).name if isinstance(entry, Mapping) else ""
        for entry in entries
    )


def _is_grouped(content: Mapping[object, object]) -> bool:
    # a list of {file_name: ..., text: ...} is one concept's pictures
    return bool(content) and all(
        isinstance(value, list)
        and all(isinstance(entry, Mapping) and "file_name" not in entry for entry in value)
        for value in content.values()
    )


def _named(groups: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Groups by their names as texts; YAML takes a name for a number, a date or a truth value."""
    named: dict[str, Any] = {}
    for key, entries in groups.items():
        if str(key) in named:
            raise MimaError(f"{where}: group {quoted(str(key))} stands twice")
        named[str(key)] = entries
    return named


def _chosen_group(
    groups: Mapping[str, Any], group: str | None, where: str
) -> tuple[str, Sequence[object]]:
    if group is None and len(groups) > 1:
        raise MimaError(
            f"{where} holds {len(groups)} groups of concepts, say which: "
            + one_line(", ".join(groups), LONGEST_PROBLEM)
        )
    key = next(iter(groups)) if group is None else group
    if key not in groups:
        raise MimaError(f"{where} holds no group {quoted(key)}; {nearest(key, groups)}")
    if not groups[key]:
        raise MimaError(f"{where}: group {quoted(key)} is empty")
    return key, groups[key]


def _makers_of(
    entry: object, base: Path, where: str, name: str | None, reading: tuple[Path, ...]
) -> list[_Maker]:
    if isinstance(entry, str):
        return _makers_at(entry, base, None, reading)
    if not isinstance(entry, Mapping):
        raise MimaError(f"{where}: expected the attributes of a concept, got {quoted(entry)}")
    if "instance_data_dir" in entry or "instance_prompt" in entry:
        return [partial(_from_list_entry, entry, base, where, name)]
    given = with_base(entry, base)
    if name is not None:
        given = {"name": name, **given}
    return [lambda told: Concept(**attributes_of({**given, **told}, where))]


def _distinct(concepts: list[Concept]) -> list[Concept]:
    """Number the later ones of concepts that share a name, so that no table drops one."""
    names = told_apart((concept.name for concept in concepts), NUMBERED)
    return [
        concept if name == concept.name else replace(concept, name=name)
        for concept, name in zip(concepts, names, strict=True)
    ]
