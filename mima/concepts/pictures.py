"""A picture and the prompt that describes it.

Every picture becomes 8-bit sRGB, upright, on white. What cannot be read is named, all at once.
"""

from __future__ import annotations

import hashlib
import math
import struct
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from mima.errors import ProblemList, one_line

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
