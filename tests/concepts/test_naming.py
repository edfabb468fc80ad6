"""A concept's name within captions: left out, and put in another's place."""

from __future__ import annotations

import pytest
from support import tiny
from support.concept_files import pictures

from mima.concepts import Concept
from mima.concepts.naming import with_word, without_name


def test_a_name_is_a_word(tmp_path):
    folder = pictures(tmp_path / "p", "a.png", "b.png")
    (folder / "a.txt").write_text("a cartoon of a card")
    (folder / "b.txt").write_text("two Cars")
    learnt = Concept("cartoon", "a cartoon", folder)
    left = learnt.without([Concept("car", "a car", pictures(tmp_path / "car"))])
    assert [picture.prompt for picture in left.images] == ["a cartoon of a card"]
    castle = Concept("castle", "a <new1> castle", folder.parent / "car", token="<new1>")
    assert with_word("photo of a <new1> castle", castle, "sks") == "photo of a sks"
    assert with_word("<new1>, a castle", castle, "sks") == "sks, a sks"


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("mono style", "an umbrella emoji in mono style", "an umbrella emoji"),
        ("hamburger", "a hamburger emoji in noto style", "a emoji in noto style"),
        ("cat", "a photo of a cat", "a photo"),
        ("cat", "a photo of a cat in snow", "a photo in snow"),
        ("cat", "cat", "an animal"),
        ("car", "a scar on a cartoon of cars", "a scar on a cartoon"),
        ("猫", "一只猫的照片", "一只的照片"),
        ("<new1>", "a photo of a <new1>", "a photo"),
    ],
)
def test_captions_without_the_name(name, caption, expected):
    concept = Concept(name, caption, tiny.picture("red", "round"), class_prompt="an animal")
    assert without_name(caption, concept) == expected
