"""One outer step, three concepts, K = 1: each mode of the hypergradient beside the naive engine.

A forward is 1 unit, a backward 2, a backward through a backward about 6. Per concept and step:

    naive exact            3 + 3 + 6                    12
    two-pass exact         3 + 3 + (3 + 6)              15
    finite_difference      3 + 3 + 2 · 3                12
    first_order            3 + 3                         6
    published pair         3 + 3                         6

On the embedded model; on a GPU also at Stable Diffusion 1.x's size, with random weights, where the
naive engine, which keeps every concept's graph, is left out. MIMA_BENCH_SD1=sd1-tiny runs that part
anywhere, at a small size.
"""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch

from benchmarks.harness import Comparison, Machine, replay
from benchmarks.outer_step import make_problem, naive, two_pass
from mima.alternating import merge_step
from mima.bilevel.outer import OuterGradient, upper_gradient
from mima.merging import MergeLayer
from mima.problem import Problem

CONCEPTS = 3
UNITS = {"naive": 12, "exact": 15, "finite_difference": 12, "first_order": 6, "published": 6}


def published_pair(problem: Problem) -> OuterGradient:
    """An even and an odd step of the released code, without the optimizers."""
    assert problem.merge is not None
    theta, lr = problem.theta(), problem.config.lower.lr
    names = [data.name for data in problem.data]
    outer, merged = merge_step(theta, problem.lower_levels(0), problem.merge, names, lr=lr)
    upper_gradient({**theta, **merged}, problem.upper_levels(1))
    return outer


def step_of(mode: str, model: str, device: torch.device):
    problem = make_problem(
        CONCEPTS,
        batch=1,
        device=device,
        model=model,
        hypergradient={"naive": "exact", "published": "alternating"}.get(mode, mode),
    )
    solve = {"naive": naive, "published": published_pair}.get(mode, two_pass)

    def step() -> torch.Tensor:
        gradient = solve(problem).gradient
        return torch.cat([gradient[name].flatten() for name in sorted(gradient)])

    return step


@functools.lru_cache(maxsize=1)
def comparison(model: str, device: torch.device) -> Comparison:
    modes = [mode for mode in UNITS if mode != "naive" or model == "embedded"]
    return Comparison(
        group=f"outer step of {model}, N={CONCEPTS}, K=1, batch 1",
        variants={mode: step_of(mode, model, device) for mode in modes},
        baseline=modes[0],
        # approximations, whose errors the tests of the engine judge
        unchecked=("finite_difference", "first_order", "published"),
        tolerance=1e-3,
        rounds=5,
    )


@pytest.mark.parametrize("mode", UNITS)
@pytest.mark.parametrize("size", ["embedded", "sd1"])
def test_step(benchmark, size, mode, machine: Machine):
    model = size
    if size == "sd1" and machine.device.type != "cuda":
        model = os.environ.get("MIMA_BENCH_SD1", "")
        if not model:
            pytest.skip("minutes and tens of gigabytes without a GPU; MIMA_BENCH_SD1=sd1-tiny")
    replay(benchmark, comparison(model, machine.device), mode, machine)
    benchmark.extra_info["units"] = UNITS[mode] * CONCEPTS


def test_merge_share(monkeypatch, machine: Machine):
    """Merging, forwards and backwards, takes less than 2% of a `first_order` step."""
    spent = []

    def now() -> float:
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for name in ("averaged", "asked", "spread", "missed"):
        method = getattr(MergeLayer, name)

        def timed(self, *args, method=method):
            started = now()
            out = method(self, *args)
            spent.append(now() - started)
            return out

        monkeypatch.setattr(MergeLayer, name, timed)
    model = "embedded" if machine.device.type != "cuda" else "sd1"
    step = step_of("first_order", model, machine.device)
    step()
    spent.clear()
    started = now()
    for _ in range(5):
        step()
    share = sum(spent) / (now() - started)
    print(f"merge share of a first_order step of {model}: {share:.2%}")
    assert share < 0.02
