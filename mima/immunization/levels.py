"""A model and its concepts as a bi-level problem: what one outer step draws, trains and merges."""

# N = concepts, K = lower-level steps

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate
from mima.bilevel.lower import Carried, LowerLevel, Tensors
from mima.bilevel.optimizers import SGD, Adam, Optimizer
from mima.bilevel.outer import OuterGradient, outer_gradient, replayed_gradient, unmerged_gradient
from mima.bilevel.tasks import FullWeights, LoraFactors, NewWord, SharedLoss
from mima.bilevel.upper import Level, Upper, UpperLevel, UpperTerm, upper_gradient
from mima.concepts import Concept
from mima.distributed import ALONE, Ranks, union
from mima.families import Family, Params
from mima.families.fused_layers import FusedLayers
from mima.immunization.attackers import Alive, Attacker, choose
from mima.immunization.benign import BenignTerms
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import ConceptData
from mima.immunization.objectives import (
    PENALTIES,
    READS_START,
    Seen,
    blind_prediction,
    hinge,
    lacking,
    reads_start,
)
from mima.immunization.parameters import adapted_names, trained_names
from mima.immunization.progress import LossName
from mima.immunization.trained_words import TrainedWord
from mima.immunization.turns import Turns
from mima.merging import MergeLayer
from mima.training.batches import Batch, Encoded, predictions, seeded

logger = logging.getLogger(__name__)

