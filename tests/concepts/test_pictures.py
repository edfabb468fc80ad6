"""Pictures as people have them: every mode, rotation and kind of damage."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from mima.concepts.pictures import (
    Picture,
    PictureError,
    check_pictures,
    picture_files,
    read_folder,
    to_rgb,
)
from mima.errors import MimaError, ProblemList

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def save(path: Path, color=RED, size=(8, 6), **options) -> Path:
    Image.new("RGB", size, color).save(path, **options)
    return path


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


# captions


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
@pytest.mark.parametrize("name", ["a.png", "x.jpg!Large.jpg", "a (1).png", "IMG_1.PNG", "ä b.jpeg"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata(tmp_path, name, column, kind):
    save(tmp_path / name)
    prompt = 'a "red", flat square'
    if kind == "csv":
        quoted = prompt.replace('"', '""')
        content = f'file_name,{column}\n{name},"{quoted}"\n'
    else:
        content = f'{{"file_name": "{name}", "{column}": "a \\"red\\", flat square"}}\n\n'
    (tmp_path / f"metadata.{kind}").write_text(content, encoding="utf-8")
    (picture,) = read_folder(tmp_path)
    assert picture.prompt == prompt
    assert at(picture.load())[0] > 250


def test_metadata_as_spreadsheets_write_it(tmp_path):
    save(tmp_path / "a.png")
    content = '﻿File_Name, Text ,note\r\na.png, "one, two",\r\n,,\r\n'
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    (picture,) = read_folder(tmp_path)
    assert picture.prompt == "one, two"


def test_metadata_may_name_files_in_sub_folders_and_keeps_its_order(tmp_path):
    (tmp_path / "b").mkdir()
    save(tmp_path / "b" / "z.png")
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb/z.png,last\na.png,first\n")
    assert [picture.prompt for picture in read_folder(tmp_path)] == ["last", "first"]


def test_all_problems_of_metadata_come_at_once(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\na.png,one, two\nb.png,\ngone.png,three\n,four\n"
    )
    with pytest.raises(ProblemList) as caught:
        read_folder(tmp_path)
    message = str(caught.value)
    for part in (
        "line 2: 3 fields where the header has 2",
        "line 3: b.png has no text",
        "line 4: gone.png is not in",
        "line 5: file_name is ''",
        "c.png has no row",
    ):
        assert part in message, message


def test_all_problems_of_jsonl_come_at_once(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": 3}\n{"file_name": "a.png"}\n[1]\n{oops\n'
    )
    with pytest.raises(ProblemList) as caught:
        read_folder(tmp_path)
    message = str(caught.value)
    for part in (
        "line 1: a.png has no text",
        "line 2: metadata.jsonl needs the columns",
        "line 3: expected an object, got list",
        "line 4: not JSON",
    ):
        assert part in message, message


def test_a_hundred_problems_are_told_and_the_others_counted(tmp_path):
    save(tmp_path / "a.png")
    rows = "".join(f"{n}.png,x\n" for n in range(250))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,x\n{rows}")
    with pytest.raises(ProblemList) as caught:
        read_folder(tmp_path)
    assert len(caught.value.problems) == 250
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (102, "  and 150 more")


def test_links_in_a_circle_are_pictures_that_are_missing(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("c")
    (tmp_path / "c").symlink_to("b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,x\nc,x\n")
    pictures = "line 3: b.png is not in", "line 4: c is not in"
    with pytest.raises(ProblemList) as caught:
        read_folder(tmp_path)
    assert all(part in str(caught.value) for part in pictures)


def test_a_picture_may_be_named_by_a_link_to_it(tmp_path):
    (tmp_path / "there").mkdir()
    save(tmp_path / "there" / "a.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "b.png").symlink_to(tmp_path / "there" / "a.png")
    (tmp_path / "here" / "metadata.csv").write_text("file_name,text\n../there/a.png,x\n")
    assert [picture.prompt for picture in read_folder(tmp_path / "here")] == ["x"]


@pytest.mark.parametrize("header", ["name,text", "file_name,words", ""])
def test_metadata_without_the_columns(tmp_path, header):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(header + "\na.png,x\n")
    with pytest.raises(MimaError, match="needs the columns file_name and one of text"):
        read_folder(tmp_path)


def test_metadata_that_is_not_utf8(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,Käse\n".encode("latin-1"))
    with pytest.raises(MimaError, match="not UTF-8"):
        read_folder(tmp_path)


def test_two_metadata_files(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    with pytest.raises(MimaError, match="keep one"):
        read_folder(tmp_path)


def test_text_files_beside_pictures(tmp_path):
    for name in ("x.jpg!Large.jpg", "a (1).png", "b.png"):
        save(tmp_path / name)
    (tmp_path / "x.jpg!Large.txt").write_text("from the stem\n")
    (tmp_path / "a (1).png.txt").write_text("from the\nwhole name\n")
    captions = {picture.image.name: picture.prompt for picture in read_folder(tmp_path, "default")}
    assert captions == {
        "x.jpg!Large.jpg": "from the stem",
        "a (1).png": "from the whole name",
        "b.png": "default",
    }


def test_captions_are_found_whatever_the_case_of_their_names(tmp_path):
    for name in ("a.png", "b.PNG", "C.png", "d.png", "e.png"):
        save(tmp_path / name)
    for name in ("a.TXT", "b.png.Txt", "c.caption", "d.txt", "d.caption", "E.txt", "e.txt"):
        (tmp_path / name).write_text(f"from {name}")
    captions = {picture.image.name: picture.prompt for picture in read_folder(tmp_path, "default")}
    assert captions == {
        "a.png": "from a.TXT",
        "b.PNG": "from b.png.Txt",
        "C.png": "from c.caption",
        "d.png": "from d.txt",
        "e.png": "from e.txt",
    }
    (tmp_path / "a.Txt").write_text("another")
    with pytest.raises(ProblemList, match=r"a\.png has a\.TXT and a\.Txt"):
        read_folder(tmp_path, "default")


@pytest.mark.parametrize("name", ["Metadata.csv", "METADATA.CSV"])
def test_metadata_is_found_whatever_the_case_of_its_name(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_text("file_name,text\na.png,mine\n")
    assert [picture.prompt for picture in read_folder(tmp_path, "default")] == ["mine"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,other\n")
    with pytest.raises(MimaError, match=f"{name} and metadata.csv: keep one"):
        read_folder(tmp_path, "default")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,Text\na.png,x,y\n")
    with pytest.raises(MimaError, match=r"metadata\.csv: the column 'text' stands twice"):
        read_folder(tmp_path)
    # spreadsheets leave columns without a name
    (tmp_path / "metadata.csv").write_text("file_name,text,,\na.png,x,,\n")
    assert [picture.prompt for picture in read_folder(tmp_path)] == ["x"]


def test_pictures_without_captions(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ProblemList) as caught:
        read_folder(tmp_path)
    assert caught.value.problems == ("a.png has no caption", "b.txt is empty")


def test_companions_and_hidden_files_are_no_pictures(tmp_path):
    save(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "README.md", "LICENSE", "LICENSE.txt", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "inner").mkdir()
    assert [picture.image.name for picture in read_folder(tmp_path, "x")] == ["a.png"]


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(MimaError, match="does not exist"):
        read_folder(tmp_path / "absent", "x")
    with pytest.raises(MimaError, match="is not a folder"):
        read_folder(save(tmp_path / "a.png"), "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MimaError, match="holds no pictures"):
        read_folder(tmp_path / "empty", "x")


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


def test_pictures_called_like_companions_are_pictures(tmp_path):
    for name in ("notice.png", "authors.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "LICENSE.html").write_text("x")
    assert [path.name for path in picture_files(tmp_path)] == ["authors.jpg", "notice.png"]


def test_captions_are_found_however_their_accents_are_encoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / unicodedata.normalize("NFD", "é.png"))
    (tmp_path / unicodedata.normalize("NFC", "é.txt")).write_text("an accent")
    assert [picture.prompt for picture in read_folder(tmp_path, "a prompt")] == ["an accent"]
