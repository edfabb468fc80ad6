"""`alternating` against a straight transcription of the published update."""

import logging
from dataclasses import replace

import pytest
import torch
from support import builders, tiny
from support.immunizing import concepts, settings

from mima.bilevel.upper import upper_gradient
from mima.families import family_of, load_pipeline
from mima.families.recomputed import recomputed_blocks
from mima.immunization import published
from mima.immunization.alternating import alternate, merge_step
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.merge import merge_layer
from mima.immunization.progress import LossName
from mima.training.batches import Batch, seeded
from mima.training.captions import drawn_captions, ordinary_captions

CLASSES = ("photo of a cat", "art")


def some_concepts(count=2):
    """Of different classes; of two of them, texts begin as the released code looks for."""
    return [
        replace(concept, class_prompt=name)
        for concept, name in zip(concepts(count), CLASSES, strict=False)
    ]


def make(folder, config, count=2, dtype=torch.float32):
    family = family_of(load_pipeline(str(folder), dtype=dtype))
    # otherwise all embeddings have the same mean, and no number of captions spans all directions
    for name, parameter in family.pipeline.text_encoder.named_parameters():
        if "final_layer_norm" in name:
            parameter.data += torch.linspace(-0.5, 0.5, len(parameter))
    given = some_concepts(count)
    data = encode_concepts(family, given, config)
    merge = merge_layer(family, given, config)
    lines = ordinary_captions(config.captions)
    return Problem(family, data, config, merge, captions=lines, described=given)


