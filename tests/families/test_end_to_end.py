"""Every family from a folder through immunization to an ordinary model that learns and samples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import builders, immunizing, tiny

from mima.adaptation import LoRA
from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Family, family_of
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.recipes import RECIPES
from mima.merging import MergePlan
from mima.training.loss import prediction_and_target


@pytest.fixture(scope="module", params=["sd", *builders.KINDS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / request.param
    if request.param == "sd":
        return tiny.save_tiny_stable_diffusion(path)
    return builders.save(builders.KINDS[request.param], path)


def concepts() -> list[Concept]:
    """Without class pictures, so that each family samples its own."""
    return [replace(concept, class_images=()) for concept in immunizing.concepts()]


@pytest.mark.parametrize("mode", ["first_order", "exact"])
def test_two_concepts_are_immunized_in_two_steps(folder, mode, tmp_path):
    pipeline = builders.opened(folder)
    before = {name: w.clone() for name, w in family_of(pipeline).denoiser.named_parameters()}
    config = ImmunizeConfig(
        hypergradient=mode,
        steps=2,
        num_class_images=2,
        captions=immunizing.captions(tmp_path),
        lower=LowerConfig(lr=1e-2, optimizer="sgd"),
        upper=UpperConfig(lr=1e-3),
    )
    result = immunize(pipeline, concepts(), config)

    assert [report.step for report in result.history] == [1, 2]
    losses = [
        loss
        for report in result.history
        for loss in (*report.losses.values(), *report.prior_losses.values())
    ]
    assert len(losses) == 2 * 2 * 2  # a term and its prior, of two concepts, at two steps
    assert all(0 < loss < float("inf") for loss in losses)
    assert all(report.drift > 0 for report in result.history)
    family = family_of(result.pipeline)
    chosen = set(family.parameter_names("cross_attention"))
    for name, weight in family.denoiser.named_parameters():
        assert torch.isfinite(weight).all()
        # Adam moves every entry that has a gradient, and its decay every other
        assert torch.equal(weight, before[name]) == (name not in chosen), name
    assert all(
        torch.equal(w, before[n]) for n, w in family_of(pipeline).denoiser.named_parameters()
    )


ONE = {"steps": 2, "batch_size": 1}
SHORT = {
    "default": {
        "lower": ONE,
        "upper": {"path_every": 1, "batch_size": 1, "prior_batch_size": 2},
    },
    "paper": {"resolution": None},
    "apdm": {"lower": ONE},
    "sophon": {"lower": ONE},
}
"""What makes attacks of the recipes short."""


@pytest.mark.parametrize("folder", ["lumina2", "qwen-image"], indirect=True)
@pytest.mark.parametrize("recipe", SHORT)
def test_recipes_take_finite_steps(folder, recipe, tmp_path):
    pipeline = builders.opened(folder)
    common = {"steps": 3, "captions": immunizing.captions(tmp_path), "num_class_images": 8}
    config = RECIPES[recipe](**common, **SHORT[recipe])
    result = immunize(pipeline, immunizing.concepts(), config)

    last = result.history[-1]
    assert (last.step, last.skipped) == (3, 0)
    for report in result.history:
        seen = [*report.losses.values(), *report.prior_losses.values()]
        assert seen
        assert all(map(math.isfinite, [*seen, report.drift, report.gradient_norm]))
    before = dict(family_of(pipeline).denoiser.named_parameters())
    after = dict(family_of(result.pipeline).denoiser.named_parameters())
    assert all(torch.isfinite(weight).all() for weight in after.values())
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    # the published update changes what the attacker trains, too
    trained = config.attackers[0] if config.method == "alternating" else config.upper
    assert changed <= set(family_of(pipeline).parameter_names(trained.parameters))
    assert len(changed) > 0.9 * len(family_of(pipeline).parameter_names("cross_attention"))


def test_the_immunized_model_samples_is_saved_and_learns(folder, tmp_path):
    config = immunizing.settings(tmp_path, steps=1, upper=UpperConfig(lr=1e-2))
    result = immunize(builders.opened(folder), immunizing.concepts(), config)
    output = tmp_path / folder.name
    result.save_pretrained(output)

    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    if folder.name in ("pixart", "sana"):
        options["use_resolution_binning"] = False
    if folder.name == "sana":
        options["complex_human_instruction"] = None
    pictures = [
        pipeline("a cat", generator=torch.Generator().manual_seed(5), **options).images
        for pipeline in (
            result.pipeline,
            DiffusionPipeline.from_pretrained(output),
            builders.opened(folder),
        )
    ]
    # not bit by bit: where tensors lie in memory decides how a CPU groups its sums
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-5)
    assert (pictures[0] - pictures[2]).abs().max() > 1e-4

    concept = immunizing.concepts()[0]
    run = LoRA(rank=2, learning_rate=3e-2).start(builders.opened(output), concept)
    run.advance(2)
    assert all(0 < loss < float("inf") for loss in run.losses)
    adapted = run.pipeline("a cat", generator=torch.Generator().manual_seed(5), **options).images
    assert (adapted - pictures[0]).abs().max() > 1e-4


@pytest.mark.parametrize("parameters", [None, "lora"])
def test_new_words_are_trained_where_text_alone_is_read(folder, parameters, tmp_path, monkeypatch):
    """By any encoders; where attention is joint, that is said before any work."""
    pipeline = builders.opened(folder)
    told = [
        Concept(
            word, f"a <new{n}> {word}", [tiny.picture("red", "round", seed=n)], f"a {word}",
            class_images=[tiny.picture("blue", "round", seed=n)],
            token=f"<new{n}>", initializer=word,
        )
        for n, word in enumerate(("cat", "dog"))
    ]  # fmt: skip
    config = immunizing.settings(
        tmp_path,
        steps=2,
        new_words=True,
        hypergradient="exact",
        lower={
            "parameters": parameters,
            "train_token": True,
            "lr": 1e-3,
            "token_lr": 1e-2,
            "steps": 2,
        },
    )
    if folder.name in ("sd3", "flux", "qwen-image"):
        monkeypatch.setattr(Family, "encode_images", None)
        with pytest.raises(MimaError, match=f"text projections of {type(pipeline).__name__} read"):
            immunize(pipeline, told, config)
        return
    result = immunize(pipeline, told, config)
    assert all(0 < report.gradient_norm < float("inf") for report in result.history)
    # a word alone asks nothing of the projected weights; LoRA of Lumina 2 does not adapt them
    asked = parameters == "lora" and folder.name != "lumina2"
    assert (result.history[-1].residual > 0) == asked
    assert result.pipeline.tokenizer is pipeline.tokenizer


def _batch(family: Family) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    side = family.resolution // family.pipeline.vae_scale_factor
    latents, noise = (
        torch.randn(2, 4, side, side, generator=generator, dtype=family.dtype) for _ in range(2)
    )
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": family.sample_timesteps(2, generator),
        "conditioning": family.encode_prompts(["a red cat", "a dog"]),
    }


def test_the_loss_has_a_second_derivative(folder):
    """Autograd's Hessian-vector product against central differences of gradients, in float64."""
    family = family_of(builders.opened(folder))
    family.denoiser.double()
    batch = _batch(family)
    weights = dict(family.denoiser.named_parameters())
    names = family.parameter_names("cross_attention_kv")
    generator = torch.Generator().manual_seed(1)
    direction = [
        torch.randn(weights[n].shape, generator=generator, dtype=torch.float64) for n in names
    ]

    def gradient(h: float, *, graph: bool = False) -> tuple[list[torch.Tensor], Any]:
        leaves = [
            (weights[n] + h * d).requires_grad_() for n, d in zip(names, direction, strict=True)
        ]
        params = dict(zip(names, leaves, strict=True))
        sides = prediction_and_target(family, **batch, params=params)
        loss = torch.nn.functional.mse_loss(*sides)
        return leaves, torch.autograd.grad(loss, leaves, create_graph=graph)

    with twice_differentiable_attention():
        leaves, first = gradient(0, graph=True)
        product = torch.autograd.grad(first, leaves, direction)
    # SANA's attention has ReLUs, whose kinks a longer difference would cross, and rounds in float32
    h, near = (3e-5, 5e-4) if folder.name == "sana" else (3e-4, 1e-4)
    slopes = [
        (ahead - behind) / (2 * h)
        for ahead, behind in zip(gradient(h)[1], gradient(-h)[1], strict=True)
    ]
    scale = max(float(value.norm()) for value in product)
    assert scale > 0
    for value, slope in zip(product, slopes, strict=True):
        # differences truncate at h² and magnify what the norms of SD3 and Flux round in float32
        assert float((value - slope).norm()) < near * scale


