"""A run of `immunize` that takes seconds, for the tests of runs, processes and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import tiny

from mima.concepts import Concept
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.merge import merge_layer
from mima.immunization.result import ImmunizeResult

WORDS = ("cat", "dog", "bird", "fish", "castle")
FULL = {
    "method": "compose",
    "merge": "average",
    "hypergradient": "first_order",
    "resolution": 64,
    "steps": 7,
    "seed": 3,
    "lower": {
        "steps": 2,
        "optimizer": "sgd",
        "lr": 1e-2,
        "batch_size": 3,
        "parameters": "lora",
        "train_token": True,
        "token_lr": 0.1,
        "rank": 2,
        "alpha": 4.0,
        "prior_weight": 0.5,
    },
    "upper": {
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 2,
        "parameters": r"\.attn2\.to_q\.",
        "prior_weight": 2.0,
        "prior_batch_size": 5,
        "max_grad_norm": None,
        "loss_cap": 3.0,
    },
    "lam": 0.5,
    "captions": "captions.txt",
    "num_captions": 9,
    "num_class_images": 4,
    "new_words": True,
    "token_steps": 6,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "offload_optimizer": True,
    "checkpoint_every": None,
    "max_skipped": 0,
    "divergence": None,
    "trackers": ["tensorboard"],
}
"""Settings that are not the default ones, for what reads and writes them."""


def concepts(count: int = 2) -> list[Concept]:
    return [
        Concept(
            name,
            f"a {name} in red",
            [tiny.picture("red", "round", seed=10 * n + i) for i in range(4)],
            class_prompt="a picture",
            class_images=[tiny.picture("blue", "square", seed=100 + n + i) for i in range(3)],
        )
        for n, name in enumerate(WORDS[:count])
    ]


def captions(folder: Path) -> Path:
    path = folder / "captions.txt"
    lines = [f"a {c} {o}" for c in ("red", "green", "blue") for o in ("tree", "house", "castle")]
    path.write_text("\n".join(lines))
    return path


def settings(folder: Path, **changes: Any) -> ImmunizeConfig:
    """Two steps of `first_order` with fast learning, unless `changes` says otherwise."""
    defaults = {
        "hypergradient": "first_order",
        "steps": 2,
        "captions": captions(folder),
        "lower": LowerConfig(lr=1e-3),
    }
    return ImmunizeConfig(**(defaults | changes))


def problem_of(model: Path, config: ImmunizeConfig, count: int = 2) -> Problem:
    """What a run of some concepts solves, before its first step."""
    family = family_of(load_pipeline(str(model)))
    data = encode_concepts(family, concepts(count), config)
    return Problem(family, data, config, merge_layer(family, concepts(count), config))


def run(model: Path, config: ImmunizeConfig, count: int = 2, **options: Any) -> ImmunizeResult:
    """For processes of their own: one thread, so that results can be compared bit by bit."""
    torch.set_num_threads(1)
    return immunize(model, concepts(count), config, **options)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The denoiser of an output folder."""
    (file,) = (output / "unet").glob("*.safetensors")
    return load_file(file)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
