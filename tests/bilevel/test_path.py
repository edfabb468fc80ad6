"""Upper terms along the whole path of an attack, and attacks that go on from step to step."""

from __future__ import annotations

import pytest
import torch
from bilevel.test_hypergradient import (
    CONCEPTS,
    Data,
    assert_close,
    level,
    problem,
    randn,
)

from mima.bilevel import lower
from mima.bilevel.optimizers import SGD, Adam
from mima.bilevel.outer import naive_outer_gradient, outer_gradient, unmerged_gradient
from mima.bilevel.tasks import FullWeights, LoraFactors
from mima.bilevel.upper import along_path
from mima.merging import MergeLayer

RULES = [SGD(lr=0.3), SGD(lr=0.2, momentum=0.8), Adam(lr=0.1, eps=1e-2)]


@pytest.fixture
def theta():
    return {"key": randn(4, 5, seed=1), "value": randn(3, 4, seed=2), "bias": randn(3, seed=3)}


def along(states, weight=0.4):
    """Other pictures at each state of the path, each with its own weight."""
    return {
        k: [
            level(
                (f"c{n}", Data(1000 * k + n, randn(2, 5, seed=10 + n)).loss, -weight / (k + 1)),
                (f"p{n}", Data(1000 * k + 60 + n, randn(2, 5, seed=77)).loss, 0.7),
            )
            for n in range(CONCEPTS)
        ]
        for k in states
    }


def objective(theta, tasks, layer, upper):
    paths = [[dict(state.z) for state in lower.path(task, theta)] for task in tasks]
    total = 0.0
    for k, parts in upper.items():
        changes = [task.change(path[k - 1], theta) for task, path in zip(tasks, paths, strict=True)]
        adapted = [{n: v + c[n] if n in c else v for n, v in theta.items()} for c in changes]
        total += sum(float(part(layer(theta, adapted))[0]) for part in parts)
    return total


def assert_slopes(gradient, f, theta, h=1e-5):
    """The gradient against central differences in random directions of each parameter."""
    for seed, (name, value) in enumerate(theta.items()):
        for direction in (
            randn(*value.shape, seed=900 + seed),
            randn(*value.shape, seed=950 + seed),
        ):
            ahead, behind = (f({**theta, name: value + s * h * direction}) for s in (1, -1))
            slope = float((gradient[name] * direction).sum())
            assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("merge", ["projected", "average"])
@pytest.mark.parametrize("kind", ["full", "partial", "lora"])
@pytest.mark.parametrize("states", [(4,), (1, 2, 3, 4), (2, 3)], ids=["last", "all", "middle"])
@pytest.mark.parametrize("optimizer", RULES, ids=["sgd", "momentum", "adam"])
def test_exact_path_gradient_agrees_with_central_differences(theta, merge, kind, states, optimizer):
    tasks, layer, _ = problem(theta, kind=kind, optimizer=optimizer, steps=4, merge=merge)
    upper = along(states)
    outer = outer_gradient(theta, tasks, layer, upper, mode="exact", wrt=tuple(theta))
    assert_slopes(outer.gradient, lambda t: objective(t, tasks, layer, upper), theta)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_passes_along_a_path_equal_one_graph(theta, mode, kind):
    tasks, layer, _ = problem(theta, kind=kind, optimizer=RULES[2], steps=4)
    upper = along((1, 3, 4))
    two = outer_gradient(theta, tasks, layer, upper, mode=mode, wrt=tuple(theta))
    one = naive_outer_gradient(theta, tasks, layer, upper, wrt=tuple(theta))
    assert_close(two.gradient, one.gradient, 1e-9 if mode == "exact" else 1e-5)
    assert two.losses == pytest.approx(one.losses)
    assert two.drift == pytest.approx(one.drift)


