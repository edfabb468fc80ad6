"""Sampling for evaluation: pictures of several adapters, against a plain loop of diffusers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mima.adaptation import LoRA
from mima.concepts import embedded_concept
from mima.embedded import load_embedded
from mima.evaluation import Sampler
from mima.evaluation.adapters import Adapter
from mima.evaluation.sampling import Job

ADAPTERS, PROMPTS, SEEDS, STEPS, GUIDANCE = 3, 4, 2, 12, 3.0


def plain_loop(pipeline, folders, jobs):
    """One call of the pipeline per picture, adapters loaded in turn."""
    images = []
    for number, folder in enumerate(folders):
        pipeline.load_lora_weights(folder)
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
    return images


@pytest.mark.parametrize("batch_size", [8, 24])
def test_images_per_second_against_a_plain_loop(benchmark, batch_size, tmp_path):
    pipeline = load_embedded()
    pipeline.set_progress_bar_config(disable=True)
    concept = embedded_concept("hamburger")
    run = LoRA(rank=8, learning_rate=5e-4, batch_size=4).start(pipeline, concept)
    adapters, folders = [], []
    for step in run.until(*range(2, 2 * ADAPTERS + 1, 2)):
        adapters.append(Adapter.of(run.pipeline))
        folders.append(run.save(tmp_path / str(step)))
    jobs = [
        Job(picture.prompt, seed, adapter)
        for adapter in range(ADAPTERS)
        for picture in concept.images[:PROMPTS]
        for seed in range(SEEDS)
    ]
    sampler = Sampler(steps=STEPS, guidance=GUIDANCE, batch_size=batch_size)
    loop_seconds, ours_seconds = [], []
    for _ in range(3):
        start = time.perf_counter()
        expected = plain_loop(pipeline, folders, jobs)
        middle = time.perf_counter()
        drawn = list(sampler.draw(pipeline, jobs, adapters))
        ours_seconds.append(time.perf_counter() - middle)
        loop_seconds.append(middle - start)
    for a, b in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2
    loop, ours = (sorted(seconds)[1] for seconds in (loop_seconds, ours_seconds))
    benchmark.group = "sampling"
    benchmark.extra_info.update(
        images=len(jobs),
        loop_images_per_second=len(jobs) / loop,
        images_per_second=len(jobs) / ours,
        speedup=loop / ours,
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(lambda: list(sampler.draw(pipeline, jobs, adapters)), rounds=1)
    assert loop >= 2 * ours, f"{loop / ours:.2f} times as fast as a plain loop"
