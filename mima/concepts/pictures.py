"""Reading pictures and their captions, as people have them on disk.

Every picture becomes 8-bit sRGB, upright, on white. What cannot be read is named, all at once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

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

# what Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error),
    Image.DecompressionBombError,
)

# what it raises on EXIF data in which a value is of another kind than its tag says
_EXIF_ERRORS = (*_DECODE_ERRORS, TypeError, LookupError, AttributeError)

# by EXIF's orientation; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")
"""What Pillow may read: formats that need no other program, as PostScript does, and well tried."""
MOST_PIXELS = 64 * 10**6
"""Of one picture, 8000 × 8000; decoding takes up to eight bytes of memory for each."""


ROUNDING = 2
"""Levels of 255 by which a profile may move a shade and still be that of sRGB."""


class PictureError(ProblemList):
    """Pictures that cannot be used, each with its reason."""


@dataclass(frozen=True)
class Picture:
    """One picture with the prompt that describes it.

    Attributes:
        image: a file, or a picture in memory.
        prompt: what a model is asked for to get this picture.
    """

    image: Path | Image.Image
    prompt: str
    # set when the picture was decoded without an error; copies of a concept skip the check
    _checked: bool = field(default=False, init=False, repr=False, compare=False)

    @classmethod
    def trusted(cls, file: Path, prompt: str) -> Picture:
        """One that mima itself writes, which is there by the time it is read."""
        picture = cls(file, prompt)
        object.__setattr__(picture, "_checked", True)
        return picture

    def captioned(self, prompt: str) -> Picture:
        """The same picture under another caption."""
        picture = Picture(self.image, prompt)
        object.__setattr__(picture, "_checked", self._checked)
        return picture

    def __post_init__(self) -> None:
        if isinstance(self.image, str):
            object.__setattr__(self, "image", Path(self.image))
        if not isinstance(self.image, (Path, Image.Image)):
            raise TypeError(
                f"Picture: image must be a path or a PIL image, got {type(self.image).__name__}"
            )
        if not isinstance(self.prompt, str):
            raise TypeError(f"Picture: prompt must be a string, got {self.prompt!r}")

    @property
    def label(self) -> str:
        """How messages name this picture."""
        return str(self.image) if isinstance(self.image, Path) else "picture in memory"

    def load(self) -> Image.Image:
        """The picture as upright 8-bit sRGB.

        Raises:
            PictureError: the file is missing, damaged or not a picture.
        """
        try:
            if isinstance(self.image, Image.Image):
                return to_rgb(self.image)
            if self.image.exists() and not self.image.is_file():
                raise OSError("is no ordinary file")
            with Image.open(self.image, formats=FORMATS) as image:
                # before anything is decoded: a file of kilobytes may hold gigabytes
                if math.prod(image.size) > MOST_PIXELS:
                    raise Image.DecompressionBombError(image.size)
                return to_rgb(image)
        except _DECODE_ERRORS as error:
            raise PictureError(
                "a picture cannot be read:", [f"{self.label}: {_reason(self.image, error)}"]
            ) from error


def _reason(image: Path | Image.Image, error: Exception) -> str:
    if isinstance(image, Path):
        if not image.exists():
            return "no such file"
        if image.is_dir():
            return "is a folder"
        if not image.is_file():
            return "is no ordinary file"
        if isinstance(error, PermissionError):
            return "may not be read (permission denied)"
        if image.stat().st_size == 0:
            return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large (over {MOST_PIXELS // 10**6} million pixels)"
    return f"damaged or unsupported ({one_line(error)})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow picture to upright 8-bit sRGB without an alpha channel.

    EXIF rotation is applied, transparency is composited on white (the background that generated
    pictures have), 16-bit grey is scaled rather than clipped, embedded colour profiles are
    followed.

    Args:
        image: any mode that Pillow reads.

    Returns:
        A new picture of mode RGB.

    Raises:
        ValueError: float or 32-bit values whose range does not say what white is.
    """
    # TIFF files turn themselves as they are loaded
    image.load()
    profile = image.info.get("icc_profile")
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_to_8_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "L" and "transparency" in image.info:
        image = image.convert("LA")
    if image.mode in ("L", "LA") and profile:
        # while it is grey, which its profile is of
        image, profile = _to_srgb(image, profile), None
    if image.mode in ("P", "PA", "LA", "RGBa") or "transparency" in image.info:
        # palettes without transparency take the same way
        image = image.convert("RGBA")
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        image = _to_srgb(image, profile)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    # it is upright sRGB, whoever reads it again
    image.info = {}
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says.

    ``ImageOps.exif_transpose`` writes all of the EXIF anew, which odd values in it make impossible.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS as error:
        warnings.warn(f"unreadable EXIF data were ignored: {one_line(error)}", stacklevel=3)
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    full_scale = 1.0 if image.mode == "F" else 65535.0
    if values.size and not (values.min() >= 0 and values.max() <= full_scale):
        raise ValueError(
            f"{image.mode}-mode values run from {values.min():g} to {values.max():g}, "
            f"expected 0 to {full_scale:g}: save the picture with 8 bits per channel"
        )
    scaled = np.empty(values.shape, dtype=np.uint8)
    # 256 rows at a time, because float64 takes eight bytes for each pixel
    for start in range(0, len(values), 256):
        rows = values[start : start + 256].astype(np.float64)
        scaled[start : start + 256] = np.rint(rows * (255.0 / full_scale))
    shown = Image.fromarray(scaled)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        # PNG names one value of 16 bits that is none
        shown.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return shown


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """In sRGB, from what its colour profile describes; as it was where that changes no shade."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert(image.mode.removesuffix("A"))
    try:
        to_srgb = ImageCms.buildTransform(
            BytesIO(profile), ImageCms.createProfile("sRGB"), image.mode, "RGB"
        )
    except ImageCms.PyCMSError as error:
        warnings.warn(f"an unusable colour profile was ignored: {error}", stacklevel=3)
    else:
        followed = image.mode == "CMYK" or _changes_shades(to_srgb, image.mode)
        image = to_srgb.apply(image) if followed else image
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _changes_shades(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform to RGB moves any shade of grey or of a primary by more than rounding.

    What a profile is called says little: one of linear light may have sRGB in its name.
    """
    ramp = np.arange(256, dtype=np.uint8)
    rows = np.zeros((4, 256, 3), dtype=np.uint8)
    rows[0] = ramp[:, None]
    for channel in range(3):
        rows[channel + 1, :, channel] = ramp
    shades = Image.fromarray(ramp[None] if mode == "L" else rows)
    before, after = (
        np.asarray(x, np.int16) for x in (shades.convert("RGB"), transform.apply(shades))
    )
    return bool(np.abs(after - before).max() > ROUNDING)


