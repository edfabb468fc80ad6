"""Pictures as squares: the middle of what is long, without scaling all of it."""

import torch
from PIL import Image

from mima.concepts import Picture
from mima.training.loss import LONGEST_STRIP, pixels, places


def test_of_a_long_strip_the_middle_is_read(monkeypatch):
    strip = Image.new("RGB", (3 * 9999, 3), "white")
    strip.paste("red", (3 * 4999, 0, 3 * 5000, 3))
    scaled = []
    resize = Image.Image.resize

    def count(self, size, *rest):
        scaled.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", count)
    square = pixels([Picture(strip, "a strip")], 30)
    ((width, height),) = scaled
    assert width <= 30 * (LONGEST_STRIP + 1)
    assert height == 30
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1)
    assert torch.allclose(square[..., 15], red.expand(1, 3, 30), atol=0.05)
    # where it lies in the whole, of which conditions tell
    assert places([Picture(strip, "a strip")], 30).tolist() == [[3, 29997, 0, 149970]]


def test_ordinary_pictures_are_scaled_as_a_whole():
    picture = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    scaled = picture.resize((40, 30), Image.Resampling.LANCZOS).crop((5, 0, 35, 30))
    assert torch.equal(
        pixels([Picture(picture, "a picture")], 30), pixels([Picture(scaled, "the square")], 30)
    )
