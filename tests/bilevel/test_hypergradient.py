"""The hypergradient against central differences of the whole outer objective, in float64."""

from collections import Counter
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mima.bilevel import lower
from mima.bilevel.lower import LowerLevel
from mima.bilevel.optimizers import SGD, Adam
from mima.bilevel.outer import naive_outer_gradient, outer_gradient, unmerged_gradient
from mima.bilevel.tasks import FullWeights, LoraFactors
from mima.bilevel.upper import UpperLevel, UpperTerm
from mima.immunization.planning.meta_memory import LiveBytes
from mima.merging import MergeLayer, MergePlan

# a network that reads text: y = V tanh(K c ⊙ x), K projected, V averaged
D, OUT = 5, 4
CONCEPTS = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Data:
    def __init__(self, seed, text):
        self.text, self.x, self.y = text, randn(6, OUT, seed=seed), randn(6, 3, seed=seed + 1)

    def loss(self, params):
        hidden = torch.tanh((params["key"] @ self.text.mean(0)) * self.x)
        return (hidden @ params["value"].mT + params["bias"] - self.y).square().mean()


def level(*parts):
    """An upper level of (name, loss, weight) or (name, loss, weight, cap)."""
    terms = [UpperTerm(name, *settings) for name, _, *settings in parts]
    return UpperLevel(terms, lambda phi: [loss(phi) for _, loss, *_ in parts])


@pytest.fixture
def theta():
    return {"key": randn(OUT, D, seed=1), "value": randn(3, OUT, seed=2), "bias": randn(3, seed=3)}


def problem(theta, *, kind="full", optimizer=None, steps=2, merge="projected", cap=None):
    optimizer = optimizer or SGD(lr=0.3)
    texts = [randn(2, D, seed=10 + n) for n in range(CONCEPTS)]
    tasks: list[LowerLevel] = []
    upper = []
    for n, text in enumerate(texts):
        batches = [Data(100 * n + k, text) for k in range(steps)]

        def loss(params, k, batches=batches):
            return batches[k].loss(params)

        if kind == "full":
            task = FullWeights(loss, list(theta), steps=steps, optimizer=optimizer)
        elif kind == "partial":
            task = FullWeights(loss, ["key"], steps=steps, optimizer=optimizer)
        else:
            task = LoraFactors(
                loss,
                {name: theta[name].shape for name in ("key", "value")},
                rank=2,
                scale=1.5,
                generator=generator(n),
                steps=steps,
                optimizer=optimizer,
                like=theta["key"],
            )
        tasks.append(task)
        upper.append(
            level(
                (f"c{n}", Data(100 * n + 50, text).loss, -1.0, cap),
                (f"p{n}", Data(100 * n + 60, randn(2, D, seed=77)).loss, 0.7),
            )
        )
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    layer = MergeLayer(weights)
    if merge == "projected":
        plan = MergePlan.from_embeddings(texts, randn(40, D, seed=9), weights=weights)
        layer = MergeLayer(weights, plan, ["key"])
    return tasks, layer, upper


def objective(theta, tasks, layer, upper):
    adapted = []
    for task in tasks:
        change = task.change(lower.last_state(task, theta).z, theta)
        adapted.append({n: v + change[n] if n in change else v for n, v in theta.items()})
    phi = layer(theta, adapted)
    return sum(float(part(phi)[0]) for part in upper)


def numeric_gradient(f, theta, name, h=1e-5):
    out = torch.empty_like(theta[name])
    for index in range(out.numel()):
        values = []
        for sign in (1, -1):
            moved = theta[name].clone()
            moved.view(-1)[index] += sign * h
            values.append(f({**theta, name: moved}))
        out.view(-1)[index] = (values[0] - values[1]) / (2 * h)
    return out


def assert_close(a, b, tolerance):
    for name in b:
        error = (a[name] - b[name]).norm() / b[name].norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("merge", ["projected", "average"])
