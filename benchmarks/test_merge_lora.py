"""merge_lora: adapters of three concepts merged into one weight, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Machine, compiled, replay, rotating, serves
from mima import ops

OP = "merge_lora"
N = 3
CASES = [((320, 768), 4), ((1280, 768), 16), ((1280, 1280), 64)]
"""(o, d), r."""


def eager(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, weights: Tensor
) -> Tensor:
    """The average of the merged models: what merging each adapter, then averaging, computes."""
    merged = [weight + s_n * (B_n @ A_n) for A_n, B_n, s_n in zip(A, B, scale, strict=True)]
    return weight + sum(w_n * (W_n - weight) for w_n, W_n in zip(weights, merged, strict=True))


def one_product(
    weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, weights: Tensor
) -> Tensor:
    """The best plain expression: all adapters as one of rank N r."""
    factors = [f * B_n for f, B_n in zip(weights * scale, B, strict=True)]
    return torch.addmm(weight, torch.cat(factors, 1), torch.cat(list(A)))


@functools.cache
def compiled_product():
    return compiled(one_product, dynamic=True)


def build(shape: tuple[int, int], r: int, backward: bool, device: torch.device) -> Comparison:
    torch.manual_seed(0)
    o, d = shape
    weight = torch.randn(o, d, device=device) / d**0.5
    A = [torch.randn(r, d, device=device) / d**0.5 for _ in range(N)]
    B = [torch.randn(o, r, device=device) / r**0.5 for _ in range(N)]
    scale, weights = (torch.rand(N, device=device) for _ in range(2))
    leaves = [weight, *A, *B, scale, weights]
    upstream = torch.randn(o, d, device=device)
    for x in leaves:
        x.requires_grad_(backward)

    def thunk(function, **options):
        def run():
            out = function(weight, A, B, scale, weights, **options)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        return run

    variants = {"eager": thunk(eager), "one product": thunk(one_product)}
    if (fused := compiled_product()) is not None:
        variants["compile"] = thunk(fused)
    for backend in ("native", "triton"):
        if serves(backend, OP, device, torch.float32):
            variants[backend] = thunk(ops.merge_lora, backend=backend)
    passes = 3 if backward else 1
    return Comparison(
        group=f"merge_lora {'forward+backward' if backward else 'forward'} o,d={shape} r={r}",
        variants=variants,
        baseline="eager",
        # the weight read, the result written, the factors read; backward: d_out read, d_weight and
        # the factors' gradients written
        num_bytes=4 * (2 * o * d + N * r * (o + d)) * (2 if backward else 1),
        flops=2 * o * d * N * r * passes,
        rounds=15,
    )


@functools.lru_cache(maxsize=1)
def comparison(shape: tuple[int, int], r: int, backward: bool, device: torch.device) -> Comparison:
    return rotating(functools.partial(build, shape, r, backward, device), device)


@pytest.mark.parametrize(
    ("shape", "r", "backward", "variant"),
    [
        pytest.param(
            *(shape, r, backward, variant),
            id=f"{'forward_backward' if backward else 'forward'}-{o}x{d}-r{r}-{variant}",
        )
        for shape, r in CASES
        for o, d in [shape]
        for backward in (False, True)
        for variant in ("eager", "one product", "compile", "native", "triton")
    ],
)
def test_merge_lora(benchmark, shape, r, backward, variant, machine: Machine):
    replay(benchmark, comparison(shape, r, backward, machine.device), variant, machine)
