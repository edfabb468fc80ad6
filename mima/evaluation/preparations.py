"""What an attacker may do to a model before training: noise, rounding, undoing, other training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mima.adaptation import LoRA, Run
from mima.adapters.adapter import Adapter
from mima.adapters.merge import apply
from mima.choices import SEED_STRIDE
from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.evaluation.bench import Bench
from mima.evaluation.grid import Attack, GridConfig, configured
from mima.evaluation.records import Side
from mima.families import family_of
from mima.families.pipelines import Pipeline, with_values

KICK = 0.1
"""Noise of a kick, as a share of each weight's own standard deviation."""
UNDO_RANK = 8
"""Rank of what ``undo`` takes out of each weight: the size of a LoRA file."""
INTERPOLATION = 0.5
"""The share of the way back to the original model that ``interpolate`` goes."""

Weights = dict[str, torch.Tensor]


def prepared(
    bench: Bench,
    attack: Attack,
    side: Side,
    pipelines: Mapping[Side, Pipeline],
    advance: Callable[[int], None],
) -> Any:
    """A model after what comes before the attack; what undoes leaves the original as it is.

    Args:
        bench: what the attack is made with.
        attack: one with a preparation.
        side: the model that it is made on.
        pipelines: both models.
        advance: called with the training steps just done.

    Raises:
        Diverged: a training that prepares it does.
    """
    pipeline, original = pipelines[side], pipelines["original"]
    match attack.preparation:
        case "fp16":
            return rounded(pipeline, 16)
        case "int8":
            return rounded(pipeline, 8)
        case "undo":
            return pipeline if side == "original" else undone(pipeline, original)
        case "interpolate":
            return pipeline if side == "original" else interpolated(pipeline, original)
        case "kick":
            start = kicked(pipeline, attack.seed)
            config, steps = bench.config, bench.config.preparation_steps
            pictures = bench.ordinary()
            return benign_training(start, pictures, config, steps, attack.seed, advance).pipeline
        case "merge" | "benign":
            return _with_loras(bench, attack, pipeline, advance)


def _with_loras(
    bench: Bench, attack: Attack, pipeline: Pipeline, advance: Callable[[int], None]
) -> Any:
    """Merge LoRAs of all targets, or of the other concepts' pictures, into the weights."""
    config = bench.config
    method = configured(config, "lora")
    assert isinstance(method, LoRA)
    # what is merged is low-rank updates of the denoiser
    lora = replace(
        method, steps=config.preparation_steps, prior_weight=0.0, text_encoder=False, dora=False
    )
    subjects = bench.merged(attack)
    if attack.preparation == "benign":
        pictures = bench.ordinary()
        subjects = [Concept("benign", pictures[0].prompt, pictures)]
    adapters = []
    for place, subject in enumerate(subjects, 1):
        # LoRAs of several people have no draws in common
        lora = replace(lora, seed=attack.seed * SEED_STRIDE + place)
        run = lora.adapt(pipeline, subject, on_step=lambda _: advance(1))
        adapters.append(Adapter.of(run.pipeline))
    return apply(pipeline, adapters)


def benign_training(
    pipeline: Pipeline,
    pictures: Sequence[Picture],
    config: GridConfig,
    steps: int,
    seed: int,
    advance: Callable[[int], None],
) -> Run:
    """Fine-tune every weight on ordinary pictures, with the grid's settings of DreamBooth."""
    method = configured(config, "dreambooth")
    settings = replace(method, steps=steps, seed=seed, prior_weight=0.0)
    concept = Concept("benign", pictures[0].prompt, pictures)
    return settings.adapt(pipeline, concept, on_step=lambda _: advance(1))


def denoiser_weights(pipeline: Pipeline) -> Weights:
    """The denoiser's parameters by name."""
    return {name: value.detach() for name, value in family_of(pipeline).denoiser.named_parameters()}


def changed_parameters(original: Any, immunized: Any) -> list[str]:
    """Names of the denoiser's parameters in which two models of one architecture differ.

    What was only rounded, where the immunized model is published in half precision, is the same.
    """
    before, after = denoiser_weights(original), denoiser_weights(immunized)
    return [
        name
        for name, value in after.items()
        if not any(
            torch.equal(value, before[name].to(dtype).to(value))
            for dtype in (value.dtype, torch.float16, torch.bfloat16)
        )
    ]


def with_weights(pipeline: Pipeline, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """The pipeline with every parameter of its denoiser changed; the given one stays.

    Args:
        pipeline: a diffusers pipeline.
        change: gives a new value for a name and an old value.
    """
    place = family_of(pipeline).denoiser_name
    weights = denoiser_weights(pipeline)
    return with_values(pipeline, {f"{place}.{n}": change(n, value) for n, value in weights.items()})


def kicked(pipeline: Pipeline, seed: int) -> Any:
    """With noise of a tenth of its own standard deviation on each weight, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)

    def kick(_: str, weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + KICK * weight.std(correction=0) * noise

    return with_weights(pipeline, kick)


def rounded(pipeline: Pipeline, bits: int) -> Any:
    """With weights rounded to 16 bits (float16), or to 8 (int8 with a scale for each output)."""

    def fewer(_: str, weight: torch.Tensor) -> torch.Tensor:
        if bits == 16:
            return weight.half().to(weight)
        rows = weight.reshape(len(weight), -1) if weight.ndim > 1 else weight.reshape(1, -1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / 127
        near: torch.Tensor = (rows / scale).round() * scale
        return near.reshape(weight.shape)

    return with_weights(pipeline, fewer)


def undone(immunized: Any, original: Any) -> Any:
    """The immunized model without the strongest part, of rank 8, of each weight's change."""
    before = denoiser_weights(original)

    def undo(name: str, weight: torch.Tensor) -> torch.Tensor:
        change = (weight - before[name].to(weight)).float()
        if change.ndim < 2:
            return weight - change.to(weight)
        U, S, Vh = torch.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
        strongest: torch.Tensor = (U[:, :UNDO_RANK] * S[:UNDO_RANK]) @ Vh[:UNDO_RANK]
        return weight - strongest.reshape(weight.shape).to(weight)

    return with_weights(immunized, undo)


def interpolated(immunized: Any, original: Any) -> Any:
    """The model half of the way from the immunized to the original one."""
    before = denoiser_weights(original)
    return with_weights(
        immunized,
        lambda name, weight: torch.lerp(weight, before[name].to(weight), INTERPOLATION),
    )
