"""The roofline counts what an outer step launches, multiplies and moves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_a_roofline_counts_what_an_outer_step_launches():
    from benchmarks import kernel_counts, roofline

    first, double = (
        roofline._count("tiny", (1,), "h100", "first_order", "bfloat16", n, 1, 1) for n in (1, 2)
    )
    # each concept has its own lower and upper level, and the weights are merged
    assert double.parts["products"].launches == 2 * first.parts["products"].launches
    assert double.parts["products"].flops == 2 * first.parts["products"].flops
    # first_order keeps the fused attention, exact the matrices
    assert "attention matrices" not in first.parts
    exact = roofline.count("tiny", mode="exact", concepts=1, steps=1, precision="float32")
    assert exact.parts["attention matrices"].launches > 0
    assert exact.total.launches > 3 * first.total.launches
    assert exact.peak_bytes > first.peak_bytes
    # the device cannot be done before it has worked, nor before the host has asked
    assert first.seconds >= first.total.seconds
    assert first.seconds >= first.total.launches * kernel_counts.HOST_BACKWARD


def test_a_roofline_counts_a_few_layers_of_a_kind(monkeypatch):
    from benchmarks import roofline

    settings = "h100", "first_order", "bfloat16", 1, 1, 1
    every = roofline._count("tiny", (5,), *settings)
    deep = replace(roofline.ARCHITECTURES["tiny"], layers=(5,))
    monkeypatch.setitem(roofline.ARCHITECTURES, "tiny", deep)
    few = roofline.count("tiny", mode="first_order", concepts=1, steps=1)
    assert few.parts.keys() == every.parts.keys()
    for name, part in every.parts.items():
        assert few.parts[name].launches == part.launches
        assert few.parts[name].flops == pytest.approx(part.flops)
        assert few.parts[name].num_bytes == pytest.approx(part.num_bytes)
        assert few.parts[name].seconds == pytest.approx(part.seconds)
    assert few.seconds == pytest.approx(every.seconds)
    assert few.reads == every.reads
    assert few.peak_bytes == pytest.approx(every.peak_bytes, rel=1e-3)


def test_a_roofline_counts_a_few_concepts_and_steps(monkeypatch):
    from benchmarks import roofline

    # as of the models that it is for
    monkeypatch.setattr("mima.bilevel.outer.KEPT", 0)
    every = roofline._count("tiny", (1,), "h100", "finite_difference", "bfloat16", 2, 3, 1)
    few = roofline.count("tiny", mode="finite_difference", concepts=2, steps=3)
    assert few.parts.keys() == every.parts.keys()
    for name, part in every.parts.items():
        # the first of several sums is none
        assert few.parts[name].launches == pytest.approx(part.launches, rel=2e-2)
        assert few.parts[name].flops == pytest.approx(part.flops)
        assert few.parts[name].num_bytes == pytest.approx(part.num_bytes, rel=2e-2)
    assert few.seconds == pytest.approx(every.seconds, rel=2e-2)
    assert few.reads == every.reads
    assert few.peak_bytes == pytest.approx(every.peak_bytes, rel=2e-2)


def test_a_roofline_knows_a_product():
    from benchmarks.kernel_counts import GPUS, Counter

    counter = Counter(GPUS["h100"], "bfloat16", [torch.Size([64, 32])], [49], [2])
    x, weight = (torch.empty(s, device="meta") for s in ((48, 32), (64, 32)))
    with counter:
        y = x @ weight.mT
        weight * 2
        y.relu()
        torch.empty(2, 49, 49, device="meta").exp()
        torch.empty(3, 49, 49, device="meta").exp()
    parts = counter.counts.parts
    assert parts["products"].flops == 2 * 48 * 64 * 32
    assert parts["products"].num_bytes == 4 * (48 * 32 + 64 * 32 + 48 * 64)
    assert {name: part.launches for name, part in parts.items()} == {
        "products": 1,
        "weights": 1,
        "norms, activations": 2,
        "attention matrices": 1,
    }
    assert parts["weights"].num_bytes == 2 * 4 * 64 * 32


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("width", [40, 64, 128, 160, 512])
def test_a_roofline_has_attention_reach_no_more_than_its_kernels_can(width, precision):
    from benchmarks import kernel_counts

    gpu = kernel_counts.GPUS["h100"]
    q = torch.empty(8, 4096, width, device="meta")
    pairs, padded = 8 * 4096**2, max(16, 2 ** (width - 1).bit_length())
    names = "attention", "attention_backward", "attention_double_backward"
    for (name, products), first in zip(zip(names, (2, 9, 22), strict=True), (0, 1, 4), strict=True):
        passes = kernel_counts._ATTENTION[getattr(torch.ops.mima, name)]
        args = (*[None] * first, q, q, q)
        flops, seconds = kernel_counts._attention_cost(passes, args, gpu, precision)
        assert flops == 2 * products * pairs * padded
        assert seconds >= flops / gpu.flops_per_second[precision]
        # probabilities are multiplied in TF32 at best
        assert seconds >= passes.in_float32 / products * flops / gpu.flops_per_second["tf32"]
        if precision == "bfloat16":
            least = min(passes.cycles.values())
            assert seconds >= pairs * least / (132 * 1.98e9)


@pytest.mark.parametrize("model", ["sd14", "sdxl", "sd3", "flux"])
def test_a_roofline_builds_the_published_architectures(model):
    from benchmarks.architectures import ARCHITECTURES

    with torch.device("meta"):
        architecture = ARCHITECTURES[model]
        denoiser = architecture.build(*architecture.layers)
    millions = sum(x.numel() for x in denoiser.parameters()) / 1e6
    published = {"sd14": 859.5, "sdxl": 2567.5, "sd3": 2028.3, "flux": 11901.4}
    assert millions == pytest.approx(published[model], rel=0.03)
    assert any(re.search(architecture.trained, n) for n in denoiser.state_dict())
