"""What keeps other concepts learnable: benign adaptations, simulated beside the attacks.

A benign adaptation starts from θ, as an attack does, and learns another concept from half of its
pictures. At states of its path, θ'_k, the term is, on the other half,

| target | term |
| --- | --- |
| held_out | L, the loss of training (after MLAC, Henderson et al. 2023) |
| match | mean (v(θ'_k) − v(start'_k))²: predict what the model before immunization predicts after \
the same steps on the same batches |

``match`` draws from few paths for each concept, batches, noise and rates included, so that what the
model before immunization becomes of each is computed once.
"""

# b = index of a benign concept, K = steps of its adaptation

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mima.bilevel import lower
from mima.bilevel.lower import LowerLevel, plus
from mima.bilevel.outer import OuterGradient, unmerged_gradient
from mima.bilevel.upper import Level
from mima.immunization.attackers import Attacker
from mima.immunization.config import BenignConfig, LowerConfig
from mima.immunization.progress import LossName
from mima.merging import Params
from mima.training.batches import Batch, seeded

if TYPE_CHECKING:
    from mima.immunization.levels import Problem


class BenignTerms:
    """The benign terms of a run on its ``benign`` concepts; ``before`` is all of θ at its start."""

    def __init__(self, problem: Problem, config: BenignConfig, before: Params) -> None:
        self._problem = problem
        self._config = config
        self._before = before
        self._matched: dict[tuple[int, int], dict[int, torch.Tensor]] = {}

    @cached_property
    def states(self) -> tuple[int, ...]:
        """The states of each adaptation, by their steps, at which the term counts."""
        return self._lower.states(self._config.path_every)

    @cached_property
    def _lower(self) -> LowerConfig:
        return self._problem.config.benign_lower

    def gradient(self, theta: Params, step: int) -> OuterGradient | None:
        """The terms' gradient on S_u at one outer step; None at steps that have none."""
        config, problem = self._config, self._problem
        if step % config.every:
            return None
        draws = seeded(problem.config.seed, step, "benign")
        chosen = torch.randperm(len(problem.benign), generator=draws)[: config.concepts_per_step]
        # a path is a draw of its own, or one of a few
        paths = torch.randint(config.paths, (len(chosen),), generator=draws).tolist()
        if config.target == "held_out":
            paths = [step] * len(chosen)
        drawn = list(zip(chosen.tolist(), paths, strict=True))
        upper: dict[int, Sequence[Level]] = {
            k: [partial(self._term, b, j, k, len(drawn)) for b, j in drawn] for k in self.states
        }
        tasks = [self._adaptation(b, j) for b, j in drawn]
        mode, wrt = problem.config.hypergradient, problem.upper_names
        return unmerged_gradient(theta, tasks, upper, mode=mode, wrt=wrt, ranks=problem.ranks)

    def _adaptation(self, b: int, j: int) -> LowerLevel:
        """The j-th adaptation to concept b, its batches drawn."""
        adapter, pictures = self._adapter(b, j), self._problem.benign[b].images
        own, _ = adapter.split(len(pictures))
        return self._problem.adaptation(
            adapter, pictures, own, self._lower.steps, self._draws(b, j)
        )

    def _term(
        self, b: int, j: int, k: int, count: int, params: Params
    ) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
        """Concept b's term at the k-th state of its j-th adaptation; and the loss there."""
        ((prediction, target),) = self._problem.predictions([self._held_out(b, j, k)], params)
        loss = F.mse_loss(prediction, target)
        penalty = loss
        if self._config.target == "match":
            penalty = F.mse_loss(prediction, self._before_at(b, j)[k])
        name = LossName(self._problem.benign[b].name, "benign")
        return self._config.weight / count * penalty, {name: loss}

    def _before_at(self, b: int, j: int) -> dict[int, torch.Tensor]:
        """What the model before immunization predicts at each state of the same adaptation."""
        if (b, j) not in self._matched:
            task, theta = self._adaptation(b, j), self._before
            found = {}
            with torch.no_grad():
                for k, state in enumerate(lower.path(task, theta), start=1):
                    if k in self.states:
                        adapted = plus(theta, task.change(state.z, theta))
                        batch = self._held_out(b, j, k)
                        ((found[k], _),) = self._problem.predictions([batch], adapted)
            self._matched[b, j] = found
        return self._matched[b, j]

    def _held_out(self, b: int, j: int, k: int) -> Batch:
        pictures, size = self._problem.benign[b].images, self._problem.config.upper.batch_size
        _, other = self._adapter(b, j).split(len(pictures))
        return Batch.draw(self._problem.family, pictures, size, self._draws(b, j, k), other)

    def _adapter(self, b: int, j: int) -> Attacker:
        return Attacker(self._lower, self._problem.config.seed, b, j, who="benign")

    def _draws(self, *key: int) -> torch.Generator:
        return seeded(self._problem.config.seed, "benign", *key)
