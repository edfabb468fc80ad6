"""combine: a concept's share of the average in place, and a step of SGD with momentum."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Machine, replay, rotating, serves
from benchmarks.test_adam_step import BACKENDS, LEVELS
from mima import ops

OP = "combine"
LR, MOMENTUM, SHARE = 1e-4, 0.9, 1 / 3


def inputs(level: str, device: torch.device, lists: int) -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(s, device=device) for s in LEVELS[level]] for _ in range(lists)]


def add(level: str, device: torch.device) -> Comparison:
    """φ − θ grows by a share of a change. Compared is what the first tensor is after a call."""
    change, start = inputs(level, device, 2)

    def eager(moved: list[Tensor]) -> list[Tensor]:
        for x, y in zip(moved, change, strict=True):
            x += SHARE * y
        return [moved[0].clone()]

    def foreach(moved: list[Tensor]) -> list[Tensor]:
        torch._foreach_add_(moved, change, alpha=SHARE)
        return [moved[0].clone()]

    def by_operator(moved: list[Tensor], backend: str) -> list[Tensor]:
        ops.combine([moved, change], [[1, SHARE]], into=[moved], backend=backend)
        return [moved[0].clone()]

    def own() -> list[Tensor]:
        return [x.clone() for x in start]

    # each its own sums, from the same start
    variants = {
        "eager": functools.partial(eager, own()),
        "foreach": functools.partial(foreach, own()),
    }
    for backend in BACKENDS:
        if serves(backend, OP, device, torch.float32):
            moved = own()
            variants[backend] = functools.partial(by_operator, moved, backend)
    elements = sum(x.numel() for x in change)
    return Comparison(
        group=f"combine add {level}",
        variants=variants,
        baseline="eager",
        # φ − θ and the change read, φ − θ written
        num_bytes=4 * elements * 3,
        flops=2 * elements,
        rounds=5,
    )


def momentum(level: str, device: torch.device) -> Comparison:
    z, g, m = inputs(level, device, 3)

    def eager() -> list[Tensor]:
        moved = [MOMENTUM * m_p + g_p for m_p, g_p in zip(m, g, strict=True)]
        return [z_p - LR * m_p for z_p, m_p in zip(z, moved, strict=True)] + moved

    def foreach() -> list[Tensor]:
        moved = torch._foreach_add(torch._foreach_mul(m, MOMENTUM), g)
        return [*torch._foreach_add(z, moved, alpha=-LR), *moved]

    rule = [[1, -LR, -LR * MOMENTUM], [0, 1, MOMENTUM]]
    variants = {"eager": eager, "foreach": foreach}
    for backend in BACKENDS:
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: [
                x for xs in ops.combine([z, g, m], rule, backend=b) for x in xs
            ]
    elements = sum(x.numel() for x in z)
    return Comparison(
        group=f"combine momentum {level}",
        variants=variants,
        baseline="eager",
        # z, g and m read, z and m written
        num_bytes=4 * elements * 5,
        flops=4 * elements,
        rounds=5,
    )


CASES = {"add": add, "momentum": momentum}


@functools.lru_cache(maxsize=1)
def comparison(case: str, level: str, device: torch.device) -> Comparison:
    return rotating(functools.partial(CASES[case], level, device), device)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["eager", "foreach", *BACKENDS])
def test_combine(benchmark, level: str, case: str, variant: str, machine: Machine):
    replay(benchmark, comparison(case, level, machine.device), variant, machine)
