"""Other concepts stay learnable: benign adaptations beside the attacks, and attacks after them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from support import immunizing

from mima.bilevel import lower
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem

UPPER = {"parameters": "denoiser", "objective": "log", "retain": "distill", "ascent_ratio": 0.5}
BENIGN = {"weight": 2.0, "lower": {"steps": 2, "lr": 1e-3, "parameters": "lora"}}


def settings(folder, benign=BENIGN, **changes):
    defaults = {"method": "joint", "lower": {"steps": 2, "lr": 1e-3}}
    return immunizing.settings(folder, upper=UPPER | {"benign": benign}, **(defaults | changes))


def others(count=2):
    return immunizing.concepts(4)[-count:]


def make(model, config, count=2):
    family = family_of(load_pipeline(str(model)))
    data = encode_concepts(family, immunizing.concepts(1), config)
    benign = encode_concepts(family, others(count), config, benign=True)
    assert all(concept.class_images is None for concept in benign)
    return Problem(family, data, config, None, benign=benign)


def moved(theta, names):
    draw = torch.Generator().manual_seed(0)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=draw) if name in names else value
        for name, value in theta.items()
    }


def test_the_model_before_immunization_matches_itself(model, tmp_path):
    problem = make(model, settings(tmp_path))
    theta = problem.theta()
    pulled = problem._benign.gradient(moved(theta, problem.upper_names), 0)
    assert pulled.norm > 1e-3
    for step in range(3):
        benign = problem._benign.gradient(theta, step)
        # predictions differ by rounding where they are made with a graph and without one
        assert benign.norm < 20 * torch.finfo(torch.float32).eps * pulled.norm
        assert {name.kind for name in benign.losses} == {"benign"}


@pytest.mark.parametrize("target", ["match", "held_out"])
@pytest.mark.parametrize("mode", ["first_order", "exact"])
def test_the_term_is_its_formula(model, tmp_path, target, mode):
    paths = {"paths": 1} if target == "match" else {}
    benign = BENIGN | {"target": target, "path_every": 1, **paths}
    problem = make(model, settings(tmp_path, benign, hypergradient=mode))
    terms, before = problem._benign, problem.theta()
    theta = moved(before, problem.upper_names)

    outer = terms.gradient(theta, 4)
    ((concept, _),) = outer.losses
    b = [other.name for other in problem.benign].index(concept)
    j = 4 if target == "held_out" else 0

    def total(theta):
        """The term at step 4, at both states of the one path that it draws."""
        task, value = terms._adaptation(b, j), 0.0
        starts = (theta, before)
        ends = [[dict(state.z) for state in lower.path(task, start)] for start in starts]
        for k in (1, 2):
            (v, goal), (v_before, _) = (
                problem.predictions(
                    [terms._held_out(b, j, k)],
                    {n: x + task.change(z[k - 1], start).get(n, 0) for n, x in start.items()},
                )[0]
                for z, start in zip(ends, starts, strict=True)
            )
            value = value + 2.0 * F.mse_loss(v, v_before if target == "match" else goal)
        return float(value)

    name = max(problem.upper_names, key=lambda n: float(outer.gradient[n].norm()))
    direction = outer.gradient[name] / outer.gradient[name].norm()
    with torch.no_grad():
        ahead, behind = (total({**theta, name: theta[name] + h * direction}) for h in (1e-2, -1e-2))
    slope = float((outer.gradient[name] * direction).sum())
    # first_order leaves out what the path's steps do to a slope
    tolerance = 0.05 if mode == "exact" else 0.3
    assert slope == pytest.approx((ahead - behind) / 2e-2, rel=tolerance)


def test_it_is_added_to_what_retains(model, tmp_path):
    config = settings(tmp_path, BENIGN | {"every": 2})
    problem = make(model, config)
    theta = moved(problem.theta(), problem.upper_names)
    both = [problem.retaining_gradient(theta, step) for step in range(2)]
    terms, problem._benign = problem._benign, None
    for step, one in enumerate(both):
        alone = problem.retaining_gradient(theta, step)
        benign = terms.gradient(theta, step)
        assert (benign is None) == (step == 1)
        for name, value in one.gradient.items():
            more = benign.gradient[name] if benign else 0
            torch.testing.assert_close(value, alone.gradient[name] + more)
        assert [name.kind for name in one.losses] == ["prior", "benign"][: 2 - step]


def test_what_the_start_becomes_is_computed_once_for_each_path(model, tmp_path, monkeypatch):
    problem = make(model, settings(tmp_path, BENIGN | {"paths": 2}), 1)
    terms, theta, begun = problem._benign, problem.theta(), []
    paths = lower.paths

    def recorded(tasks, at, *args, **options):
        begun.append(at)
        return paths(tasks, at, *args, **options)

    monkeypatch.setattr(lower, "paths", recorded)
    for step in range(12):
        terms.gradient(moved(theta, problem.upper_names), step)
    at_the_start = [at for at in begun if at is terms._before]
    assert len(at_the_start) == 2
    assert len(begun) == 12 + 2


def test_an_attacker_may_begin_with_a_benign_concept(model, tmp_path):
    kinds = {"steps": 1, "lr": 1e-2, "parameters": "lora", "benign_start": (0, 3), "age": (2, 9)}
    problem = make(model, settings(tmp_path, None, lower=kinds))
    theta, seen = problem.theta(), set()
    for step in range(12):
        b, steps = problem.attacker(0, step, {}).begins_with(2)
        task = problem.lower_level(0, step)
        begun = lower.start(task, theta)
        change = task.change(begun.z, theta)
        assert any(value.any() for value in change.values()) == bool(steps)
        assert task.age == 0
        assert not any(value.any() for memory in begun.memory.values() for value in memory)
        seen.add((b, steps))
    assert {b for b, _ in seen} == {0, 1}
    assert {steps for _, steps in seen} == {0, 1, 2, 3}
    alive = problem.survivors(0, {}, {0: task.stop(list(lower.path(task, theta))[-1], theta)})
    assert problem.lower_level(0, 1, alive).age == 1


def test_a_run_with_benign_concepts_goes_on_bit_by_bit_and_names_them(model, tmp_path):
    kinds = [
        {"steps": 1, "lr": 1e-3, "benign_start": (1, 2), "age": (2, 4)},
        {"steps": 1, "lr": 1e-3, "parameters": "lora", "captions": ("empty", "rare_token")},
    ]
    config = settings(tmp_path, lower=kinds, steps=3)
    whole = immunize(
        model, immunizing.concepts(1), config, benign=others(), output=tmp_path / "whole"
    )
    assert all(report.benign_losses for report in whole.history)

    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    run = {"benign": others(), "output": tmp_path / "half"}
    with pytest.raises(KeyboardInterrupt):
        immunize(model, immunizing.concepts(1), config, callbacks=[interrupt], **run)
    with pytest.raises(MimaError, match=r"benign\.0\.name: bird then, fish now"):
        immunize(
            model, immunizing.concepts(1), config, resume=True, **(run | {"benign": others(1)})
        )
    immunize(model, immunizing.concepts(1), config, resume=True, **run)
    immunizing.assert_same(*(immunizing.weights(tmp_path / name) for name in ("half", "whole")))
    saw = json.loads((tmp_path / "half" / "mima.json").read_text())["saw"]
    assert saw["benign"]["concepts"] == [concept.name for concept in others()]
    assert "a sks in red" in saw["lower"]["prompts"]
    card = (tmp_path / "half" / "README.md").read_text()
    assert "so that they stay learnable: bird, fish" in card


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, (), "upper.benign: there are no benign concepts"),
        (
            {"benign": None, "lower": {"benign_start": (1, 2)}},
            (),
            "lower.benign_start: there are no benign concepts",
        ),
        ({"benign": None}, others(1), "benign: nothing reads these concepts"),
        ({}, immunizing.concepts(1), "benign: cat cannot both stay learnable and become immune"),
    ],
)
def test_benign_concepts_are_asked_for_and_read(tmp_path, config, given, message):
    with pytest.raises(MimaError, match=message):
        immunize("absent", immunizing.concepts(1), settings(tmp_path, **config), benign=given)


def test_a_step_of_all_of_it_evaluates_nothing_twice(model, tmp_path, monkeypatch):
    """Forwards with and without a graph, and backwards, of one outer step in first order."""
    attackers = {"steps": 5, "lr": 1e-3, "parameters": "denoiser", "age": (20, 20)}
    config = settings(tmp_path, BENIGN | {"paths": 1}, lower=attackers)
    upper = config.upper.model_copy(update={"objective": "hinge", "margin": 9.0, "path_every": 3})
    problem = make(model, config.model_copy(update={"upper": upper}), 1)
    counts = {"graph": 0, "none": 0, "backward": 0}
    predict = type(problem.family).predict
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def counted(self, *args):
        counts["graph" if torch.is_grad_enabled() else "none"] += 1
        return predict(self, *args)

    def differentiating(function):
        def counting(*args, **options):
            counts["backward"] += 1
            return function(*args, **options)

        return counting

    monkeypatch.setattr(type(problem.family), "predict", counted)
    monkeypatch.setattr(torch.autograd, "grad", differentiating(grad))
    monkeypatch.setattr(torch.autograd, "backward", differentiating(backward))
    theta = problem.theta()
    outer = problem.hypergradient(theta, problem.lower_levels(0), problem.upper_path(0))
    # five steps of the attack, two states of its path, each beside the start's prediction
    assert counts == {"graph": 5 + 2, "none": 2, "backward": 5 + 2}
    assert list(outer.ends) == [0]
    for step, before in ((0, 2), (1, 0)):
        counts.update(graph=0, none=0, backward=0)
        problem.retaining_gradient(theta, step)
        # two steps of a benign adaptation and its end; the start's path is kept from the first time
        at_the_start = {"graph": before, "none": 1 if before else 0, "backward": before}
        expected = {"graph": 1 + 2 + 1, "none": 1, "backward": 1 + 2 + 1}
        assert counts == {kind: expected[kind] + at_the_start[kind] for kind in counts}
