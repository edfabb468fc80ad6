"""The upper level's named objectives, paths, and what keeps the model useful."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from support import immunizing
from support.immunizing import problem_of

from mima.bilevel.outer import OuterGradient
from mima.bilevel.upper import part_backward, upper_gradient
from mima.concepts.naming import without_name
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.objectives import (
    EPSILON,
    PENALTIES,
    READS_START,
    Seen,
    blind_prediction,
    lacking,
)
from mima.immunization.outer_loop import Ascent, without_conflict
from mima.immunization.progress import LossName
from mima.options import TrainingOptions
from mima.training.batches import Batch, seeded
from mima.training.captions import divided, ordinary_captions

OBJECTIVES = sorted(PENALTIES)
PATH = {"steps": 4, "lr": (1e-4, 1e-2), "parameters": "denoiser"}
UPPER = {
    "parameters": "denoiser",
    "path_every": 2,
    "objective": "log",
    "retain": "distill",
    "ascent_ratio": 0.5,
    "lr": 1e-3,
}


def settings(folder, **changes):
    defaults = {"lower": PATH, "upper": UPPER, "merge": "sum"}
    return immunizing.settings(folder, **(defaults | changes))


def seen(seed=0, margin=0.0):
    draw = torch.Generator().manual_seed(seed)
    prediction, target, start, blind, *other = (
        torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(7)
    )
    paired = Seen(*other)
    return Seen(prediction.requires_grad_(), target, start, margin, blind, paired, beta=0.8)


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_formula(name, margin):
    s = seen(margin=margin)
    v, y, w = (x.detach() for x in (s.prediction, s.target, s.start))
    p = s.pair
    own, before = (((x - y) ** 2).mean((1, 2, 3)) for x in (v, w))
    expected = {
        "log": -math.log(float(((v - y) ** 2).mean()) + EPSILON),
        "hinge": sum(
            max(0.0, math.log(b + EPSILON) + margin - math.log(o + EPSILON))
            for o, b in zip(own.tolist(), before.tolist(), strict=True)
        )
        / 3,
        "anchor": float(((v - w) ** 2).mean()),
        "zero": float((v**2).mean()),
        "entropy": float(((v - s.blind) ** 2).mean()),
        "pair": sum(
            math.log(1 + math.exp(0.8 * d))
            for d in (
                ((p.prediction - p.target) ** 2 - (p.start - p.target) ** 2)
                - ((v - y) ** 2 - (w - y) ** 2)
            )
            .flatten()
            .tolist()
        )
        / v.numel(),
    }[name]
    assert PENALTIES[name](s).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_gradient_agrees_with_central_differences(name):
    s = seen(1, margin=0.3)

    def value(prediction):
        return PENALTIES[name](replace(s, prediction=prediction))

    assert torch.autograd.gradcheck(value, s.prediction)


def test_pair_learns_from_both_of_its_pictures():
    s = seen(2)
    own, other = s.prediction, s.pair.prediction.clone().requires_grad_()
    value = PENALTIES["pair"](replace(s, pair=replace(s.pair, prediction=other)))
    gradients = torch.autograd.grad(value, (own, other))
    # down on the paired picture's error, up on the concept's
    errors = [(x - y).detach() for x, y in ((own, s.target), (other, s.pair.target))]
    signs = [(g * e).sign().unique().tolist() for g, e in zip(gradients, errors, strict=True)]
    assert signs == [[-1.0], [1.0]]


def test_pairs_share_captions_noise_and_noise_levels(model, tmp_path):
    config = settings(tmp_path, upper=UPPER | {"objective": "pair", "batch_size": 2})
    problem = problem_of(model, config, 1)
    batches = problem.upper_level([0], 3).args[2]
    own, paired = batches
    assert torch.equal(own.noise, paired.noise)
    assert torch.equal(own.timesteps, paired.timesteps)
    assert all(torch.equal(value, own.conditioning[n]) for n, value in paired.conditioning.items())
    pictures, class_images = (
        getattr(problem.data[0], kind).latents for kind in ("images", "class_images")
    )
    for mine, theirs in zip(own.latents, paired.latents, strict=True):
        (place,) = [i for i, x in enumerate(pictures) if torch.equal(x, mine)]
        assert torch.equal(class_images[place % len(class_images)], theirs)


def test_the_blind_prediction_is_the_best_one_of_gaussian_pictures(model):
    family = family_of(load_pipeline(str(model)))
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(400, 4, 8, 8, generator=draw) for _ in range(2))
    for t in (10, 400, 900):
        steps = torch.full((400,), t)
        batch = Batch(x, {}, steps, noise, torch.zeros(400))
        v, target = blind_prediction(family, batch), family.target(x, noise, steps)
        z = family.add_noise(x, noise, steps)
        # of all multiples of z: what it misses is orthogonal to z
        torch.testing.assert_close(((target - v) * z).mean(), torch.zeros(()), atol=0.02, rtol=0)
        gain = (v * z).sum() / z.square().sum()
        torch.testing.assert_close(v, gain * z, atol=1e-4, rtol=1e-4)


def test_the_blind_prediction_is_weighted_as_the_loss_is(model):
    family = family_of(load_pipeline(str(model)))
    x, noise = (torch.randn(4, 4, 8, 8, generator=seeded(n)) for n in (0, 1))
    batch = Batch(x, {}, torch.tensor([0, 300, 600, 999]), noise, torch.zeros(4))
    plain = blind_prediction(family, batch)
    family.training = TrainingOptions(snr_gamma=0.05)
    weights = family.loss_weights(batch.timesteps)
    assert float(weights.max() / weights.min()) > 2
    torch.testing.assert_close(
        blind_prediction(family, batch), weights.sqrt().view(-1, 1, 1, 1) * plain
    )


@pytest.mark.parametrize("objective", ["log", "neg"])
def test_late_states_count_more(model, tmp_path, objective):
    upper = UPPER | {"objective": objective, "retain": "class_images"}
    even = problem_of(model, settings(tmp_path, upper=upper), 1)
    late = problem_of(model, settings(tmp_path, upper=upper | {"path_weights": "late"}), 1)
    theta = even.theta()
    for k in (2, 4):
        values = [float(p.upper_path(0)[k][0](theta)[0]) for p in (even, late)]
        assert values[1] == pytest.approx(math.exp((k - 4) / 16) * values[0], rel=1e-5)


def test_what_would_undo_the_retaining_gradient_is_left_out():
    retain = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    with_it = {"a": torch.tensor([-1.0, 5.0]), "b": torch.tensor([1.0])}
    assert without_conflict(with_it, retain) is with_it
    against = {"a": torch.tensor([-3.0, 5.0]), "b": torch.tensor([1.0])}
    left = without_conflict(against, retain)
    assert sum(float((left[n] * retain[n]).sum()) for n in retain) == pytest.approx(0, abs=1e-5)
    # ⟨a, r⟩ = −5, ‖r‖² = 25
    torch.testing.assert_close(left["a"], torch.tensor([-3.0 + 0.6, 5.0]))
    torch.testing.assert_close(left["b"], torch.tensor([1.0 + 0.8]))


@pytest.mark.parametrize("projection", [True, False])
def test_projection_is_of_the_step(model, tmp_path, monkeypatch, projection):
    problem = problem_of(model, settings(tmp_path, upper=UPPER | {"projection": projection}), 1)
    taken = []
    monkeypatch.setattr(Ascent, "_step", lambda self, gradient, level: taken.append(gradient))
    ones = {name: torch.ones_like(value) for name, value in problem.theta().items()}
    opposed = {name: -value for name, value in ones.items()}
    with Ascent(problem) as run:
        run.update(OuterGradient(opposed, {}, 0.0), retain=OuterGradient(ones, {}, 0.0))
    for value in taken[0].values():
        torch.testing.assert_close(value, torch.full_like(value, 1.0 if projection else 0.5))


def test_hinge_has_no_pull_where_an_attack_has_gained_nothing():
    target = torch.zeros(2, 1, 2, 2)
    prediction = torch.full((2, 1, 2, 2), 2.0, requires_grad=True)
    penalty = PENALTIES["hinge"](Seen(prediction, target, torch.ones_like(target)))
    (gradient,) = torch.autograd.grad(penalty, prediction)
    assert penalty.item() == 0
    assert not gradient.any()


def test_hinge_pulls_until_its_margin_is_reached():
    target, start = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    # losses of 1, e and e² against one of 1
    prediction = start * torch.tensor([0.0, 0.5, 1.0]).exp().reshape(3, 1, 1, 1)
    lacks = lacking(Seen(prediction, target, start, margin=1.5))
    torch.testing.assert_close(lacks, torch.tensor([1.5, 0.5, -0.5]), atol=2e-3, rtol=0)
    penalty = PENALTIES["hinge"](Seen(prediction, target, start, margin=1.5))
    assert penalty.item() == pytest.approx(2 / 3, abs=2e-3)


def test_a_satisfied_hinge_costs_no_backward_and_says_so(model, tmp_path, monkeypatch):
    # the start itself is satisfied by no margin and by none of its pictures with one
    for margin, share in ((0.0, 0.0), (1.0, 1.0)):
        upper = UPPER | {"objective": "hinge", "margin": margin}
        problem = problem_of(model, settings(tmp_path, upper=upper))
        part = problem.upper_levels(0)[0]
        with monkeypatch.context() as patched:
            if not share:
                patched.setattr(torch.autograd, "backward", None)
            leaves = {n: v.requires_grad_() for n, v in problem.theta().items()}
            told = part_backward(part, leaves)
        (pull,) = [value for name, value in told.items() if name.kind == "pull"]
        assert float(pull) == share
        assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves.values()) == bool(
            share
        )


def test_ascent_is_scaled_by_the_share_of_pictures_that_pull(model, tmp_path, monkeypatch):
    upper = UPPER | {"objective": "hinge", "margin": 0.1}
    problem = problem_of(model, settings(tmp_path, upper=upper), 1)
    taken = []
    monkeypatch.setattr(Ascent, "_step", lambda self, gradient, level: taken.append(gradient))
    ones = {name: torch.ones_like(value) for name, value in problem.theta().items()}
    retain = OuterGradient({name: 3 * value for name, value in ones.items()}, {}, 0.0)
    with Ascent(problem) as run:
        for shares in ((1.0, 1.0), (0.25, 0.75), (0.0, 0.0)):
            path = {k: {LossName("cat", "pull"): x} for k, x in zip((2, 4), shares, strict=True)}
            outer = OuterGradient(dict(ones), {LossName("cat"): 1.0}, 0.0, path=path)
            run.update(outer, retain=retain)
    assert [report.pulling for report in run.history] == [1.0, 0.5, 0.0]
    assert [report.losses for report in run.history] == [{"cat": 1.0}] * 3
    for gradient, share in zip(taken, (1.0, 0.5, 0.0), strict=True):
        for value in gradient.values():
            # ρ = 0.5 of a retaining gradient three times as long
            torch.testing.assert_close(value, torch.full_like(value, 3 + 1.5 * share))


@pytest.mark.parametrize("objective", ["neg", *OBJECTIVES])
def test_every_objective_runs_along_the_path_and_moves_what_it_may(model, tmp_path, objective):
    config = settings(tmp_path, upper=UPPER | {"objective": objective})
    problem = problem_of(model, config)
    before = {n: v.clone() for n, v in problem.theta().items()}
    assert problem.states == (2, 4)
    outer = problem.hypergradient(problem.theta(), problem.lower_levels(0), problem.upper_path(0))
    assert outer.gradient.keys() == set(problem.upper_names)
    assert outer.norm > 0
    assert all(torch.equal(before[n], v) for n, v in problem.theta().items())
    assert {name.concept for name in outer.losses} == {"cat", "dog"}


def test_each_state_of_the_path_has_pictures_of_its_own(model, tmp_path):
    problem = problem_of(model, settings(tmp_path))
    path = problem.upper_path(0)
    values = [float(path[k][0](problem.theta())[0]) for k in path]
    assert len(set(values)) == len(values)
    again = [float(problem.upper_path(0)[k][0](problem.theta())[0]) for k in path]
    assert again == values


def test_distillation_is_zero_at_the_start_and_pulls_back_to_it(model, tmp_path):
    problem = problem_of(model, settings(tmp_path))
    theta = problem.theta()
    still = problem.retaining_gradient(theta, 0)
    # with a graph and without one predictions differ by rounding, where those of noise err by 1
    upper = UPPER | {"retain": "class_images"}
    whole = problem_of(model, settings(tmp_path, upper=upper)).retaining_gradient(theta, 0)
    assert still.norm < 10 * torch.finfo(torch.float32).eps * whole.norm
    name = max(problem.upper_names, key=lambda n: theta[n].numel())
    moved = {**theta, name: theta[name] * 1.5}
    back = problem.retaining_gradient(moved, 0)
    assert float((back.gradient[name] * (moved[name] - theta[name])).sum()) > 0


def test_class_pictures_retain_by_their_loss(model, tmp_path):
    config = settings(tmp_path, upper=UPPER | {"retain": "class_images"})
    problem = problem_of(model, config)
    theta = problem.theta()
    retained = problem.retaining_gradient(theta, 3)
    parts = [lambda phi, n=n: problem._retention(n, 3, phi) for n in range(2)]
    gradient, _, losses = upper_gradient(theta, parts)
    assert retained.losses == losses
    assert all(torch.equal(retained.gradient[n], gradient[n]) for n in problem.upper_names)


def test_class_pictures_are_retained_under_the_captions_that_are_drawn(model, tmp_path):
    def of(*captions):
        upper = UPPER | {"retain_captions": captions, "prior_batch_size": 3}
        return problem_of(model, settings(tmp_path, upper=upper))

    problem = of("empty", "as_is", "without_name")
    data, draw = problem.data[0], torch.Generator().manual_seed(0)
    pictures = data.class_images
    assert data.class_pictures(("own", "own"), draw) is pictures
    # each kind has rows of its own, which no picture has otherwise
    concept = immunizing.concepts()[0]
    assert data.name == concept.name
    caption = concept.images[0].prompt
    named = {"empty": "", "as_is": caption, "without_name": without_name(caption, concept)}
    for kind, text in named.items():
        (row,) = data.class_prompts[kind].tolist()
        assert row not in pictures.prompt
        read = problem.family.encode_prompts([text])
        assert all(
            torch.equal(rows[row : row + 1], read[n]) for n, rows in pictures.prompts.items()
        )
        assert set(data.class_pictures((kind,), draw).prompt.tolist()) == {row}
    every, _ = divided(ordinary_captions(problem.config.captions))
    rows = of("ordinary").data[0]
    assert len(rows.class_prompts["ordinary"]) == len(set(every)) > len(set(pictures.prompt))
    others = data.class_pictures(("other",), draw).prompt
    assert set(others.tolist()) <= set(pictures.prompt.tolist())
    many = replace(data, class_images=pictures.rows(torch.arange(3000) % len(pictures)))
    drawn = many.class_pictures((*named, "own"), draw).prompt
    for kind in named:
        share = float((drawn == data.class_prompts[kind]).double().mean())
        assert share == pytest.approx(1 / 4, abs=0.04)

    # the gap to the start is taken where they are read so
    theta = problem.theta()
    name = max(problem.upper_names, key=lambda n: theta[n].numel())
    moved = {**theta, name: theta[name] * 1.5}
    penalties = {}
    for captions in (
        ("own",),
        ("empty",),
        ("as_is",),
        ("without_name",),
        ("other",),
        ("ordinary",),
    ):
        other = of(*captions)
        penalties[captions], losses = other._retention(0, 3, moved)
        assert losses.keys() == {LossName(other.data[0].name, "prior")}
        draws = seeded(other.config.seed, 3, 0, "retain")
        chosen = other.data[0].class_pictures(captions, draws)
        batch = Batch.draw(other.family, chosen, 3, draws)
        ((now, _),), ((then, _),) = (other.predictions([batch], p) for p in (moved, theta))
        assert torch.equal(penalties[captions], torch.nn.functional.mse_loss(now, then))
    assert len({float(penalties[kind,]) for kind in ("own", *named)}) == 4


def test_attacks_draw_their_rates_log_uniformly_between_two(model, tmp_path):
    problem = problem_of(model, settings(tmp_path))
    rates = [problem.attacker(n, step, {}).lr for n in range(2) for step in range(200)]
    assert 1e-4 <= min(rates) < 1.3e-4
    assert 0.8e-2 < max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) / len(rates) == pytest.approx(0.5, abs=0.1)
    assert problem.lower_level(1, 7).optimizer.lr == problem.attacker(1, 7, {}).lr


def test_every_concept_has_its_turn_before_one_has_its_next(model, tmp_path):
    config = settings(tmp_path, method="mima", merge="sum", hypergradient="first_order")
    for every in (1, 3):
        config = config.model_copy(update={"concepts_per_step": 1, "attack_every": every})
        problem = problem_of(model, config, 3)
        turns = [n for step in range(60 * every) for n in problem.concepts(step)]
        assert all(turns[step] == turns[step - step % every] for step in range(len(turns)))
        attacked = turns[::every]
        rounds = {tuple(attacked[i : i + 3]) for i in range(0, len(attacked), 3)}
        # in an order of its own each time
        assert rounds == set(permutations(range(3)))


def test_some_concepts_of_a_step_are_drawn_evenly(model, tmp_path):
    problem = problem_of(model, settings(tmp_path, concepts_per_step=2), 3)
    drawn = [problem.concepts(step) for step in range(300)]
    assert all(len(chosen) == 2 and chosen == sorted(set(chosen)) for chosen in drawn)
    # a step takes from two rounds, and after each third step both are whole
    for steps in (3, 30, 300):
        turns = [sum(n in chosen for chosen in drawn[:steps]) for n in range(3)]
        assert turns == 3 * [2 * steps // 3]
    assert [problem.concepts(step) for step in (299, 7)] == [drawn[299], drawn[7]]
    outer = problem.hypergradient(problem.theta(), problem.lower_levels(0), problem.upper_path(0))
    names = [problem.data[n].name for n in problem.concepts(0)]
    assert [name.concept for name in outer.losses] == names


def test_a_sum_shows_each_attack_whole(model, tmp_path):
    lower = PATH | {"lr": 1e-3}
    alone = problem_of(model, settings(tmp_path, lower=lower), 1)
    pair = problem_of(model, settings(tmp_path, lower=lower), 2)
    args = [(p.theta(), p.lower_levels(0), p.upper_path(0)) for p in (alone, pair)]
    one, two = (p.hypergradient(*a) for p, a in zip((alone, pair), args, strict=True))
    # two attacks from one point go their own ways: their sum is longer than either
    assert two.drift > 1.2 * one.drift


@pytest.mark.parametrize("method", ["mima", "joint"])
def test_a_run_along_the_path_goes_on_bit_by_bit(model, tmp_path, method):
    merge = {"merge": "sum"} if method == "mima" else {"merge": "projected"}
    config = settings(tmp_path, steps=4, concepts_per_step=1, method=method, **merge)
    whole = immunize(model, immunizing.concepts(), config)

    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    half = tmp_path / f"half-{method}"
    with pytest.raises(KeyboardInterrupt):
        immunize(model, immunizing.concepts(), config, checkpoint=half, callbacks=[interrupt])
    resumed = immunize(model, immunizing.concepts(), config, checkpoint=half, resume=True)
    assert [report.step for report in resumed.history] == [1, 2, 3, 4]
    immunizing.assert_same(resumed.pipeline.unet.state_dict(), whole.pipeline.unet.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower": PATH | {"steps": 1}}, "upper.path_every: 2 asks for states on the way"),
        ({"lower": PATH | {"lr": (1e-3, 1e-4)}}, "the first must not be the larger"),
        ({"lower": PATH | {"lr": 0}}, "must be > 0"),
        ({"upper": UPPER | {"pair_beta": 1.0}}, "upper.pair_beta: it is of objective 'pair'"),
        (
            {"upper": {"objective": "pair"}, "lower": {"train_token": True}, "new_words": True}
            | {"merge": "average"},
            "'pair' reads no new words",
        ),
        ({"upper": {"path_weights": "late"}}, "without path_every the last state alone counts"),
        ({"upper": {"projection": True}}, "without ascent_ratio there is one gradient alone"),
        ({"upper": UPPER | {"margin": 1.0}}, "upper.margin: it is of objective 'hinge', got 'log'"),
        ({"upper": UPPER | {"loss_cap": 1.0}}, "objective 'log' has no use for a cap"),
        ({"upper": UPPER | {"prior_weight": 0}}, "with prior_weight 0 nothing retains"),
        ({"upper": {"retain": "distill"}}, "'distill' needs upper.ascent_ratio"),
        (
            {"upper": UPPER | {"retain": "class_images", "retain_captions": ("own", "empty")}},
            "other than own needs upper.retain 'distill'",
        ),
        ({"upper": UPPER | {"retain_captions": ()}}, "retain_captions"),
        ({"upper": UPPER | {"concepts_per_forward": 2}}, "with upper.ascent_ratio it is 1"),
        (
            {"method": "compose", "merge": "average", "concepts_per_step": 1},
            "steps of methods 'mima' and 'joint' alone are about some of the concepts",
        ),
        ({"method": "compose"}, "merge: 'sum' is of method 'mima', got method 'compose'"),
        ({"method": "alternating", "merge": "projected"}, "is the published MIMA update"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, message):
    defaults = {"lower": PATH, "upper": UPPER, "merge": "sum"}
    with pytest.raises(ValueError, match=message):
        ImmunizeConfig.model_validate(defaults | changes)


def test_only_what_an_objective_reads_is_kept(model, tmp_path):
    for objective in ("neg", *OBJECTIVES):
        upper = {"objective": objective}
        problem = problem_of(model, settings(tmp_path, lower={}, upper=upper, merge="average"))
        assert bool(problem._start) == (objective in READS_START)
