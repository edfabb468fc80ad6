"""Hashes that tell the models, pictures and prompts of two evaluations apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mima.concepts import Concept
from mima.concepts.pictures import Picture, digest
from mima.families import family_of
from mima.families.pipelines import (
    Pipeline,
    names_for_all,
    networks,
    readers,
    scheduler_settings,
)
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


def weights_hash(pipeline: Pipeline) -> str:
    """A hash of all weights of a pipeline, of its noise schedule and of its configurations."""
    parts = [
        f"{name} {fingerprint(dict(module.state_dict()))}"
        for name, module in sorted(networks(pipeline).items())
    ]
    settings = str(sorted(configurations_of(pipeline).items()))
    return " ".join([*parts, scheduler_of(pipeline), settings])


def encoders_of(pipeline: Pipeline) -> dict[str, str]:
    """A hash of the weights of each part that the denoiser draws with: text encoders and VAE."""
    family, parts = family_of(pipeline), networks(pipeline)
    return {
        name: fingerprint(names_for_all(parts[name], parts[name].state_dict()))
        for name in family.parts
        if name in parts and name != family.denoiser_name
    }


def configurations_of(pipeline: Pipeline) -> dict[str, str]:
    """A hash of what the weights of each part do not say: its settings; of tokenizers, their words.

    They hold for one version of diffusers and transformers, as `scheduler_of` does.
    """
    family, parts = family_of(pipeline), networks(pipeline)
    settings = {name: _settings(parts[name]) for name in family.parts if name in parts}
    words = {
        f"tokenizer{reader.number}": sorted(reader.tokenizer.get_vocab().items())
        for reader in readers(pipeline)
    }
    return {name: short_hash(value) for name, value in {**settings, **words}.items()}


NOT_OF_THE_MODEL = frozenset({"architectures", "transformers_version", "dtype", "torch_dtype"})
"""Settings of a part that say how it was written or opened."""


def _settings(part: Any) -> Any:
    config = part.config
    return _own(config.to_dict() if hasattr(config, "to_dict") else dict(config))


def _own(value: Any) -> Any:
    """Settings in one order, without what is no part of the model; those within them likewise."""
    if not isinstance(value, Mapping):
        return value
    kept = {key: _own(part) for key, part in value.items() if str(key) not in NOT_OF_THE_MODEL}
    return sorted((str(k), v) for k, v in kept.items() if not str(k).startswith("_"))


def scheduler_of(pipeline: Pipeline) -> str:
    """A hash of a pipeline's noise schedule, for one version of diffusers."""
    return short_hash(sorted(scheduler_settings(pipeline).items()))
