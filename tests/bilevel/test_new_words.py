"""New words in the lower level: the gradient goes through the merge plan, which they move."""

import pytest
import torch
from bilevel.test_hypergradient import (
    OUT,
    D,
    assert_close,
    generator,
    level,
    numeric_gradient,
    randn,
)

from mima import reference
from mima.bilevel import lower
from mima.bilevel.optimizers import SGD, Adam
from mima.bilevel.outer import naive_outer_gradient, outer_gradient
from mima.bilevel.tasks import FullWeights, LoraFactors, NewWord
from mima.merging import MergeLayer, MergePlan

WORD = "word"
CAPTIONS = randn(40, D, seed=9)
WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)
SGD_RULE, ADAM_RULE = SGD(lr=0.3), Adam(lr=0.1, eps=1e-2)


@pytest.fixture
def theta():
    return {"key": randn(OUT, D, seed=1), "value": randn(3, OUT, seed=2), "bias": randn(3, seed=3)}


def text(n, word):
    """C_n: a fixed token, the new word, and one that reads it, as a text encoder's tokens do."""
    mix = randn(D, D, seed=200 + n)
    return torch.stack([randn(D, seed=300 + n), word, torch.tanh(mix @ word)])


def loss_of(n, seed):
    x, y = randn(6, OUT, seed=seed), randn(6, 3, seed=seed + 1)

    def loss(params):
        hidden = torch.tanh((params["key"] @ text(n, params[WORD]).mean(0)) * x)
        return (hidden @ params["value"].mT + params["bias"] - y).square().mean()

    return loss


def problem(theta, kind, optimizer, steps):
    tasks, upper = [], []
    starts = [randn(D, seed=10 + n) for n in range(2)]
    for n, start in enumerate(starts):
        batches = [loss_of(n, 100 * n + 10 * k) for k in range(steps)]

        def loss(params, k, batches=batches):
            return batches[k](params)

        options = {"steps": steps, "optimizer": optimizer}
        if kind == "lora":
            shapes = {name: theta[name].shape for name in ("key", "value")}
            like = {"rank": 2, "scale": 1.5, "generator": generator(n), "like": theta["key"]}
            weights = LoraFactors(loss, shapes, **like, **options)
        else:
            weights = FullWeights(loss, [] if kind == "alone" else ["key", "bias"], **options)
        tasks.append(NewWord(weights, WORD, start, lambda word, n=n: text(n, word)))
        upper.append(level((f"c{n}", loss_of(n, 50 + n), -1.0), (f"p{n}", loss_of(n, 60), 0.7)))
    plan = MergePlan.from_embeddings(
        [text(n, start) for n, start in enumerate(starts)], CAPTIONS, weights=WEIGHTS
    )
    return tasks, MergeLayer(WEIGHTS, plan, ["key"], trained_tokens=True), upper


def objective(theta, tasks, upper):
    """The outer objective by its formulas, without the engine's merge."""
    ends = [lower.last_state(task, theta).z for task in tasks]
    changes = [task.change(z, theta) for task, z in zip(tasks, ends, strict=True)]
    C = [text(n, change[WORD]) for n, change in enumerate(changes)]
    M = reference.merge_plan(C, CAPTIONS, 1e-4, WEIGHTS)
    phi = dict(theta)
    for n, change in enumerate(changes):
        for name, value in change.items():
            if name == "key":
                phi[name] = phi[name] + value @ C[n].mT @ M[n]
            elif name != WORD:
                phi[name] = phi[name] + WEIGHTS[n] * value
    return sum(
        float(part({**phi, WORD: change[WORD]})[0])
        for change, part in zip(changes, upper, strict=True)
    )


@pytest.mark.parametrize("kind", ["full", "lora", "alone"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [SGD_RULE, ADAM_RULE], ids=["sgd", "adam"])
def test_exact_agrees_with_central_differences(theta, kind, steps, optimizer):
    tasks, layer, upper = problem(theta, kind, optimizer, steps)
    outer = outer_gradient(theta, tasks, layer, upper, mode="exact", wrt=tuple(theta))
    truth = {n: numeric_gradient(lambda t: objective(t, tasks, upper), theta, n) for n in theta}
    assert_close(outer.gradient, truth, 1e-6)


@pytest.mark.parametrize("kind", ["full", "lora", "alone"])
@pytest.mark.parametrize("optimizer", [SGD_RULE, ADAM_RULE], ids=["sgd", "adam"])
def test_two_passes_equal_holding_every_graph(theta, kind, optimizer):
    args = problem(theta, kind, optimizer, 2)
    outer = outer_gradient(theta, *args, mode="exact", wrt=tuple(theta))
    naive = naive_outer_gradient(theta, *args, wrt=tuple(theta))
    assert_close(outer.gradient, naive.gradient, 1e-6)
    assert outer.losses == pytest.approx(naive.losses, rel=1e-10)


@pytest.mark.parametrize("kind", ["full", "lora", "alone"])
@pytest.mark.parametrize("optimizer", [SGD_RULE, ADAM_RULE], ids=["sgd", "adam"])
def test_finite_difference_agrees_on_the_second_order_part(theta, kind, optimizer):
    args = problem(theta, kind, optimizer, 2)
    exact, estimate, first = (
        outer_gradient(theta, *args, mode=mode, wrt=tuple(theta)).gradient
        for mode in ("exact", "finite_difference", "first_order")
    )
    second = {n: exact[n] - first[n] for n in theta}
    assert_close({n: estimate[n] - first[n] for n in theta}, second, 1e-3)


def test_first_order_is_the_limit_of_small_lower_steps(theta):
    gaps = []
    for lr in (1e-2, 1e-4):
        args = problem(theta, "full", SGD(lr=lr), 2)
        exact, first = (
            outer_gradient(theta, *args, mode=mode, wrt=tuple(theta)).gradient
            for mode in ("exact", "first_order")
        )
        gaps.append(sum(float((exact[n] - first[n]).norm()) for n in theta))
    assert gaps[0] > 50 * gaps[1] > 0


def test_the_plan_follows_the_words(theta):
    tasks, layer, upper = problem(theta, "full", SGD_RULE, 2)
    moving = outer_gradient(theta, tasks, layer, upper, mode="exact", wrt=("key",))
    still = MergeLayer(WEIGHTS, layer.plan, ["key"])
    fixed = outer_gradient(theta, tasks, still, upper, mode="exact", wrt=("key",))
    assert (moving.gradient["key"] - fixed.gradient["key"]).norm() > 1e-3 * moving.norm
