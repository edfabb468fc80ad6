"""Pictures as people have them: every mode, rotation and kind of damage."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps
from support.concept_files import save

from mima.concepts.picture_folders import read_folder
from mima.concepts.pictures import Picture, PictureError, check_pictures, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def at(image: Image.Image, x: int = 0, y: int = 0):
    return image.getpixel((x, y))


LINEAR = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)


def _xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


D50 = (0.9642, 1, 0.8249)
PRIMARIES = {
    b"rXYZ": _xyz(0.43607, 0.22249, 0.01392),
    b"gXYZ": _xyz(0.38515, 0.71687, 0.09708),
    b"bXYZ": _xyz(0.14307, 0.06061, 0.7141),
}


def profile(space, called, parts):
    """A colour profile of version 2, of the ICC's specification."""
    name = called.encode() + b"\0"
    told = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    parts = {b"desc": told, b"cprt": b"text\0\0\0\0x\0", b"wtpt": _xyz(*D50)} | parts
    table, body, start = b"", b"", 132 + 12 * len(parts)
    for key, data in parts.items():
        data += bytes(-len(data) % 4)
        table += key + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">8xI4s4s4s", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", *(round(v * 65536) for v in D50))
    whole = header.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def test_exif_rotation_is_applied(tmp_path):
    # left half red, right half blue; orientation 6 says: turn a quarter clockwise to view
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / "a.png", exif=exif)
    loaded = Picture(tmp_path / "a.png", "x").load()
    assert loaded.size == (8, 16)
    assert at(loaded, 4, 2) == RED
    assert at(loaded, 4, 13) == BLUE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation, name):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        expected = ImageOps.exif_transpose(image)
    assert Picture(tmp_path / name, "x").load().tobytes() == expected.tobytes()
    assert (expected.size == (5, 7)) == (orientation > 4)


