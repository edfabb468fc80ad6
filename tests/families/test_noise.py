"""Noise, noise levels and targets against the pipelines' schedulers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from support.families import DDPM, FLOW, of, open_family

from mima.families import family_of, load_pipeline


@of(DDPM)
def test_noise_and_target_follow_the_pipelines_scheduler(family):
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 998])
    scheduler = family.pipeline.scheduler
    alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = family.add_noise(latents, noise, timesteps)
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)
    target = family.target(latents, noise, timesteps)
    if not isinstance(scheduler, DDIMScheduler):
        assert torch.equal(target, noise)
        return
    # the pipeline's own sampler, told the target, finds the clean latents
    scheduler.set_timesteps(family.num_train_timesteps)
    for i, t in enumerate(timesteps.tolist()):
        step = scheduler.step(target[i], t, noisy[i])
        # divided by √ᾱ, which is 0.07 at the last of these levels
        torch.testing.assert_close(step.pred_original_sample, latents[i], rtol=0, atol=1e-4)


def test_sample_prediction_targets_the_latents(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.scheduler.register_to_config(prediction_type="sample")
    latents = torch.randn(1, 4, 8, 8)
    target = family_of(pipeline).target(latents, torch.randn(1, 4, 8, 8), torch.tensor([5]))
    assert torch.equal(target, latents)


def test_zero_terminal_snr_is_kept(folder_of):
    """At the last level there is noise alone, and v is the negated picture."""
    family = open_family(folder_of("sd-v"))
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    last = torch.tensor([family.num_train_timesteps - 1] * 2)
    assert torch.equal(family.add_noise(latents, noise, last), noise)
    assert torch.equal(family.target(latents, noise, last), -latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@of(("sd-v", "sd3"))
def test_half_precision_rounds_once(family, dtype):
    latents, noise = (torch.randn(64, 4, 8, 8).to(dtype) for _ in range(2))
    timesteps = family.sample_timesteps(64, torch.Generator().manual_seed(0))
    for compute in (family.add_noise, family.target):
        truth = compute(latents.double(), noise.double(), timesteps)
        assert compute(latents, noise, timesteps).dtype == dtype
        error = (compute(latents, noise, timesteps).double() - truth).abs()
        # one rounding to dtype, and those of float32 arithmetic
        bound = truth.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        assert bool((error <= bound).all())


@of(FLOW)
def test_flow_is_that_of_the_pipelines_scheduler(family):
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    scheduler = family.pipeline.scheduler
    timesteps = scheduler.timesteps[[10, 500, 990]]
    noisy = family.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    # following the target from σ to 0 leads to the clean latents
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    arrived = noisy - sigmas * family.target(latents, noise, timesteps)
    torch.testing.assert_close(arrived, latents, rtol=1e-5, atol=1e-5)


@of(FLOW)
def test_sampling_shifts_noise_levels_as_the_scheduler_does(family):
    scheduler = copy.deepcopy(family.pipeline.scheduler)
    levels = torch.linspace(0.999, 0.002, 300)
    mu = None
    if scheduler.config.use_dynamic_shifting:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        side = family.resolution // family.pipeline.vae_scale_factor // 2
        mu = calculate_shift(side**2, 256, 4096, 0.5, 1.15)
    if mu is None and scheduler.config.shift == 1:
        expected = levels
    else:
        scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu)
        expected = scheduler.sigmas[:-1]
    torch.testing.assert_close(family._shift(levels), expected, rtol=1e-4, atol=1e-5)


@of(DDPM)
def test_noise_levels_are_uniform(family):
    drawn = family.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == family.num_train_timesteps - 1
    assert abs(drawn.float().mean() - 499.5) < 10  # 5 standard errors
