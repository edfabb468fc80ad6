"""A denoiser's layers run as fused operators for as long as they are asked to, and no longer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from support.convolutions import Convolutions
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_full_backward_hook

from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.families import fused_layers
from mima.families.frozen import Upcast
from mima.families.fused_layers import FusedLayers
from mima.families.loading import load_embedded
from mima.ops.attention import FusedAttention
from mima.ops.backends import choice


@pytest.fixture(scope="module")
def denoiser():
    return load_embedded().unet.eval().requires_grad_(False)


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that are called."""
    names: list[str] = []
    original = choice.resolve

    def noted(op, *args):
        names.append(op)
        return original(op, *args)

    monkeypatch.setattr(choice, "resolve", noted)
    return names


def run(denoiser, params, side=16):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, denoiser.config.in_channels, side, side, generator=draw)
    text = torch.randn(1, 9, denoiser.config.cross_attention_dim, generator=draw)
    inputs = {"sample": x, "timestep": torch.tensor([500]), "encoder_hidden_states": text}
    return functional_call(denoiser, params, (), inputs).sample


def second_derivative(denoiser):
    """The loss, its gradient at some weights, and the product of its Hessian with that."""
    leaves = {
        name: p.clone().requires_grad_()
        for name, p in denoiser.named_parameters()
        if name.endswith(("attn2.to_v.weight", "norm1.weight", "conv_norm_out.bias"))
    }
    with twice_differentiable_attention():
        loss = run(denoiser, leaves).square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        direction = [g.detach() for g in grads]
        products = torch.autograd.grad(grads, list(leaves.values()), direction)
    return [loss.detach(), *direction, *products]


def test_derivatives_are_those_of_pytorchs_layers(denoiser, calls, monkeypatch):
    for bound in ("NORM", "ROWS", "GATE", "MATRIX"):
        monkeypatch.setattr(fused_layers, bound, 0)
    expected = second_derivative(denoiser)
    assert calls == []
    with FusedLayers(denoiser):
        actual = second_derivative(denoiser)
    assert set(calls) == {"group_norm", "geglu", "attention"}
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5 * y.abs().max().item())


def test_small_layers_stay_pytorchs(denoiser, calls):
    with FusedLayers(denoiser), torch.no_grad(), twice_differentiable_attention():
        run(denoiser, {}, side=8)
    assert calls == []


@pytest.mark.parametrize("where", ["norm", "activation", "anywhere"])
def test_who_watches_gradients_changes_no_value(where, monkeypatch):
    monkeypatch.setattr(fused_layers, "NORM", 0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=4, groups=2).eval()
    x, temb = torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 4)
    expected = block(x, temb)
    watched = {"norm": block.norm1, "activation": block.nonlinearity}
    hook = (
        register_module_full_backward_hook(lambda *args: None)
        if where == "anywhere"
        else watched[where].register_full_backward_hook(lambda *args: None)
    )
    try:
        with FusedLayers(block):
            actual = block(x, temb)
    finally:
        hook.remove()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def attributes(network):
    return [
        {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for module in network.modules()
    ]


def test_the_network_is_the_same_afterwards_whatever_happens(denoiser):
    before = attributes(denoiser)
    fused = FusedLayers(denoiser)
    with fused:
        inside = attributes(denoiser)
        with fused:  # a run within a run changes nothing further, and takes nothing back
            assert attributes(denoiser) == inside
        assert attributes(denoiser) == inside
    assert inside != before
    assert attributes(denoiser) == before
    with pytest.raises(ZeroDivisionError), fused:
        raise ZeroDivisionError
    assert attributes(denoiser) == before


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_layers_keep_their_own_functions(calls):
    x = torch.randn(2, 4, 100, 100)
    hooked = nn.GroupNorm(2, 4)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    replaced = nn.GroupNorm(2, 4)
    replaced.forward = torch.neg
    network = nn.Sequential(Doubled(2, 4), hooked, replaced, nn.BatchNorm2d(4)).eval()
    expected = network(x)
    with FusedLayers(network):
        assert torch.equal(network(x), expected)
    assert replaced.forward is torch.neg
    assert calls == []


def test_attention_that_the_operator_does_not_know_stays_pytorchs(calls):
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    mask = torch.randn(5, 5)
    cases = [
        ((q, k, v, mask), {}),
        ((q, k, v), {"attn_mask": mask > 0.5}),
        ((q, k, v), {"is_causal": True}),
        ((q, k[:, :1], v[:, :1]), {"enable_gqa": True}),
        ((q[..., :0, :], k, v), {}),
    ]
    for args, options in cases:
        expected = F.scaled_dot_product_attention(*args, **options)
        with FusedAttention():
            actual = F.scaled_dot_product_attention(*args, **options)
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert calls == []
    with FusedAttention():
        actual = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert calls == ["attention"]
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v, scale=0.3))


def counted(denoiser, params, *, side=8):
    """Products of a second derivative by some parameters, and that derivative."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    with Convolutions() as products, twice_differentiable_attention():
        loss = run(denoiser, leaves, side).square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        found = torch.autograd.grad(grads, list(leaves.values()), [g.detach() for g in grads])
    return products.count, found


def test_frozen_convolutions_have_no_gradients_in_a_second_derivative(denoiser):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    params = {name: denoiser.get_parameter(name)}
    most, expected = counted(denoiser, params)
    with FusedLayers(denoiser):
        least, actual = counted(denoiser, params)
    # those that a graph is recorded of, once each
    layers = sum(type(module) is nn.Conv2d for module in denoiser.modules())
    assert layers / 2 < most - least < layers
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5 * y.abs().max().item())


def test_trained_and_other_convolutions_stay_pytorchs(denoiser):
    # of the last layer, whose input every trained weight moves
    weights = {"conv_out.weight": denoiser.conv_out.weight}
    most, expected = counted(denoiser, weights)
    with FusedLayers(denoiser):
        least, actual = counted(denoiser, weights)
    assert least == most
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    network = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 1))
    network.requires_grad_(False)
    x = torch.randn(2, 5, 5, requires_grad=True)
    with FusedLayers(network):
        with twice_differentiable_attention():
            assert "forward" not in vars(network[0])
            assert network[1](x[None]).grad_fn.name() == "_ConvolutionBackward"
            # a picture that is no batch, and what the operator cannot be differentiated in
            assert network[1](x).grad_fn.name() != "_ConvolutionBackward"
            assert torch.func.grad(lambda x: network(x).sum())(x[None]).shape == (1, 2, 5, 5)
        assert network[1](x[None]).grad_fn.name() == "ConvolutionBackward0"


def test_a_convolution_that_is_stored_in_half_precision_is_computed_in_float32():
    layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    stored = layer.weight.detach().bfloat16()
    layer.weight = nn.Parameter(stored.float(), requires_grad=False)
    expected = derivatives(layer, x)
    del layer.weight
    layer.register_parameter("weight", None)
    layer._parameters["weight"] = Upcast(stored)
    with FusedLayers(layer), twice_differentiable_attention(), Convolutions() as products:
        actual = derivatives(layer, x)
    assert products.count == 4
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def derivatives(layer, x):
    y = layer(x)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y, d_x, *torch.autograd.grad(d_x, x, d_x.detach())
