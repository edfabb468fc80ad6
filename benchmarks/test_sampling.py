"""Sampling for evaluation: pictures of several adapters, against a plain loop of diffusers."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from benchmarks.harness import Comparison, Machine, replay
from benchmarks.targets import ratio
from mima.adaptation import LoRA
from mima.adapters.adapter import Adapter
from mima.concepts import embedded_concept
from mima.evaluation import Sampler
from mima.families.loading import load_embedded
from mima.sampling import Job

ADAPTERS, PROMPTS, SEEDS, STEPS, GUIDANCE = 3, 4, 2, 6, 3.0
BATCHES = (8, 24)


def stacked(images) -> Tensor:
    return torch.tensor(np.stack([np.asarray(image) for image in images]), dtype=torch.float32)


def plain_loop(pipeline, folders, jobs) -> Tensor:
    """One call of the pipeline per picture, adapters loaded in turn."""
    images = []
    for number, folder in enumerate(folders):
        pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHT_NAME_SAFE)
        images += [
            pipeline(
                job.prompt,
                generator=torch.Generator().manual_seed(job.seed),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=64,
                width=64,
            ).images[0]
            for job in jobs
            if job.adapter == number
        ]
        pipeline.unload_lora_weights()
    return stacked(images)


@pytest.fixture(scope="module")
def comparison(machine: Machine, tmp_path_factory) -> Comparison:
    pipeline = load_embedded(device=machine.device)
    pipeline.set_progress_bar_config(disable=True)
    concept = embedded_concept("hamburger")
    run = LoRA(rank=8, learning_rate=5e-4, batch_size=4).start(pipeline, concept)
    adapters, folders = [], []
    for step in run.until(*range(2, 2 * ADAPTERS + 1, 2)):
        adapters.append(Adapter.of(run.pipeline).copied())
        folders.append(run.save(tmp_path_factory.mktemp("adapters") / str(step)))
    jobs = [
        Job(picture.prompt, seed, adapter)
        for adapter in range(ADAPTERS)
        for picture in concept.images[:PROMPTS]
        for seed in range(SEEDS)
    ]

    def sample(batch_size: int) -> Tensor:
        sampler = Sampler(steps=STEPS, guidance=GUIDANCE, batch_size=batch_size)
        return stacked(sampler.draw(pipeline, jobs, adapters))

    variants = {"plain loop": lambda: plain_loop(pipeline, folders, jobs)}
    variants |= {f"batch {size}": functools.partial(sample, size) for size in BATCHES}
    return Comparison(
        group=f"sampling {len(jobs)} pictures of {ADAPTERS} adapters, {STEPS} steps",
        variants=variants,
        slow=tuple(variants),
        baseline="plain loop",
        tolerance=2 / 255,
        rounds=3,
    )


@pytest.mark.parametrize("variant", ["plain loop", *(f"batch {size}" for size in BATCHES)])
def test_sampling(benchmark, comparison, variant, machine: Machine):
    replay(benchmark, comparison, variant, machine)
    if variant != "plain loop":
        assert ratio(comparison.samples, variant, "plain loop") <= 0.5
