"""What a sampler refuses; how it draws is tested with the evaluation."""

from __future__ import annotations

import math

import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from support import builders, tiny

from mima.errors import MimaError
from mima.sampling import Sampler


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -1.0])
def test_guidance_is_a_number_from_zero_on(guidance):
    with pytest.raises(MimaError, match=rf"guidance must be at least 0 and finite, got {guidance}"):
        Sampler(guidance=guidance)
    assert Sampler(guidance=0.0).guidance == 0


@pytest.mark.parametrize("scheduler", ["own", "dpm++"])
def test_more_steps_than_noise_levels_are_refused(tmp_path, scheduler):
    pipeline = tiny.tiny_stable_diffusion(tmp_path, blocks=1)
    levels = pipeline.scheduler.config.num_train_timesteps
    sampler = Sampler(steps=levels + 1, scheduler=scheduler)
    with pytest.raises(MimaError, match=f"steps must be at most {levels}, .*got {levels + 1}"):
        sampler(pipeline, ["a cat"], (0,))


def test_rectified_flow_has_a_noise_level_for_every_number_of_steps(tmp_path):
    pipeline = tiny.tiny_stable_diffusion(tmp_path, blocks=1)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=10)
    assert Sampler(steps=11)._drawer(pipeline).scheduler.config.num_train_timesteps == 10


def test_one_step_of_pixart_alpha_is_refused_where_its_scheduler_has_none(tmp_path):
    folder = builders.save(builders.pixart, tmp_path / "pixart")
    alpha = builders.opened(folder)
    with pytest.raises(MimaError, match="steps must be at least 2 for a PixArtAlphaPipeline with"):
        Sampler(steps=1)(alpha, ["a cat"], (0,))
    assert Sampler(steps=2)(alpha, ["a cat"], (0,))
    alpha.scheduler = DDPMScheduler.from_config(alpha.scheduler.config)
    assert Sampler(steps=1)(alpha, ["a cat"], (0,))
