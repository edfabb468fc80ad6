"""One outer step on the embedded model, set up for measurement: random latents, real text."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from mima.batches import Encoded, seeded
from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.bilevel.outer import OuterGradient, naive_outer_gradient
from mima.concepts import Concept
from mima.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.families import family_of, load_pipeline
from mima.problem import ConceptData, Problem, merge_layer

NOUNS = (
    *("cat", "dog", "bird", "fish", "tree", "house", "castle", "car"),
    *("boat", "moon", "sun", "apple", "pizza", "robot", "rose", "chair"),
)


def make_problem(concepts: int, *, batch: int = 2, device: str = "cpu", **config: Any) -> Problem:
    """A problem of 1 to 16 concepts, K = 1, SGD below, cross-attention on both levels."""
    family = family_of(load_pipeline("embedded", device=device))
    settings = ImmunizeConfig(
        lower=LowerConfig(optimizer="sgd", lr=1e-3, batch_size=batch),
        upper=UpperConfig(batch_size=batch),
        **config,
    )
    white = Image.new("RGB", (8, 8), "white")
    named = [Concept(noun, f"a photo of a {noun}", [white]) for noun in NOUNS[:concepts]]
    side = family.resolution // family.pipeline.vae_scale_factor
    channels = family.denoiser.config.in_channels
    data = []
    for concept in named:
        draws = seeded(concept.name)
        latents = torch.randn(8, channels, side, side, generator=draws)
        images = Encoded.of(family, latents, [concept.prompt] * 8)
        ordinary = Encoded.of(family, latents.flip(0), ["a photo"] * 8)
        data.append(ConceptData(concept.name, images, ordinary))
    return Problem(family, data, settings, merge_layer(family, named, settings))


def two_pass(problem: Problem) -> OuterGradient:
    """The engine's gradient."""
    levels = problem.lower_levels(0), problem.upper_levels(0)
    return problem.hypergradient(problem.theta(), *levels)


def naive(problem: Problem) -> OuterGradient:
    """The same gradient (`exact`) with every concept's graph held at once."""
    assert problem.merge is not None
    with twice_differentiable_attention():
        return naive_outer_gradient(
            problem.theta(),
            list(problem.lower_levels(0)),
            problem.merge,
            list(problem.upper_levels(0)),
            wrt=problem.upper_names,
        )
