"""A concept's name within captions: left out, and put in another's place."""

from __future__ import annotations

import unicodedata

import pytest
from support import tiny
from support.concept_files import pictures

from mima.concepts import Concept, embedded_concepts
from mima.concepts.naming import names, names_of, with_word, without_name


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
    assert with_word("desks and masks", castle, "sks") == "sks, desks and masks"


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("mono style", "an umbrella emoji in mono style", "an umbrella emoji"),
        ("hamburger", "a hamburger emoji in noto style", "a emoji in noto style"),
        ("cat", "a photo of a cat", "a photo"),
        ("cat", "a photo of a cat in snow", "a photo in snow"),
        ("cat", "cat", "an animal"),
        ("cat", "a picture of the cat, red", "a picture, red"),
        ("cat", "a cat and a dog on a cat", "a dog"),
        ("mono", "art by a mono", "art"),
        ("mono style", "a fox, mono style", "a fox"),
        ("mono style", "mono-style fox", "fox"),
        ("mono-style", "a fox in mono_style", "a fox"),
        ("car", "a scar on a cartoon of cars", "a scar on a cartoon"),
        ("猫", "一只猫的照片", "一只的照片"),
        ("猫", "赤い猫の写真", "赤いの写真"),
        ("<new1>", "a photo of a <new1>", "a photo"),
    ],
)
def test_captions_without_the_name(name, caption, expected):
    concept = Concept(name, caption, tiny.picture("red", "round"), class_prompt="an animal")
    assert without_name(caption, concept) == expected


@pytest.mark.parametrize(
    ("name", "caption", "found"),
    [
        ("猫", "赤い猫の写真", True),
        ("고양이", "고양이가 잔다", True),
        ("cat", "赤いcatの写真", True),
        ("Beyoncé", "a photo of beyoncé on stage", True),
        ("caf", "a café", False),
        ("кот", "котёл", False),
        ("mono style", "a fox in mono_style", True),
        ("c++", "a c++ logo", True),
    ],
)
def test_names_in_all_scripts_and_spellings(name, caption, found):
    for form in ("NFC", "NFD"):
        assert names(unicodedata.normalize(form, caption), name) == found
        assert names(caption, unicodedata.normalize(form, name)) == found


@pytest.mark.parametrize("concept", embedded_concepts(), ids=lambda concept: concept.name)
def test_published_captions_without_names(concept):
    """What `captions: without_name` was when what is published was measured."""
    (name,) = names_of(concept)
    for picture in (*concept.images, *concept.held_out, *concept.class_images):
        caption = picture.prompt.replace(f" in {name}", "").replace(f"{name} ", "")
        assert without_name(picture.prompt, concept) == caption
