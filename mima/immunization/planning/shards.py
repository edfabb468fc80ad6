"""What a run takes where several processes hold the model: memory of each, and what each gets."""

# N = concepts, K = lower-level steps, C = groups of processes, S = shards
# P = weights of the denoiser, P_t = those that are trained, m = states of the path that count

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mima.immunization.config import BenignConfig, ImmunizeConfig, LowerConfig
from mima.immunization.objectives import READS_START
from mima.immunization.planning.sizes import FLOAT32
from mima.immunization.planning.work import concepts_of_a_step, outer_steps


@dataclass(frozen=True)
class Mesh:
    """The processes of a run.

    Attributes:
        groups: C, which share the concepts out.
        shards: S, the processes of a group, which hold a model between them.
    """

    groups: int
    shards: int

    def rows(self, shape: torch.Size) -> int:
        """Numbers that each process has of a weight: FSDP2 pads all rows to as many."""
        return math.ceil(shape[0] / self.shards) * math.prod(shape[1:]) if shape else 1

    def own(self, batch_size: int) -> int:
        """Pictures of a batch that each process computes."""
        return math.ceil(batch_size / self.shards)


def rows_of(denoiser: torch.nn.Module, mesh: Mesh, names: Collection[str] | None = None) -> int:
    """Numbers that each process has of some weights, or of all."""
    every = denoiser.named_parameters()
    return sum(mesh.rows(p.shape) for name, p in every if names is None or name in names)


def gathered_at_once(denoiser: torch.nn.Module) -> int:
    """Bytes of the weights that are whole while one block computes, and of their gradients."""
    # torch.distributed's own imports take a second
    from mima.families.sharded import blocks

    seen: set[int] = set()
    sizes = []
    for module in (*blocks(denoiser), denoiser):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        sizes.append(sum(p.numel() for p in own))
    # what belongs to no block is whole from the denoiser's first layer to its last
    return 2 * FLOAT32 * (max(sizes[:-1], default=0) + sizes[-1])


def of_each_process(config: ImmunizeConfig, mesh: Mesh) -> ImmunizeConfig:
    """The settings whose batches have the pictures that one process computes."""

    def attacker(low: LowerConfig) -> LowerConfig:
        return low.model_copy(update={"batch_size": mesh.own(low.batch_size)})

    def adaptation(benign: BenignConfig) -> BenignConfig:
        return benign.model_copy(update={"lower": benign.lower and attacker(benign.lower)})

    up = config.upper
    upper = up.model_copy(
        update={
            "batch_size": mesh.own(up.batch_size),
            "prior_batch_size": up.prior_batch_size and mesh.own(up.prior_batch_size),
            "benign": up.benign and adaptation(up.benign),
        }
    )
    lower = tuple(attacker(low) for low in config.attackers)
    return config.model_copy(update={"upper": upper, "lower": lower})


def received(
    denoiser: torch.nn.Module,
    trained: Collection[str],
    config: ImmunizeConfig,
    mesh: Mesh,
    *,
    count: int,
    benign: int,
) -> dict[str, int]:
    """Bytes that each process receives in one outer step, by what for: the mean over the steps.

    docs/distributed.md derives them. Predictions, losses and norms are left out.

    Args:
        denoiser: on any device.
        trained: names of P_t.
        config: the settings.
        mesh: C and S.
        count: N.
        benign: concepts that must stay learnable.
    """
    C, S = mesh.groups, mesh.shards
    if S == 1 or config.method == "none":
        return {}
    rows, rows_t = (rows_of(denoiser, mesh, names) for names in (None, trained))
    itemsize = 2 if config.precision == "bfloat16" else FLOAT32
    forward = rows * itemsize * (S - 1)
    both = 2 * forward + rows_t * FLOAT32 * (S - 1)
    up, attackers = config.upper, config.attackers
    share = math.ceil(concepts_of_a_step(config, count) / C)
    chances = sum(low.share for low in attackers)
    steps = sum(low.share * (low.steps + _begun(low)) for low in attackers) / chances
    states = len(attackers[0].states(up.path_every))
    apart = up.ascent_ratio is not None
    within = {
        "attacks": share * steps * both / config.attack_every,
        "the objective": share * states * (both + forward * (up.objective in READS_START)),
        "what retains": apart * share * (both + forward * (up.retain == "distill")),
        "benign adaptations": _benign(config, up.benign, benign, C, forward, both),
    }
    # an all-reduce sends everything there and back
    reduced = 2 * rows_t * FLOAT32 * (C - 1) / C
    merges = config.method == "mima"
    between = {
        "the merge's sums": merges * states * reduced / config.attack_every,
        "sums of gradients": (states if merges else 1) * reduced + apart * reduced,
    }
    named = {f"{what}, within a group": size for what, size in within.items()}
    named |= {f"{what}, between groups": size for what, size in between.items()}
    return {what: round(size) for what, size in named.items() if size}


def _begun(low: LowerConfig) -> float:
    """Steps that an attacker takes on a benign concept first, for each outer step."""
    return sum(low.benign_start) / 2 / outer_steps(low) if low.benign_start else 0.0


def _benign(
    config: ImmunizeConfig,
    benign: BenignConfig | None,
    count: int,
    groups: int,
    forward: int,
    both: int,
) -> float:
    if benign is None or not count:
        return 0.0
    low = config.benign_lower
    states = len(low.states(benign.path_every))
    at_once = min(benign.concepts_per_step, count)
    share = math.ceil(at_once / groups) / benign.every
    found = share * (low.steps + states) * both
    if benign.target == "match":
        times = math.ceil(config.steps / benign.every) * at_once
        paths = min(times, benign.paths * count) / config.steps / groups
        found += paths * (low.steps * both + states * forward)
    return found
