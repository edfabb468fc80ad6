"""Attackers: what they draw, how long they live, and that a run with them can be interrupted."""

from __future__ import annotations

import math

import pytest
import torch
from support import immunizing, tiny
from support.immunizing import problem_of

from mima.adaptation import LoRA
from mima.adapters.adapter import Adapter
from mima.bilevel import lower
from mima.bilevel.lower import Carried
from mima.bilevel.upper import upper_gradient
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.immunization import levels
from mima.immunization.algorithm import immunize
from mima.immunization.attackers import Alive, Attacker, choose, from_tensors, to_tensors
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.encoding import captions_of, encode_concepts
from mima.immunization.levels import Problem
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


def settings(folder, **changes):
    defaults = {"lower": LIVING, "upper": UPPER, "method": "joint"}
    return immunizing.settings(folder, **(defaults | changes))


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
        attacker = Attacker(config, 0, 0, born)
        ages.append(int(10 * (1001 / 10) ** attacker._draw("age")))
    assert 10 <= min(ages) < 13
    assert 800 < max(ages) <= 1000
    assert sum(age < 100 for age in ages) / len(ages) == pytest.approx(0.5, abs=0.08)


def test_an_attacker_goes_on_until_its_age_and_another_begins(model, tmp_path):
    problem = problem_of(model, settings(tmp_path))
    seen, alive = {n: [] for n in range(2)}, {}
    for step in range(30):
        ends = {}
        for n in range(2):
            attacker = problem.attacker(n, step, alive)
            age = attacker.carried.age if attacker.carried else 0
            seen[n].append((attacker.born, age, attacker.lr, attacker.split(4)[0].tolist()))
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


def test_a_step_keeps_its_concepts_until_their_attackers_have_died(model, tmp_path):
    config = settings(tmp_path, concepts_per_step=1, lower=LIVING | {"age": (4, 4)})
    problem, alive, seen = problem_of(model, config, 3), {}, []
    for step in range(40):
        chosen = problem.concepts(step, alive)
        seen += chosen
        attacker = problem.attacker(chosen[0], step, alive)
        age = attacker.carried.age if attacker.carried else 0
        ends = (
            {0: Carried({}, {}, age + 2)} if problem.lower_levels(step, alive)[0].continues else {}
        )
        taken = problem.turns_taken(step, alive)
        alive = problem.survivors(step, alive, ends)
        problem.turn += taken
        assert len(alive) == len(ends)
    # of two outer steps each
    assert seen[::2] == seen[1::2]
    assert set(seen) == {0, 1, 2}


def test_attackers_are_drawn_as_often_as_their_shares_say():
    kinds = (LowerConfig(share=3.0), LowerConfig(lr=1.0))
    drawn = [choose(kinds, 0, n, step) for n in range(2) for step in range(200)]
    assert drawn.count(kinds[0]) / len(drawn) == pytest.approx(0.75, abs=0.07)
    assert drawn[7] == choose(kinds, 0, 0, 7)


def test_ranks_are_drawn_log_uniformly_between_two(model, tmp_path):
    lora = {"parameters": "lora", "rank": (2, 17), "steps": 1, "lr": 1e-3}
    problem = problem_of(model, settings(tmp_path, lower=lora), 1)
    ranks = [problem.attacker(0, step, {}).rank for step in range(300)]
    assert set(ranks) == set(range(2, 18))
    assert sum(rank < 6 for rank in ranks) / len(ranks) == pytest.approx(0.5, abs=0.1)
    factors = problem.lower_level(0, 5).start(problem.theta())
    assert {v.shape[0] for name, v in factors.items() if name.endswith("lora_A")} == {ranks[5]}


def test_one_attacker_in_a_list_is_that_attacker(model, tmp_path):
    lower = {"steps": 1, "lr": (1e-4, 1e-2), "parameters": "lora"}
    gradients = []
    for given in (lower, [lower]):
        problem = problem_of(model, settings(tmp_path, lower=given))
        levels = problem.lower_levels(3), problem.upper_path(3)
        gradients.append(problem.hypergradient(problem.theta(), *levels).gradient)
    immunizing.assert_same(*gradients)


