"""Bytes of an outer step, which is followed on the meta device."""

# N = concepts, K = lower-level steps, S_u and S_l = what the defender and the attacks change

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate
from mima.bilevel.outer import kept_paths
from mima.bilevel.upper import upper_gradient
from mima.concepts import Concept
from mima.families import Conditioning, Family, Params
from mima.families.frozen import Upcast, stored_bytes
from mima.families.recomputed import recomputed_blocks
from mima.immunization.attackers import Alive, Attacker
from mima.immunization.config import BenignConfig, ImmunizeConfig, LowerConfig
from mima.immunization.encoding import ConceptData, retained_kinds
from mima.immunization.levels import NOBODY, Problem
from mima.immunization.parameters import adapted_names, trained_names
from mima.immunization.planning.meta_memory import counted
from mima.immunization.planning.shards import Mesh, of_each_process
from mima.immunization.planning.sizes import FLOAT32
from mima.immunization.planning.work import concepts_of_a_step
from mima.immunization.trained_words import TrainedWord
from mima.merging import MergeLayer
from mima.training.batches import Batch, Encoded, predictions

FOLLOWED = 2
"""Lower-level steps that are followed on the meta device."""
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
"""Tensors that an attacker's update rule keeps for each that the attacker trains."""


def step_parts(
    family: Family,
    encoded: Encoded,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    numels: Mapping[str, int],
    benign: int,
    mesh: Mesh,
) -> dict[str, int]:
    """Bytes of an outer step's own tensors in one process, at their peak.

    Args:
        family: on the meta device.
        encoded: two pictures.
        concepts: N concepts.
        config: the settings.
        numels: what the process has of each trained weight.
        benign: concepts that must stay learnable.
        mesh: the run's processes.
    """
    if mesh.shards > 1:
        config = of_each_process(config, mesh)
    kinds, upper, low = _kinds(config), config.upper, config.attackers[0]
    mode = "first_order" if config.method == "alternating" else config.hypergradient
    done = concepts_of_a_step(config, len(concepts))
    below = max(kind.concepts_per_forward for kind in kinds)
    count = min(done, max(2, upper.concepts_per_forward, below, len(kinds)))
    reduced = config.model_copy(
        update={
            "lower": tuple(kinds),
            "upper": upper.model_copy(
                update={
                    "path_every": _every(low, upper.path_every),
                    "benign": upper.benign and _short_benign(upper.benign, config.benign_lower),
                }
            ),
            "concepts_per_step": None,
        }
    )
    _, names = trained_names(family, config)
    merged = sum(numels[name] for name in names) * FLOAT32
    # without a merge, one concept's path is over before the next begins
    paths = (math.ceil(done / mesh.groups), count) if config.method == "mima" else (1, 1)
    replayed = config.attack_every > 1
    states = max(
        _further(a, upper.path_every, mode, attacked(family, a, numels), merged, paths, replayed)
        for a in config.attackers
    )
    beside = _further(low, upper.path_every, "first_order", 0, merged)
    further = {"attack": states, "retain": beside if replayed else 0}
    if upper.benign is not None:
        own = config.benign_lower
        size = sum(numels[n] for n in adapted_names(family, own.parameters)) * FLOAT32
        trained = attacked(family, own, numels)
        further["retain"] += _further(own, upper.benign.path_every, mode, trained, size)
    found = [
        _followed(
            family,
            encoded,
            [concept.name for concept in concepts[:count]],
            reduced.model_copy(update={"lower": tuple(kinds[first:] + kinds[:first])}),
            further,
            min(benign, 2),
        )
        for first in range(0, len(kinds), count)
    ]
    parts = max(found, key=lambda parts: sum(parts.values()))
    if mesh.shards > 1:
        whole = sum(family.denoiser.get_parameter(name).numel() for name in numels)
        weights = "attacks, their gradients and merge"
        parts[weights] = round(parts[weights] * sum(numels.values()) / whole)
        # shards are float32, or cast as they are gathered
        parts["casts of frozen weights"] = 0
    return parts


