import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny

from mima.errors import MimaError
from mima.evaluation import load_similarity
from mima.evaluation.encoders import judge_fingerprint


@pytest.fixture(scope="module")
def lpips_net(tmp_path_factory):
    """lpips.LPIPS with a small random trunk and its own calibrated weights, and its folder."""
    lpips = pytest.importorskip("lpips", reason="the extra lpips is not installed")
    torch.manual_seed(0)
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    folder = tmp_path_factory.mktemp("lpips")
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    # lins.N and linN are the same tensors
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    return net, folder


@pytest.fixture(scope="module")
def pictures():
    colours = ("red", "green", "blue", "yellow")
    return [tiny.picture(colour, "round", seed=seed) for seed, colour in enumerate(colours)]


@pytest.mark.parametrize("protocol", ["standard", "published"])
def test_lpips_is_that_of_the_package(lpips_net, pictures, protocol):
    net, folder = lpips_net
    side = {"standard": 224, "published": 64}[protocol]

    def prepared(image):
        small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)[None]
        # the published script forgets the range that the network expects
        return pixels * 2 - 1 if protocol == "standard" else pixels

    ours = load_similarity(f"lpips:{folder}", protocol=protocol, batch_size=2)
    table = ours.pairs(pictures[:3], pictures)
    with torch.no_grad():
        expected = [
            [1 - net(prepared(a), prepared(b)).item() for b in pictures] for a in pictures[:3]
        ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[[0, 1], [0, 1]], torch.ones(2))


def test_lpips_says_what_is_missing(monkeypatch, tmp_path):
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    with pytest.raises(MimaError, match=r"lpips: cannot open"):
        load_similarity(f"lpips:{tmp_path}")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MimaError, match=r"pip install 'mima\[lpips\]'"):
        load_similarity("lpips")


def test_lpips_without_a_network_says_what_to_use(monkeypatch, tmp_path):
    pytest.importorskip("lpips", reason="the extra lpips is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(MimaError, match=r"no network.* \(lpips:FOLDER\), or use embedded"):
        load_similarity("lpips")


def test_lpips_has_a_fingerprint_of_its_protocol(lpips_net):
    _, folder = lpips_net
    one, other = (
        judge_fingerprint(load_similarity(f"lpips:{folder}", protocol=protocol))
        for protocol in ("standard", "published")
    )
    assert one != other
