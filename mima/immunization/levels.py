"""A model and its concepts as a bi-level problem: what one outer step draws, trains and merges."""

# N = concepts, K = lower-level steps

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mima.bilevel.lower import Carried, LowerLevel
from mima.bilevel.optimizers import SGD, Adam, Optimizer
from mima.bilevel.outer import (
    Level,
    OuterGradient,
    Upper,
    UpperLevel,
    UpperTerm,
    outer_gradient,
    unmerged_gradient,
    upper_gradient,
)
from mima.bilevel.tasks import FullWeights, LoraFactors, NewWord, StepLoss
from mima.concepts import Concept
from mima.distributed import ALONE, Ranks
from mima.errors import MimaError
from mima.families import Family, Params
from mima.immunization.attacks import Alive, Attack
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import ConceptData
from mima.immunization.objectives import PENALTIES, READS_START, Seen, lacking
from mima.immunization.progress import LossName
from mima.immunization.trained_words import TrainedWord
from mima.merging import MergeLayer, MergePlan
from mima.training.batches import Batch, predictions, seeded
from mima.training.captions import regular_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where diffusers' modules keep how they recompute."""
ALMOST_HARD = 1e-10
"""Softness that stands in for a hard constraint where concepts share tokens."""
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adam": Adam}
"""The attackers' update rules by name."""
NOBODY: Mapping[int, Alive] = {}


