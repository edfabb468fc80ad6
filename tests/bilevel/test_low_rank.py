"""LoRA's lower level in linear layers that form no weight, beside one that forms W + s B A."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mima.bilevel import low_rank, lower
from mima.bilevel.hypergradient import pullback
from mima.bilevel.low_rank import LowRankWeight
from mima.bilevel.optimizers import Adam
from mima.bilevel.tasks import LoraFactors
from mima.ops.backends import reference as reference_backend

NAMES, SHAPES = ("0.weight", "2.weight"), ((7, 5), (3, 7))


class Formed(LoraFactors):
    """The same level with its weights formed, by definition."""

    def loss(self, z, theta, k):
        change = self.change(z, theta)
        return self._loss({**theta, **{n: theta[n] + change[n] for n in self.names}}, k)


@pytest.fixture(params=[True, False], ids=["operator", "products"])
def fused(request, monkeypatch):
    monkeypatch.setattr(low_rank, "_is_fused", lambda x: request.param)
    return request.param


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False)
    return torch.nn.Sequential(*layers).double().requires_grad_(False)


def level(network, kind=LoraFactors):
    x, y = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    x = x.mT.contiguous().mT  # as attention hands it over, not contiguous

    def loss(params, k):
        return (functional_call(network, params, (x * (k + 1),)) - y).square().mean()

    theta = {name: value.detach() for name, value in network.named_parameters()}
    task = kind(
        loss,
        {name: theta[name].shape for name in NAMES},
        rank=2,
        scale=0.5,
        generator=torch.Generator().manual_seed(1),
        steps=3,
        optimizer=Adam(lr=0.1, eps=1e-2),
        like=x,
    )
    # B moves at once, and the second derivatives are of some size
    draw = torch.Generator().manual_seed(2)
    task._factors = {
        n: torch.randn(v.shape, generator=draw, dtype=v.dtype) for n, v in task._factors.items()
    }
    return task, theta


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
@pytest.mark.usefixtures("fused")
def test_first_and_second_derivatives_are_those_of_the_formed_weight(network, mode):
    found = []
    bar = {
        n: torch.ones(o, d, dtype=torch.float64) for n, (o, d) in zip(NAMES, SHAPES, strict=True)
    }
    for kind in (LoraFactors, Formed):
        torch.manual_seed(3)
        task, theta = level(network, kind)
        states = lower.descend(task, theta, 3, keep_gradients=True)
        back = pullback(mode, task, theta, tuple(theta), {3: lambda z: bar})
        found.append([*states[-1].z.values(), *states[1].gradient.values(), *back.values()])
        assert set(back) == set(theta)
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


def test_no_weight_is_formed_in_the_loop(network, monkeypatch, fused):
    task, theta = level(network)
    calls = {"batched_lora_forward": 0, "batched_lora_backward": 0}
    originals = {name: getattr(reference_backend, name) for name in calls}

    def counted(name, *args, **kwargs):
        calls[name] += 1
        return originals[name](*args, **kwargs)

    for name in calls:
        monkeypatch.setattr(reference_backend, name, functools.partial(counted, name))

    def refuse(x):
        assert not isinstance(x, LowRankWeight), "forms W + s B A"
        return x

    monkeypatch.setattr(low_rank, "_sum", refuse)
    monkeypatch.setenv("MIMA_BACKEND", "reference")
    lower.last_state(task, theta)
    # two layers, three steps
    assert set(calls.values()) == {6 if fused else 0}


@pytest.mark.usefixtures("fused")
def test_a_block_that_is_recomputed_reads_the_same_weight(network):
    # as gradient checkpointing under functional_call does: the block's parameters by name, again
    network = torch.nn.Sequential(network)
    plain = network[0].forward

    def recomputed(x):
        params = dict(network[0].named_parameters())
        assert all(isinstance(params[name], LowRankWeight) for name in NAMES)
        block = torch.nn.Sequential(*network[0])
        run = lambda x: functional_call(block, params, (x,))  # noqa: E731
        return checkpoint(run, x, use_reentrant=False)

    x = torch.randn(2, 5, dtype=torch.float64)
    found = []
    for forward in (plain, recomputed):
        network[0].forward = forward
        draw = torch.Generator().manual_seed(0)
        factors = [
            torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()
            for o, d in SHAPES
            for shape in ((2, d), (o, 2))
        ]
        params = {
            f"0.{name}": LowRankWeight(
                network.get_parameter(f"0.{name}"), *([x] for x in pair), [0.5]
            )
            for name, pair in zip(NAMES, (factors[:2], factors[2:]), strict=True)
        }
        y = functional_call(network, params, (x,))
        found.append(torch.autograd.grad(y.square().sum(), factors))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("fused")
def test_autocast_rounds_the_factors_as_it_does_the_weight(network):
    W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    x = torch.randn(3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, LowRankWeight(W, [A], [B], [0.5]))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ (W + 0.5 * B @ A).mT, atol=0.1, rtol=0.05)


@pytest.mark.usefixtures("fused")
def test_other_operations_read_the_sum():
    W, A, B = torch.randn(6, 4), torch.randn(2, 4).requires_grad_(), torch.randn(6, 2)
    adapted, formed = LowRankWeight(W, [A], [B], [0.5]), W + 0.5 * B @ A
    x = torch.randn(5, 4)
    assert adapted.shape == W.shape
    torch.testing.assert_close(x @ adapted.mT, x @ formed.mT)
    torch.testing.assert_close(torch.nn.functional.linear(x[0], adapted), formed @ x[0])
    assert type(adapted + 0) is torch.Tensor
    first, second = (torch.autograd.grad(w.square().sum(), A)[0] for w in (adapted, formed))
    torch.testing.assert_close(first, second)


def test_each_sample_has_its_own_adapter():
    draw = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=draw, dtype=torch.float64)
    W, bias, x = randn(6, 4), randn(6), randn(3, 5, 4)
    A, B = [randn(2, 4).requires_grad_(), randn(1, 4)], [randn(6, 2), randn(6, 1)]
    index = low_rank.indices((2, 1), x.device)
    adapted = LowRankWeight(W, A, B, [0.5, 2.0], index)
    y = torch.nn.functional.linear(x, adapted, bias)
    sums = [W + s * b @ a for s, a, b in zip((0.5, 2.0), A, B, strict=True)]
    expected = torch.stack([x[i] @ sums[n].mT + bias for i, n in enumerate((0, 0, 1))])
    torch.testing.assert_close(y, expected)
    slopes = [torch.autograd.grad(out.square().sum(), A[0])[0] for out in (y, expected)]
    torch.testing.assert_close(*slopes)
    with pytest.raises(RuntimeError, match=r"set lower\.concepts_per_forward to 1"):
        adapted + 0