def _kinds(config: ImmunizeConfig) -> list[LowerConfig]:
    """Attackers of different memory, a few steps each; drawn settings as large as they may be."""
    found: list[LowerConfig] = []
    for attacker in config.attackers:
        start = attacker.benign_start
        one = attacker.model_copy(
            update={
                "steps": min(attacker.steps, FOLLOWED),
                "lr": 1.0,
                "rank": attacker.highest_rank,
                "captions": ("as_is",),
                "benign_start": start and (min(1, start[1]),) * 2,
                "share": 1.0,
                "age": None,
            }
        )
        if one not in found:
            found.append(one)
    return found


def _short_benign(benign: BenignConfig, own: LowerConfig) -> BenignConfig:
    return benign.model_copy(
        update={
            "path_every": _every(own, benign.path_every),
            "lower": own.model_copy(
                update={"steps": min(own.steps, FOLLOWED), "rank": own.highest_rank}
            ),
        }
    )


def _every(low: LowerConfig, every: int | None) -> int | None:
    """Every which state of the steps that are followed is to count, for every which of all."""
    if low.steps <= FOLLOWED:
        return every
    # at every step that is followed, or at the last alone
    return 1 if len(low.states(every)) >= FOLLOWED > 1 else None


def _further(
    low: LowerConfig,
    every: int | None,
    mode: str,
    attacked: int,
    merged: int,
    paths: tuple[int, int] = (1, 1),
    replayed: bool = False,
) -> int:
    """Bytes that paths, and steps of them, which are not followed add to those that are.

    Args:
        low: the adaptation.
        every: which of its states count.
        mode: how it is differentiated.
        attacked: bytes of what it trains.
        merged: bytes of its change.
        paths: how many there are in an outer step, and how many of them are followed.
        replayed: whether φ_k − θ of each state is kept beside the gradient there.
    """
    few = low.model_copy(update={"steps": min(low.steps, FOLLOWED)})
    states = len(low.states(every)) - len(few.states(_every(low, every)))
    if mode == "first_order":
        return states * merged
    gradient = mode == "finite_difference" and low.optimizer == "adam"
    state = attacked * (1 + MOMENTS[low.optimizer] + gradient)
    # where z is beside the network, it begins as tensors of its own, elsewhere as θ's
    first = attacked * (low.parameters == "lora")
    held = []
    for one, count in zip((low, few), paths, strict=True):
        own = one.steps * state
        # of one step, there is no path to keep
        kept = kept_paths(own + attacked, count, low.concepts_per_forward) if one.steps > 1 else 1
        # kept ones are given up one by one, and others are walked again when all of them are gone
        held.append(max(kept, 1) * (own + first))
    return max(held[0] - held[1], 0) + states * (1 + replayed) * merged


def attacked(family: Family, low: LowerConfig, numels: Mapping[str, int]) -> int:
    """Bytes of what an adaptation trains."""
    names = adapted_names(family, low.parameters)
    if low.parameters != "lora":
        return sum(numels[name] for name in names) * FLOAT32
    shapes = (family.denoiser.get_parameter(name).shape for name in names)
    return sum(FLOAT32 * low.highest_rank * (o + d) for o, d in shapes)