class Problem:
    """Everything about a run that stays fixed while θ changes.

    Args:
        family: the model. Its parameters are θ; they are read, and written by the caller.
        data: the concepts' pictures.
        config: the settings.
        merge: how the adapted weights are merged; None leaves them apart (one problem each).
        ranks: the processes that share the concepts out.
        words: each concept's new word, where the lower level trains them.

    Attributes:
        upper_names: S_u, the parameters that the defender may change.
        names: S_u ∪ S_l, all parameters that the run concerns.
    """

    def __init__(
        self,
        family: Family,
        data: Sequence[ConceptData],
        config: ImmunizeConfig,
        merge: MergeLayer | None,
        ranks: Ranks = ALONE,
        words: Sequence[TrainedWord] = (),
    ) -> None:
        self.family = family
        self.data = list(data)
        self.words = list(words)
        self.config = config
        self.merge = merge
        self.ranks = ranks
        self.upper_names, self.lower_names = trained_names(family, config)
        self.names = tuple(dict.fromkeys((*self.upper_names, *self.lower_names)))
        # found once: each step asks for them, and a network's modules are many
        parameters = dict(family.denoiser.named_parameters())
        self._theta = {name: parameters[name] for name in self.names}
        self._start: dict[str, torch.Tensor] = {}
        if config.upper.objective in READS_START or config.upper.retain == "distill":
            self._start = {name: self._theta[name].detach().clone() for name in self.upper_names}

    def theta(self) -> dict[str, torch.Tensor]:
        """θ by name: the denoiser's own tensors, not copies."""
        return {name: value.detach() for name, value in self._theta.items()}

    def predictions(
        self, batches: Sequence[Batch], params: Params
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prediction and target of each batch in the run's precision, all from one forward."""
        if self.config.precision == "float32":
            return predictions(self.family, batches, params)
        with torch.autocast(self.family.device.type, getattr(torch, self.config.precision)):
            return predictions(self.family, batches, {**self._frozen, **params})

    def losses(self, batches: Sequence[Batch], params: Params) -> list[torch.Tensor]:
        """L(batch; params) of each batch in the run's precision, all from one forward."""
        return [F.mse_loss(*pair) for pair in self.predictions(batches, params)]

    def concepts(self, step: int) -> list[int]:
        """The concepts that one outer step is about, in order."""
        count = self.config.concepts_per_step
        if count is None or count >= len(self.data):
            return list(range(len(self.data)))
        order = torch.randperm(len(self.data), generator=seeded(self.config.seed, step, "concepts"))
        return sorted(order[:count].tolist())

    @cached_property
    def states(self) -> tuple[int, ...]:
        """The states of each attack, by their steps, at which the objective counts."""
        steps, every = self.config.lower.steps, self.config.upper.path_every
        return (steps,) if every is None else (*range(every, steps, every), steps)

    @cached_property
    def _frozen(self) -> dict[str, torch.Tensor]:
        """Weights that the run leaves alone, in its precision, by name.

        Of the layers whose weights autocast would cast in every forward; norms stay in float32.
        """
        dtype = getattr(torch, self.config.precision)
        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
        return {
            name: value.detach().to(dtype)
            for path, layer in self.family.denoiser.named_modules()
            if isinstance(layer, layers)
            for name, value in layer.named_parameters(path, recurse=False)
            if name not in self.names
        }

    def attack(self, n: int, step: int, alive: Mapping[int, Alive]) -> Attack:
        """Concept n's attacker at one outer step: the one that is alive, or else a new one."""
        config, seed = self.config.lower, self.config.seed
        if n in alive:
            return Attack(config, seed, n, alive[n].born, alive[n].carried)
        return Attack(config, seed, n, step)

    def survivors(
        self, step: int, alive: Mapping[int, Alive], ends: Mapping[int, Carried]
    ) -> dict[int, Alive]:
        """The attackers that are alive after an outer step, by concept.

        Args:
            step: the outer step.
            alive: those that were alive before.
            ends: where those of this step that go on have stopped, by their places in the step.
        """
        chosen = self.concepts(step)
        others = {n: attacker for n, attacker in alive.items() if n not in chosen}
        born = {i: self.attack(chosen[i], step, alive).born for i in ends}
        return others | {chosen[i]: Alive(born[i], end) for i, end in ends.items()}

    def lower_level(self, n: int, step: int, alive: Mapping[int, Alive] = NOBODY) -> LowerLevel:
        """The lower level of concept n at one outer step, its K batches drawn."""
        attack, data = self.attack(n, step, alive), self.data[n]
        config = attack.config
        own, _ = attack.split(len(data.images))
        draws = seeded(self.config.seed, step, n, "lower")
        draw = partial(Batch.draw, self.family, size=config.batch_size, generator=draws)
        batches = [[draw(data.images, among=own)] for _ in range(config.steps)]
        if config.prior_weight:
            assert data.class_images is not None
            for step_batches in batches:
                step_batches.append(draw(data.class_images))

        def loss(params: Params, k: int) -> torch.Tensor:
            value, *prior = self.losses(*self._read(n, batches[k], params))
            return value + config.prior_weight * prior[0] if prior else value

        weights = self._lower_weights(attack, loss, draws)
        if not self.words:
            return weights
        word = self.words[n]
        rule = OPTIMIZERS[config.optimizer](lr=config.token_lr or attack.lr)
        tokens = partial(word.tokens, self.family)
        return NewWord(weights, word.text, word.embedding, tokens, rule)

    def _lower_weights(self, attack: Attack, loss: StepLoss, draws: torch.Generator) -> LowerLevel:
        config, theta = attack.config, self.theta()
        settings: dict[str, Any] = {
            "steps": config.steps,
            "optimizer": OPTIMIZERS[config.optimizer](lr=attack.lr),
            "carried": attack.carried,
        }
        weights: LowerLevel
        if config.parameters == "lora":
            weights = LoraFactors(
                loss,
                {name: theta[name].shape for name in self.lower_names},
                rank=config.rank,
                scale=(config.alpha or config.rank) / config.rank,
                generator=draws,
                like=theta[self.lower_names[0]],
                **settings,
            )
        else:
            weights = FullWeights(loss, self.lower_names, **settings)
        weights.continues = attack.continues
        return weights

    def _read(
        self, n: int, batches: Sequence[Batch], params: Params
    ) -> tuple[Sequence[Batch], Params]:
        """Let concept n's own pictures, the first batch, be read with its word among the params."""
        if not self.words:
            return batches, params
        word, (own, *others) = self.words[n], batches
        conditioning = word.read(self.family, own.prompt.tolist(), params[word.text])
        rest = {name: value for name, value in params.items() if name != word.text}
        conditioning = {**own.conditioning, **conditioning}
        return [replace(own, conditioning=conditioning), *others], rest

    def upper_level(
        self,
        concepts: Sequence[int],
        step: int,
        state: int | None = None,
        alive: Mapping[int, Alive] = NOBODY,
    ) -> Level:
        """Some concepts' part of the upper level, −L(x_u, c; φ) + w · L(class; φ) for each.

        Args:
            concepts: their indices.
            step: the outer step.
            state: of the attacks' paths, each with pictures of its own; None for the last.
            alive: the attackers that live on from earlier steps, by concept.
        """
        config = self.config.upper
        terms: list[UpperTerm] = []
        batches: list[Batch] = []
        last = state in (None, self.config.lower.steps)
        for n in concepts:
            data = self.data[n]
            _, other = self.attack(n, step, alive).split(len(data.images))
            draws = seeded(self.config.seed, step, n, "upper", *(() if last else (state,)))
            batches.append(Batch.draw(self.family, data.images, config.batch_size, draws, other))
            terms.append(UpperTerm(LossName(data.name), -1.0, config.loss_cap))
            if config.prior_weight and config.ascent_ratio is None:
                assert data.class_images is not None
                size = config.prior_batch_size or config.batch_size
                batches.append(Batch.draw(self.family, data.class_images, size, draws))
                terms.append(UpperTerm(LossName(data.name, prior=True), config.prior_weight))
        if config.objective != "neg":
            return partial(self._penalty, concepts, terms, batches)
        # a word is read by its own concept's pictures alone, in a part of their own
        return UpperLevel(terms, lambda phi: self.losses(*self._read(concepts[0], batches, phi)))

    def _penalty(
        self,
        concepts: Sequence[int],
        terms: Sequence[UpperTerm],
        batches: Sequence[Batch],
        phi: Params,
    ) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
        """The named objective of some concepts at φ, with the priors' losses; and what was seen."""
        objective = self.config.upper.objective
        starts: list[torch.Tensor | None] = [None] * len(batches)
        if objective in READS_START:
            with torch.no_grad():
                starts = [v for v, _ in self.predictions(batches, self._start)]
        pairs = self.predictions(*self._read(concepts[0], batches, phi))
        summands, seen = [], {}
        for term, (prediction, target), start in zip(terms, pairs, starts, strict=True):
            one = Seen(prediction, target, start, self.config.upper.margin)
            seen[term.name] = one.loss
            if term.name.prior:
                summands.append(term.objective(one.loss))
            elif objective != "hinge":
                summands.append(PENALTIES[objective](one))
            else:
                pull = (lacking(one) > 0).float().mean()
                seen[term.name._replace(pull=True)] = pull
                if pull > 0:
                    summands.append(PENALTIES[objective](one))
        return torch.stack(summands).sum() if summands else prediction.new_zeros(()), seen

    def lower_levels(self, step: int, alive: Mapping[int, Alive] = NOBODY) -> Sequence[LowerLevel]:
        """The lower level of each of the step's concepts, drawn when asked for and not kept.

        Args:
            step: the outer step.
            alive: the attackers that live on from earlier steps, by concept.
        """
        chosen = self.concepts(step)
        return _Drawn(lambda i: self.lower_level(chosen[i], step, alive), len(chosen))

    def upper_levels(
        self, step: int, state: int | None = None, alive: Mapping[int, Alive] = NOBODY
    ) -> Sequence[Level]:
        """The upper level at a state of the path, by default the last, in parts.

        A part is of ``concepts_per_forward`` of the step's concepts, drawn when it is asked for.
        """
        chosen, size = self.concepts(step), self.config.upper.concepts_per_forward
        # no process is to wait for another that does its part as well
        size = min(size, -(-len(chosen) // self.ranks.size))

        def draw(part: int) -> Level:
            return self.upper_level(chosen[part * size : (part + 1) * size], step, state, alive)

        return _Drawn(draw, -(-len(chosen) // size))

    def upper_path(
        self, step: int, alive: Mapping[int, Alive] = NOBODY
    ) -> Mapping[int, Sequence[Level]]:
        """The upper level at each state of the path that counts, by the steps that lead to it."""
        return {state: self.upper_levels(step, state, alive) for state in self.states}

    def hypergradient(
        self,
        theta: Params,
        lower: Sequence[LowerLevel],
        upper: Upper,
    ) -> OuterGradient:
        """dJ/dθ on S_u, merged or, where the run has no merge, for each concept by itself."""
        mode, wrt = self.config.hypergradient, self.upper_names
        if self.merge is None:
            return unmerged_gradient(theta, lower, upper, mode=mode, wrt=wrt, ranks=self.ranks)
        merge = self.merge
        if self.config.merge == "sum":
            merge = MergeLayer(merge.weights.new_ones(len(lower)))
        return outer_gradient(theta, lower, merge, upper, mode=mode, wrt=wrt, ranks=self.ranks)

    def retaining_gradient(self, theta: Params, step: int) -> OuterGradient | None:
        """The gradient at θ that keeps the model useful, where it is apart from the objective's."""
        config = self.config.upper
        if config.ascent_ratio is None:
            return None
        chosen = self.concepts(step)
        parts = _Drawn(lambda i: partial(self._retention, chosen[i], step), len(chosen))
        gradient, _, losses = upper_gradient(theta, parts, self.ranks, wrt=self.upper_names)
        return OuterGradient(gradient, losses, 0.0)

    def _retention(
        self, n: int, step: int, theta: Params
    ) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
        """``w · L(class; θ)``, or ``w · mean (v_θ − v_start)²`` on the same pictures; and L."""
        config, data = self.config.upper, self.data[n]
        assert data.class_images is not None
        draws = seeded(self.config.seed, step, n, "retain")
        size = config.prior_batch_size or config.batch_size
        batch = Batch.draw(self.family, data.class_images, size, draws)
        ((prediction, target),) = self.predictions([batch], theta)
        loss = F.mse_loss(prediction, target)
        penalty = loss
        if config.retain == "distill":
            with torch.no_grad():
                ((start, _),) = self.predictions([batch], self._start)
            penalty = F.mse_loss(prediction, start)
        return config.prior_weight * penalty, {LossName(data.name, prior=True): loss}


def trained_names(
    family: Family, config: ImmunizeConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """S_u and S_l: names of the denoiser's parameters that each level of a run trains.

    Raises:
        MimaError: a setting matches no parameter.
    """
    lower = config.lower.parameters
    if lower == "lora":
        lower_names = family.lora_targets()
    else:
        lower_names = [] if lower is None else family.parameter_names(lower)
    return tuple(family.parameter_names(config.upper.parameters)), tuple(lower_names)


@contextmanager
def recomputed_blocks(denoiser: torch.nn.Module, on: bool = True) -> Iterator[None]:
    """While it lasts, let a denoiser of diffusers recompute each block's activations.

    diffusers' own way would recompute with the module's parameters, not with those that the block
    was called with under ``torch.func.functional_call``.
    """

    def run(block: torch.nn.Module, *args: Any) -> Any:
        params: dict[str, torch.Tensor] = dict(block.named_parameters())
        return checkpoint(
            lambda *inputs: functional_call(block, params, inputs), *args, use_reentrant=False
        )

    if not on:
        yield
        return
    before = [
        (module, module.gradient_checkpointing, getattr(module, CHECKPOINT_FUNCTION, None))
        for module in denoiser.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]
    try:
        yield
    finally:
        for module, was_on, function in before:
            module.gradient_checkpointing = was_on
            setattr(module, CHECKPOINT_FUNCTION, function)


class _Drawn(Sequence[T]):
    """A sequence whose items are made anew at each access."""

    def __init__(self, draw: Callable[[int], T], count: int) -> None:
        self._draw = draw
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, n: Any) -> Any:
        if not 0 <= n < self._count:
            raise IndexError(n)
        return self._draw(n)


def merge_layer(
    family: Family, concepts: Sequence[Concept], config: ImmunizeConfig
) -> MergeLayer | None:
    """The merge of a run: None for the methods that do not merge."""
    if config.method in ("imma", "joint"):
        return None
    weights = torch.full((len(concepts),), 1 / len(concepts), device=family.device)
    if config.merge in ("average", "sum"):
        return MergeLayer(weights)
    make_plan = partial(
        MergePlan.from_embeddings,
        [concept_tokens(family, concept) for concept in concepts],
        regular_tokens(family, config.captions, config.num_captions, config.seed),
        weights=weights,
    )
    try:
        published = config.method == "alternating"
        plan = _hard_plan(make_plan) if published else make_plan(lam=config.lam)
    except ValueError as error:
        raise MimaError(f"merge: {error}") from error
    return MergeLayer(
        weights, plan, family.text_projections(), trained_tokens=config.lower.train_token
    )


def _hard_plan(make_plan: Callable[..., MergePlan]) -> MergePlan:
    """The published merge's hard constraint, or next to it where that contradicts itself."""
    try:
        return make_plan(lam=0.0)
    except ValueError as error:
        logger.warning("%s; using lam=%g", error, ALMOST_HARD)
        return make_plan(lam=ALMOST_HARD)


def concept_tokens(family: Family, concept: Concept) -> torch.Tensor:
    """C_n [S_n, D]: embeddings of the concept's prompt, the text its keys and values answer to."""
    return family.token_embeddings(concept.prompt)
