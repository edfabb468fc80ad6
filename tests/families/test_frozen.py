"""Weights kept in half precision compute what they would compute in float32, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from support import builders, tiny

from mima.errors import MimaError
from mima.families import family_of, frozen, load_pipeline
from mima.families.frozen import Upcast, hold_frozen, make_dense
from mima.families.model_files import stored_dtype, weight_files
from mima.families.pipelines import networks

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def hold_small_ones(monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)


def network(dtype):
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Flatten()]
    layers += [torch.nn.Linear(8 * 36, 5), torch.nn.SiLU(), torch.nn.Linear(5, 5)]
    return torch.nn.Sequential(*layers).to(dtype).requires_grad_(False)


def derivatives(module, pictures):
    """Value, gradient and second gradient, with other values for one weight."""
    x = pictures.clone().requires_grad_()
    weight = module[5].weight.detach().clone().requires_grad_()
    out = torch.func.functional_call(module, {"5.weight": weight}, (x,)).square().sum()
    first = torch.autograd.grad(out, [x, weight], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight])
    return [out, *first, *second]


@HALF
def test_values_and_both_derivatives_are_those_of_float32(dtype):
    held = network(dtype)
    dense = copy.deepcopy(held).float()
    hold_frozen(held, trained=["5.weight"])
    kinds = {name: type(value.data) for name, value in held.named_parameters()}
    assert kinds.pop("5.weight") is torch.Tensor
    assert set(kinds.values()) == {Upcast}
    assert {value.stored.dtype for value in held.parameters() if type(value) is Upcast} == {dtype}
    assert all(value.dtype == torch.float32 for value in held.parameters())
    pictures = torch.randn(4, 3, 8, 8)
    wanted = derivatives(dense, pictures)
    for module in (held, copy.deepcopy(held)):
        for ours, theirs in zip(derivatives(module, pictures), wanted, strict=True):
            assert torch.equal(ours, theirs)
    make_dense(held)
    for ours, theirs in zip(held.parameters(), dense.parameters(), strict=True):
        assert type(ours) is torch.nn.Parameter
        assert torch.equal(ours, theirs)


def test_a_graph_keeps_no_float32_copy_of_a_frozen_weight():
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device="cpu")
    hold_frozen(layer)
    saved = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with pack:
        layer(torch.randn(2, 64, requires_grad=True)).sum()
    weights = [x for x in saved if x.shape == (64, 64)]
    assert weights
    assert all(type(x) is Upcast for x in weights)


def test_autocast_to_their_own_dtype_copies_nothing():
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    hold_frozen(layer)
    cast = layer.weight.detach().to(torch.bfloat16)
    assert cast.data_ptr() == layer.weight.stored.data_ptr()


def test_a_frozen_weight_is_not_written_to():
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    hold_frozen(layer)
    with pytest.raises(TypeError, match=r"bfloat16 is not written to"), torch.no_grad():
        layer.weight.add_(1)


def test_masters_have_memory_of_their_own_and_shared_weights_stay_shared():
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    layers[1].weight = layers[0].weight
    before = layers[0].weight.data_ptr()
    hold_frozen(layers, trained=["0.weight"])
    assert layers[1].weight is layers[0].weight
    assert layers[0].weight.data_ptr() != before
    assert layers[0].bias.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "sd3", "flux"])
@HALF
def test_every_family_encodes_and_predicts_as_in_float32(tmp_path, kind, dtype):
    folder = builders.save(getattr(builders, kind), tmp_path / "model")
    load_pipeline(folder, dtype=dtype).save_pretrained(tmp_path / "half")
    dense, held = (builders.opened(tmp_path / "half", dtype=d) for d in (torch.float32, None))
    for network in networks(held).values():
        hold_frozen(network)
    kept = next(held.vae.parameters())
    assert (type(kept), kept.stored.dtype) == (Upcast, dtype)
    found = []
    for pipeline in (dense, held):
        family = family_of(pipeline)
        draws = torch.Generator().manual_seed(0)
        side = family.resolution
        pixels = torch.rand(2, 3, side, side, generator=draws) * 2 - 1
        latents = family.encode_images(pixels)
        text = family.encode_prompts(["a cat", "a dog"])
        timesteps = family.sample_timesteps(2, draws)
        noise = torch.randn(latents.shape, generator=draws)
        with torch.no_grad():
            prediction = family.predict(
                family.add_noise(latents, noise, timesteps), timesteps, text
            )
        found.append([latents, *text.values(), prediction])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_component_is_opened_in_the_dtype_of_its_own_file(tmp_path):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    pipeline = load_pipeline(folder)
    pipeline.unet.to(torch.bfloat16)
    pipeline.text_encoder.half()
    pipeline.save_pretrained(tmp_path / "mixed")
    opened = load_pipeline(tmp_path / "mixed", dtype=None)
    assert opened.unet.dtype == torch.bfloat16
    assert opened.text_encoder.dtype == torch.float16
    assert opened.vae.dtype == torch.float32
    # a file of two half precisions is opened in what holds both
    pipeline.unet.conv_in.half()
    pipeline.unet.save_pretrained(tmp_path / "unet")
    assert stored_dtype(weight_files(tmp_path / "unet", None)) == torch.float32


def test_a_quantized_part_is_refused_by_name(tmp_path):
    pipeline = load_pipeline(tiny.save_tiny_stable_diffusion(tmp_path / "model"))
    pipeline.text_encoder.is_quantized = True
    with pytest.raises(
        MimaError, match=r"the text_encoder is quantized; open it unquantized \(immunize takes"
    ):
        load_pipeline(pipeline)
