"""What a run holds in memory: half-precision files as they are, idle encoders, moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny
from support.immunizing import assert_same, concepts, settings

from mima.bilevel.optimizers import Adam
from mima.bilevel.outer import UpperLevel, UpperTerm, outer_gradient
from mima.bilevel.tasks import FullWeights
from mima.families import frozen, load_pipeline
from mima.families.frozen import Upcast
from mima.immunization.algorithm import immunize
from mima.immunization.offload import idle_modules, out_of_memory_while
from mima.immunization.planning.meta_memory import LiveBytes
from mima.merging import MergeLayer

SAVERS = [{}, {"hypergradient": "exact"}, {"method": "alternating"}, {"erase_first": True}]
IDS = ["first_order", "exact", "alternating", "erased"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model whose files are in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = load_pipeline(tiny.save_tiny_stable_diffusion(folder / "whole"))
    pipeline.to(torch.bfloat16).save_pretrained(folder / "half")
    return folder / "half"


def mapped_files() -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "spilled.safetensors" in line})


@pytest.mark.parametrize("changes", SAVERS, ids=IDS)
def test_weights_in_the_dtype_of_their_file_change_no_value(half, tmp_path, monkeypatch, changes):
    config = settings(tmp_path, steps=2, **{"hypergradient": "first_order", **changes})
    wanted = immunize(half, concepts(), config)
    monkeypatch.setattr(frozen, "LARGE", 0)
    mapped = []
    found = immunize(half, concepts(), config, callbacks=[lambda _: mapped.append(mapped_files())])
    # VAE and text encoder, which the published update needs for each merge's captions
    count = 1 if config.method == "alternating" else 2
    assert mapped == [count, count]
    assert mapped_files() == 0
    assert [r.losses for r in found.history] == [r.losses for r in wanted.history]
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(r.pipeline, name) for r in (found, wanted))
        assert_same(ours.state_dict(), theirs.state_dict())
        assert {(type(v), v.dtype) for v in ours.parameters()} == {
            (torch.nn.Parameter, torch.float32)
        }


def test_while_it_runs_only_what_is_trained_is_float32(half, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)
    pipeline = load_pipeline(half, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pointers = {value.data_ptr() for value in pipeline.unet.parameters()}
    seen = []
    original = immunize.__globals__["make_whole"]

    def look(own, device):
        for name, value in own.unet.named_parameters():
            held = isinstance(value, Upcast)
            shared = held and value.stored.data_ptr() in pointers
            seen.append((".attn2." in name, held, shared))
        original(own, device)

    monkeypatch.setitem(immunize.__globals__, "make_whole", look)
    result = immunize(pipeline, concepts(), settings(tmp_path, steps=1))
    # the frozen ones are the caller's own memory, the trained ones are not
    assert set(seen) == {(True, False, False), (False, True, True)}
    assert_same(pipeline.unet.state_dict(), before)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert result.pipeline.unet.dtype == torch.float32


def test_recomputing_ends_with_the_run(half, tmp_path):
    pipeline = load_pipeline(half)
    config = settings(tmp_path, steps=1, gradient_checkpointing=True)
    result = immunize(pipeline, concepts(), config)
    for unet in (pipeline.unet, result.pipeline.unet):
        assert not unet.is_gradient_checkpointing


def test_idle_encoders_go_on_working_and_come_back(half, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)
    pipeline = load_pipeline(half)
    tokens = torch.tensor([[1, 2, 3]])
    before = pipeline.text_encoder(tokens)[0]
    assert idle_modules(pipeline, reads_text=True) == [pipeline.vae]
    with out_of_memory_while(idle_modules(pipeline, reads_text=False), tmp_path):
        assert mapped_files() == 2
        assert torch.equal(pipeline.text_encoder(tokens)[0], before)
        assert list(tmp_path.iterdir()) == []
    assert mapped_files() == 0
    assert torch.equal(pipeline.text_encoder(tokens)[0], before)


@pytest.mark.parametrize("method", ["mima", "alternating"])
def test_offloaded_moments_change_nothing(half, tmp_path, method):
    config = settings(tmp_path, steps=3, method=method, hypergradient="first_order")
    plain, offloaded = (
        immunize(half, concepts(), config.model_copy(update={"offload_optimizer": on}))
        for on in (False, True)
    )
    unet, other = (result.pipeline.unet.state_dict() for result in (plain, offloaded))
    assert_same(unet, other)


def test_a_concepts_path_is_out_of_memory_before_the_next_begins():
    """A second concept adds to the peak its share of the merge, not what an attack holds."""
    theta = {"w": torch.randn(256, 256)}

    def loss(params, k=0):
        return params["w"].square().sum()

    task = FullWeights(loss, ("w",), steps=1, optimizer=Adam(lr=1e-3))
    upper = UpperLevel([UpperTerm("one", -1.0)], lambda phi: [loss(phi)])

    def copies(count):
        merge = MergeLayer(torch.full((count,), 1 / count))
        with LiveBytes(theta.values(), [], "cpu") as live:
            outer_gradient(
                theta, [task] * count, merge, [upper] * count, mode="first_order", wrt=("w",)
            )
        return live.peak / theta["w"].nbytes

    assert copies(3) - copies(1) <= 1.1
