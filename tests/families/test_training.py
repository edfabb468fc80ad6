"""Noise levels, loss weighting and conditions against diffusers' training scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from PIL import Image
from support import builders, tiny

from mima.adaptation import LoRA
from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.families import Family, TrainingOptions, family_of, load_pipeline
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.encoding import encode_concepts
from mima.training.batches import Batch, Encoded, encode, losses, seeded
from mima.training.loss import prediction_and_target

SCHEMES = ("none", "logit_normal", "sigma_sqrt", "mode", "cosmap")
SCRIPTS = {"sd3": ("logit_normal", True), "flux": ("none", False)}
"""Default weighting scheme and preconditioning of the DreamBooth LoRA script of each kind."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds = {
        **{"sd3": builders.sd3, "flux": builders.flux, "sdxl": builders.sdxl},
        **{"sana": builders.sana, "lumina2": builders.lumina2, "qwen": builders.qwen_image},
    }
    made = {name: builders.save(kind, root / name) for name, kind in kinds.items()}
    return made | {"sd": tiny.save_tiny_stable_diffusion(root / "sd")}


def opened(folders: dict[str, Path], kind: str, **training: object) -> Family:
    return family_of(builders.opened(folders[kind]), training=TrainingOptions(**training))


def script_timesteps(family: Family, scheme: str, count: int) -> torch.Tensor:
    """The scripts' lines: a density, an index, the scheduler's timestep there."""
    scheduler = type(family.pipeline.scheduler).from_config(family.pipeline.scheduler.config)
    torch.manual_seed(3)
    u = compute_density_for_timestep_sampling(
        weighting_scheme=scheme, batch_size=count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    return scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_noise_levels_are_drawn_as_the_scripts_draw_them(folders, kind, scheme):
    family = opened(folders, kind, weighting_scheme=scheme)
    # sampling leaves its own few timesteps in the pipeline's scheduler
    family.sample_latents(["a cat"], torch.Generator().manual_seed(0))
    drawn = family.sample_timesteps(20_000, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.float32
    expected = script_timesteps(family, scheme, 20_000)
    ranks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    # the quantiles of 20,000 draws have standard errors of 0.004 in u at most
    torch.testing.assert_close(drawn.quantile(ranks), expected.quantile(ranks), rtol=0, atol=25)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_default_scheme_is_the_scripts(folders, kind):
    family, (scheme, precondition) = opened(folders, kind), SCRIPTS[kind]
    assert family.training.weighting_scheme == scheme
    assert bool(family.training.precondition_outputs) is precondition
    below_half = family.sample_timesteps(4000, torch.Generator().manual_seed(1)) < 500
    expected = script_timesteps(family, scheme, 4000) < 500
    assert abs(below_half.float().mean() - expected.float().mean()) < 0.04
    if kind == "flux":
        assert abs(below_half.float().mean() - 0.5) < 0.04


def test_the_ends_of_the_density_are_levels_of_the_schedule(folders, monkeypatch):
    family = opened(folders, "flux", weighting_scheme="mode")
    for u, level in ((0.0, 1.0), (1.0, 1000.0)):
        monkeypatch.setattr(torch, "rand", lambda n, *, generator, u=u: torch.full((n,), u))
        assert family.sample_timesteps(2, torch.Generator()).tolist() == [level] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_loss_is_that_of_the_script(folders, kind, scheme):
    family = opened(folders, kind, weighting_scheme=scheme)
    latents, noise = (torch.randn(3, 4, 8, 8) for _ in range(2))
    timesteps = torch.tensor([20.0, 500.0, 980.0])
    text = family.encode_prompts(["a cat"] * 3)
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    with torch.no_grad():
        predicted = family.predict(noisy, timesteps, text)
        sides = prediction_and_target(family, latents, text, timesteps, noise)
    target = noise - latents
    if SCRIPTS[kind][1]:
        predicted, target = predicted * -sigmas + noisy, latents
    weights = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = (weights * (predicted - target) ** 2).flatten(1).mean(1).mean()
    torch.testing.assert_close(torch.nn.functional.mse_loss(*sides), expected)


def script_loss(family, kind, latents, noise, sigmas, text):
    """The lines of each script from the noise level to the squared error, [B, C, H, W]."""
    network, pipeline = family.denoiser, family.pipeline
    hidden, mask = text["encoder_hidden_states"], text["encoder_attention_mask"]
    levels = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - levels) * latents + levels * noise
    if kind == "sana":
        predicted = network(
            noisy, encoder_hidden_states=hidden, encoder_attention_mask=mask, timestep=sigmas * 1000
        ).sample
        return (predicted - (noise - latents)).square()
    if kind == "lumina2":
        # its levels count the picture's share
        noisy = (1 - levels) * noise + levels * latents
        predicted = network(
            noisy, timestep=sigmas, encoder_hidden_states=hidden, encoder_attention_mask=mask
        ).sample
        return (predicted - (latents - noise)).square()
    packed = pipeline._pack_latents(noisy, len(noisy), 4, 8, 8)
    predicted = network(
        hidden_states=packed,
        encoder_hidden_states=hidden,
        encoder_hidden_states_mask=mask,
        timestep=sigmas,
        img_shapes=[(1, 4, 4)] * len(noisy),
    ).sample
    return (pipeline._unpack_latents(predicted, 8, 8, 1)[:, :, 0] - (noise - latents)).square()


@pytest.mark.parametrize("kind", ["sana", "lumina2", "qwen"])
def test_newer_families_train_as_their_scripts_do(folders, kind):
    family = opened(folders, kind)
    assert family.training.weighting_scheme == "none"
    latents, noise = (torch.randn(3, 4, 8, 8) for _ in range(2))
    sigmas = torch.tensor([0.02, 0.5, 0.98])
    text = family.encode_prompts(["a cat", "a red dog", "a photo"])
    timesteps = 1000 * ((1 - sigmas) if kind == "lumina2" else sigmas)
    with torch.no_grad():
        sides = prediction_and_target(family, latents, text, timesteps, noise)
        expected = script_loss(family, kind, latents, noise, sigmas, text)
    torch.testing.assert_close((sides[0] - sides[1]).square(), expected, rtol=1e-4, atol=1e-5)
    # FlowMatchEulerDiscreteScheduler from the folder's settings: of SANA's, it knows no shift
    shift = {"sana": 1.0, "lumina2": 6.0, "qwen": 1.0}[kind]
    drawn = family.sample_timesteps(4000, torch.Generator().manual_seed(1)) / 1000
    drawn = 1 - drawn if kind == "lumina2" else drawn
    assert abs(float(drawn.median()) - shift / (1 + shift)) < 0.03


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_that_of_the_script(folders, prediction):
    family = opened(folders, "sd")
    family.pipeline.scheduler.register_to_config(prediction_type=prediction)
    plain = family_of(family.pipeline)
    weighted = family_of(family.pipeline, training=TrainingOptions(snr_gamma=5.0))
    latents, noise = (torch.randn(3, 4, 8, 8) for _ in range(2))
    timesteps, text = torch.tensor([10, 400, 900]), plain.encode_prompts(["a cat"] * 3)
    with torch.no_grad():
        one, other = (
            prediction_and_target(f, latents, text, timesteps, noise) for f in (plain, weighted)
        )
    snr = compute_snr(plain.schedule, timesteps)
    # of an error of x itself, as the paper has it; the script knows none
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    weights = torch.stack([snr, 5 * torch.ones(3)], dim=1).min(dim=1)[0] / divisor
    errors = (one[0] - one[1]).square().flatten(1).mean(1)
    expected = (errors * weights).mean()
    torch.testing.assert_close(torch.nn.functional.mse_loss(*other), expected, rtol=1e-4, atol=0)
    assert plain.loss_weights(timesteps) is None


def test_time_ids_are_the_pictures_whatever_an_attacker_calls_them(folders):
    """A run reads the same pictures under several captions."""
    family = opened(folders, "sdxl")
    wide = Image.new("RGB", (4 * family.resolution, 2 * family.resolution))
    concept = Concept("cat", "a cat", [wide], class_prompt="a pet", class_images=[wide])
    captions = ("as_is", "without_name", "empty")
    config = ImmunizeConfig(method="joint", lower=LowerConfig(captions=captions))
    (data,) = encode_concepts(family, [concept], config)
    told = [data.pictures(kind).pictures["time_ids"].tolist() for kind in captions]
    assert told[0] == told[1] == told[2]


def test_time_ids_are_the_pictures(folders):
    """SDXL's script: height, width, top and left of the crop, and the side that is trained on."""
    family = opened(folders, "sdxl")
    side = family.resolution
    wide, small = Image.new("RGB", (4 * side, 2 * side)), Image.new("RGB", (side // 2, side))
    data = encode(family, [Picture(wide, "a cat"), Picture(small, "a dog")])
    expected = [
        [2 * side, 4 * side, 0, side // 2, side, side],
        [side, side // 2, side // 2, 0, side, side],
    ]
    assert data.conditioning["time_ids"].tolist() == expected
    assert Encoded.from_tensors(data.to_tensors()).pictures["time_ids"].tolist() == expected
    batch = Batch.draw(family, data, 1, seeded("draw"), among=torch.tensor([1]))
    seen = []
    family.denoiser.register_forward_pre_hook(
        lambda _, args, keywords: seen.append(keywords["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    losses(family, [batch])
    assert seen[0].tolist() == [[float(number) for number in expected[1]]]
    # drawn by the model: whole, and of the size that it was drawn in
    drawn = Encoded.of(family, data.latents[:1], ["a cat"])
    assert drawn.conditioning["time_ids"].tolist() == [[side, side, 0, 0, side, side]]
    whole = opened(folders, "sdxl", picture_sizes=False)
    assert "time_ids" not in encode(whole, [Picture(wide, "a cat")]).conditioning


def test_the_text_and_the_guidance_of_training_are_settings(folders):
    family = opened(folders, "flux", max_sequence_length=7, guidance_scale=1.0)
    text = family.encode_prompts(["a photo of a red cat"])
    assert text["encoder_hidden_states"].shape[1] == 7
    assert family.token_mask(["a cat"]).shape == (1, 7)
    seen = []
    family.denoiser.register_forward_pre_hook(
        lambda _, args, keywords: seen.append(keywords["guidance"]), with_kwargs=True
    )
    family.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), text)
    assert seen[0].tolist() == [1.0]
    # sampling stays as the pipeline has it
    assert family.sampling_options(1)["guidance_scale"] == 3.5
    assert opened(folders, "sd3", max_sequence_length=5).token_mask(["a cat"]).shape[1] == 16 + 5


def test_options_that_a_family_does_not_read_are_refused(folders):
    with pytest.raises(MimaError, match="Flux has no snr_gamma; its options are weighting_scheme"):
        opened(folders, "flux", snr_gamma=5.0)
    with pytest.raises(MimaError, match="StableDiffusion has no weighting_scheme"):
        opened(folders, "sd", weighting_scheme="none")
    with pytest.raises(MimaError, match="weighting_scheme must be one of none"):
        TrainingOptions(weighting_scheme="uniform")
    with pytest.raises(MimaError, match="logit_std must be above 0"):
        TrainingOptions(logit_std=0.0)


def test_attacks_train_with_the_same_options(folders):
    """A run of an adaptation weighs its loss as the family does, and takes the same options."""
    concept = tiny.concept(images=2)
    runs = [
        LoRA(rank=1, steps=1, training=options, resolution=32).start(
            load_pipeline(folders["sd3"]), concept
        )
        for options in (
            TrainingOptions(),
            TrainingOptions(precondition_outputs=False),
        )
    ]
    for run in runs:
        run.advance(1)
    # σ² < 1 at the same draws
    assert runs[0].loss < runs[1].loss
