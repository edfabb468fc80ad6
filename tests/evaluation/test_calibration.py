"""A judge on pictures whose subject is known."""

import dataclasses
from statistics import fmean

import numpy as np
import pytest
import torch
from support import tiny

from mima.concepts import Picture
from mima.concepts.concept import embedded_names
from mima.concepts.reading import load_concepts
from mima.errors import MimaError
from mima.evaluation import TextImageEncoder, load_encoder
from mima.evaluation.calibration import Calibrated, calibrate


class Redness:
    """Cosine with the share of red among the colours, which can be worked out by hand."""

    name = "redness"

    def embed(self, images):
        means = [
            255 - np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) for image in images
        ]
        return torch.nn.functional.normalize(torch.tensor(np.stack(means)) + 1e-6, dim=-1)


def test_a_judge_of_colours_tells_colours_apart():
    red, blue = tiny.concept("red"), tiny.concept("blue")
    judge = Redness()
    found = calibrate(judge, [red, blue])
    assert [one.concept for one in found] == [red.name, blue.name]
    images = judge.embed([picture.load() for picture in blue.images])
    references = judge.embed([picture.load() for picture in red.held_out])
    assert found[0].others == {blue.name: pytest.approx((images @ references.T).mean().item())}
    assert found[0].right == pytest.approx(1, abs=1e-4)
    assert found[0].margin < found[0].right - found[0].others[blue.name] + 1e-6
    with pytest.raises(MimaError, match="no held_out pictures"):
        calibrate(judge, [dataclasses.replace(red, held_out=())])


def test_margins_are_to_the_best_wrong_picture():
    one = Calibrated(concept="a", right=0.8, others={"b": 0.6, "c": 0.2}, noise=0.1, grey=0.3)
    assert one.margin == pytest.approx(0.2)


def test_pictures_that_show_the_concept_are_no_wrong_ones():
    """A caption that names the concept takes its picture out of the other concept's."""
    red, blue = tiny.concept("red"), tiny.concept("blue")
    judge = Redness()
    both = dataclasses.replace(blue.images[0], prompt=f"a blue and {red.name.upper()} square")
    mixed = dataclasses.replace(blue, images=(both, *blue.images[1:]))
    assert calibrate(judge, [red, mixed])[0].others == {
        blue.name: calibrate(judge, [red, dataclasses.replace(blue, images=blue.images[1:])])[
            0
        ].others[blue.name]
    }
    only = dataclasses.replace(blue, images=(both,))
    found = calibrate(judge, [red, only])[0]
    assert found.others == {}
    assert found.margin == pytest.approx(found.right - max(found.noise, found.grey))


def test_a_concept_whose_name_is_part_of_a_word_is_a_wrong_one():
    red, blue = tiny.concept("red"), tiny.concept("blue")
    cat = dataclasses.replace(red, name="cat")
    images = [dataclasses.replace(picture, prompt="a caterpillar") for picture in blue.images]
    caterpillar = dataclasses.replace(blue, name="caterpillar", images=tuple(images))
    assert set(calibrate(Redness(), [cat, caterpillar])[0].others) == {"caterpillar"}


class Counting(Redness):
    """Remembers how many pictures came at once, and how large they were."""

    def __init__(self):
        self.counts, self.sides = [], []

    def embed(self, images):
        self.counts.append(len(images))
        self.sides += [max(image.size) for image in images]
        return super().embed(images)


def test_photographs_are_looked_at_a_few_at_a_time_and_noise_stays_noise():
    """Scaled down from a photograph's size, noise at every pixel would be a grey picture."""
    photo = tiny.picture("red", "round", size=700)
    many = (Picture(photo, "a red emoji"),) * 70
    red = dataclasses.replace(tiny.concept("red"), images=many)
    judge = Counting()
    calibrate(judge, [red])
    assert max(judge.counts) == 64
    assert judge.sides.count(700) == 70
    assert judge.sides.count(512) == 16 + 4


# the judge takes its twemoji picture for something else, and flat pictures for twemoji ones
BELOW = {"pizza": 0.18, "twemoji style": 0.19}


def test_the_embedded_judge():
    """The judge tells every embedded concept from all others, by references that it never saw."""
    concepts = load_concepts(embedded_names())
    found = calibrate(load_encoder("embedded"), concepts)
    assert len(found) == 19
    margins = {one.concept: one.margin for one in found}
    assert {name for name, margin in margins.items() if margin < 0.25} == set(BELOW)
    for name, reached in BELOW.items():
        assert margins[name] > reached
    for one in found:
        assert one.right > max(one.noise, one.grey, fmean(one.others.values())) + 0.25
        assert abs(one.noise) < 0.1


def test_the_second_embedded_judge():
    """It is of another kind, and weaker: on average over other concepts it is right, too."""
    names = ["tiger", "penguin", "style-mono", "style-fluent", "benign-style-twemoji"]
    judge = load_encoder("embedded-clip")
    assert isinstance(judge, TextImageEncoder)
    for one in calibrate(judge, load_concepts(names)):
        assert one.right > max(one.noise, one.grey) + 0.05
        assert one.right > np.mean(list(one.others.values()))
