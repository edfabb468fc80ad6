"""The embedded judge: what it describes pictures by, and its file."""

import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mima.assets import assets
from mima.concepts import embedded_concept
from mima.errors import MimaError
from mima.evaluation import discriminants, load_encoder
from mima.evaluation.encoders import DiscriminantEncoder


@pytest.fixture(scope="module")
def judge():
    return load_encoder("embedded")


def test_gradients_are_counted_by_orientation():
    """A ramp of known slope has one orientation, and its share is split between two neighbours."""
    slope = math.radians(30)
    down, across = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = 0.01 * (across * math.cos(slope) + down * math.sin(slope))
    counts = discriminants.gradient_histograms(ramp[None, None], 4)
    assert counts.shape == (1, 8, 4, 4)
    inner = counts[0, :, 1:3, 1:3].mean(dim=(1, 2))
    # 30 of 180 degrees is 4/3 of the eighth that the second bin begins
    place = 8 * 30 / 180
    assert inner[1] / inner.sum() == pytest.approx(2 - place, abs=1e-4)
    assert inner[2] / inner.sum() == pytest.approx(place - 1, abs=1e-4)


def test_a_mirror_changes_no_shape(rng_pixels):
    torch.testing.assert_close(
        discriminants.shape_features(rng_pixels),
        discriminants.shape_features(rng_pixels.flip(-1)),
    )


@pytest.fixture
def rng_pixels():
    return torch.rand(3, 3, 64, 64) * 2 - 1


def test_patches_are_nearer_than_average_to_few_centres(judge, rng_pixels):
    """Against the definition, distance by distance."""
    numbers = judge.numbers
    found = discriminants.patch_features(rng_pixels, numbers)
    patches = rng_pixels.unfold(2, 6, 4).unfold(3, 6, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
    white = (patches - numbers["patch_mean"]) @ numbers["whitening"]
    distances = torch.cdist(white.flatten(0, 2), numbers["centres"]).unflatten(0, white.shape[:3])
    nearness = (distances.mean(-1, keepdim=True) - distances).clamp(min=0)
    torch.testing.assert_close(
        found[:, : nearness.shape[-1]], nearness.mean((1, 2)), atol=1e-3, rtol=1e-3
    )


def test_shares_of_textures_are_shares():
    half = torch.full((1, 3, 64, 64), 1.0)
    half[..., 32:] = -1.0
    found = discriminants.texture_features(half)
    # one of 63 columns changes, by more than every limit
    torch.testing.assert_close(found[0, :9], torch.full((9,), 1 / 63))
    # nothing is coloured, half is dark
    torch.testing.assert_close(found[0, 18:24], torch.zeros(6))
    torch.testing.assert_close(found[0, 24:32], torch.full((8,), 0.5))


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(judge):
    pictures = [picture.load() for picture in embedded_concept("tiger").images]
    found = judge.embed(pictures)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(pictures)))
    alone = torch.cat([judge.embed([picture]) for picture in pictures])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-4)
    larger = judge.embed([pictures[0].resize((128, 128), Image.Resampling.BICUBIC)])
    assert (larger @ found[0]).item() > 0.9
    with pytest.raises(ValueError, match="images is empty"):
        judge.embed([])


def test_refuses_damaged_files(tmp_path):
    with pytest.raises(MimaError, match="cannot open"):
        DiscriminantEncoder(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"{")
    with pytest.raises(MimaError, match="cannot open"):
        DiscriminantEncoder(tmp_path)
    save_file({"shares": torch.ones(3)}, tmp_path / "judge.safetensors")
    with pytest.raises(MimaError, match=r"lacks .*centres"):
        DiscriminantEncoder(tmp_path)


def test_the_file_is_small():
    assert (assets() / "judge" / "judge.safetensors").stat().st_size < 3 * 2**20
