"""Pictures on disk and their captions: metadata, text files, names and links."""

from __future__ import annotations

import unicodedata

import pytest
from PIL import Image
from support.concept_files import save

from mima.concepts.picture_folders import picture_files, read_folder
from mima.errors import MimaError, ProblemList


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
    assert picture.load().getpixel((0, 0))[0] > 250


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


def test_pictures_called_like_companions_are_pictures(tmp_path):
    for name in ("notice.png", "authors.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "LICENSE.html").write_text("x")
    assert [path.name for path in picture_files(tmp_path)] == ["authors.jpg", "notice.png"]


def test_captions_are_found_however_their_accents_are_encoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / unicodedata.normalize("NFD", "é.png"))
    (tmp_path / unicodedata.normalize("NFC", "é.txt")).write_text("an accent")
    assert [picture.prompt for picture in read_folder(tmp_path, "a prompt")] == ["an accent"]
