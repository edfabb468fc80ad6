"""Lower-level problems on a network's weights: all of some weights, or LoRA factors beside them."""

# O = output, D = input features, R = rank

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from mima.bilevel.low_rank import LowRankWeight, indices
from mima.bilevel.lower import Carried, LowerLevel, State, Tensors
from mima.bilevel.optimizers import Optimizer
from mima.merging import Params

StepLoss = Callable[[Params, int], torch.Tensor]
"""``(params, k) ↦ L``: the training loss of step k's batch under the network's parameters."""


class SharedLoss(ABC):
    """A step's loss that can be computed in one forward with others of its kind.

    Attributes:
        own: of the last call, the part on the concept's own pictures, without a graph.
    """

    own: torch.Tensor | None = None

    @abstractmethod
    def __call__(self, params: Params, k: int) -> torch.Tensor:
        """The loss of step k's batch."""

    @abstractmethod
    def samples(self, k: int) -> int:
        """How many samples of the network's input step k's batch is."""

    @abstractmethod
    def together(self, others: Sequence[SharedLoss], params: Params, k: int) -> list[torch.Tensor]:
        """This loss and others: their samples follow each other in one input of the network."""


class FullWeights(LowerLevel):
    """Fine-tuning of the weights themselves (DreamBooth, Custom Diffusion's keys and values).

    Args:
        loss: training loss of step k at given parameters.
        names: the trained parameters.
        steps: K.
        optimizer: the update rule.
        carried: where an earlier attack stopped, which these K steps continue from the weights as
            they are now; None starts from θ.
    """

    def __init__(
        self,
        loss: StepLoss,
        names: Sequence[str],
        *,
        steps: int,
        optimizer: Optimizer,
        carried: Carried | None = None,
    ) -> None:
        self._loss = loss
        self.names = tuple(names)
        self.steps = steps
        self.optimizer = optimizer
        self._moved: Params = {}
        if carried is not None:
            self._moved, self.memory, self.age = carried.moved, carried.memory, carried.age

    @property
    def own_loss(self) -> torch.Tensor | None:
        return self._loss.own if isinstance(self._loss, SharedLoss) else None

    def start(self, theta: Params) -> Tensors:
        if not self._moved:
            return {name: theta[name] for name in self.names}
        return {name: theta[name] + self._moved[name] for name in self.names}

    def stop(self, state: State, theta: Params) -> Carried:
        moved = {name: state.z[name] - theta[name] for name in self.names}
        return Carried(moved, state.memory, self.age + self.steps)

    def loss(self, z: Params, theta: Params, k: int) -> torch.Tensor:
        return self._loss({**theta, **z}, k)

    def change(self, z: Params, theta: Params) -> Tensors:
        return {name: z[name] - theta[name] for name in self.names}

    def change_pullback(
        self, final: Callable[[], Params], theta: Params, wrt: tuple[str, ...], cotangent: Params
    ) -> tuple[Tensors, Tensors]:
        z_bar = {name: cotangent[name] for name in self.names}
        return z_bar, {name: -value for name, value in z_bar.items() if name in wrt}

    def start_pullback(self, cotangent: Params) -> Tensors:
        return dict(cotangent)