T = TypeVar("T")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "adam": Adam,
}
"""The attackers' update rules by name."""
LATE = 16
"""Steps before the last at which a state of the path counts e times less, where late ones count."""
APDM_BETA = 100.0
"""β of the objective ``pair`` where none is set: APDM's."""
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
        benign: pictures of concepts that must stay learnable.
        captions: ordinary ones, of which the published update draws.
        described: the concepts, whose texts the published update reads anew for each merge.
        first: the place of the first concept among all, where each is a problem of its own: draws
            are by it.

    Attributes:
        upper_names: S_u, the parameters that the defender may change.
        names: S_u ∪ S_l, all parameters that the run concerns.
        anew: the step after the last one that was left out: where the same attack would fail
            again, others are drawn.
        turn: how many turns concepts have taken, where attackers live on: a step then takes as
            many as it begins attacks.
    """

    def __init__(
        self,
        family: Family,
        data: Sequence[ConceptData],
        config: ImmunizeConfig,
        merge: MergeLayer | None,
        ranks: Ranks = ALONE,
        words: Sequence[TrainedWord] = (),
        benign: Sequence[ConceptData] = (),
        captions: Sequence[str] = (),
        described: Sequence[Concept] = (),
        first: int = 0,
    ) -> None:
        self.family = family
        self.data = list(data)
        self.words = list(words)
        self.benign = list(benign)
        self.captions = captions
        self.described = described
        self.first = first
        self.config = config
        self.merge = merge
        self.ranks = ranks
        self.anew = 0
        self.turn = 0
        self.upper_names, self.lower_names = trained_names(family, config)
        kinds = dict.fromkeys(adapter.parameters for adapter in config.adapters)
        self._trained = {kind: adapted_names(family, kind) for kind in kinds}
        self.names = tuple(dict.fromkeys((*self.upper_names, *self.lower_names)))
        # found once: each step asks for them, and a network's modules are many
        sharded = family.sharded
        parameters = sharded.theta if sharded else dict(family.denoiser.named_parameters())
        self._theta = {name: parameters[name] for name in self.names}
        count = config.concepts_per_step
        self._turns = None
        if count is not None and count < len(self.data):
            self._turns = Turns(len(self.data), count, config.seed)
        self._start: dict[str, torch.Tensor] = {}
        if reads_start(config.upper):
            self._start = {name: self._theta[name].detach().clone() for name in self.upper_names}
        self._benign: BenignTerms | None = None
        if config.upper.benign is not None and self.benign:
            before = self.theta() | self._start
            self._benign = BenignTerms(self, config.upper.benign, before)

    def theta(self) -> dict[str, torch.Tensor]:
        """θ by name: the denoiser's own tensors, or this process' rows of them; not copies."""
        return {name: value.detach() for name, value in self._theta.items()}

    def predictions(
        self, batches: Sequence[Batch], params: Params
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prediction and target of each batch in the run's precision, all from one forward."""
        if self.config.precision == "float32":
            return predictions(self.family, batches, params)
        with torch.autocast(self.family.device.type, getattr(torch, self.config.precision)):
            frozen = {} if self.family.sharded else self._frozen
            return predictions(self.family, batches, {**frozen, **params})

    def losses(self, batches: Sequence[Batch], params: Params) -> list[torch.Tensor]:
        """L(batch; params) of each batch in the run's precision, all from one forward."""
        return [F.mse_loss(*pair) for pair in self.predictions(batches, params)]

    def concepts(self, step: int, alive: Mapping[int, Alive] = NOBODY) -> list[int]:
        """The concepts that one outer step is about, in order.

        Those whose attackers live on come first, so that no more attackers are ever alive than a
        step has concepts; to the other places, concepts have their turns.
        """
        return sorted(self._chosen(step, alive)[0])

    def turns_taken(self, step: int, alive: Mapping[int, Alive]) -> int:
        """How many turns one outer step takes, where attackers live on: ``turn`` grows by them."""
        return self._chosen(step, alive)[1]

    def _chosen(self, step: int, alive: Mapping[int, Alive]) -> tuple[list[int], int]:
        if self._turns is None:
            return list(range(len(self.data))), 0
        chosen, taken = [*alive][: self._turns.at_once], 0
        place = step // self.config.attack_every * self._turns.at_once
        if any(attacker.age for attacker in self.config.attackers):
            place = self.turn
        for n in self._turns.since(place):
            if len(chosen) == self._turns.at_once:
                break
            taken += 1
            # whose attacker lives has its turn already
            if n not in chosen:
                chosen.append(n)
        return chosen, taken

    def _simulated(self, step: int) -> int:
        """The outer step that simulated the attack which serves at this one."""
        return max(step - step % self.config.attack_every, self.anew)

    @cached_property
    def states(self) -> tuple[int, ...]:
        """The states of each attack, by their steps, at which the objective counts."""
        return self.config.attackers[0].states(self.config.upper.path_every)

    @cached_property
    def _frozen(self) -> dict[str, torch.Tensor]:
        """Weights that the run leaves alone, in its precision, by name.

        Of the layers whose weights autocast would cast in every forward; norms stay in float32.
        """
        dtype = getattr(torch, self.config.precision)
        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
        # a weight that is trained may go by other names, too
        trained = {id(value) for value in self._theta.values()}
        return {
            name: value.detach().to(dtype)
            for path, layer in self.family.denoiser.named_modules()
            if isinstance(layer, layers)
            for name, value in layer.named_parameters(path, recurse=False)
            if id(value) not in trained
        }

    @cached_property
    def _fused(self) -> FusedLayers:
        return FusedLayers(self.family.denoiser)

    def attacker(self, n: int, step: int, alive: Mapping[int, Alive]) -> Attacker:
        """Concept n's attacker at one outer step: the one that is alive, or else a new one."""
        born, carried = (
            (alive[n].born, alive[n].carried) if n in alive else (self._simulated(step), None)
        )
        place = self.first + n
        config = choose(self.config.attackers, self.config.seed, place, born)
        return Attacker(config, self.config.seed, place, born, carried)

    def survivors(
        self, step: int, alive: Mapping[int, Alive], ends: Mapping[int, Carried]
    ) -> dict[int, Alive]:
        """The attackers that are alive after an outer step, by concept.

        ``ends`` is where those of this step that go on have stopped, by their places in the step.
        """
        chosen = self.concepts(step, alive)
        others = {n: attacker for n, attacker in alive.items() if n not in chosen}
        born = {i: self.attacker(chosen[i], step, alive).born for i in ends}
        return others | {chosen[i]: Alive(born[i], end) for i, end in ends.items()}

    def lower_level(self, n: int, step: int, alive: Mapping[int, Alive] = NOBODY) -> LowerLevel:
        """The lower level of concept n at one outer step, its K batches drawn."""
        attacker, data = self.attacker(n, step, alive), self.data[n]
        b, count = attacker.begins_with(len(self.benign))
        if count:
            attacker = replace(attacker, carried=self._begun(attacker, b, count))
        pictures = data.pictures(attacker.captions)
        own, _ = attacker.split(len(pictures))
        draws = seeded(self.config.seed, step, self.first + n, "lower")
        weights = self.adaptation(attacker, pictures, own, attacker.config.steps, draws, n)
        weights.continues = attacker.continues
        if not attacker.config.train_token:
            return weights
        word = self.words[n]
        rule = OPTIMIZERS[attacker.config.optimizer](lr=attacker.config.token_lr or attacker.lr)
        tokens = partial(word.tokens, self.family)
        return NewWord(weights, word.text, word.embedding, tokens, rule)

    def _begun(self, attacker: Attacker, b: int, steps: int) -> Carried:
        """Where an attacker stands after its steps on a benign concept; its optimizer is new."""
        pictures, theta = self.benign[b].images, self.theta()
        everything = torch.arange(len(pictures))
        draws = seeded(self.config.seed, attacker.born, attacker.n, "benign start")
        task = self.adaptation(attacker, pictures, everything, steps, draws)
        last = lower.last_state(task, theta)
        return replace(task.stop(last, theta), memory=None, age=0)

    def adaptation(
        self,
        attacker: Attacker,
        pictures: Encoded,
        among: torch.Tensor,
        steps: int,
        draws: torch.Generator,
        n: int | None = None,
    ) -> FullWeights | LoraFactors:
        """Steps of who attacks, or means no harm, on the weights, their batches drawn.

        It sees the pictures at the indices ``among``. ``draws`` are of batches and LoRA's factors.
        n is the concept whose class pictures and new word belong to the pictures; None for none.
        """
        config, theta = attacker.config, self.theta()
        draw = partial(Batch.draw, self.family, size=config.batch_size, generator=draws)
        batches = [[draw(pictures, among=among)] for _ in range(steps)]
        prior_weight = 0.0 if n is None else config.prior_weight
        if prior_weight:
            assert n is not None
            class_images = self.data[n].class_images
            assert class_images is not None
            for step_batches in batches:
                step_batches.append(draw(class_images))

        loss = _AttackLoss(self, batches, prior_weight, n)
        names = self._trained[config.parameters]
        settings: dict[str, Any] = {
            "steps": steps,
            "optimizer": OPTIMIZERS[config.optimizer](lr=attacker.lr),
            "carried": attacker.carried,
        }
        if config.parameters != "lora":
            return FullWeights(loss, names, **settings)
        return LoraFactors(
            loss,
            {name: theta[name].shape for name in names},
            rank=attacker.rank,
            scale=(config.alpha or attacker.rank) / attacker.rank,
            generator=draws,
            like=theta[names[0]],
            at_once=config.concepts_per_forward,
            **settings,
        )

    def _read(
        self, n: int, batches: Sequence[Batch], params: Params
    ) -> tuple[Sequence[Batch], Params]:
        """Let concept n's own pictures, the first batch, be read with its word among the params."""
        if not self.words or self.words[n].text not in params:
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

        A state of the attacks' paths has pictures of its own; None is the last one.
        """
        config, last = self.config.upper, self.states[-1]
        k = last if state is None else state
        share = math.exp((k - last) / LATE) if config.path_weights == "late" else 1.0
        terms: list[UpperTerm] = []
        batches: list[Batch] = []
        for n in concepts:
            data, attacker = self.data[n], self.attacker(n, step, alive)
            pictures = data.pictures(attacker.captions)
            _, other = attacker.split(len(pictures))
            key = (self.config.seed, step, self.first + n, "upper", *(() if k == last else (k,)))
            draws = seeded(*key)
            own = Batch.draw(self.family, pictures, config.batch_size, draws, other)
            batches.append(own)
            terms.append(UpperTerm(LossName(data.name), -share, config.loss_cap))
            if config.objective == "pair":
                batches.append(self._pair(n, own, other, seeded(*key)))
                terms.append(UpperTerm(LossName(data.name, "pair"), 0.0))
            if config.prior_weight and config.ascent_ratio is None:
                assert data.class_images is not None
                batches.append(Batch.draw(self.family, data.class_images, config.prior_size, draws))
                terms.append(UpperTerm(LossName(data.name, "prior"), share * config.prior_weight))
        if config.objective != "neg":
            return partial(self._penalty, concepts, terms, batches, share)
        # a word is read by its own concept's pictures alone, in a part of their own
        return UpperLevel(terms, lambda phi: self.losses(*self._read(concepts[0], batches, phi)))

    def _pair(self, n: int, own: Batch, among: torch.Tensor, draws: torch.Generator) -> Batch:
        """The class pictures in the places of a batch's own, under its captions and noise."""
        class_images = self.data[n].class_images
        assert class_images is not None
        # the same draws as the batch's own
        places = among % len(class_images)
        paired = Batch.draw(self.family, class_images, len(own.latents), draws, places)
        return replace(paired, conditioning=own.conditioning, prompt=own.prompt)

    def _penalty(
        self,
        concepts: Sequence[int],
        terms: Sequence[UpperTerm],
        batches: Sequence[Batch],
        share: float,
        phi: Params,
    ) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
        """The named objective of some concepts at φ, with the priors' losses; and what was seen."""
        config, objective = self.config.upper, self.config.upper.objective
        starts: list[torch.Tensor | None] = [None] * len(batches)
        if objective in READS_START:
            with torch.no_grad():
                starts = [v for v, _ in self.predictions(batches, self._start)]
        pairs = self.predictions(*self._read(concepts[0], batches, phi))
        seen = {
            term.name: Seen(*pair, start, config.margin)
            for term, pair, start in zip(terms, pairs, starts, strict=True)
        }
        told = {name: one.loss for name, one in seen.items()}
        summands = []
        for term, batch in zip(terms, batches, strict=True):
            name, one = term.name, seen[term.name]
            if name.kind == "prior":
                summands.append(term.objective(one.loss))
            elif objective == "hinge":
                pull = told[name._replace(kind="pull")] = (lacking(one) > 0).float().mean()
                if pull > 0:
                    summands.append(share * hinge(one))
            elif name.kind == "concept":
                if objective == "pair":
                    beta = config.pair_beta or APDM_BETA
                    one = replace(one, pair=seen[name._replace(kind="pair")], beta=beta)
                elif objective == "entropy":
                    one = replace(one, blind=blind_prediction(self.family, batch))
                summands.append(share * PENALTIES[objective](one))
        return torch.stack(summands).sum() if summands else pairs[0][0].new_zeros(()), told

    def lower_levels(self, step: int, alive: Mapping[int, Alive] = NOBODY) -> LowerLevels:
        """The lower level of each of the step's concepts, drawn when asked for and not kept."""
        return LowerLevels(lambda n: self.lower_level(n, step, alive), self.concepts(step, alive))

    def upper_levels(
        self, step: int, state: int | None = None, alive: Mapping[int, Alive] = NOBODY
    ) -> Sequence[Level]:
        """The upper level at a state of the path, by default the last, in parts.

        A part is of ``concepts_per_forward`` of the step's concepts, drawn when it is asked for.
        """
        chosen, size = self.concepts(step, alive), self.config.upper.concepts_per_forward
        # parts are so small that every process has one
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
        lower: LowerLevels,
        upper: Upper,
        moved: Mapping[int, Tensors] | None = None,
    ) -> OuterGradient:
        """dJ/dθ on S_u, merged or, where the run has no merge, for each concept by itself.

        ``moved`` is φ − θ along the path of the attack that serves again; None simulates one.
        A merge of some of the concepts shares out among these.
        """
        mode, wrt = self.config.hypergradient, self.upper_names
        with self._fused:
            if moved:
                return replayed_gradient(theta, moved, upper, wrt=wrt, ranks=self.ranks)
            if self.merge is None:
                return unmerged_gradient(theta, lower, upper, mode=mode, wrt=wrt, ranks=self.ranks)
            if self.config.merge == "sum":
                merge = MergeLayer(self.merge.weights.new_ones(len(lower)))
            else:
                merge = self.merge.of(lower.concepts)
            keep = self.config.attack_every > 1
            return outer_gradient(
                theta, lower, merge, upper, mode=mode, wrt=wrt, ranks=self.ranks, keep=keep
            )

    def retaining_gradient(
        self, theta: Params, step: int, alive: Mapping[int, Alive] = NOBODY
    ) -> OuterGradient | None:
        """The gradient at θ that keeps the model useful, where it is apart from the objective's."""
        config = self.config.upper
        if config.ascent_ratio is None:
            return None
        chosen = self.concepts(step, alive)
        parts = _Drawn(lambda i: partial(self._retention, chosen[i], step), len(chosen))
        gradient, _, losses = upper_gradient(theta, parts, self.ranks, wrt=self.upper_names)
        benign = self._benign.gradient(theta, step) if self._benign else None
        if benign is not None:
            accumulate(gradient, benign.gradient)
            losses = union([losses, benign.losses])
        return OuterGradient(gradient, losses, 0.0)

    def _retention(
        self, n: int, step: int, theta: Params
    ) -> tuple[torch.Tensor, dict[LossName, torch.Tensor]]:
        """``w · L(class; θ)``, or ``w · mean (v_θ − v_start)²`` on the same pictures; and L."""
        config, data = self.config.upper, self.data[n]
        assert data.class_images is not None
        draws = seeded(self.config.seed, step, self.first + n, "retain")
        pictures = data.class_pictures(config.retain_captions, draws)
        batch = Batch.draw(self.family, pictures, config.prior_size, draws)
        ((prediction, target),) = self.predictions([batch], theta)
        loss = F.mse_loss(prediction, target)
        penalty = loss
        if config.retain == "distill":
            with torch.no_grad():
                ((start, _),) = self.predictions([batch], self._start)
            penalty = F.mse_loss(prediction, start)
        return config.prior_weight * penalty, {LossName(data.name, "prior"): loss}


