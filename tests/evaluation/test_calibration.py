"""A judge on pictures whose subject is known."""

import dataclasses

import numpy as np
import pytest
import torch
from support import tiny

from mima.concepts.reading import load_concepts
from mima.errors import MimaError
from mima.evaluation import load_encoder
from mima.evaluation.calibration import Calibration, calibrate


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


def test_margins_are_to_the_best_wrong_picture_and_to_the_mean():
    one = Calibration(concept="a", right=0.8, others={"b": 0.6, "c": 0.2}, noise=0.1, grey=0.3)
    assert one.margin == pytest.approx(0.2)
    assert one.mean_margin == pytest.approx(0.4)


def test_the_embedded_judge():
    """What the shipped encoder reaches, less a little: it is weak on twemoji and on fluent."""
    names = ["tiger", "penguin", "style-mono", "style-fluent", "benign-style-twemoji"]
    found = {one.concept: one for one in calibrate(load_encoder("embedded"), load_concepts(names))}
    assert {name for name, one in found.items() if one.mean_margin > 0.2} == {
        "tiger", "penguin", "mono style",
    }  # fmt: skip
    for one in found.values():
        assert one.right > max(one.noise, one.grey) + 0.05
        assert one.mean_margin > 0