def test_the_merge_plan_holds_for_what_the_projections_read(folder, tmp_path):
    """At λ = 0 the merged weights give each concept's tokens the adapted model's keys and values.

    Checked on what the first projection really reads in a call of the denoiser: for cross-attention
    at any noise level, for joint attention in the first block at the middle one.
    """
    family = family_of(builders.opened(folder))
    prompts = ["red cat", "green house"]
    captions = [
        f"a {c} {o} in the style of a {c} {o}" for c in tiny.WORDS[:20] for o in ("dog", "bird")
    ]
    C = [family.token_embeddings(prompt).double() for prompt in prompts]
    plan = MergePlan.from_embeddings(
        C, torch.cat([family.token_embeddings(caption) for caption in captions]).double(), lam=0.0
    )
    name = family.text_projections()[0]
    base = family.denoiser.get_parameter(name).double()
    adapted = [base + 0.1 * torch.randn_like(base) for _ in prompts]
    merged = base + sum(
        (w - base) @ c.mT @ m for w, c, m in zip(adapted, plan.C, plan.M, strict=True)
    )
    side = family.resolution // family.pipeline.vae_scale_factor
    middle = torch.full((1,), family.num_train_timesteps // 2)
    for prompt, weight in zip(prompts, adapted, strict=True):
        read = family.projection_inputs(
            torch.randn(1, 4, side, side), middle, family.encode_prompts([prompt])
        )[name]
        tokens = read[0][family.token_mask([prompt])[0]].double()
        asked = tokens @ (weight - base).mT
        missed = tokens @ (merged - weight).mT
        assert float(missed.norm()) < 1e-3 * float(asked.norm())