class _AttackLoss(SharedLoss):
    """The losses of an attack's K steps: of each step's batch and, if any, that of class pictures.

    n is the concept whose new word, where there are such, the first batches read; None for none.
    """

    def __init__(
        self,
        problem: Problem,
        batches: Sequence[Sequence[Batch]],
        prior_weight: float,
        n: int | None,
    ) -> None:
        self._problem = problem
        self._batches = batches
        self._prior_weight = prior_weight
        self._n = n

    def __call__(self, params: Params, k: int) -> torch.Tensor:
        read = self._batches[k], params
        if self._n is not None:
            read = self._problem._read(self._n, *read)
        return self._of(self._problem.losses(*read))

    def samples(self, k: int) -> int:
        return sum(len(batch.latents) for batch in self._batches[k])

    def together(self, others: Sequence[SharedLoss], params: Params, k: int) -> list[torch.Tensor]:
        everyone = [self, *(one for one in others if isinstance(one, _AttackLoss))]
        batches = [batch for one in everyone for batch in one._batches[k]]
        values = iter(self._problem.losses(batches, params))
        return [one._of([next(values) for _ in one._batches[k]]) for one in everyone]

    def _of(self, losses: Sequence[torch.Tensor]) -> torch.Tensor:
        own, *prior = losses
        self.own = own.detach()
        return own + self._prior_weight * prior[0] if prior else own


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


class LowerLevels(_Drawn[LowerLevel]):
    """The lower levels of some concepts.

    Args:
        draw: makes that of a concept.
        concepts: whose they are, in order.
    """

    def __init__(self, draw: Callable[[int], LowerLevel], concepts: Sequence[int]) -> None:
        super().__init__(lambda i: draw(concepts[i]), len(concepts))
        self.concepts = concepts