@pytest.mark.parametrize("kind", ["full", "partial", "lora"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.3), Adam(lr=0.1, eps=1e-2)], ids=["sgd", "adam"])
def test_exact_agrees_with_central_differences(theta, merge, kind, steps, optimizer):
    args = problem(theta, kind=kind, optimizer=optimizer, steps=steps, merge=merge)
    outer = outer_gradient(theta, *args, mode="exact", wrt=tuple(theta))
    truth = {n: numeric_gradient(lambda t: objective(t, *args), theta, n) for n in theta}
    assert_close(outer.gradient, truth, 1e-6)


@pytest.mark.parametrize("kind", ["full", "partial", "lora"])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.3), Adam(lr=0.1)], ids=["sgd", "adam"])
def test_two_passes_equal_holding_every_graph(theta, kind, optimizer):
    args = problem(theta, kind=kind, optimizer=optimizer, steps=3)
    outer = outer_gradient(theta, *args, mode="exact", wrt=tuple(theta))
    naive = naive_outer_gradient(theta, *args, wrt=tuple(theta))
    assert_close(outer.gradient, naive.gradient, 1e-10)
    assert outer.losses == pytest.approx(naive.losses, rel=1e-12)
    assert outer.drift == pytest.approx(naive.drift, rel=1e-12)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.3), Adam(lr=0.1, eps=1e-2)], ids=["sgd", "adam"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("steps", [1, 3])
def test_finite_difference_agrees_with_exact_on_the_second_order_part(
    theta, kind, steps, optimizer
):
    args = problem(theta, kind=kind, optimizer=optimizer, steps=steps)
    modes = {
        mode: outer_gradient(theta, *args, mode=mode, wrt=tuple(theta)).gradient
        for mode in ("exact", "finite_difference", "first_order")
    }
    second = {n: modes["exact"][n] - modes["first_order"][n] for n in theta}
    estimate = {n: modes["finite_difference"][n] - modes["first_order"][n] for n in theta}
    assert_close(estimate, second, 1e-3)


def test_finite_difference_holds_in_float32(theta):
    theta = {name: value.float() for name, value in theta.items()}
    batches = [Data(k, randn(2, D, seed=10)) for k in range(2)]
    for data in batches:
        data.text, data.x, data.y = data.text.float(), data.x.float(), data.y.float()
    task = FullWeights(
        lambda params, k: batches[k].loss(params), list(theta), steps=2, optimizer=SGD(lr=0.3)
    )
    args = [task], MergeLayer(torch.ones(1)), [level(("c", batches[0].loss, -1.0))]
    modes = {
        mode: outer_gradient(theta, *args, mode=mode, wrt=tuple(theta)).gradient
        for mode in ("exact", "finite_difference", "first_order")
    }
    second = {n: modes["exact"][n] - modes["first_order"][n] for n in theta}
    estimate = {n: modes["finite_difference"][n] - modes["first_order"][n] for n in theta}
    assert_close(estimate, second, 1e-3)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_differences_of_gradients_are_never_in_tf32(theta, mode):
    tasks, layer, upper = problem(theta, steps=1)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    seen = []

    def settings():
        return products.fp32_precision, convolutions.fp32_precision

    for task in tasks:
        loss_of = task._loss
        task._loss = lambda params, k, loss_of=loss_of: (
            seen.append(settings()) or loss_of(params, k)
        )
    before = settings()
    try:
        products.fp32_precision = convolutions.fp32_precision = "tf32"
        outer_gradient(theta, tasks, layer, upper, mode=mode, wrt=tuple(theta))
        assert settings() == ("tf32", "tf32")
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
    differences = 2 * CONCEPTS if mode == "finite_difference" else 0
    assert seen.count(("ieee", "ieee")) == differences
    assert seen.count(("tf32", "tf32")) == len(seen) - differences > 0


@pytest.mark.parametrize("kept", [0, 2**28], ids=["walked-again", "kept"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("mode", "optimizer", "walked", "again"),
    [
        ("first_order", SGD(lr=0.3), lambda steps: 0, 0),
        # the way to the last step, then one with a graph for each
        ("exact", SGD(lr=0.3), lambda steps: steps - 1, 1),
        # the way to the last step, whose gradient Adam's rule reads, then two for each
        ("finite_difference", SGD(lr=0.3), lambda steps: steps - 1, 2),
        ("finite_difference", Adam(lr=0.1), lambda steps: steps, 2),
    ],
)
def test_no_mode_evaluates_the_lower_loss_more_often_than_it_must(
    theta, monkeypatch, mode, optimizer, walked, again, steps, kept
):
    monkeypatch.setattr("mima.bilevel.outer.KEPT", kept)
    tasks, layer, upper = problem(theta, optimizer=optimizer, steps=steps)
    calls = []
    for task in tasks:
        loss_of = task._loss
        task._loss = lambda params, k, loss_of=loss_of: calls.append(k) or loss_of(params, k)
    outer_gradient(theta, tasks, layer, upper, mode=mode, wrt=tuple(theta))
    # a path of one step is none to keep
    way = 0 if kept and steps > 1 else walked(steps)
    assert len(calls) == CONCEPTS * (steps + way + again * steps)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.3, momentum=0.9), Adam(lr=0.1)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_kept_paths_are_those_that_would_be_walked_again(theta, monkeypatch, mode, optimizer, kind):
    args = problem(theta, kind=kind, optimizer=optimizer, steps=3)
    one = lower.path_bytes(
        args[0][0], theta, with_gradients=mode != "exact" and optimizer.reads_gradient
    )
    walked = []
    descend = lower.descend
    monkeypatch.setattr(
        *(lower, "descend"), lambda *args, **kw: walked.append(1) or descend(*args, **kw)
    )
    found = []
    for room in (0, 2 * one, CONCEPTS * one):
        monkeypatch.setattr("mima.bilevel.outer.KEPT", room)
        found.append(outer_gradient(theta, *args, mode=mode, wrt=tuple(theta)))
    # all, the third, none
    assert len(walked) == CONCEPTS + 1
    for other in found[1:]:
        for name in theta:
            assert torch.equal(other.gradient[name], found[0].gradient[name])
        assert other.losses == found[0].losses


class OperatorCalls(TorchDispatchMode):
    """Count the calls of mima's operators, each of a whole list of tensors."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mima":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [0, 2**28], ids=["walked-again", "kept"])
@pytest.mark.parametrize(
    ("optimizer", "stepped", "pulled"),
    [
        (Adam(lr=0.1), "adam_step", "adam_step_backward"),
        (SGD(lr=0.1), "combine", "combine"),
        (SGD(lr=0.1, momentum=0.9), "combine", "combine"),
    ],
    ids=["adam", "sgd", "momentum"],
)
def test_an_outer_step_calls_the_operators(theta, monkeypatch, optimizer, stepped, pulled, kept):
    monkeypatch.setattr("mima.bilevel.outer.KEPT", kept)
    tasks, layer, upper = problem(theta, optimizer=optimizer, steps=2)
    with OperatorCalls() as counted:
        outer_gradient(theta, tasks, layer, upper, mode="exact", wrt=tuple(theta))
    # once for all concepts: what they add to the projected weight, and the constraint's residual
    expected = Counter(add_token_outputs_=1, token_outputs=1)
    # of each concept: its share added to the average, and what it asks for; the gradient at both
    for name in ("combine_", "token_outputs"):
        expected[name] += CONCEPTS
    for name in ("weighted_merge_backward", "projected_merge_backward"):
        expected[name] += CONCEPTS
    # two steps and two back; and the first again, where its path was not kept
    expected[stepped] += (2 if kept else 3) * CONCEPTS
    expected[pulled] += 2 * CONCEPTS
    # on a first pass that is not kept, momentum's steps take the memory of what they read
    if getattr(optimizer, "momentum", 0) and not kept:
        expected["combine"] -= 2 * CONCEPTS
        expected["combine_"] += 2 * CONCEPTS
    assert dict(counted.calls) == dict(expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_merge_keeps_the_memory_of_one_concept(kind):
    """Another concept adds to the peak what it asks of the projected weight, and no weight."""
    theta = {"key": torch.randn(256, 256), "value": torch.randn(256, 256)}
    texts = [torch.randn(2, 256) for _ in range(6)]

    def loss(params, k=0):
        return sum(F.linear(params[name], theta[name]).square().sum() for name in theta)

    def peak(count):
        plan = MergePlan.from_embeddings(texts[:count], torch.randn(300, 256))
        layer = MergeLayer(torch.full((count,), 1 / count), plan, ["key"])
        rule = {"steps": 2, "optimizer": SGD(lr=0.1, momentum=0.9)}
        task = FullWeights(loss, list(theta), **rule)
        if kind == "lora":
            shapes = {name: value.shape for name, value in theta.items()}
            like = {"rank": 1, "scale": 1.0, "generator": generator(), "like": theta["key"]}
            task = LoraFactors(loss, shapes, **like, **rule)
        held = [*theta.values(), *plan.C, *plan.M]
        with LiveBytes(held, [], "cpu") as live:
            outer_gradient(
                *(theta, [task] * count, layer, [level(("one", loss, -1.0))] * count),
                mode="first_order",
                wrt=tuple(theta),
            )
        return live.peak

    # with three, the sums over concepts are as long-lived as they get
    assert peak(6) - peak(3) < theta["key"].nbytes / 10


def test_kept_paths_take_no_more_memory_than_they_may(monkeypatch):
    """Whatever the number of concepts: those that do not fit are walked again, one by one."""
    theta = {"key": torch.randn(64, 64), "value": torch.randn(64, 64)}

    def loss(params, k=0):
        return sum(F.linear(params[name], theta[name]).square().sum() for name in theta)

    task = FullWeights(loss, list(theta), steps=3, optimizer=Adam(lr=0.1))
    one = lower.path_bytes(task, theta)

    def peak(count, room):
        monkeypatch.setattr("mima.bilevel.outer.KEPT", room)
        layer = MergeLayer(torch.full((count,), 1 / count))
        with LiveBytes(theta.values(), [], "cpu") as live:
            outer_gradient(
                *(theta, [task] * count, layer, [level(("one", loss, -1.0))] * count),
                mode="exact",
                wrt=tuple(theta),
            )
        return live.peak

    # state 0 is θ itself
    within = one + theta["key"].nbytes
    assert peak(2, 4 * one) - peak(2, 0) < within
    assert within < peak(6, 4 * one) - peak(6, 0) <= 4 * one
    assert peak(9, 4 * one) - peak(6, 4 * one) < theta["key"].nbytes


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_first_order_is_the_limit_of_small_lower_steps(theta, kind):
    gaps = []
    for lr in (1e-2, 1e-4, 1e-6):
        args = problem(theta, kind=kind, optimizer=SGD(lr=lr))
        exact = outer_gradient(theta, *args, mode="exact", wrt=tuple(theta)).gradient
        first = outer_gradient(theta, *args, mode="first_order", wrt=tuple(theta)).gradient
        gaps.append(sum(float((exact[n] - first[n]).norm()) for n in theta))
    # the gap is the second-order part, of order lr (lr² for LoRA, whose B starts at 0)
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]


def test_a_capped_concept_does_not_pull(theta):
    tasks, layer, upper = problem(theta, cap=1e-9)
    outer = outer_gradient(theta, tasks, layer, upper, mode="exact", wrt=tuple(theta))
    priors = [
        UpperLevel(part.terms[1:], lambda phi, part=part: part.losses(phi)[1:]) for part in upper
    ]
    kept = outer_gradient(theta, tasks, layer, priors, mode="exact", wrt=tuple(theta))
    assert_close(outer.gradient, kept.gradient, 1e-12)


def test_parts_of_several_concepts_give_the_same(theta):
    # a cap that holds one of a part's concepts and not the other
    tasks, layer, upper = problem(theta, cap=1.6)
    first, second, third = upper
    both = UpperLevel(
        [*first.terms, *second.terms], lambda phi: [*first.losses(phi), *second.losses(phi)]
    )
    one, other = (
        outer_gradient(theta, tasks, layer, parts, mode="exact", wrt=tuple(theta))
        for parts in (upper, [both, third])
    )
    assert one.losses["c1"] < 1.6 < one.losses["c0"]
    assert_close(other.gradient, one.gradient, 1e-12)
    assert other.losses == pytest.approx(one.losses, rel=1e-12)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.3), Adam(lr=0.1, eps=1e-2)], ids=["sgd", "adam"])
@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_weights_that_no_batch_reads_stay(theta, mode, optimizer):
    args = problem(theta, optimizer=optimizer)
    expected = outer_gradient(theta, *args, mode="exact", wrt=tuple(theta)).gradient
    wider = {**theta, "unread": randn(2, 3, seed=5)}
    args = problem(wider, optimizer=optimizer)
    ours = outer_gradient(wider, *args, mode=mode, wrt=tuple(wider)).gradient
    assert not ours.pop("unread").any()
    assert_close(ours, expected, 1e-6)
    naive = naive_outer_gradient(wider, *args, wrt=tuple(wider)).gradient
    assert not naive.pop("unread").any()
    assert_close(naive, expected, 1e-10)


def test_unmerged_sums_the_single_concept_problems(theta):
    tasks, _, upper = problem(theta)
    joint = unmerged_gradient(theta, tasks, upper, mode="exact", wrt=("key",))
    alone = MergeLayer(torch.ones(1))

    def total(t):
        return sum(objective(t, [tasks[n]], alone, [upper[n]]) for n in range(CONCEPTS))

    assert_close(joint.gradient, {"key": numeric_gradient(total, theta, "key")}, 1e-6)


def test_closed_form_of_a_quadratic_lower_level():
    """SGD on ½(z − t)ᵀH(z − t): θ' = t + (I − lr H)ᴷ(θ − t), and ½|θ'|² has a known gradient."""
    H = randn(4, 4, seed=1)
    H = H @ H.mT
    target, start, lr = randn(4, seed=2), randn(4, seed=3), 0.05

    def loss(params, k):
        gap = params["z"] - target
        return 0.5 * gap @ H @ gap

    steps = 3
    task = FullWeights(loss, ["z"], steps=steps, optimizer=SGD(lr=lr))
    upper = [level(("u", lambda p: 0.5 * p["z"].square().sum(), 1.0))]
    outer = outer_gradient(
        {"z": start}, [task], MergeLayer(torch.ones(1)), upper, mode="exact", wrt=("z",)
    )
    contraction = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - lr * H, steps)
    adapted = target + contraction @ (start - target)
    torch.testing.assert_close(outer.gradient["z"], contraction.mT @ adapted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_the_optimum_of_a_quadratic_problem_is_found(mode):
    """Three quadratic lower levels, merged: φ = B θ + c, and the best φ is known.

    θ'[n] = t_n + A_n (θ − t_n) with A_n = (I − lr H_n)ᴷ, so B = I + Σ w_n (A_n − I) and
    c = Σ w_n (I − A_n) t_n; the minimum of ½ (φ − s)ᵀ Q (φ − s) is at B θ = s − c.
    """
    eye, steps, lr = torch.eye(4, dtype=torch.float64), 2, 0.1
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    tasks, B, c = [], eye.clone(), torch.zeros(4, dtype=torch.float64)
    for n, w in enumerate(weights):
        root, t = randn(4, 4, seed=n), randn(4, seed=10 + n)
        H = root @ root.mT / 4 + eye

        def loss(params, k, H=H, t=t):
            return 0.5 * (params["z"] - t) @ H @ (params["z"] - t)

        tasks.append(FullWeights(loss, ["z"], steps=steps, optimizer=SGD(lr=lr)))
        A = torch.linalg.matrix_power(eye - lr * H, steps)
        B, c = B + w * (A - eye), c + w * (eye - A) @ t
    root, s = randn(4, 4, seed=20), randn(4, seed=21)
    Q = root @ root.mT + eye
    upper = [level(("u", lambda p: 0.5 * (p["z"] - s) @ Q @ (p["z"] - s), 1.0))]
    best = torch.linalg.solve(B, s - c)

    def gradient(z):
        args = tasks, MergeLayer(weights), upper
        return outer_gradient({"z": z}, *args, mode=mode, wrt=("z",)).gradient["z"]

    z = randn(4, seed=22)
    torch.testing.assert_close(gradient(z), B.mT @ Q @ (B @ z + c - s), rtol=1e-6, atol=0)
    curvature = torch.linalg.eigvalsh(B.mT @ Q @ B)
    for _ in range(150):
        z = z - 2 / (curvature[0] + curvature[-1]) * gradient(z)
    torch.testing.assert_close(z, best, rtol=1e-4, atol=1e-4)


def test_the_second_order_part_matters():
    """A steep lower level undoes what first_order does: only exact finds the better start.

    ½ h (z − t)² with lr·h = 1.5 overshoots: θ' − t = −½ (θ − t). Moving θ' up needs θ to go down,
    which first_order, taking dθ'/dθ for 1, never does.
    """
    h, lr, target = 15.0, 0.1, 1.0
    task = FullWeights(
        lambda p, k: 0.5 * h * (p["z"] - target).square().sum(),
        ["z"],
        steps=1,
        optimizer=SGD(lr=lr),
    )
    upper = [level(("u", lambda p: 0.5 * (p["z"] - 3.0).square().sum(), 1.0))]
    reached = {}
    for mode in ("exact", "first_order"):
        z = torch.tensor([0.0], dtype=torch.float64)
        for _ in range(20):
            outer = outer_gradient(
                {"z": z}, [task], MergeLayer(torch.ones(1)), upper, mode=mode, wrt=("z",)
            )
            z = z - 0.5 * outer.gradient["z"]
        reached[mode] = outer.losses["u"]
    assert reached["exact"] < 0.1 < reached["first_order"]


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (torch.optim.AdamW, Adam(lr=0.1, weight_decay=0.01)),
        (torch.optim.SGD, SGD(lr=0.1, momentum=0.9)),
    ],
    ids=["adam", "momentum"],
)
def test_rule_equals_torch(kind, rule):
    parameter = torch.nn.Parameter(randn(6, seed=1))
    reference = kind([parameter], **asdict(rule))
    z, state = [parameter.detach().clone()], [rule.init(parameter.detach())]
    for k in range(4):
        g = randn(6, seed=20 + k)
        parameter.grad = g.clone()
        reference.step()
        z, state = rule.step(z, [g], state, k, overwrite=k > 0)
    torch.testing.assert_close(z[0], parameter.detach())


@pytest.mark.parametrize(
    "rule", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adam(lr=0.1, weight_decay=0.02, eps=1e-3)]
)
def test_a_rules_pullback_is_the_adjoint_of_its_step(rule):
    z, g = ([randn(*s, seed=seed) for s in ((3, 2), (4,))] for seed in (1, 2))
    state = [tuple(randn(*x.shape, seed=3).square() for _ in rule.init(x)) for x in z]
    leaves = [x.requires_grad_() for x in (*z, *g, *(x for vector in state for x in vector))]
    stepped, after = rule.step(z, g, state, 3)
    outputs = [*stepped, *(x for vector in after for x in vector)]
    bars = [randn(*x.shape, seed=5 + i) for i, x in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, leaves, bars, allow_unused=True, materialize_grads=True)
    rest = iter(bars[2:])
    state_bar = [tuple(next(rest) for _ in vector) for vector in state]
    z_bar, g_bar, memory_bar = rule.pullback(bars[:2], state_bar, g, state, 3)
    actual = [*z_bar, *g_bar, *(x for vector in memory_bar for x in vector)]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_adam_has_finite_derivatives_where_no_gradient_was_seen():
    z, g = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64).requires_grad_()
    rule = Adam(lr=0.1)
    (stepped,), _ = rule.step([z], [g], [rule.init(z)], 0)
    (slope,) = torch.autograd.grad(stepped.sum(), g)
    assert torch.isfinite(slope).all()
