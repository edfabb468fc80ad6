"""New words: words while the model is immunized, and trained in the lower level."""

import math
import sys
from importlib.metadata import version

import pytest
import torch
from support import tiny
from support.immunizing import concepts, settings

from mima.adaptation import TextualInversion
from mima.concepts import Concept
from mima.errors import MimaError
from mima.immunization.algorithm import immunize


def with_new_words():
    return [
        Concept(
            word, f"a {token} emoji", [tiny.picture("red", "round", seed=n)], "an emoji",
            token=token, initializer=word, class_images=[tiny.picture("blue", "round", seed=n)],
        )
        for n, (word, token) in enumerate((("cat", "<new1>"), ("castle", "<new2>")))
    ]  # fmt: skip


@pytest.mark.skipif(
    version("transformers").startswith("4."), reason="its text encoder cannot mask in float64"
)
@pytest.mark.parametrize(
    ("parameters", "method"),
    [(None, "mima"), ("cross_attention_kv", "mima"), ("lora", "mima"), ("lora", "joint")],
)
def test_trained_words_agree_with_central_differences(tmp_path, monkeypatch, parameters, method):
    """The gradient that a run takes, through text encoder, plan and steps, in float64."""
    module = sys.modules["mima.immunization.algorithm"]
    problems = []

    def keep(problem, *_, **__):
        problems.append(problem)
        return []

    monkeypatch.setattr(module, "ascend", keep)
    config = settings(
        tmp_path,
        hypergradient="exact",
        method=method,
        new_words=True,
        lower={
            "lr": 0.05, "token_lr": 0.3, "steps": 2, "optimizer": "sgd", "parameters": parameters,
            "train_token": True,
        },
        upper={"parameters": "cross_attention_kv"},
    )  # fmt: skip
    monkeypatch.setattr(module, "own_copy", lambda pipeline, _: pipeline.to(torch.float64))
    immunize(tiny.tiny_stable_diffusion(tmp_path / "tokenizer"), with_new_words(), config)
    (problem,) = problems
    theta = problem.theta()
    levels = problem.lower_levels(0), problem.upper_levels(0)

    def objective(theta):
        losses = problem.hypergradient(theta, *levels).losses
        return sum((1 if name.kind == "prior" else -1) * x for name, x in losses.items())

    outer = problem.hypergradient(theta, *levels)
    draws = torch.Generator().manual_seed(0)
    along = {n: torch.randn(v.shape, generator=draws).to(v) for n, v in outer.gradient.items()}
    h = 1e-4
    monkeypatch.setattr(
        problem, "config", config.model_copy(update={"hypergradient": "first_order"})
    )
    ahead, behind = (
        objective(theta | {n: theta[n] + sign * h * v for n, v in along.items()})
        for sign in (1, -1)
    )
    slope = sum(float((outer.gradient[n] * v).sum()) for n, v in along.items())
    first = problem.hypergradient(theta, *levels)
    without = sum(float((first.gradient[n] * v).sum()) for n, v in along.items())
    assert abs(slope - (ahead - behind) / (2 * h)) <= 1e-5 * abs(slope)
    # and the steps matter
    assert abs(slope - without) > 1e-3 * abs(slope)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_a_run_trains_new_words_in_its_lower_level(tmp_path, mode):
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    lower = {"parameters": "lora", "lr": 1e-3, "prior_weight": 0.5}
    lower |= {"train_token": True, "token_lr": 1e-2}
    config = settings(tmp_path, hypergradient=mode, new_words=True, lower=lower)
    result = immunize(pipeline, with_new_words(), config)
    assert all(math.isfinite(report.gradient_norm) for report in result.history)
    assert 0 < result.history[-1].residual < 1
    after, before = (part.text_encoder.state_dict() for part in (result.pipeline, pipeline))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(MimaError, match="no token: cat, dog"):
        immunize(pipeline, concepts(), config)


def test_new_words_are_words_while_the_model_is_immunized(tmp_path, monkeypatch):
    """Each is one token, its row alone was trained, and the result's vocabulary is the old one."""
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    seen = []
    # the package's attribute of that name is the function
    module = sys.modules["mima.immunization.algorithm"]
    encode = module.encode_concepts

    def spy(family, *args, **keywords):
        seen.append(family.pipeline)
        return encode(family, *args, **keywords)

    monkeypatch.setattr(module, "encode_concepts", spy)
    config = settings(tmp_path, steps=1, new_words=True, token_steps=2)
    result = immunize(pipeline, with_new_words(), config)
    # of the concepts, and of no benign ones
    inner, _ = seen
    old = pipeline.text_encoder.get_input_embeddings().weight
    new = inner.text_encoder.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    assert len(new) == len(old) + 2
    for row, word, token in ((-2, "cat", "<new1>"), (-1, "castle", "<new2>")):
        assert inner.tokenizer.convert_tokens_to_ids(token) == len(new) + row
        start = old[pipeline.tokenizer.encode(word, add_special_tokens=False)[0]]
        # two steps of AdamW at 5e-4
        assert 1e-4 < (new[row] - start).abs().max() < 2e-3
    assert result.pipeline.tokenizer is pipeline.tokenizer
    after, before = (part.text_encoder.state_dict() for part in (result.pipeline, pipeline))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_new_words_are_trained_on_the_runs_resolution_with_its_losses(tmp_path, monkeypatch):
    asked = []

    def spy(**options):
        asked.append(options)
        return TextualInversion(**options)

    monkeypatch.setattr("mima.immunization.own_model.TextualInversion", spy)
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    training = {"snr_gamma": 5.0}
    config = settings(
        tmp_path, steps=1, new_words=True, token_steps=1, resolution=16, training=training
    )
    immunize(pipeline, with_new_words(), config)
    told = {"seed": config.seed, "resolution": 16, "training": config.training}
    told |= {"gradient_checkpointing": False}
    assert asked == [told, told]
    assert config.training.snr_gamma == 5.0
