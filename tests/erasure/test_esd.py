"""ESD: its objective, what it trains, and every family."""

import dataclasses
import math

import pytest
import torch
from support import builders, tiny

from mima.erasure import ESD, VARIANTS, Edit
from mima.errors import MimaError
from mima.families import family_of, load_pipeline

FAST = ESD(steps=2, learning_rate=1e-2, sampling_steps=3, batch_size=2)


@pytest.fixture(scope="module")
def concept():
    return dataclasses.replace(tiny.concept(), name="red")


def changed(pipeline, erased):
    old = dict(family_of(pipeline).denoiser.named_parameters())
    new = dict(family_of(erased).denoiser.named_parameters())
    return {name for name, value in old.items() if not torch.equal(value, new[name])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_its_parameters_and_nothing_else(pipeline, concept, variant):
    family = family_of(pipeline)
    before = {name: value.clone() for name, value in family.denoiser.named_parameters()}
    settings = dataclasses.replace(FAST, parameters=VARIANTS[variant].parameters)
    erased = settings.erase(pipeline, [concept])
    cross = {name for name in before if ".attn2." in name}
    expected = {"esd-x": cross, "esd-u": set(before) - cross, "esd-full": set(before)}[variant]
    assert changed(pipeline, erased) == expected
    assert all(torch.equal(before[n], v) for n, v in family.denoiser.named_parameters())
    assert not any(value.requires_grad for value in erased.unet.parameters())
    assert erased.text_encoder is pipeline.text_encoder


def test_published_defaults():
    assert VARIANTS["esd-x"] == ESD(
        parameters="cross_attention",
        steps=1000,
        learning_rate=1e-5,
        negative_guidance=1.0,
        start_guidance=3.0,
        sampling_steps=50,
    )


def test_the_objective_and_its_direction(pipeline):
    """At the start ε_θ = ε*, so that the loss is (1 + η)² mean (ε*(c) − ε*(c₀))²."""
    edit = Edit("a red round emoji", "a blue cat")
    settings = ESD(
        parameters="denoiser", steps=20, learning_rate=2e-5, sampling_steps=1, batch_size=4,
        negative_guidance=3.0,
    )  # fmt: skip
    losses = []
    erased = settings.erase(pipeline, [[edit]], on_step=lambda _, loss: losses.append(loss))
    old, new = family_of(pipeline), family_of(erased)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randint(1, (), generator=generator)  # the prompt's and the noise level's draws
    noisy = torch.randn(4, 4, 8, 8, generator=generator)
    level = old.sampling_timesteps(1).expand(4)
    named, unnamed = (old.encode_prompts([text] * 4) for text in (edit.source, edit.target))
    with torch.no_grad():
        before, neutral = (old.predict(noisy, level, text) for text in (named, unnamed))
        after = new.predict(noisy, level, named)
    assert losses[0] == pytest.approx(16 * (before - neutral).square().mean().item(), rel=1e-4)
    target = neutral - 3.0 * (before - neutral)
    moved, wanted = (after - before).flatten(), (target - before).flatten()
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_takes_the_samplers_steps(pipeline, guidance):
    """x_t is what diffusers' DDIM scheduler makes of the same predictions."""
    from diffusers import DDIMScheduler

    family = family_of(pipeline)
    settings = dataclasses.replace(FAST, start_guidance=guidance)
    text, empty = (family.encode_prompts([prompt] * 2) for prompt in ("a red cat", ""))
    levels = family.sampling_timesteps(4)
    with torch.no_grad():
        got = settings._draw(family, text, empty, levels, torch.Generator().manual_seed(0))
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler.set_timesteps(4)
        for now, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            named, unnamed = (
                family.predict(x, torch.full((2,), now), prompt) for prompt in (text, empty)
            )
            prediction = unnamed + guidance * (named - unnamed)
            # DDIM's own step ends where the next level is num_train / num_steps further down
            scheduler.num_inference_steps = 1
            scheduler.config.num_train_timesteps = now - following
            x = scheduler.step(prediction, now, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "sd3", "flux"])
def test_every_family(kind, tmp_path):
    pipeline = load_pipeline(builders.save(getattr(builders, kind), tmp_path / kind))
    # a Flux folder does not say what it was trained on
    settings = dataclasses.replace(FAST, resolution=32 if kind == "flux" else None)
    losses = []
    erased = settings.erase(
        pipeline, [[Edit("a red cat", "a cat")]], on_step=lambda _, loss: losses.append(loss)
    )
    assert changed(pipeline, erased) <= set(family_of(pipeline).parameter_names("cross_attention"))
    assert changed(pipeline, erased) >= set(family_of(pipeline).text_projections())
    assert all(0 < loss < float("inf") for loss in losses)


def test_velocity_and_sample_predictions_step_like_epsilon(tmp_path):
    """The same x and ε, told in three ways, arrive at the same place."""
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    now, following = torch.tensor([900, 500]), torch.tensor([400, 0])
    for kind in ("epsilon", "v_prediction", "sample"):
        pipeline = tiny.tiny_stable_diffusion(tmp_path / kind, prediction_type=kind)
        family = family_of(pipeline)
        noisy = family.add_noise(x, eps, now)
        got = family.denoise(noisy, family.target(x, eps, now), now, following)
        torch.testing.assert_close(got, family.add_noise(x, eps, following), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_erased(pipeline, concept):
    with pytest.raises(ValueError, match="concepts is empty"):
        FAST.erase(pipeline, [])
    with pytest.raises(ValueError, match="a list of edits is empty"):
        FAST.erase(pipeline, [[]])
    with pytest.raises(MimaError, match="none of its prompts contains its name"):
        FAST.erase(pipeline, [dataclasses.replace(concept, name="purple")])
    with pytest.raises(MimaError, match="30 pixels do not fit the vae"):
        dataclasses.replace(FAST, resolution=30).erase(pipeline, [concept])
    with pytest.raises(MimaError, match=r"esd: the loss is .*lower learning_rate"):
        dataclasses.replace(FAST, learning_rate=1e30, steps=5).erase(pipeline, [concept])
    for name, value in (
        ("steps", 0),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("negative_guidance", -1.0),
        ("negative_guidance", math.inf),
        ("start_guidance", 0.5),
        ("start_guidance", math.inf),
        ("sampling_steps", 0),
        ("sampling_steps", 2**31),
        ("resolution", 0),
    ):
        with pytest.raises(ValueError, match=f"ESD: {name} must be"):
            ESD(**{name: value})


def test_half_precision_weights_are_not_trained(tmp_path, concept):
    half = tiny.tiny_stable_diffusion(tmp_path).to(dtype=torch.bfloat16)
    with pytest.raises(MimaError, match=r"esd: .*float32"):
        FAST.erase(half, [concept])
