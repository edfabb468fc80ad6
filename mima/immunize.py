"""Algorithm 1 of MIMA: multi-concept immunization through differentiable merging.

Zheng & Yeh, AAAI 2025, arXiv 2412.15320:

max_{θ ∈ S_u}  Σ_n L(x_u[n], c[n]; Merge({θ'[n]}))
s.t.  θ'[n] = argmin_{θ ∈ S_l} L(x_l[n], c[n]; θ)  for all n
"""

# N = concepts, K = lower-level steps, θ'[n] = weights adapted to concept n, φ = merged weights

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mima.adaptation.copies import component_name, with_modules
from mima.bilevel.outer import OuterGradient
from mima.concepts import Concept, load_concepts
from mima.config import ImmunizeConfig
from mima.erasure import erase
from mima.errors import MimaError
from mima.families import Family, family_of, load_pipeline
from mima.problem import ConceptData, Problem, encode_concepts, merge_layer, ordinary_captions


@dataclass(frozen=True)
class StepReport:
    """One outer step.

    Attributes:
        step: steps done, from 1.
        steps: steps in all.
        losses: loss of each upper term at the merged weights: a concept's is wanted high, a prior's
            low.
        drift: ‖φ − θ‖ / ‖θ‖.
        gradient_norm: length of the hypergradient before clipping.
    """

    step: int
    steps: int
    losses: dict[str, float]
    drift: float
    gradient_norm: float


Callback = Callable[[StepReport], bool | None]
"""Called after each outer step; returning True ends the run there."""


@dataclass
class ImmunizeResult:
    """An immunized model and how it came about.

    Attributes:
        pipeline: an ordinary diffusers pipeline.
        concepts: names of the concepts it was immunized against.
        config: the settings.
        history: one report per outer step.
    """

    pipeline: Any
    concepts: list[str]
    config: ImmunizeConfig
    history: list[StepReport] = field(default_factory=list)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a diffusers folder, which opens without mima."""
        self.pipeline.save_pretrained(folder)


def immunize(
    model: Any,
    concepts: Sequence[Concept] | object,
    config: ImmunizeConfig | None = None,
    *,
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> ImmunizeResult:
    """Make a model a bad starting point for learning the concepts, and keep it good otherwise.

    Args:
        model: a diffusers pipeline (left as it is: the result holds a copy of what changes), a
            diffusers folder, a .safetensors file, a hub id, or ``"embedded"``.
        concepts: N concepts, or whatever ``load_concepts`` reads.
        config: the settings; by default those of the published re-learning experiments.
        output: a new or empty folder for the immunized model; None writes nothing.
        callbacks: called with a ``StepReport`` after each outer step.

    Returns:
        The immunized pipeline, in float32 on the model's device, with its history.

    Raises:
        MimaError: the model, a concept, a setting or the output folder cannot be used. Everything
            is checked before long work starts.

    Example:
        >>> result = immunize("embedded", [embedded_concept("cat"), embedded_concept("noto-style")])
        >>> result.save_pretrained("immunized")
    """
    config = config or ImmunizeConfig()
    concepts = load_concepts(concepts)
    if config.method == "imma" and len(concepts) != 1:
        raise MimaError(
            f"method: imma immunizes against one concept, got {len(concepts)}; "
            "use joint, compose or mima"
        )
    if output is not None:
        _check_output(Path(output))
    pipeline = _own_copy(model)
    family = family_of(pipeline)

    data = encode_concepts(family, concepts, config)
    if config.erase_first:
        pipeline = erase(pipeline, concepts, preserve=ordinary_captions(config.captions))
        family = family_of(pipeline)
    if config.method == "none":
        history = []
    elif config.method == "compose":
        history = _compose(family, concepts, data, config, callbacks)
    else:
        merge = merge_layer(family, concepts, config)
        history = ascend(Problem(family, data, config, merge), callbacks)

    result = ImmunizeResult(pipeline, [c.name for c in concepts], config, history)
    if output is not None:
        result.save_pretrained(output)
    return result


def ascend(problem: Problem, callbacks: Sequence[Callback] = ()) -> list[StepReport]:
    """Algorithm 1: gradient steps on the upper level, in place on the model's own weights."""
    config = problem.config
    theta = problem.theta()
    optimizer = torch.optim.AdamW(
        [theta[name] for name in problem.upper_names],
        lr=config.upper.lr,
        weight_decay=config.upper.weight_decay,
    )
    history = []
    for step in range(config.steps):
        # θ'[n] = argmin L(x_l[n], c[n]; θ), K steps on batches drawn now
        lower = [problem.lower_level(n, step) for n in range(len(problem.data))]
        # −L(x_u[n], c[n]; φ) + w · L(class; φ), on other pictures
        upper = [problem.upper_level(n, step) for n in range(len(problem.data))]
        # φ = Merge({θ'[n]}), and dJ/dθ through φ, through Merge, through the K steps
        outer = problem.hypergradient(theta, lower, upper)
        # θ ← θ − η dJ/dθ on S_u
        gradient = _clipped(outer, config.upper.max_grad_norm)
        for name in problem.upper_names:
            theta[name].grad = gradient[name]
        optimizer.step()
        history.append(StepReport(step + 1, config.steps, outer.losses, outer.drift, outer.norm))
        stops = [callback(history[-1]) for callback in callbacks]
        if any(stops):
            break
    return history


def _clipped(outer: OuterGradient, longest: float | None) -> dict[str, torch.Tensor]:
    if longest is None or outer.norm <= longest:
        return outer.gradient
    return {name: g * (longest / outer.norm) for name, g in outer.gradient.items()}


def _compose(
    family: Family,
    concepts: Sequence[Concept],
    data: Sequence[ConceptData],
    config: ImmunizeConfig,
    callbacks: Sequence[Callback],
) -> list[StepReport]:
    """Immunize each concept alone, each from the same start, then merge the immunized models."""
    history, immunized = [], []
    merge = merge_layer(family, concepts, config)
    assert merge is not None
    for one in data:
        problem = Problem(family, [one], config, None)
        theta = problem.theta()
        base = {name: value.clone() for name, value in theta.items()}
        history += ascend(problem, callbacks)
        immunized.append({name: value.clone() for name, value in theta.items()})
        for name, value in theta.items():
            value.copy_(base[name])
    for name, value in merge(base, immunized).items():
        theta[name].copy_(value)
    return history


def _own_copy(model: Any) -> Any:
    """Open a model; of a pipeline in memory, copy the denoiser, which is what changes."""
    pipeline = load_pipeline(model)
    if pipeline is not model:
        return pipeline
    denoiser = family_of(pipeline).denoiser
    name = component_name(pipeline, denoiser)
    return with_modules(pipeline, **{name: copy.deepcopy(denoiser)})


def _check_output(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MimaError(f"output: {folder} exists and is not an empty folder")
