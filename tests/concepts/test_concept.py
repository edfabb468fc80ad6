"""Concepts made in Python and embedded ones; what is left of one beside others."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, replace

import pytest
from PIL import Image
from support.concept_files import pictures

from mima.concepts import (
    Concept,
    Picture,
    PictureError,
    embedded_concept,
    embedded_concepts,
    embedded_names,
)
from mima.concepts.concept import learnable
from mima.concepts.reading import load_concepts
from mima.errors import MimaError


def test_pictures_in_every_form(tmp_path):
    folder = pictures(tmp_path / "cat")
    image = Image.new("RGB", (4, 4))
    forms = {
        "folder": (folder, 2),
        "text": (str(folder), 2),
        "file": (folder / "0.png", 1),
        "image": (image, 1),
        "files": ([folder / "0.png", str(folder / "1.png")], 2),
        "images": ([image, image], 2),
        "pictures": ((Picture(image, "own"), folder / "0.png"), 2),
        "mapping": ([{"file_name": str(folder / "0.png"), "caption": "own"}], 1),
    }
    for form, (source, count) in forms.items():
        concept = Concept("cat", "a cat", source, held_out=source)
        assert len(concept.images) == len(concept.held_out) == count, form
        assert all(picture.load().mode == "RGB" for picture in concept.images)
        own = form in ("pictures", "mapping")
        assert concept.images[0].prompt == ("own" if own else "a cat"), form


def test_a_concept_is_a_frozen_value_that_can_be_varied(tmp_path):
    concept = Concept("cat", "a cat", pictures(tmp_path / "cat"))
    with pytest.raises(FrozenInstanceError):
        concept.name = "dog"
    renamed = replace(concept, name="dog")
    assert (renamed.name, renamed.images) == ("dog", concept.images)
    assert replace(renamed, name="cat") == concept


def test_class_images_take_the_class_prompt(tmp_path):
    folder = pictures(tmp_path / "animals")
    concept = Concept("cat", "a cat", folder, class_prompt="an animal", class_images=folder)
    assert {picture.prompt for picture in concept.class_images} == {"an animal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "name is empty"),
        ({"name": "a\rcat"}, r"concept 'a\\rcat': its name holds a control character"),
        ({"prompt": " "}, "no caption|prompt is empty|lack captions"),
        ({"images": ()}, "no pictures"),
        ({"images": "absent"}, "no such file"),
        ({"kind": "styel"}, "did you mean 'style'"),
        ({"token": "<new1>"}, "does not contain the token '<new1>'"),
        ({"token": ""}, "token is empty"),
    ],
)
def test_bad_concepts(tmp_path, change, message):
    good = {"name": "cat", "prompt": "a cat", "images": pictures(tmp_path / "cat")}
    with pytest.raises(MimaError, match=message):
        Concept(**{**good, **change})


def test_wrong_types(tmp_path):
    folder = pictures(tmp_path / "cat")
    with pytest.raises(TypeError, match="prompt must be a string"):
        Concept("cat", 3, folder)
    with pytest.raises(TypeError, match="pictures must be"):
        Concept("cat", "a cat", 3)
    with pytest.raises(TypeError, match="path or a PIL image"):
        Concept("cat", "a cat", [3])


def test_texts_that_utf8_cannot_write_are_refused_before_anything_is_trained(tmp_path):
    folder = pictures(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(MimaError, match=r"name 'caf\\udce9' cannot .* give the concept a name"):
        Concept.from_folder(folder, prompt="a cat")
    assert Concept.from_folder(folder, name="cafe", prompt="a cat").name == "cafe"
    with pytest.raises(MimaError, match=r"prompt 'a .* cannot be written as UTF-8"):
        Concept("cat", "a \udce9", folder)
    with pytest.raises(MimaError, match=r"the caption .* of '.*0\.png' cannot be written"):
        Concept("cat", "a cat", [Picture(folder / "0.png", "a \ud800")])


def test_captions_must_say_the_token(tmp_path):
    folder = pictures(tmp_path / "cat", "a.png", "b.png")
    (folder / "b.txt").write_text("a plain castle")
    with pytest.raises(MimaError, match=r"1 captions do not contain .* 'a plain castle'"):
        Concept("castle", "a <new1> castle", folder, token="<new1>")


def test_every_unreadable_picture_is_in_one_error(tmp_path):
    folder = pictures(tmp_path / "cat", "good.png")
    (folder / "bad.png").write_text("x")
    held_out = pictures(tmp_path / "more")
    (held_out / "worse.pdf").write_bytes(b"%PDF")
    with pytest.raises(PictureError, match="2 pictures cannot be read") as caught:
        Concept("cat", "a cat", folder, held_out=held_out)
    assert "bad.png" in str(caught.value)
    assert "worse.pdf" in str(caught.value)


def test_embedded_concepts():
    found = embedded_concepts()
    assert len(found) == len(embedded_names()) >= 18
    kinds = [concept.kind for concept in found]
    assert kinds.count("object") >= 6
    assert kinds.count("style") >= 2
    assert kinds.count("instance") >= 4
    assert kinds.count("benign") >= 6
    for concept in found:
        assert concept.images, concept.name
        assert concept.held_out, concept.name
        assert concept.class_prompt, concept.name
    assert load_concepts(embedded_names()[0]) == [found[0]]


def test_an_unknown_embedded_concept():
    name = embedded_names()[0]
    with pytest.raises(MimaError, match=f"did you mean '{name}'"):
        embedded_concept(name + "x")


def test_a_concept_is_freed_of_pictures_that_show_another() -> None:
    fox, mono = embedded_concept("unseen-fox"), embedded_concept("style-mono")
    left = fox.without([mono])
    assert [p.prompt for p in left.images] == [
        p.prompt for p in fox.images if "mono style" not in p.prompt
    ]
    assert 0 < len(left.images) < len(fox.images)
    assert left.held_out == fox.held_out
    assert fox.without([embedded_concept("tiger")]) is fox
    with pytest.raises(MimaError, match="every picture's caption names one of: mono style"):
        mono.without([mono])


def test_what_must_stay_learnable_is_freed_of_targets_aloud(tmp_path, caplog):
    folder = pictures(tmp_path / "tiger", "a.png", "b.png")
    (folder / "a.txt").write_text("a tiger in mono style")
    (folder / "b.txt").write_text("a tiger")
    style = Concept("mono style", "mono style", pictures(tmp_path / "style"), kind="style")
    (tiger,) = learnable([Concept("tiger", "a tiger", folder)], [style])
    assert [picture.prompt for picture in tiger.images] == ["a tiger"]
    assert "concept 'tiger': 1 of its 2 pictures are left out" in caplog.text
    # where nothing would be left, it stays as it is
    black = Concept("black cat", "a black cat", pictures(tmp_path / "black"))
    assert learnable([black], [Concept("cat", "a cat", folder)]) == [black]
    assert "every picture's caption names one of: cat" in caplog.text