@pytest.mark.parametrize("method", ["joint", "sum"])
@pytest.mark.parametrize("hypergradient", ["exact", "first_order"])
def test_attackers_of_several_kinds_meet_in_one_step(model, tmp_path, method, hypergradient):
    lower = [
        {"steps": 2, "lr": 1e-3, "parameters": "lora"},
        {"steps": 2, "lr": 1e-3, "parameters": "cross_attention_kv", "optimizer": "momentum"},
    ]
    how = {"method": "joint"} if method == "joint" else {"method": "mima", "merge": "sum"}
    config = settings(tmp_path, lower=lower, hypergradient=hypergradient, **how)
    problem = problem_of(model, config)
    step = next(
        step
        for step in range(20)
        if len({problem.attacker(n, step, {}).config.parameters for n in range(2)}) == 2
    )
    theta = problem.theta()
    outer = problem.hypergradient(theta, problem.lower_levels(step), problem.upper_path(step))
    assert 0 < outer.norm < math.inf
    assert {name.concept for name in outer.losses} == {"cat", "dog"}


@pytest.mark.parametrize("kind", ["as_is", "without_name", "rare_token", "empty"])
def test_both_levels_read_the_attackers_captions(model, tmp_path, kind, monkeypatch):
    concept = immunizing.concepts(1)[0]
    expected = {
        "as_is": "a cat in red",
        "without_name": "in red",
        "rare_token": "a sks in red",
        "empty": "",
    }[kind]
    assert set(captions_of(concept, kind)) == {expected}
    config = settings(tmp_path, lower={"steps": 1, "lr": 1e-3, "captions": kind})
    cache = CheckpointFolder(tmp_path / "cache")
    family = family_of(load_pipeline(str(model)))
    for _ in range(2):
        # the second time from the file
        data = encode_concepts(family, [concept], config, cache=cache)
        problem = Problem(family, data, config, None)
        read = []

        def losses(batches, params, problem=problem, read=read):
            read.extend(batches)
            return Problem.predictions(problem, batches, params)

        monkeypatch.setattr(problem, "predictions", losses)
        theta = problem.theta()
        problem.lower_level(0, 0).loss({}, theta, 0)
        problem.upper_levels(0)[0](theta)
        wanted = family.encode_prompts([expected])
        assert len(read) == 2
        for batch in read:
            for name, value in wanted.items():
                torch.testing.assert_close(batch.conditioning[name], value)
        assert torch.equal(data[0].pictures(kind).latents, data[0].images.latents)


def test_a_concept_without_its_name_cannot_be_renamed(model, tmp_path):
    concept = Concept("zebra", "a cat in red", [tiny.picture("red", "round")])
    for kind in ("without_name", "rare_token"):
        config = settings(tmp_path, lower={"captions": ("as_is", kind)})
        with pytest.raises(MimaError, match=f"lower.captions: {kind} needs a name.*zebra"):
            immunize(model, [concept], config)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_simulated_lora_begins_as_an_attackers_does(model, tmp_path, rank):
    """A as large as that: with Adam, how far an update goes is in proportion to it."""
    config = settings(
        tmp_path, lower={"steps": 1, "lr": 1e-3, "parameters": "lora", "rank": rank, "alpha": rank}
    )
    problem = problem_of(model, config, 1)
    start = problem.lower_level(0, 0).start(problem.theta())
    simulated = torch.cat([v.flatten() for n, v in start.items() if n.endswith("lora_A")])
    run = LoRA(rank=rank).start(problem.family.pipeline, immunizing.concepts(1)[0])
    factors = Adapter.of(run.pipeline).factors.values()
    real = torch.cat([one.A.detach().flatten() for one in factors])
    assert len(simulated) > 1000
    assert float(simulated.std()) == pytest.approx(float(real.std()), rel=0.1)
    assert float(simulated.std()) == pytest.approx(1 / rank, rel=0.1)