def check_pictures(pictures: Iterable[Picture]) -> list[str]:
    """Decode every picture once, those in memory too: a line for each that fails, and why."""
    problems: list[str] = []
    # a file may have a caption in each of many rows
    good: set[Path] = set()
    for picture in pictures:
        file = picture.image if isinstance(picture.image, Path) else None
        if file in good:
            object.__setattr__(picture, "_checked", True)
        if picture._checked:
            continue
        try:
            picture.load()
        except PictureError as error:
            problems.extend(error.problems)
        else:
            object.__setattr__(picture, "_checked", True)
            if file is not None:
                good.add(file)
    return problems


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
            caption = " ".join(_read_text(texts[0]).split())
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


def _read_text(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark first
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MimaError(f"{path} is not UTF-8 text (byte {error.start})") from error


_Rows = list[tuple[str, str, str]]


def _read_csv(path: Path) -> tuple[_Rows, list[str]]:
    """Rows as (place, file name, caption), and what is wrong with the others."""
    reader = csv.reader(StringIO(_read_text(path), newline=""), strict=True, skipinitialspace=True)
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
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
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


def digest(picture: Picture) -> str:
    """A picture's name in records: a hash of its size and pixels, whatever file they come from.

    Raises:
        PictureError: the picture cannot be read.
    """
    image = picture.load()
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def by_prompt(pictures: Sequence[Picture], limit: int | None) -> dict[str, list[Picture]]:
    """Pictures by prompt in order of appearance, thinned evenly to `limit` prompts."""
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.prompt, []).append(picture)
    kept = list(groups) if limit is None else spread(list(groups), limit)
    return {prompt: groups[prompt] for prompt in kept}


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
