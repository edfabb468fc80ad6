"""LoRA of several concepts on the embedded model: one forward for all, or a pass for each."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.harness import Comparison, Machine, replay
from benchmarks.outer_step import NOUNS
from mima.adaptation import LoRA, Together
from mima.assets import assets
from mima.concepts import Concept
from mima.families.loading import load_embedded

CONCEPTS = (2, 4, 8)
PICTURES = assets() / "concepts"


@functools.lru_cache(maxsize=1)
def comparison(concepts: int, device: torch.device) -> Comparison:
    pipeline = load_embedded(device=device)
    folders = sorted(path for path in PICTURES.iterdir() if path.is_dir())
    named = [
        Concept(noun, f"a {noun} emoji", sorted(folder.glob("*.png"))[:2])
        for noun, folder in zip(NOUNS[:concepts], folders, strict=False)
    ]
    # batch 1, as the scripts of diffusers have it by default
    settings = LoRA(rank=4, batch_size=1)
    alone = [settings.start(pipeline, concept) for concept in named]
    shared = [settings.start(pipeline, concept) for concept in named]
    together = Together(shared)

    def one_by_one() -> torch.Tensor:
        for run in alone:
            run.advance(1)
        return torch.tensor([run.losses[0] for run in alone])

    def at_once() -> torch.Tensor:
        together.advance(1)
        return torch.tensor([run.losses[0] for run in shared])

    return Comparison(
        group=f"a training step of {concepts} LoRA, rank 4, batch 1",
        # the first step's losses are compared: the same batches, noise and adapters
        variants={"one by one": one_by_one, "together": at_once},
        baseline="one by one",
        num_bytes=0,
        flops=0,
        rounds=15,
    )


@pytest.mark.parametrize("variant", ["one by one", "together"])
@pytest.mark.parametrize("concepts", CONCEPTS)
def test_together(benchmark, concepts, variant, machine: Machine):
    replay(benchmark, comparison(concepts, machine.device), variant, machine)
    benchmark.extra_info["concepts"] = concepts
