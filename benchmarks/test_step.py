"""One outer step of the embedded model, three concepts, K = 1: each mode beside the naive engine.

A forward is 1 unit, a backward 2, a backward through a backward about 6. Per concept and step:

    naive exact            3 + 3 + 6                    12
    two-pass exact         3 + 3 + (3 + 6)              15
    finite_difference      3 + 3 + 2 · 3                12
    first_order            3 + 3                         6
    published pair         3 + 3                         6
"""

from __future__ import annotations

import time

import pytest
import torch

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


def step_of(mode: str):
    problem = make_problem(
        CONCEPTS,
        batch=1,
        hypergradient={"naive": "exact", "published": "alternating"}.get(mode, mode),
    )
    solve = {"naive": naive, "published": published_pair}.get(mode, two_pass)
    return problem, lambda: solve(problem)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", UNITS)
def test_step(benchmark, mode):
    benchmark.group = f"outer step, N={CONCEPTS}, K=1, batch 1"
    benchmark.extra_info["units"] = UNITS[mode] * CONCEPTS
    problem, step = step_of(mode)
    if mode == "exact":
        truth = naive(problem).gradient
        ours = step().gradient
        error = sum(float((ours[n] - truth[n]).square().sum()) for n in truth) ** 0.5
        assert error <= 1e-4 * naive(problem).norm
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_merge_share(monkeypatch):
    """Merging, forwards and backwards, takes less than 2% of a `first_order` step."""
    spent = []
    for name in ("averaged", "asked", "spread", "missed"):
        method = getattr(MergeLayer, name)

        def timed(self, *args, method=method):
            started = time.perf_counter()
            out = method(self, *args)
            spent.append(time.perf_counter() - started)
            return out

        monkeypatch.setattr(MergeLayer, name, timed)
    _, step = step_of("first_order")
    step()
    spent.clear()
    started = time.perf_counter()
    for _ in range(5):
        step()
    share = sum(spent) / (time.perf_counter() - started)
    print(f"merge share of a first_order step: {share:.2%}")
    assert share < 0.02
