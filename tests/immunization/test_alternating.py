"""`alternating` against a straight transcription of the published update."""

import logging

import pytest
import torch
from support import tiny
from support.immunizing import concepts, settings

from mima.bilevel.outer import upper_gradient
from mima.families import family_of, load_pipeline
from mima.immunization.alternating import alternate, merge_step
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import ALMOST_HARD, Problem, merge_layer, recomputed_blocks


def make(folder, config, count=2):
    family = family_of(load_pipeline(str(folder)))
    data = encode_concepts(family, concepts(count), config)
    return Problem(family, data, config, merge_layer(family, concepts(count), config))


def transcription(problem, steps):
    """The released loop, one line after the other, with torch's optimizers and no engine."""
    config = problem.config
    network = problem.family.denoiser
    parameters = dict(network.named_parameters())
    keys_values = problem.family.text_projections()
    others = [name for name in problem.lower_names if name not in keys_values]
    low = torch.optim.AdamW(
        [parameters[n] for n in others] or [torch.zeros(1)],
        lr=config.lower.lr,
        weight_decay=config.upper.weight_decay,
    )
    up = torch.optim.AdamW(
        [parameters[n] for n in problem.upper_names],
        lr=config.upper.lr,
        weight_decay=config.upper.weight_decay,
    )
    trained = {*problem.lower_names, *problem.upper_names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    plan = problem.merge.plan
    for step in range(steps):
        network.zero_grad(set_to_none=True)
        if step % 2 == 0:
            adapted = []
            for n in range(len(problem.data)):
                before = {k: parameters[k].grad for k in keys_values}
                loss = problem.lower_level(n, step).loss({}, {}, 0)
                # gradients of the other parameters add up to their mean
                (loss / len(problem.data)).backward()
                own = {
                    k: len(problem.data)
                    * (parameters[k].grad - (0 if before[k] is None else before[k]))
                    for k in keys_values
                }
                adapted.append({k: parameters[k].detach() - config.lower.lr * own[k] for k in own})
                for k in keys_values:
                    parameters[k].grad = before[k]
            torch.nn.utils.clip_grad_norm_([parameters[n] for n in others], 1.0)
            low.step()
            with torch.no_grad():
                for k in keys_values:
                    W0 = parameters[k].clone()
                    for C, M, W in zip(plan.C, plan.M, adapted, strict=True):
                        parameters[k] += (W[k] - W0) @ C.mT @ M
        else:
            for n in range(len(problem.data)):
                part = problem.upper_level([n], step)
                for term, loss in zip(part.terms, part.losses({}), strict=True):
                    (term.weight * loss).backward(retain_graph=True)
            torch.nn.utils.clip_grad_norm_([parameters[n] for n in problem.upper_names], 1.0)
            up.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("parameters", ["cross_attention", "cross_attention_kv", "attention"])
def test_it_is_the_published_update(tmp_path, parameters):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    config = settings(
        tmp_path,
        method="alternating",
        steps=4,
        divergence=None,
        lower={"lr": 1e-4, "parameters": parameters},
    )
    ours = make(folder, config)
    start = {n: v.clone() for n, v in ours.family.denoiser.named_parameters()}
    history = alternate(ours)
    truth = transcription(make(folder, config), 4)
    for name, value in ours.family.denoiser.named_parameters():
        # AdamW divides by the root of g², which magnifies rounding where g is small
        change = value - start[name]
        gap = (value - truth[name]).norm()
        assert gap <= 1e-2 * change.norm() + 1e-9 * value.norm(), (name, gap, change.norm())
    assert [sorted(r.losses) for r in history[:2]] == [["cat", "dog"]] * 2
    assert [sorted(r.prior_losses) for r in history[:2]] == [[], ["cat", "dog"]]
    assert history[0].drift > 0


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        # 8 bits of mantissa, and a few dozen layers whose roundings add up
        ({"precision": "bfloat16"}, 0.1),
        ({"precision": "bfloat16", "gradient_checkpointing": True}, 0.1),
    ],
    ids=["checkpointing", "bfloat16", "both"],
)
def test_memory_savers_change_neither_step(tmp_path, changes, tolerance):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")

    def steps(**changes):
        problem = make(folder, settings(tmp_path, method="alternating", **changes), 1)
        theta, lower = problem.theta(), problem.lower_levels(0)
        with recomputed_blocks(problem.family.denoiser, problem.config.gradient_checkpointing):
            lower, merged = merge_step(theta, lower, problem.merge, ["cat"], lr=1e-3)
            upper, _, _ = upper_gradient(theta, problem.upper_levels(1))
        moved = {name: value - theta[name] for name, value in merged.items()}
        return [
            torch.cat([v.flatten() for v in part.values()])
            for part in (moved, lower.gradient, upper)
        ]

    for ours, plain in zip(steps(**changes), steps(), strict=True):
        assert (ours - plain).norm() <= tolerance * plain.norm()
        assert ours.dtype == torch.float32


def test_a_hard_constraint_that_contradicts_itself_is_softened_a_little(tmp_path, caplog):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    family = family_of(load_pipeline(str(folder)))
    config = settings(tmp_path, method="alternating")
    with caplog.at_level(logging.WARNING, "mima"):
        # both prompts begin with the same word, in the same place
        merge = merge_layer(family, concepts(), config)
    assert merge.plan.lam == ALMOST_HARD
    assert "linearly dependent" in caplog.text
    assert merge_layer(family, concepts(1), config).plan.lam == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower": {"train_token": True}, "new_words": True}, "one lower step on the weights"),
        ({"merge": "average"}, "not for merge 'average'"),
        ({"lower": {"parameters": "lora"}}, "one lower step on the weights"),
        ({"lower": {"steps": 2}}, "one lower step on the weights"),
    ],
)
def test_what_the_published_update_cannot_do_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, method="alternating", **changes)