def test_concepts_that_are_immunized_apart_have_draws_of_their_own(model, tmp_path):
    lower = {"steps": 1, "lr": (1e-5, 1e-3), "captions": ("as_is", "empty")}
    config = settings(tmp_path, method="joint", lower=lower)
    together = problem_of(model, config, 2)
    apart = Problem(together.family, together.data[1:], config, None, first=1)
    theta = together.theta()
    for step in range(3):
        own = together.lower_level(1, step)
        assert apart.attacker(0, step, {}) == together.attacker(1, step, {})
        for level in (apart.lower_level(0, step), own):
            loss = level.loss(level.start(theta), theta, 0)
            assert torch.equal(loss, own.loss(own.start(theta), theta, 0))
        first, second = apart.upper_levels(step)[0](theta), together.upper_levels(step)[1](theta)
        assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("kind", ["denoiser", "lora"])
def test_what_an_attacker_changed_is_kept_relative_to_the_weights(model, tmp_path, kind):
    config = settings(tmp_path, lower={"steps": 2, "lr": 1e-3, "parameters": kind, "age": (9, 9)})
    problem = problem_of(model, config, 1)
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
    problem = problem_of(model, settings(tmp_path), 1)
    task = problem.lower_level(0, 0)
    task.continues = True
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
        {"method": "joint", "concepts_per_step": 1, "lower": LIVING | {"age": (7, 9)}},
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


@pytest.mark.parametrize(
    "changes",
    [
        {"hypergradient": "finite_difference", "lower": LIVING | {"parameters": "lora"}},
        {"method": "mima", "merge": "sum", "attack_every": 2, "lower": {"lr": 1e-2, "steps": 3}},
    ],
    ids=["living-lora", "served"],
)
def test_what_a_checkpoint_gives_back_has_its_order(model, tmp_path, changes):
    """Sums hang on it: safetensors sorts names, and networks do not."""
    config = settings(tmp_path, steps=4, **changes)
    whole = immunize(model, immunizing.concepts(), config)

    def interrupt(report):
        if report.step == 3:
            raise KeyboardInterrupt

    folder, given = tmp_path / "c", (model, immunizing.concepts(), config)
    with pytest.raises(KeyboardInterrupt):
        immunize(*given, checkpoint=folder, callbacks=[interrupt])
    resumed = immunize(*given, checkpoint=folder, resume=True)
    immunizing.assert_same(*(r.pipeline.unet.state_dict() for r in (resumed, whole)))
    assert resumed.history[-1].drift == whole.history[-1].drift


def test_an_attack_that_diverges_is_followed_by_another(model, tmp_path):
    """Not by itself, until the run ends."""
    low = [{"lr": 1e-3}, {"lr": 1e30, "share": 0.5}]
    config = immunizing.settings(
        tmp_path,
        steps=24,
        merge="sum",
        attack_every=12,
        lower=low,
        upper={"lr": 1e-5},
        hypergradient="first_order",
    )
    one = immunizing.concepts(1)
    whole = immunize(model, one, config)
    skipped = [report.skipped for report in whole.history]
    assert 0 < skipped[-1] < 12
    # the same where a run goes on within such a window
    first = next(step for step, count in enumerate(skipped, 1) if count)

    def interrupt(report):
        if report.step == first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunize(model, one, config, checkpoint=tmp_path / "c", callbacks=[interrupt])
    resumed = immunize(model, one, config, checkpoint=tmp_path / "c", resume=True)
    immunizing.assert_same(*(r.pipeline.unet.state_dict() for r in (resumed, whole)))