def _followed(
    family: Family,
    encoded: Encoded,
    names: Sequence[str],
    config: ImmunizeConfig,
    further: Mapping[str, int],
    benign: int,
) -> dict[str, int]:
    """Bytes of one outer step, of a few steps each, that is followed on the meta device.

    Args:
        family: on the meta device.
        encoded: two pictures.
        names: the step's concepts.
        config: the settings of the shortened step.
        further: bytes that the whole one adds, by phase.
        benign: concepts that must stay learnable.
    """
    count = len(names)
    read: dict[str, torch.Tensor] = {
        kind: torch.zeros(1, dtype=torch.long) for kind in retained_kinds(config)
    }
    data = [ConceptData(name, encoded, encoded, class_prompts=read) for name in names]
    others = [ConceptData(f"benign {b}", encoded, None) for b in range(benign)]
    merges = config.method in ("mima", "alternating")
    merge = MergeLayer(torch.full((count,), 1 / count, device="meta")) if merges else None
    word = _WordOnMeta(
        text="<new>",
        indices=(),
        embedding=torch.empty(1, device="meta"),
        prompt="a photo",
        prompts=(),
    )
    words = [word] * count if config.train_tokens else []
    problem = _OnMeta(family, data, config, merge, words=words, benign=others)
    theta = problem.theta()
    held = [
        *family.denoiser.parameters(),
        *family.denoiser.buffers(),
        *(encoded.latents, *encoded.prompts.values(), *problem._start.values()),
        # bfloat16 copies of frozen weights, which ``_frozen`` of a float32 file makes
        *(copies := problem._frozen if config.precision != "float32" else {}).values(),
    ]
    found: list[dict[str, int]] = []
    with ExitStack() as stack:
        stack.enter_context(recomputed_blocks(family.denoiser, config.gradient_checkpointing))
        shapes = [value.shape for value in theta.values()]
        half = config.precision == "bfloat16"
        live = stack.enter_context(counted(held, shapes, bfloat16=half))
        for phase in follow(problem, theta):
            found.append(
                {
                    "attacks, their gradients and merge": live.parts.get("weights", 0),
                    "further states of the path": further[phase],
                    "activations": live.parts.get("activations", 0),
                }
            )
            live.restart()
    frozen = {n: p for n, p in family.denoiser.named_parameters() if n in copies}
    made = sum(
        0 if isinstance(p, Upcast) and p.stored.dtype == torch.bfloat16 else stored_bytes(copies[n])
        for n, p in frozen.items()
    )
    largest = max(found, key=lambda parts: sum(parts.values()))
    return {"casts of frozen weights": live.largest_cast + made, **largest}


def follow(problem: Problem, theta: Params) -> Iterator[str]:
    """One outer step, up to the gradient that the optimizer reads; the phase that is over."""
    if problem.config.method == "alternating":
        total: dict[str, torch.Tensor] = {}
        for task in problem.lower_levels(0):
            gradient = lower.gradient(task, lower.start(task, theta), theta, 0)
            accumulate(total, {name: g / 2 for name, g in gradient.items()})
        del total
        upper_gradient(theta, problem.upper_levels(0))
        yield "attack"
        return
    outer = problem.hypergradient(theta, problem.lower_levels(0), problem.upper_path(0))
    yield "attack"
    retain = problem.retaining_gradient(theta, 0)
    # clipped or balanced, while both are there
    _ = {name: value * 1.0 for name, value in (retain or outer).gradient.items()}
    yield "retain"


class _OnMeta(Problem):
    """A problem without autocast, which does not know the meta device; ``counted`` imitates it."""

    def predictions(
        self, batches: Sequence[Batch], params: Params
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        frozen = {} if self.config.precision == "float32" else self._frozen
        return predictions(self.family, batches, {**frozen, **params})

    def attacker(self, n: int, step: int, alive: Mapping[int, Alive] = NOBODY) -> Attacker:
        """One of each kind in turn, where a run draws them."""
        kinds = self.config.attackers
        return Attacker(kinds[n % len(kinds)], self.config.seed, n, step)


class _WordOnMeta(TrainedWord):
    """A new word whose embedding reaches the denoiser's text, past the text encoders."""

    def read(self, family: Family, rows: Sequence[int], embedding: torch.Tensor) -> Conditioning:
        text = family.encode_prompts([self.prompt])["encoder_hidden_states"]
        return {"encoder_hidden_states": text.expand(len(rows), -1, -1) + embedding.sum()}
