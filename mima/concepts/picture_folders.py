"""Reading folders of pictures and their captions, as people have them on disk."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from mima.concepts.pictures import Picture
from mima.errors import MimaError, ProblemList, one_line, quoted
from mima.storage.inputs import expanded, resolved
from mima.storage.plain_data import read_json

CAPTION_COLUMNS = ("text", "prompt", "caption")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTION_ENDINGS = (".txt", ".caption")

# files that people keep beside pictures; anything else in a folder must be a picture
_COMPANION_ENDINGS = {
    *(".caption", ".csv", ".json", ".jsonl", ".license"),
    *(".md", ".rst", ".toml", ".txt", ".yaml", ".yml"),
}
_COMPANION_NAMES = {"license", "notice", "copying", "authors", "readme", "thumbs.db", "desktop.ini"}

_PICTURE_ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".tga"),
}


def is_candidate(path: Path) -> bool:
    """Whether a file in a folder of pictures is meant to be a picture."""
    name = path.name.lower()
    # a broken link counts as a picture, which is then reported missing
    broken = path.is_symlink() and not path.exists()
    if name.startswith((".", "~")) or not (path.is_file() or broken):
        return False
    ending = path.suffix.lower()
    return not (
        ending in _COMPANION_ENDINGS
        or name in _COMPANION_NAMES
        or (path.stem.lower() in _COMPANION_NAMES and ending not in _PICTURE_ENDINGS)
    )


def picture_files(folder: Path) -> list[Path]:
    """The files of a folder that are meant to be pictures, in the order of their names."""
    return sorted(path for path in folder.iterdir() if is_candidate(path))


def files_by_name(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names in lower case, each list in order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            found.setdefault(_folded(path.name), []).append(path)
    return found


def _folded(name: str) -> str:
    """A name in lower case, however its accents are encoded: archives of macOS take them apart."""
    return unicodedata.normalize("NFC", name.lower())


def only_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder's one file of these names, in whatever case, if it has one.

    Raises:
        MimaError: it has several.
    """
    files = files_by_name(folder)
    found = [path for name in names for path in files.get(name, ())]
    if len(found) > 1:
        alike = " and ".join(path.name for path in found)
        raise MimaError(f"{folder} holds {alike}: keep one of them")
    return found[0] if found else None


def metadata_file(folder: Path) -> Path | None:
    """The folder's `metadata.csv` or `metadata.jsonl`, if it has one.

    Raises:
        MimaError: it has both.
    """
    return only_file(folder, METADATA_NAMES)


def check_picture_folder(folder: Path) -> None:
    """Refuse a folder that is none.

    Raises:
        MimaError: it is a file, or not there.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise MimaError(f"picture folder {folder} {what}")


def read_folder(folder: Path, prompt: str = "", *, setting: str = "prompt") -> tuple[Picture, ...]:
    """Read a folder of pictures with their captions.

    Captions come from `metadata.csv` or `metadata.jsonl` (columns `file_name` and one of `text`,
    `prompt`, `caption`), else from a text file beside each picture (`.txt`, or else `.caption`),
    else from `prompt`. The case of these names does not matter.

    Args:
        folder: the pictures; sub-folders count only where metadata names files in them.
        prompt: for pictures that have no caption of their own.
        setting: what errors call that prompt, ``prompt`` or ``class_prompt``.

    Returns:
        The pictures, in the order of the metadata or of the file names. They are not decoded yet.

    Raises:
        MimaError: no such folder, no pictures, or captions that do not fit the pictures.
    """
    check_picture_folder(folder)
    metadata = metadata_file(folder)
    if metadata:
        pictures = read_captions(folder, metadata)
    else:
        pictures = _with_text_files(folder, prompt, setting)
    if not pictures:
        raise MimaError(f"picture folder {folder} holds no pictures")
    return pictures


def read_captions(folder: Path, metadata: Path) -> tuple[Picture, ...]:
    """Pair the pictures of a folder with the rows of a `.csv` or `.jsonl` file of names in it.

    Returns:
        One picture for each row, in the order of the rows.

    Raises:
        MimaError: rows that cannot be read, or that do not fit the pictures; all are listed.
    """
    rows, problems = (
        _read_jsonl(metadata) if metadata.suffix.lower() == ".jsonl" else _read_csv(metadata)
    )
    pictures = []
    named: set[Path] = set()
    for place, name, caption in rows:
        try:
            path = folder / expanded(name)
        except MimaError as error:
            problems.append(f"{place}: {error}")
            continue
        if not path.is_file():
            problems.append(f"{place}: {name} is not in {folder}")
        named.add(path)
        pictures.append(Picture(path, caption))
    # the same file by several names; each is followed once, whatever the number of its rows
    named |= {resolved(path) for path in named}
    problems += [
        f"{path.name} has no row"
        for path in picture_files(folder)
        if path not in named and resolved(path) not in named
    ]
    if problems:
        raise ProblemList(f"{metadata} does not fit its pictures:", problems)
    return tuple(pictures)


def _with_text_files(folder: Path, prompt: str, setting: str) -> tuple[Picture, ...]:
    files = files_by_name(folder)
    pictures: list[Picture] = []
    problems: list[str] = []
    for path in picture_files(folder):
        names = [stem + ending for ending in CAPTION_ENDINGS for stem in (path.stem, path.name)]
        texts = next(filter(None, (files.get(_folded(name)) for name in names)), [])
        # of names that differ in case alone, the picture's own
        texts = [text for text in texts if text.name in names] or texts
        caption = prompt
        if len(texts) > 1:
            problems.append(f"{path.name} has {' and '.join(text.name for text in texts)}")
        elif texts:
            caption = " ".join(read_text(texts[0]).split())
            if not caption:
                problems.append(f"{texts[0].name} is empty")
        elif not prompt:
            problems.append(f"{path.name} has no caption")
        pictures.append(Picture(path, caption))
    if problems:
        raise ProblemList(
            f"pictures in {folder} lack captions; give one prompt for all ({setting}= in Python, "
            f"--{setting.replace('_', '-')}, or {setting}: in the concept's concept.yaml), a "
            "metadata.csv with the columns file_name and text, or a .txt file beside each:",
            problems,
        )
    return tuple(pictures)


def read_text(path: Path) -> str:
    """What a file of captions holds.

    Raises:
        MimaError: it is not UTF-8.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark first
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MimaError(f"{path} is not UTF-8 text (byte {error.start})") from error


