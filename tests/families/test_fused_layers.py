"""A denoiser's layers run as fused operators for as long as they are asked to, and no longer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.families import fused_layers
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
