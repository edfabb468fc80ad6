"""Bytes of what a run holds beside the tensors of an outer step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mima.adaptation.steps import MATRICES
from mima.concepts import Concept
from mima.families import Family
from mima.families.base import PIXELS_AT_ONCE
from mima.families.frozen import Upcast, stored_bytes
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import caption_kinds, retained_captions
from mima.immunization.planning.meta_memory import counted
from mima.training.batches import CHUNK, Encoded

FLOAT32 = 4
"""Bytes."""


def dtype_of(x: torch.Tensor) -> str:
    """The name of the dtype in which a tensor is stored."""
    return str((x.stored if isinstance(x, Upcast) else x).dtype).removeprefix("torch.")


def weights_size(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of networks' weights as they are stored."""
    return sum(stored_bytes(p) for module in modules for p in module.parameters())


def encoded_pictures(family: Family) -> Encoded:
    """Two pictures of one prompt, on the meta device."""
    # text encoders look whether anything is masked, which the meta device cannot say
    with counted(()):
        prompts = family.encode_prompts(["a photo"])
    return Encoded(
        torch.empty(family.latent_shape(2), device="meta"),
        prompts,
        torch.zeros(2, dtype=torch.long),
    )


def encodings_size(
    encoded: Encoded,
    concepts: Sequence[Concept],
    benign: Sequence[Concept],
    config: ImmunizeConfig,
) -> int:
    """Bytes of all pictures and prompts as the denoiser reads them."""
    pictures = sum(len(concept.images) for concept in (*concepts, *benign))
    prompts = sum(len({x.prompt for x in c.images}) for c in benign)
    prompts += len(caption_kinds(config)) * sum(len({x.prompt for x in c.images}) for c in concepts)
    if config.has_prior:
        for concept in concepts:
            own = {x.prompt for x in concept.class_images}
            drawn = config.num_class_images
            pictures += len(concept.class_images) or drawn
            said = concept.class_prompt and config.captions is None
            prompts += len(own) or (1 if said else drawn)
            prompts += sum(map(len, retained_captions(concept, config).values()))
    text = sum(stored_bytes(v) for v in encoded.prompts.values())
    return stored_bytes(encoded.latents[:1]) * pictures + text * prompts


def matched(encoded: Encoded, config: ImmunizeConfig, count: int) -> int:
    """Bytes that the model before immunization predicts after benign adaptations, kept."""
    benign = config.upper.benign
    if benign is None or benign.target != "match":
        return 0
    low = config.benign_lower
    states = len(low.states(benign.path_every))
    each = encoded.latents[0].numel() * FLOAT32 * config.upper.batch_size
    return count * benign.paths * states * each


def served(config: ImmunizeConfig, names: Sequence[str], numels: Mapping[str, int]) -> int:
    """Bytes of the states of an attack that are kept for later outer steps."""
    if config.attack_every == 1:
        return 0
    states = len(config.attackers[0].states(config.upper.path_every))
    return states * sum(numels[name] for name in names) * FLOAT32


def preparing(family: Family, encoded: Encoded, *, most: int, drawn: int) -> int:
    """Bytes of activations while pictures are encoded and class pictures are drawn.

    Args:
        family: on the meta device.
        encoded: a prompt as the denoiser reads it.
        most: pictures of a concept.
        drawn: class pictures that are drawn at once.
    """
    modules = (family.denoiser, family.pipeline.vae)
    held = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    side = family.resolution
    with torch.no_grad(), counted(held) as live:
        rows = min(most, CHUNK, max(1, PIXELS_AT_ONCE // side**2))
        family.encode_images(torch.empty(rows, 3, side, side, device="meta"))
        if drawn:
            # with guidance, twice as many
            batch = 2 * drawn
            noisy = encoded.latents[:1].expand(batch, -1, -1, -1).clone()
            text = {n: v.expand(batch, *v.shape[1:]).clone() for n, v in encoded.prompts.items()}
            family.predict(noisy, torch.zeros(batch, device="meta"), text)
    return live.peak + live.largest_cast


def moments(
    family: Family, config: ImmunizeConfig, names: Iterable[str], numels: Mapping[str, int]
) -> int:
    """Bytes that the upper level's optimizer keeps: two numbers for each, of Muon's matrices one.

    Args:
        family: the model.
        config: the settings.
        names: the parameters that the defender changes.
        numels: how many numbers each has.
    """
    muon = config.upper.optimizer == "muon"
    dimensions = {name: p.ndim for name, p in family.denoiser.named_parameters()}
    kept = (numels[n] * (1 if muon and dimensions[n] in MATRICES else 2) for n in names)
    return sum(kept) * FLOAT32