class LoraFactors(LowerLevel):
    """LoRA (Hu et al. 2022): ``W + scale · B A`` with B = 0 at the start, only A and B trained.

    Args:
        loss: training loss of step k at given parameters.
        shapes: the [O, D] shapes of the adapted weights, by name.
        rank: R ≥ 1.
        scale: alpha / rank (or alpha / √rank for rsLoRA).
        generator: draws A as the attacks' LoRA does, normal with a deviation of 1 / rank.
        steps: K.
        optimizer: the update rule.
        like: a tensor whose dtype and device the factors have.
        carried: where an earlier attack stopped, which these K steps continue.
        at_once: how many such lower levels may share a forward, each sample with its own factors;
            more than one needs a ``SharedLoss``.
    """

    def __init__(
        self,
        loss: StepLoss,
        shapes: dict[str, torch.Size],
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
        steps: int,
        optimizer: Optimizer,
        like: torch.Tensor,
        carried: Carried | None = None,
        at_once: int = 1,
    ) -> None:
        self._loss = loss
        self.at_once = at_once
        self.names = tuple(shapes)
        self.scale = scale
        self.steps = steps
        self.optimizer = optimizer
        self._factors: Tensors = {}
        if carried is not None:
            # a checkpoint gives them back in another order, and norms are sums in this one
            keys = [f"{name}.{part}" for name in shapes for part in ("lora_A", "lora_B")]
            self._factors = {key: carried.moved[key] for key in keys}
            self.memory, self.age = carried.memory, carried.age
            return
        for name, (out_features, in_features) in shapes.items():
            A_RD = torch.randn(rank, in_features, generator=generator, dtype=torch.float64) / rank
            self._factors[f"{name}.lora_A"] = A_RD.to(like)
            self._factors[f"{name}.lora_B"] = like.new_zeros(out_features, rank)

    def start(self, theta: Params) -> Tensors:
        return dict(self._factors)

    def stop(self, state: State, theta: Params) -> Carried:
        return Carried(state.z, state.memory, self.age + self.steps)

    def change(self, z: Params, theta: Params) -> Tensors:
        return {
            name: self.scale * (z[f"{name}.lora_B"] @ z[f"{name}.lora_A"]) for name in self.names
        }

    def loss(self, z: Params, theta: Params, k: int) -> torch.Tensor:
        return self._loss({**theta, **_adapted([self], [z], theta)}, k)

    def joins(self, others: Sequence[LowerLevel]) -> bool:
        return all(
            isinstance(one, LoraFactors)
            and isinstance(one._loss, SharedLoss)
            and one.names == self.names
            and one.at_once > len(others)
            for one in (self, *others)
        )

    def losses(
        self, others: Sequence[LowerLevel], z: Sequence[Params], theta: Params, k: int
    ) -> list[torch.Tensor]:
        if not others:
            return [self.loss(z[0], theta, k)]
        everyone = [self, *(one for one in others if isinstance(one, LoraFactors))]
        shared = [one._loss for one in everyone if isinstance(one._loss, SharedLoss)]
        samples = tuple(loss.samples(k) for loss in shared)
        adapted = _adapted(everyone, z, theta, samples)
        return shared[0].together(shared[1:], {**theta, **adapted}, k)

    def change_pullback(
        self, final: Callable[[], Params], theta: Params, wrt: tuple[str, ...], cotangent: Params
    ) -> tuple[Tensors, Tensors]:
        z = final()
        z_bar: Tensors = {}
        for name in self.names:
            A_RD, B_OR = z[f"{name}.lora_A"], z[f"{name}.lora_B"]
            z_bar[f"{name}.lora_A"] = self.scale * (B_OR.mT @ cotangent[name])
            z_bar[f"{name}.lora_B"] = self.scale * (cotangent[name] @ A_RD.mT)
        return z_bar, {}

    def start_pullback(self, cotangent: Params) -> Tensors:
        return {}


def _adapted(
    tasks: Sequence[LoraFactors],
    z: Sequence[Params],
    theta: Params,
    samples: tuple[int, ...] | None = None,
) -> Tensors:
    """The weights with the factors of one lower level, or of each sample's, beside them."""
    scale = [task.scale for task in tasks]
    index = None if samples is None else indices(samples, next(iter(theta.values())).device)
    return {
        name: LowRankWeight(
            theta[name],
            [own[f"{name}.lora_A"] for own in z],
            [own[f"{name}.lora_B"] for own in z],
            scale,
            index,
        )
        for name in tasks[0].names
    }


class NewWord(LowerLevel):
    """A new word's embedding trained beside weights, or alone (Textual Inversion).

    The embedding is the concept's own: it starts from a constant, does not enter θ, and is not
    merged. It moves the tokens that the merge plan is made from.

    Args:
        weights: the lower level on weights; its loss reads the embedding under ``name``, among the
            parameters. ``FullWeights`` with no names trains the word alone.
        name: of the embedding, not one of θ's.
        embedding: its start.
        tokens: the embedding ↦ C_n [S_n, D], differentiable.
        optimizer: the embedding's update rule, one of the weights' kind; by default theirs.
    """

    def __init__(
        self,
        weights: LowerLevel,
        name: str,
        embedding: torch.Tensor,
        tokens: Callable[[torch.Tensor], torch.Tensor],
        optimizer: Optimizer | None = None,
    ) -> None:
        self._weights = weights
        self._name = name
        self._embedding = embedding.detach()
        self._tokens = tokens
        self.steps = weights.steps
        self.optimizer = weights.optimizer
        self._own_rule = optimizer or weights.optimizer

    def rule(self, name: str) -> Optimizer:
        return self._own_rule if name == self._name else self._weights.rule(name)

    def start(self, theta: Params) -> Tensors:
        return {**self._weights.start(theta), self._name: self._embedding}

    def loss(self, z: Params, theta: Params, k: int) -> torch.Tensor:
        return self._weights.loss(self._rest(z), {**theta, self._name: z[self._name]}, k)

    def change(self, z: Params, theta: Params) -> Tensors:
        return {**self._weights.change(self._rest(z), theta), self._name: z[self._name]}

    def tokens(self, words: Params) -> torch.Tensor:
        return self._tokens(words[self._name])

    def change_pullback(
        self, final: Callable[[], Params], theta: Params, wrt: tuple[str, ...], cotangent: Params
    ) -> tuple[Tensors, Tensors]:
        z_bar, total = self._weights.change_pullback(final, theta, wrt, cotangent)
        return {**z_bar, self._name: cotangent[self._name]}, total

    def start_pullback(self, cotangent: Params) -> Tensors:
        return self._weights.start_pullback(self._rest(cotangent))

    def _rest(self, z: Params) -> Tensors:
        return {name: value for name, value in z.items() if name != self._name}
