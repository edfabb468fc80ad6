import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from mima.errors import MimaError
from mima.evaluation.preprocessing import Preprocessor

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def test_preprocessing_by_hand():
    settings = {
        "size": {"shortest_edge": 4},
        "do_center_crop": True,
        "crop_size": {"height": 4, "width": 4},
        "image_mean": MEAN,
        "image_std": STD,
    }
    # twice as wide as high: the middle half survives
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = [255, 128, 0]
    out = Preprocessor(settings)([Image.fromarray(pixels)])
    assert out.shape == (1, 3, 4, 4)
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand(1, 3, 4, 4))


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("size", [(32, 32), (61, 40), (20, 33)], ids=str)
def test_preprocessing_agrees_with_transformers(kind, size, tmp_path):
    from transformers import AutoImageProcessor

    folder = tiny.save_tiny_clip(tmp_path) if kind == "clip" else tiny.save_tiny_dino(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    # smooth, so that only the resize filters' rounding differs
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = np.stack([np.sin(rows / 9), np.cos(columns / 7), np.sin((rows + columns) / 11)], -1)
    image = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    ours = Preprocessor(settings)([image])
    reference = theirs(images=image, return_tensors="pt")["pixel_values"]
    # one grey level is 1/255 over a standard deviation of at least 0.26
    torch.testing.assert_close(ours, reference, rtol=0, atol=3 / 255 / 0.26)


def test_settings_that_are_not_understood_are_named():
    with pytest.raises(MimaError, match=r"size .* not understood"):
        Preprocessor({"size": {"longest_edge": 5}})
    with pytest.raises(MimaError, match="image_mean"):
        Preprocessor({"size": 5})
