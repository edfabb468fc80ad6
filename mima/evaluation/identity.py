"""Hashes that tell the models, pictures and prompts of two evaluations apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from mima.concepts import Concept
from mima.concepts.pictures import Picture, digest
from mima.families import family_of
from mima.families.pipelines import Pipeline, names_for_all, networks, scheduler_settings
from mima.storage.tensor_files import fingerprint


def pictures_of(concept: Concept) -> dict[str, str]:
    """A hash of each kind of a concept's pictures with their prompts, of those that it has."""
    kinds = ("images", "held_out", "class_images")
    found: dict[str, Sequence[Picture]] = {kind: getattr(concept, kind) for kind in kinds}
    return {
        kind: short_hash([(digest(picture), picture.prompt) for picture in pictures])
        for kind, pictures in found.items()
        if pictures
    }


def texts_of(concept: Concept) -> str:
    """A hash of those of a concept's texts that attacks may read, beside name and prompt."""
    return short_hash(
        (concept.class_prompt, concept.token, concept.initializer, concept.validation_prompt)
    )


def short_hash(value: object) -> str:
    """A hash of what a value says of itself in repr."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def weights_of(pipeline: Pipeline) -> str:
    """A hash of all weights of a pipeline, and of its noise schedule."""
    parts = [
        f"{name} {fingerprint(dict(module.state_dict()))}"
        for name, module in sorted(pipeline.components.items())
        if isinstance(module, torch.nn.Module)
    ]
    scheduler = pipeline.scheduler
    return " ".join([*parts, type(scheduler).__name__, str(sorted(scheduler.config.items()))])


def encoders_of(pipeline: Pipeline) -> dict[str, str]:
    """A hash of the weights of each part that the denoiser draws with: text encoders and VAE."""
    family, parts = family_of(pipeline), networks(pipeline)
    return {
        name: fingerprint(names_for_all(parts[name], parts[name].state_dict()))
        for name in family.parts
        if name in parts and name != family.denoiser_name
    }


def scheduler_of(pipeline: Pipeline) -> str:
    """A hash of a pipeline's noise schedule, for one version of diffusers."""
    return short_hash(sorted(scheduler_settings(pipeline).items()))
