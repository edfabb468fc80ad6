"""Pictures that were saved anew are found, and different ones are told apart."""

import io
from collections.abc import Callable

import pytest
from PIL import Image, ImageOps

from mima.assets import assets
from mima.concepts.near_duplicates import SIGNATURE_LENGTH, nearly_the_same, signature
from mima.concepts.pictures import Picture, digest


@pytest.fixture(scope="module")
def embedded() -> dict[str, Picture]:
    """The pictures of all embedded concepts, by their names."""
    folder = assets() / "concepts"
    files = sorted(folder.rglob("*.png"))
    assert len(files) > 150
    return {str(file.relative_to(folder)): Picture(file, "") for file in files}


def by_jpeg(image: Image.Image, quality: int = 70) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def smaller(image: Image.Image) -> Image.Image:
    return image.resize([round(0.75 * side) for side in image.size], Image.Resampling.BICUBIC)


def and_back(image: Image.Image) -> Image.Image:
    return smaller(image).resize(image.size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((1, 1, width - 1, height - 1))


def at_the_left(image: Image.Image) -> Image.Image:
    return image.crop((1, 0, *image.size))


def all_at_once(image: Image.Image) -> Image.Image:
    return by_jpeg(cropped(ImageOps.mirror(image)))


@pytest.mark.parametrize(
    "change", [by_jpeg, smaller, and_back, ImageOps.mirror, cropped, at_the_left, all_at_once]
)
def test_a_copy_is_nearly_the_same_picture(
    change: Callable[[Image.Image], Image.Image], embedded: dict[str, Picture]
):
    for name, picture in embedded.items():
        copy = Picture(change(picture.load()), "")
        assert nearly_the_same([copy], [signature(picture)]) == [True], name


def test_a_picture_is_nearly_the_same_as_what_was_cut_from_it(embedded: dict[str, Picture]):
    for name, picture in embedded.items():
        copy = Picture(at_the_left(picture.load()), "")
        assert nearly_the_same([picture], [signature(copy)]) == [True], name


def test_different_pictures_are_not(embedded: dict[str, Picture]):
    """An object in two styles of one set is two pictures; copies moved by some pixels are one."""
    digests = {name: digest(picture) for name, picture in embedded.items()}
    signatures = {name: signature(picture) for name, picture in embedded.items()}
    for name, picture in embedded.items():
        others = [
            signatures[other]
            for other in embedded
            if digests[other] != digests[name]
            and other.replace("-moved", "") != name.replace("-moved", "")
        ]
        assert len(others) > 150
        assert nearly_the_same([picture], others) == [False], name


def test_a_signature_is_short_and_of_any_picture():
    white, tall = Image.new("RGB", (300, 200), "white"), Image.new("L", (1, 500), 7)
    for image in (white, tall):
        picture = Picture(image, "")
        assert len(signature(picture)) == SIGNATURE_LENGTH
        assert nearly_the_same([picture], [signature(picture)]) == [True]
    answers = nearly_the_same(
        [Picture(image, "") for image in (white, tall)], [signature(Picture(white, ""))]
    )
    assert answers == [True, False]
    assert nearly_the_same([Picture(white, "")], []) == [False]


def test_little_contrast_makes_no_two_pictures_the_same():
    """Two faint drawings differ by less than what JPEG does to strong ones."""
    drawn = []
    for box in ((8, 8, 24, 24), (40, 40, 56, 56)):
        image = Image.new("RGB", (64, 64), "white")
        image.paste((235, 235, 235), box)
        drawn.append(Picture(image, ""))
    first, second = drawn
    assert nearly_the_same([first, second], [signature(first)]) == [True, False]


def test_another_colour_is_another_picture():
    red, blue = (Picture(Image.new("RGB", (64, 64), c), "") for c in ((200, 60, 60), (90, 90, 200)))
    assert nearly_the_same([red, blue], [signature(red)]) == [True, False]
