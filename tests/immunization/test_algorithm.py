"""Runs of `immunize`: precision, memory savers, what is refused, what it leaves alone."""

import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from support.immunizing import assert_same, concepts, problem_of, settings, weights

from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.bilevel.outer import naive_outer_gradient
from mima.bilevel.upper import upper_gradient
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.families.pipelines import networks
from mima.families.recomputed import recomputed_blocks
from mima.immunization.algorithm import immunize
from mima.immunization.checks import warn_of_model
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import ConceptData, encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.outer_loop import cosine
from mima.immunization.own_model import own_copy
from mima.immunization.recipes import default
from mima.merging import MergeLayer
from mima.training.batches import Encoded, seeded
from mima.training.class_images import ClassPictures

MODES = ("exact", "finite_difference", "first_order")


def gradient(model, config):
    problem = problem_of(model, config)
    levels = problem.lower_levels(0), problem.upper_levels(0)
    with recomputed_blocks(problem.family.denoiser, config.gradient_checkpointing):
        return problem.hypergradient(problem.theta(), *levels).gradient


def flat(gradient):
    return torch.cat([value.flatten() for value in gradient.values()])


def gap(a, b):
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def test_two_passes_equal_holding_every_graph_on_a_unet(model, tmp_path):
    problem = problem_of(model, settings(tmp_path, hypergradient="exact", lower={"lr": 1e-3}))
    theta, lower, upper = problem.theta(), problem.lower_levels(0), problem.upper_levels(0)
    ours = problem.hypergradient(theta, lower, upper)
    with twice_differentiable_attention():
        naive = naive_outer_gradient(
            theta, list(lower), problem.merge, list(upper), wrt=problem.upper_names
        )
    assert gap(ours.gradient, naive.gradient) < 1e-5
    assert ours.losses == pytest.approx(naive.losses, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_differentiated_twice_gives_up_fused_attention(
    model, tmp_path, monkeypatch, mode
):
    problem = problem_of(
        model, settings(tmp_path, hypergradient=mode, lower={"optimizer": "sgd"}), 2
    )
    predictions_of, fused = problem.predictions, []

    def predictions(batches, params):
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return predictions_of(batches, params)

    monkeypatch.setattr(problem, "predictions", predictions)
    problem.hypergradient(problem.theta(), problem.lower_levels(0), problem.upper_levels(0))
    # each concept's lower and upper level; then, of two concepts, what the mode asks for
    again = {"exact": [False] * 2, "finite_difference": [True] * 4, "first_order": []}[mode]
    assert fused == [True] * 4 + again
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("per_forward", [1, 2, 3])
def test_losses_computed_in_one_forward_are_those_of_one_each(
    model, tmp_path, per_forward, monkeypatch
):
    upper = {"batch_size": 2, "prior_batch_size": 3, "concepts_per_forward": per_forward}
    free = problem_of(model, settings(tmp_path, upper=upper), 3)
    theta = free.theta()
    _, _, losses = upper_gradient(theta, free.upper_levels(0))
    own = [x for name, x in losses.items() if name.kind == "concept"]
    # a cap for some of them, whatever weights this version of diffusers draws
    cap = (min(own) + max(own)) / 2
    problem = problem_of(model, settings(tmp_path, upper=upper | {"loss_cap": cap}), 3)
    losses_of, drawn = problem.losses, []
    monkeypatch.setattr(
        problem,
        "losses",
        lambda batches, params: drawn.append(batches) or losses_of(batches, params),
    )
    ours, _, losses = upper_gradient(theta, problem.upper_levels(0))
    one_each = [[batch] for batches in drawn for batch in batches]
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    terms = [term for part in problem.upper_levels(0) for term in part.terms]
    for term, batches in zip(terms, one_each, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        (loss,) = losses_of(batches, leaves)
        assert losses[term.name] == pytest.approx(loss.item(), rel=1e-5)
        grads = torch.autograd.grad(term.objective(loss), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            total[name] += grad
    capped = [x > cap for name, x in losses.items() if name.kind == "concept"]
    assert any(capped)
    assert not all(capped)
    assert gap(ours, total) < 1e-5


@pytest.mark.parametrize(("mode", "per_forward"), [("first_order", 2), ("exact", 3)])
def test_attacks_in_one_forward_are_those_of_one_each(
    model, tmp_path, mode, per_forward, monkeypatch
):
    below = {"parameters": "lora", "steps": 2, "optimizer": "sgd", "lr": 0.1, "prior_weight": 0.5}
    # each concept draws a rank of its own
    below |= {"batch_size": 2, "rank": [1, 6]}
    found, forwards = {}, {}
    for size in (1, per_forward):
        config = settings(
            tmp_path, hypergradient=mode, lower=below | {"concepts_per_forward": size}
        )
        problem = problem_of(model, config, 3)
        losses_of, sizes = problem.losses, []
        monkeypatch.setattr(
            problem,
            "losses",
            lambda batches, params, losses_of=losses_of, sizes=sizes: (
                sizes.append(len(batches)) or losses_of(batches, params)
            ),
        )
        levels = problem.lower_levels(0), problem.upper_levels(0)
        assert len({problem.attacker(n, 0, {}).rank for n in range(3)}) > 1
        found[size], forwards[size] = problem.hypergradient(problem.theta(), *levels), sizes
    alone, together = found[1], found[per_forward]
    assert gap(together.gradient, alone.gradient) < 1e-5
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    # two steps of each: own and class pictures of two concepts and then of one, or of all three
    first = {2: [4, 4, 2, 2], 3: [6, 6]}[per_forward]
    assert forwards[per_forward][: len(first)] == first
    assert forwards[1][:6] == [2] * 6


@pytest.mark.parametrize(
    ("parameters", "lr", "steps"),
    [("cross_attention", 1e-3, 1), ("denoiser", 1e-3, 1), ("lora", 0.1, 2)],
)
def test_finite_differences_find_their_step_in_a_trained_network(parameters, lr, steps):
    """The second-order part in float32, where a gradient's direction is the most curved one."""
    family = family_of(load_pipeline("embedded"))
    draws = torch.Generator().manual_seed(0)
    side = family.resolution // family.pipeline.vae_scale_factor
    latents = torch.randn(4, family.denoiser.config.in_channels, side, side, generator=draws)
    data = [
        ConceptData(name, *(Encoded.of(family, latents, [text] * 4) for text in (name, "a photo")))
        for name in ("a cat", "a dog")
    ]
    lower = {"parameters": parameters, "lr": lr, "steps": steps, "optimizer": "sgd"}
    found = {}
    for mode in MODES:
        config = ImmunizeConfig(hypergradient=mode, merge="average", lower=lower)
        problem = Problem(family, data, config, MergeLayer(torch.full((2,), 0.5)))
        levels = problem.lower_levels(0), problem.upper_levels(0)
        found[mode] = flat(problem.hypergradient(problem.theta(), *levels).gradient)
    second = found["exact"] - found["first_order"]
    estimate = found["finite_difference"] - found["first_order"]
    error = float((estimate - second).norm() / second.norm())
    assert error <= 1.5e-3


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_activations_changes_no_gradient(model, tmp_path, mode):
    # SGD: Adam's first step is the gradient's sign, which magnifies rounding
    common = {"hypergradient": mode, "lower": {"lr": 1e-2, "optimizer": "sgd"}}
    plain = gradient(model, settings(tmp_path, **common))
    saving = gradient(model, settings(tmp_path, gradient_checkpointing=True, **common))
    assert gap(saving, plain) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_bfloat16_is_near_float32(model, tmp_path, mode, checkpointing):
    common = {"hypergradient": mode, "lower": {"lr": 1e-2, "optimizer": "sgd"}}
    plain = gradient(model, settings(tmp_path, **common))
    half = gradient(
        model,
        settings(tmp_path, precision="bfloat16", gradient_checkpointing=checkpointing, **common),
    )
    # 8 bits of mantissa, and a few dozen layers whose roundings add up
    assert gap(half, plain) < 0.1
    assert all(value.dtype == torch.float32 for value in half.values())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "float16"}, "float16 gradients underflow"),
        ({"precision": "bfloat16", "hypergradient": "finite_difference"}, "more coarsely"),
        ({"merge": "none"}, "write method: joint"),
        ({"hypergradient": "alternating"}, "write method: alternating"),
        ({"method": "joint", "upper": {"concepts_per_forward": 2}}, "only merged weights"),
        ({"lower": {"concepts_per_forward": 2}}, "only LoRA's factors"),
        ({"lower": {"train_token": True}}, "no new words without new_words"),
        ({"lower": {"token_lr": 1e-3}}, "no new word is trained"),
        ({"lower": {"parameters": None}}, "leaves nothing to train"),
        ({"lower": {"parameters": "lora+token"}}, "train_token: true, with parameters: 'lora'"),
        ({"lower": {"parameters": "token"}}, "train_token: true, with parameters: null"),
        (
            {
                "new_words": True,
                "lower": {"train_token": True},
                "upper": {"concepts_per_forward": 2},
            },
            "encoded with its own",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ImmunizeConfig(**settings)


def test_a_cosine_schedule_warms_up_and_falls_to_a_tenth(model, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = settings(tmp_path, steps=4, upper={"lr": 1e-5, "lr_schedule": "cosine"})
    immunize(model, concepts(), config)
    expected = [
        1e-5 * (k + 1) / 10 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4)
    ]
    assert rates == pytest.approx(expected)
    assert cosine(99, 100) == pytest.approx(0.1, rel=1e-2)


def test_a_pipeline_in_memory_stays_where_and_how_it_is(model):
    pipeline = load_pipeline(str(model))
    pipeline.text_encoder.train()
    # the only other device of every machine
    own = own_copy(pipeline, "meta")
    for name, network in networks(own).items():
        theirs = networks(pipeline)[name]
        assert {value.device.type for value in network.parameters()} == {"meta"}
        assert {value.device.type for value in theirs.parameters()} == {"cpu"}
        assert not network.training
        assert theirs.training == (name == "text_encoder")
    # what is there already is not copied
    own = own_copy(pipeline, None)
    assert own.vae.quant_conv.weight.data_ptr() == pipeline.vae.quant_conv.weight.data_ptr()


def test_a_pipeline_in_memory_stays_as_it_is(model, tmp_path):
    pipeline = load_pipeline(str(model))
    pipeline.unet.half()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    result = immunize(pipeline, concepts(), settings(tmp_path, steps=1), output=tmp_path / "out")
    assert_same(pipeline.unet.state_dict(), before)
    assert result.pipeline.unet.dtype == torch.float32
    assert weights(tmp_path / "out").keys() == before.keys()


def test_the_output_folder_is_checked_first(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(MimaError, match="not empty"):
        immunize("no such model", concepts(), settings(tmp_path), output=tmp_path / "out")


def test_what_a_run_cannot_use_is_said_before_class_pictures_are_drawn(
    model, tmp_path, monkeypatch
):
    def drawn(*args):
        raise AssertionError("class pictures were drawn")

    monkeypatch.setattr(ClassPictures, "latents", drawn)
    given = [replace(concept, class_images=(), prompt="a cat") for concept in concepts()]
    projected = {"merge": "projected", "lam": 0.0}
    for refused, options in (
        ({"trackers": ("tensorbord",)}, {}),
        ({"trackers": ("tensorboard",)}, {}),
        (projected, {}),
    ):
        with pytest.raises(MimaError, match=r"trackers: |merge: "):
            immunize(model, given, settings(tmp_path, **refused), **options)
    # nothing reads them
    result = immunize(model, given, settings(tmp_path, method="none", **projected))
    assert not result.history


def test_class_pictures_of_a_concept_without_a_name_keep_their_captions(model, tmp_path, caplog):
    nameless = replace(concepts()[0], name="cat6", images=concepts()[0].images[:1])
    kinds = ("own", "without_name", "empty")
    upper = {"retain": "distill", "ascent_ratio": 1.0, "retain_captions": kinds}
    config = settings(tmp_path, steps=1, upper=upper)
    family = family_of(load_pipeline(str(model)))
    data, named = encode_concepts(family, [nameless, concepts()[1]], config)
    assert [*data.class_prompts] == ["empty"]
    assert [*named.class_prompts] == ["without_name", "empty"]
    own = data.class_images.prompt
    alone = data.class_pictures(("without_name",), seeded(0))
    assert torch.equal(alone.prompt, own)
    immunize(model, [nameless], config)
    assert "without_name needs a name to leave out" in caplog.text
    assert "cat6" in caplog.text


def test_a_weight_of_two_names_is_trained_in_half_precision(model, tmp_path):
    pipeline = load_pipeline(model)
    kv = [m for n, m in pipeline.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    first, second = kv[:2]
    second.weight = first.weight
    assert immunize(
        pipeline, concepts(1), settings(tmp_path, steps=1, precision="bfloat16")
    ).history


def test_settings_that_are_none_are_refused_by_name(model):
    with pytest.raises(MimaError, match="config: expected an ImmunizeConfig, got a dict"):
        immunize(model, concepts(1), {"steps": 1})


def test_a_card_says_that_concepts_had_their_turns(model, tmp_path):
    config = settings(tmp_path, steps=2, merge="sum", concepts_per_step=1)
    text = str(immunize(model, concepts(2), config).card())
    assert "Immunized against 2 concepts in turn, 1 in each step, without a merge" in text
    # each concept's loss at its own last step
    assert {f"last loss: {name}" for name in ("cat", "dog")} <= set(
        re.findall("last loss: .{3}", text)
    )


@pytest.mark.parametrize(("rate", "warned"), [(5e-6, True), (1e-4, False)])
def test_a_rate_of_large_models_is_warned_of_on_a_small_one(rate, warned, caplog):
    config = default(rate=rate, steps=1, num_class_images=1)
    with caplog.at_level(logging.WARNING, "mima"):
        warn_of_model(load_pipeline("embedded"), concepts(1), config)
    assert ("set rate: 0.0001 with the recipe default" in caplog.text) == warned