def test_first_order_along_a_path_is_the_sum_of_the_gradients_at_its_merged_states(theta):
    tasks, layer, _ = problem(theta, optimizer=RULES[2], steps=3)
    upper = along((1, 3))
    outer = outer_gradient(theta, tasks, layer, upper, mode="first_order", wrt=tuple(theta))
    total = {n: torch.zeros_like(v) for n, v in theta.items()}
    for k, parts in upper.items():
        states = [[dict(s.z) for s in lower.path(task, theta)][k - 1] for task in tasks]
        phi = layer(theta, [{**theta, **z} for z in states])
        leaves = {n: v.detach().requires_grad_() for n, v in phi.items()}
        sum(part(leaves)[0] for part in parts).backward()
        total = {n: total[n] + leaves[n].grad for n in total}
    assert_close(outer.gradient, total, 1e-12)


def test_unmerged_paths_may_differ_in_length(theta):
    tasks, _, _ = problem(theta, steps=2)
    longer, _, _ = problem(theta, steps=4)
    mixed = [tasks[0], longer[1], longer[2]]
    upper = along((2, 4))
    outer = unmerged_gradient(theta, mixed, upper, mode="exact", wrt=tuple(theta))
    alone = MergeLayer(torch.ones(1))
    parts = [
        outer_gradient(
            theta,
            [task],
            alone,
            {k: [upper[k][n]] for k in upper if k <= task.steps},
            mode="exact",
            wrt=tuple(theta),
        )
        for n, task in enumerate(mixed)
    ]
    total = {n: sum(part.gradient[n] for part in parts) for n in theta}
    assert_close(outer.gradient, total, 1e-12)
    layer = MergeLayer(torch.ones(CONCEPTS, dtype=torch.float64))
    with pytest.raises(ValueError, match="differ in length: 2 and 4"):
        outer_gradient(theta, mixed, layer, upper[2], mode="exact", wrt=tuple(theta))


@pytest.mark.parametrize("states", [(), (0, 1), (3,)])
def test_states_that_the_path_lacks_are_refused(states):
    with pytest.raises(ValueError, match=r"states must lie in 1 … 2"):
        along_path(along(states), 2)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("optimizer", RULES, ids=["sgd", "momentum", "adam"])
def test_an_attack_that_goes_on_takes_the_steps_that_one_long_attack_takes(theta, kind, optimizer):
    batches = [Data(k, randn(2, 5, seed=10)) for k in range(6)]
    names = ["key", "value"]

    def task(first, steps, carried=None):
        def loss(params, k):
            return batches[first + k].loss(params)

        if kind == "full":
            return FullWeights(loss, names, steps=steps, optimizer=optimizer, carried=carried)
        return LoraFactors(
            loss,
            {name: theta[name].shape for name in names},
            rank=2,
            scale=1.5,
            generator=torch.Generator().manual_seed(0),
            steps=steps,
            optimizer=optimizer,
            like=theta["key"],
            carried=carried,
        )

    whole = task(0, 6)
    first = task(0, 2)
    first.continues = True
    carried = first.stop(list(lower.path(first, theta))[-1], theta)
    assert carried.age == 2
    second = task(2, 4, carried)
    expected = whole.change(lower.last_state(whole, theta).z, theta)
    actual = second.change(lower.last_state(second, theta).z, theta)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-14)


def test_the_gradient_through_an_attack_that_goes_on(theta):
    tasks, layer, _ = problem(theta, optimizer=RULES[2], steps=3, merge="average")
    went_on = []
    for task in tasks:
        task.continues = True
        carried = task.stop(list(lower.path(task, theta))[-1], theta)
        went_on.append(
            FullWeights(task._loss, task.names, steps=3, optimizer=task.optimizer, carried=carried)
        )
    upper = along((1, 3))
    outer = outer_gradient(theta, went_on, layer, upper, mode="exact", wrt=tuple(theta))
    assert_slopes(outer.gradient, lambda t: objective(t, went_on, layer, upper), theta)
