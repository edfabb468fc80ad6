"""Attackers: what they draw, how long they live, and that a run with them can be interrupted."""

from __future__ import annotations

import math

import pytest
import torch
from support import immunizing, tiny

from mima.bilevel import lower
from mima.bilevel.lower import Carried
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.attacks import Alive, Attack, from_tensors, to_tensors
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem, merge_layer
from mima.immunization.outer_loop import Ascent
from mima.settings import parse_config
from mima.storage.checkpoint import CheckpointFolder

LIVING = {"steps": 2, "lr": (1e-4, 1e-2), "parameters": "denoiser", "age": (3, 9)}
UPPER = {
    "parameters": "denoiser",
    "objective": "log",
    "retain": "distill",
    "ascent_ratio": 0.5,
    "lr": 1e-3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


def settings(folder, **changes):
    defaults = {"lower": LIVING, "upper": UPPER, "method": "joint"}
    return immunizing.settings(folder, **(defaults | changes))


def make(model, config, count=2):
    family = family_of(load_pipeline(str(model)))
    concepts = immunizing.concepts(count)
    data = encode_concepts(family, concepts, config)
    return Problem(family, data, config, merge_layer(family, concepts, config))


def interrupted(model, config, folder, at=2):
    """The denoiser of a run that is stopped after a step and resumed."""

    def interrupt(report):
        if report.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunize(model, immunizing.concepts(), config, checkpoint=folder, callbacks=[interrupt])
    resumed = immunize(model, immunizing.concepts(), config, checkpoint=folder, resume=True)
    return resumed.pipeline.unet.state_dict()


def test_ages_are_drawn_log_uniformly_between_two():
    config = LowerConfig(steps=1, age=(10, 1000))
    ages = []
    for born in range(400):
        attack = Attack(config, 0, 0, born)
        ages.append(int(10 * (1001 / 10) ** attack._draw("age")))
    assert 10 <= min(ages) < 13
    assert 800 < max(ages) <= 1000
    assert sum(age < 100 for age in ages) / len(ages) == pytest.approx(0.5, abs=0.08)


def test_an_attacker_goes_on_until_its_age_and_another_begins(model, tmp_path):
    problem = make(model, settings(tmp_path))
    seen, alive = {n: [] for n in range(2)}, {}
    for step in range(30):
        ends = {}
        for n in range(2):
            attack = problem.attack(n, step, alive)
            age = attack.carried.age if attack.carried else 0
            seen[n].append((attack.born, age, attack.lr, attack.split(4)[0].tolist()))
            if problem.lower_level(n, step, alive).continues:
                ends[n] = Carried({"w": torch.zeros(1)}, {"w": ()}, age + 2)
        alive = problem.survivors(step, alive, ends)
    for attacks in seen.values():
        lives = {born: [a for a in attacks if a[0] == born] for born, *_ in attacks}
        assert len(lives) > 3
        for born, life in list(lives.items())[:-1]:
            # of steps 2 each: ages 0, 2, 4 before a step, until the drawn age of 3 to 9 is reached
            assert [age for _, age, *_ in life] == list(range(0, 2 * len(life), 2))
            assert 2 <= len(life) <= 5
            assert len({repr(rest) for *_, rest in life}) == 1
            assert len({lr for _, _, lr, _ in life}) == 1
            assert attacks[born][0] == born
        assert len({len(life) for life in lives.values()}) > 1


@pytest.mark.parametrize("kind", ["denoiser", "lora"])
def test_what_an_attacker_changed_is_kept_relative_to_the_weights(model, tmp_path, kind):
    config = settings(tmp_path, lower={"steps": 2, "lr": 1e-3, "parameters": kind, "age": (9, 9)})
    problem = make(model, config, 1)
    theta = problem.theta()
    first = problem.lower_level(0, 0)
    end = list(lower.path(first, theta))[-1]
    changed = first.change(end.z, theta)
    alive = problem.survivors(0, {}, {0: first.stop(end, theta)})
    moved = {name: value + 0.01 for name, value in theta.items()}
    second = problem.lower_level(0, 1, alive)
    state = lower.start(second, moved)
    again = second.change(state.z, moved)
    assert second.age == 2
    for name, value in changed.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-7)
    for name, memory in end.memory.items():
        assert all(torch.equal(a, b) for a, b in zip(memory, state.memory[name], strict=True))
    # other batches than in its first outer step
    assert float(second.loss(state.z, moved, 0)) != float(first.loss(state.z, moved, 0))