def exif_of(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of tags, each with its kind, count and up to four bytes, or eight for one."""
    start = 8 + 2 + 12 * len(tags) + 4
    fields = b"".join(
        struct.pack("<HHL", tag, kind, count)
        + (value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", start))
        for tag, kind, count, value in tags
    )
    end = b"".join(value for *_, value in tags if len(value) > 4)
    head = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(tags))
    return head + fields + struct.pack("<L", 0) + end


@pytest.mark.parametrize(
    "odd",
    [
        (0x11A, 2, 3, b"72\0"),
        (0x11A, 7, 8, b"abcdefgh"),
        (0x11A, 12, 1, struct.pack("<d", float("nan"))),
        (0x10F, 5, 1, struct.pack("<LL", 5, 6)),
        (0x100, 2, 3, b"ab\0"),
        (0x100, 9, 1, struct.pack("<l", -5)),
        (0x128, 2, 6, b"inches"),
        (0x111, 2, 6, b"strips"),
    ],
    ids=lambda tag: f"{tag[0]:#x}-of-kind-{tag[1]}",
)
def test_odd_values_of_exif_do_not_cost_the_picture_nor_its_rotation(tmp_path, odd):
    rotation = (ORIENTATION, 3, 1, struct.pack("<H", 6))
    save(tmp_path / "a.jpg", exif=exif_of(*sorted([odd, rotation])))
    assert Picture(tmp_path / "a.jpg", "x").load().size == (6, 8)


def test_exif_that_cannot_be_read_is_ignored_aloud():
    image = Image.new("RGB", (8, 6), RED)
    image.info["exif"] = b"Exif\0\0no header"
    with pytest.warns(UserWarning, match="unreadable EXIF data were ignored"):
        assert to_rgb(image).size == (8, 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff", quality=95)
    assert Picture(tmp_path / "a.jpg", "x").load().size == (8, 6)


def test_transparency_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    loaded = Picture(tmp_path / "a.png", "x").load()
    assert at(loaded, 0) == RED
    assert at(loaded, 1) == WHITE
    # 255 · (1 − 128/255) = 127
    assert at(loaded, 2) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
def test_every_mode_with_alpha(mode):
    if mode == "PA":
        image = Image.new("P", (2, 2))
        image.putalpha(0)
        assert image.mode == mode
    else:
        image = Image.new(mode, (2, 2), 0)
    assert at(to_rgb(image)) == WHITE


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    loaded = Picture(tmp_path / "a.png", "x").load()
    assert [at(loaded, 0), at(loaded, 1)] == [RED, WHITE]


def test_opaque_palette_and_bilevel():
    image = Image.new("P", (1, 1), 0)
    image.putpalette(list(GREEN))
    assert at(to_rgb(image)) == GREEN
    assert at(to_rgb(Image.new("1", (1, 1), 1))) == WHITE


def test_a_transparent_colour_without_a_palette(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png", transparency=RED)
    assert at(Picture(tmp_path / "a.png", "x").load()) == WHITE


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        loaded = Picture(tmp_path / name, "x").load()
        assert [at(loaded, x)[0] for x in range(4)] == [0, 1, 128, 255], name


def test_float_pictures_run_from_zero_to_one():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [at(to_rgb(image), x)[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("values", [[[0.0, 200.0]], [[-0.5, 0.5]], [[np.nan, 0.5]]])
def test_float_pictures_of_unknown_scale_are_refused(values):
    picture = Picture(Image.fromarray(np.array(values, dtype=np.float32)), "x")
    with pytest.raises(PictureError, match="expected 0 to 1"):
        picture.load()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    loaded = Picture(tmp_path / "a.jpg", "x").load()
    assert loaded.mode == "RGB"
    assert np.abs(np.subtract(at(loaded, 8, 8), RED)).max() <= 4


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces_give_the_same_colour(mode):
    rgb = Image.new("RGB", (2, 2), (200, 100, 50))
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = rgb.convert(mode)
    assert np.abs(np.subtract(at(to_rgb(image)), (200, 100, 50))).max() <= 3


def test_an_embedded_profile_is_followed():
    # sRGB with its red and blue primaries swapped, under another name
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp.", 1).replace(b"bXYZ", b"rXYZ", 1)
    profile = profile.replace(b"tmp.", b"bXYZ", 1).replace("sRGB".encode("utf-16-be"), b"\0x" * 4)
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    image.info["icc_profile"] = profile
    assert np.abs(np.subtract(at(to_rgb(image)), (50, 100, 200))).max() <= 2


def test_an_srgb_profile_changes_nothing():
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert at(to_rgb(image)) == (200, 100, 50)


def test_an_unusable_profile_is_ignored_aloud():
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    image.info["icc_profile"] = b"not a profile"
    with pytest.warns(UserWarning, match="colour profile"):
        assert at(to_rgb(image)) == (200, 100, 50)


def test_the_original_is_left_alone():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    to_rgb(image)
    assert image.mode == "RGBA"
    assert at(image) == (0, 0, 0, 0)


def test_every_bad_file_is_named(tmp_path):
    save(tmp_path / "good.png")
    data = (save(tmp_path / "whole.jpg", size=(64, 64))).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    names = ["good.png", "cut.jpg", "empty.png", "text.png", "folder.png", "absent.png"]
    problems = check_pictures(Picture(tmp_path / name, "x") for name in names)
    assert len(problems) == 5
    for name, reason in [
        ("cut.jpg", "damaged"),
        ("empty.png", "empty"),
        ("text.png", "not a picture"),
        ("folder.png", "is a folder"),
        ("absent.png", "no such file"),
    ]:
        assert [line for line in problems if name in line and reason in line], (name, problems)


def test_a_link_to_nowhere_is_a_picture_that_is_missing(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "elsewhere.png")
    (problem,) = check_pictures(read_folder(tmp_path, "x"))
    assert "lost.png: no such file" in problem


def _encoded(suffix: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=suffix)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@given(data=st.data())
def test_damage_gives_a_picture_or_a_picture_error(suffix, data, tmp_path_factory):
    whole = _encoded(suffix)
    cut = data.draw(st.integers(0, len(whole)))
    flip = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255))
    damaged = bytearray(whole)
    damaged[flip] = value
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix.lower()}"
    path.write_bytes(bytes(damaged[:cut]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Picture(path, "x")
        # anything but PictureError fails the test
        if not check_pictures([picture]):
            assert picture.load().mode == "RGB"


@pytest.mark.parametrize("image", [3, None, b"x"])
def test_a_picture_is_a_path_or_a_pil_image(image):
    with pytest.raises(TypeError, match="path or a PIL image"):
        Picture(image, "x")
    with pytest.raises(TypeError, match="prompt must be a string"):
        Picture(Path("a.png"), image)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        _encoded("DDS"),
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + bytes(200),
    ],
    ids=["PostScript", "DDS", "AVIF"],
)
def test_other_formats_are_no_pictures_whatever_their_name(tmp_path, data):
    (tmp_path / "cat.png").write_bytes(data)
    with pytest.raises(PictureError, match=r"cat\.png: not a picture in a known format"):
        Picture(tmp_path / "cat.png", "a cat").load()


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (9000, 8000)).save(tmp_path / "cat.png")
    with pytest.raises(PictureError, match="over 64 million pixels"):
        Picture(tmp_path / "cat.png", "a cat").load()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "cat.png")
    with pytest.raises(PictureError, match="no ordinary file"):
        Picture(tmp_path / "cat.png", "a cat").load()


def test_a_picture_that_was_read_is_not_turned_again(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    read = Picture(tmp_path / "a.jpg", "x").load()
    assert read.size == Picture(read, "x").load().size == (20, 40)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_grey_is_followed(mode):
    image = Image.new(mode, (4, 4), 55 if mode == "L" else (55, 255))
    image.info["icc_profile"] = profile(b"GRAY", "grey in linear light", {b"kTRC": LINEAR})
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [128, 128, 128]


def test_linear_light_is_no_srgb_whatever_it_is_called():
    image = Image.new("RGB", (4, 4), (55, 55, 55))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), LINEAR)
    image.info["icc_profile"] = profile(b"RGB ", "Linear sRGB", PRIMARIES | curves)
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [128, 128, 128]


def test_a_transparent_value_of_sixteen_bits_is_white():
    image = Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))
    image.info["transparency"] = 1000
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255, 255]