_Rows = list[tuple[str, str, str]]


def _read_csv(path: Path) -> tuple[_Rows, list[str]]:
    """Rows as (place, file name, caption), and what is wrong with the others."""
    reader = csv.reader(StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    rows: _Rows = []
    problems: list[str] = []
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        caption_column = _caption_column(path, header)
        twice = [name for name, count in Counter(header).items() if name and count > 1]
        if twice:
            raise MimaError(f"{path}: the column {quoted(twice[0])} stands twice")
        for fields in reader:
            place = f"line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                problems.append(
                    f"{place}: {len(fields)} fields where the header has {len(header)} "
                    "(a prompt with commas needs double quotes around it)"
                )
                continue
            record = dict(zip(header, fields, strict=True))
            _add_row(rows, problems, place, record, caption_column)
    except csv.Error as error:
        raise MimaError(f"{path}, line {reader.line_num}: {one_line(error)}") from error
    return rows, problems


def _read_jsonl(path: Path) -> tuple[_Rows, list[str]]:
    """Rows as (place, file name, caption), and what is wrong with the others."""
    rows: _Rows = []
    problems: list[str] = []
    # not splitlines(): JSON strings may hold U+2028 and its like
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            record = read_json(line)
        except (json.JSONDecodeError, MimaError) as error:
            problems.append(f"{place}: not JSON ({error})")
            continue
        if not isinstance(record, dict):
            problems.append(f"{place}: expected an object, got {type(record).__name__}")
            continue
        try:
            caption_column = _caption_column(path, list(record))
        except MimaError as error:
            problems.append(f"{place}: {error}")
            continue
        _add_row(rows, problems, place, record, caption_column)
    return rows, problems


def _caption_column(path: Path, columns: Sequence[str]) -> str:
    if "file_name" in columns:
        for column in CAPTION_COLUMNS:
            if column in columns:
                return column
    found = one_line(", ".join(columns)) or "nothing"
    raise MimaError(
        f"{path.name} needs the columns file_name and one of {', '.join(CAPTION_COLUMNS)}; "
        f"it has {found}"
    )


def _add_row(
    rows: _Rows, problems: list[str], place: str, record: Mapping[str, object], caption_column: str
) -> None:
    name, caption = record["file_name"], record[caption_column]
    if not isinstance(name, str) or not name.strip():
        problems.append(f"{place}: file_name is {quoted(name)}")
    elif not isinstance(caption, str) or not caption.strip():
        problems.append(f"{place}: {name} has no {caption_column}")
    else:
        rows.append((place, name.strip(), caption.strip()))