def test_living_attackers_survive_a_checkpoint(model, tmp_path):
    problem = make(model, settings(tmp_path), 1)
    task = problem.lower_level(0, 0)
    end = task.stop(list(lower.path(task, problem.theta()))[-1], problem.theta())
    tensors, plain = to_tensors({3: Alive(5, end)})
    back = from_tensors(tensors, plain, torch.device("cpu"))[3]
    assert (back.born, back.carried.age) == (5, 2)
    immunizing.assert_same(back.carried.moved, end.moved)
    for name, memory in end.memory.items():
        assert all(torch.equal(*m) for m in zip(back.carried.memory[name], memory, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "joint", "concepts_per_step": 1},
        {"method": "mima", "merge": "sum", "hypergradient": "exact"},
        {"method": "mima", "lower": LIVING | {"parameters": "lora", "optimizer": "sgd"}},
        {"method": "compose"},
    ],
    ids=["joint", "sum-exact", "projected-lora", "compose"],
)
def test_a_run_with_living_attackers_goes_on_bit_by_bit(model, tmp_path, changes):
    config = settings(tmp_path, steps=3, **changes)
    whole = immunize(model, immunizing.concepts(), config).pipeline.unet.state_dict()
    if config.method != "compose":
        immunizing.assert_same(interrupted(model, config, tmp_path / "c"), whole)
        kept = CheckpointFolder(tmp_path / "c").latest()
        assert any(name.startswith("attacker.") for name in kept.tensors)
        return
    # each concept's own run counts from 1: the second's second step
    seen = []

    def interrupt(report):
        seen.append(report)
        if len(seen) == 5:
            raise KeyboardInterrupt

    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        immunize(model, immunizing.concepts(), config, checkpoint=folder, callbacks=[interrupt])
    resumed = immunize(model, immunizing.concepts(), config, checkpoint=folder, resume=True)
    immunizing.assert_same(resumed.pipeline.unet.state_dict(), whole)


def test_attackers_of_a_step_that_is_left_out_begin_anew(model, tmp_path):
    problem = make(model, settings(tmp_path, steps=2, method="joint", concepts_per_step=1))
    with Ascent(problem) as run:
        theta = run.theta
        outer = problem.hypergradient(theta, problem.lower_levels(0), problem.upper_path(0))
        (chosen,) = problem.concepts(0)
        run.alive = {n: Alive(0, outer.ends[0]) for n in range(2)}
        broken = {name: value * math.nan for name, value in outer.gradient.items()}
        outer.gradient.update(broken)
        run.update(outer, retain=problem.retaining_gradient(theta, 0))
    assert set(run.alive) == {0, 1} - {chosen}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower": {"age": (1, 1)}}, "age: no attacker of at most 1 steps outlives"),
        ({"lower": {"age": (5, 4)}}, "age: must be two numbers, 1 <= low <= high"),
        ({"lower": {"age": (0, 4)}}, "age: must be two numbers, 1 <= low <= high"),
        (
            {"new_words": True, "lower": {"age": (2, 4), "train_token": True}},
            "age: new words (train_token) begin anew",
        ),
        ({"lower": {"age": (2, 4)}, "method": "alternating"}, "one lower.lr and no lower.age"),
    ],
)
def test_attackers_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(MimaError) as caught:
        parse_config(ImmunizeConfig, changes, source="run.yaml")
    assert message in str(caught.value)