def released(problem, steps):
    """The released loop, one formula after the other, with torch's optimizers and no engine."""
    config, family, N = problem.config, problem.family, len(problem.data)
    pipeline, network = family.pipeline, family.denoiser
    weights = dict(network.named_parameters())
    kv = [n for n in weights if "attn2.to_k" in n or "attn2.to_v" in n]
    rest = [weights[n] for n in problem.lower_names if n not in kv]
    attn2 = [p for n, p in weights.items() if "attn2" in n]
    inner, outer = (
        torch.optim.AdamW(group or [torch.zeros(1)], lr=lr, weight_decay=1e-2)
        for group, lr in ((rest, config.lower.lr), (attn2, config.upper.lr))
    )

    def loss(n, step, level, sign, weight):
        draws = seeded(config.seed, step, n, level)
        halves = problem.attacker(n, step, {}).split(len(problem.data[n].images))
        mine = dict(zip(("lower", "upper"), halves, strict=True))[level]
        data, total = problem.data[n], 0.0
        for encoded, among, factor in (
            (data.images, mine, sign),
            (data.class_images, None, weight),
        ):
            batch = Batch.draw(family, encoded, 1, draws, among)
            noisy = family.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
            text = batch.conditioning["encoder_hidden_states"]
            predicted = network(noisy, batch.timesteps, text).sample
            total = total + factor * (predicted - batch.noise).square().mean()
        return total

    def rows(texts):
        out = []
        for text in texts:
            ids = torch.tensor([pipeline.tokenizer(text, truncation=True, max_length=16).input_ids])
            hidden = pipeline.text_encoder(ids)[0]
            out.append(hidden[0, 4 if "photo of a" in text[:15] else 1 :])
        return torch.cat(out).detach()

    captions = ordinary_captions(config.captions)
    for step in range(steps):
        network.requires_grad_(True).zero_grad()
        if step % 2:
            # 1/N Σ (−L + w L_class), clipped together
            (sum(loss(n, step, "upper", -1, 1.0) for n in range(N)) / N).backward()
            torch.nn.utils.clip_grad_norm_(attn2, config.upper.max_grad_norm)
            outer.step()
            continue
        names = [n for n in problem.lower_names if n not in kv]
        mean = {n: torch.zeros_like(weights[n]) for n in names}
        C, V = [], {n: [] for n in kv}
        for concept in range(N):
            name = CLASSES[concept]
            value = loss(concept, step, "lower", 1, config.lower.prior_weight)
            grads = torch.autograd.grad(value, [weights[n] for n in (*kv, *names)])
            style = "painting in the style of" if "art" in name else "photo of a"
            C.append(rows([name, f"{style} {name}"]))
            for n, grad in zip(kv, grads, strict=False):
                V[n].append(C[-1] @ (weights[n] - config.lower.lr * grad).detach().mT)
            for n, grad in zip(names, grads[len(kv) :], strict=True):
                mean[n] += grad / N
        # W + (Vᵀ − W Cᵀ) (D Cᵀ)⁻¹ D, D = C (C_regᵀ C_reg)⁻¹, with captions of this step
        C = torch.cat(C)
        drawn = rows(drawn_captions(captions, config.num_captions, config.seed, step))
        D = torch.linalg.solve(drawn.mT @ drawn, C.mT).mT
        with torch.no_grad():
            for n in kv:
                wanted = torch.cat(V[n]).mT - weights[n] @ C.mT
                weights[n] += torch.linalg.solve(D @ C.mT, wanted, left=False) @ D
        for n in names:
            weights[n].grad = mean[n]
        inner.step()
    return {name: parameter.detach() for name, parameter in weights.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parameters", ["denoiser", "cross_attention", "cross_attention_kv"])
def test_it_is_the_released_update(tmp_path, parameters):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    # enough of them that C_reg has full rank
    captions = tmp_path / "several.txt"
    nouns = ("cat", "dog", "tree", "house", "fish")
    lines = [f"{a} {b} in the {c}" for a in nouns for b in nouns for c in ("red", "blue")]
    captions.write_text("\n".join(lines))
    config = settings(
        tmp_path,
        method="alternating",
        steps=4,
        captions=captions,
        num_captions=30,
        lower={"lr": 1e-3, "parameters": parameters, "prior_weight": 1.0},
        upper={"lr": 1e-3, "max_grad_norm": 1e-3},
    )
    ours = make(folder, config, dtype=torch.float64)
    start = {n: v.clone() for n, v in ours.family.denoiser.named_parameters()}
    history = alternate(ours)
    truth = released(make(folder, config, dtype=torch.float64), 4)
    moved = 0
    for name, value in ours.family.denoiser.named_parameters():
        assert (value - truth[name]).abs().max() <= 1e-9, name
        moved += float((value - start[name]).abs().max()) > 1e-4
    assert moved >= len([n for n in ours.upper_names if n.endswith("weight")])
    # the upper level's gradients were long enough to be clipped, and the captions are redrawn
    assert history[1].gradient_norm > 1e-3
    assert drawn_captions(lines, 30, 0, 0) != drawn_captions(lines, 30, 0, 2)
    names = ["cat", "dog"]
    assert [sorted(r.losses) for r in history[:2]] == [sorted(names)] * 2
    assert [sorted(r.prior_losses) for r in history[:2]] == [[], sorted(names)]
    assert history[0].drift > 0


def test_losses_of_a_merge_step_are_on_the_concepts_own_pictures(tmp_path):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")

    def losses(**lower):
        config = settings(tmp_path, method="alternating", lower={"lr": 1e-3, **lower})
        problem = make(folder, config, 1)
        names = [LossName("cat")]
        levels = problem.lower_levels(0)
        return merge_step(problem.theta(), levels, problem.merge, names, lr=1e-3)

    with_class, moved = losses(prior_weight=1.0)
    alone, without = losses(prior_weight=0.0)
    # up to the rounding of a forward that class pictures share
    assert with_class.losses == pytest.approx(alone.losses, rel=1e-5)
    assert any(not torch.equal(value, without[name]) for name, value in moved.items())


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


def test_a_class_prompt_that_an_earlier_concept_has_is_merged_once(tmp_path, caplog):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    family = family_of(load_pipeline(str(folder)))
    config = settings(tmp_path, method="alternating")
    with caplog.at_level(logging.WARNING, "mima"):
        merge = merge_layer(family, concepts(), config)
    assert "'dog' has the class prompt of an earlier one ('a picture')" in caplog.text
    # "a picture" and its end, then "photo of a a picture" but for its first three words
    assert [len(C) for C in merge.plan.C] == [3 + 3, 0]
    assert merge.plan.lam == 0.0


def test_a_hard_constraint_that_contradicts_itself_is_softened_a_little(
    tmp_path, caplog, monkeypatch
):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    family = family_of(load_pipeline(str(folder)))
    config = settings(tmp_path, method="alternating")
    captions = ordinary_captions(config.captions)
    # both prompts begin with the same word, in the same place
    texts = {"cat": "a cat", "dog": "a dog"}
    monkeypatch.setattr(
        published,
        "concept_tokens",
        lambda family, given: [family.token_embeddings(texts[one.name]) for one in given],
    )
    both = concepts()
    with caplog.at_level(logging.WARNING, "mima"):
        plan = published.merge_plan(family, both, config, 0, torch.ones(2) / 2, captions)
    assert plan.lam == published.ALMOST_HARD
    assert "linearly dependent" in caplog.text
    alone = published.merge_plan(family, both[:1], config, 0, torch.ones(1), captions)
    assert alone.lam == 0.0


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


def test_the_plan_is_of_the_model_as_it_is(tmp_path, monkeypatch):
    """PixArt's text goes through a projection of the transformer, which is trained, too."""
    folder = builders.save(builders.pixart, tmp_path / "model")
    config = settings(
        tmp_path, method="alternating", steps=3, num_captions=4,
        lower={"lr": 1e-2, "parameters": "denoiser"},
    )  # fmt: skip
    family = family_of(load_pipeline(folder))
    given = some_concepts(1)
    data = encode_concepts(family, given, config)
    merge = merge_layer(family, given, config)
    lines = ordinary_captions(config.captions)
    problem = Problem(family, data, config, merge, captions=lines, described=given)
    plans = []

    def noted(theta, tasks, merge, *args, **options):
        plans.append((merge.plan.C[0], published.concept_tokens(family, given)[0]))
        return merge_step(theta, tasks, merge, *args, **options)

    monkeypatch.setattr("mima.immunization.alternating.merge_step", noted)
    alternate(problem)
    (before, _), (after, now) = plans
    assert torch.equal(after, now)
    assert (after - before).norm() > 1e-3 * before.norm()