def test_states_of_an_attack_serve_several_steps(model, tmp_path, monkeypatch):
    """Each step's gradient is that at θ + (φ − θ of the attack), on pictures of its own."""
    simulated = []
    outer_gradient = levels.outer_gradient

    def spy(theta, *args, **kwargs):
        simulated.append({name: value.clone() for name, value in theta.items()})
        return outer_gradient(theta, *args, **kwargs)

    monkeypatch.setattr(levels, "outer_gradient", spy)
    lower = {"steps": 4, "lr": 1e-2, "parameters": "denoiser"}
    config = settings(
        tmp_path,
        method="mima",
        merge="sum",
        steps=5,
        attack_every=3,
        concepts_per_step=1,
        lower=lower,
        upper=UPPER | {"path_every": 2},
    )
    problem = problem_of(model, config)
    with Ascent(problem) as run:
        for step in run.steps():
            served = dict(run.moved)
            lower_levels, upper = problem.lower_levels(step), problem.upper_path(step)
            outer = problem.hypergradient(run.theta, lower_levels, upper, run.moved)
            assert sorted(outer.moved) == [2, 4]
            assert bool(served) == bool(step % 3)
            assert problem.concepts(step) == problem.concepts(step - step % 3)
            expected = {name: torch.zeros_like(run.theta[name]) for name in problem.upper_names}
            for k, parts in upper.items():
                phi = {n: v + outer.moved[k].get(n, 0) for n, v in run.theta.items()}
                grads, _, _ = upper_gradient(phi, [parts[0]])
                for name in expected:
                    expected[name] += grads[name]
            for name, value in expected.items():
                torch.testing.assert_close(outer.gradient[name], value)
            run.update(outer, retain=problem.retaining_gradient(run.theta, step))
    assert len(simulated) == 2


def test_a_run_whose_attacks_serve_several_steps_goes_on_bit_by_bit(model, tmp_path):
    config = settings(
        tmp_path,
        method="mima",
        merge="sum",
        steps=4,
        attack_every=3,
        lower={"steps": 2, "lr": 1e-3, "parameters": "denoiser"},
    )
    whole = immunize(model, immunizing.concepts(), config).pipeline.unet.state_dict()
    immunizing.assert_same(interrupted(model, config, tmp_path / "c"), whole)


def test_attackers_of_a_step_that_is_left_out_begin_anew(model, tmp_path):
    problem = problem_of(model, settings(tmp_path, steps=2, method="joint", concepts_per_step=1))
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
        ({"lower": {"age": (2, 4)}, "method": "alternating"}, "one lower.lr, no lower.age"),
        ({"attack_every": 2}, "attack_every: the states of one attack serve several steps with"),
        (
            {"attack_every": 2, "hypergradient": "first_order", "lower": {"age": (2, 4)}},
            "attack_every: attackers with an age go on at each step",
        ),
    ],
)
def test_attackers_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(MimaError) as caught:
        parse_config(ImmunizeConfig, changes, source="run.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("age", [None, (10, 10), (6, 20)])
def test_every_concept_has_its_turn_however_long_attackers_live(model, tmp_path, age):
    lower = {"steps": 5, "parameters": "cross_attention_kv", **({"age": age} if age else {})}
    config = settings(tmp_path, lower=lower, concepts_per_step=1, steps=1)
    for seed in range(8):
        problem = problem_of(model, config.model_copy(update={"seed": seed}), 5)
        alive, begun = {}, []
        for step in range(40):
            (n,) = problem.concepts(step, alive)
            attacker = problem.attacker(n, step, alive)
            lived = alive[n].carried.age if n in alive else 0
            begun += [] if n in alive else [n]
            taken = problem.turns_taken(step, alive)
            ends = {0: Carried({}, None, lived + 5)} if attacker.continues else {}
            alive = problem.survivors(step, alive, ends)
            problem.turn += taken
        # none has a second turn before all had one
        rounds = [begun[k : k + 5] for k in range(0, len(begun) - 4, 5)]
        assert rounds
        assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)


def test_whose_turn_it_is_goes_on_where_it_stopped(model, tmp_path):
    config = settings(tmp_path, concepts_per_step=1, steps=9)
    whole = immunize(model, immunizing.concepts(3), config)
    folder = tmp_path / "checkpoint"

    def interrupt(report):
        if report.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunize(model, immunizing.concepts(3), config, checkpoint=folder, callbacks=[interrupt])
    resumed = immunize(model, immunizing.concepts(3), config, checkpoint=folder, resume=True)
    told = [[report.losses.keys() for report in one.history] for one in (whole, resumed)]
    assert told[0] == told[1]
