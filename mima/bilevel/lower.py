"""The lower level: what one concept's adaptation trains, and K steps of it."""

# θ = shared parameters by name, z = what the adapter trains, z_0(θ) → z_K(θ) → θ'[n](θ)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mima.bilevel.optimizers import Optimizer, Vector
from mima.merging import Params

Tensors = dict[str, torch.Tensor]

SHARE = 2**26
"""Bytes of what is trained that take a step at once along a path."""


def plus(theta: Params, change: Params) -> Tensors:
    """θ with a change of some of its names added."""
    return {name: v + change[name] if name in change else v for name, v in theta.items()}


class LowerLevel(ABC):
    """``θ'[n] = argmin L(x_l[n], c[n]; θ)``, approximated by K steps from θ on fixed batches.

    The batches are part of the problem: ``loss(z, θ, k)`` gives the same value at every call.

    Attributes:
        steps: K ≥ 1.
        optimizer: the update rule.
        age: steps that were taken before these K, for rules that count them.
        memory: the optimizer's state after those steps; None where there were none.
        continues: whether another K steps are to go on from the last state.
        at_once: how many of these lower levels may share a forward, see ``joins``.
    """

    steps: int
    optimizer: Optimizer
    age: int = 0
    memory: Mapping[str, Vector] | None = None
    continues: bool = False
    at_once: int = 1

    def rule(self, name: str) -> Optimizer:
        """The update rule of one of z's tensors: ``optimizer``, or one like it but for its step."""
        return self.optimizer

    @property
    def own_loss(self) -> torch.Tensor | None:
        """Of the last ``loss``, the part on the concept's own pictures; None where it has none."""
        return None

    @abstractmethod
    def start(self, theta: Params) -> Tensors:
        """z_0(θ), differentiable in θ."""

    @abstractmethod
    def loss(self, z: Params, theta: Params, k: int) -> torch.Tensor:
        """Loss of the k-th batch; scalar, differentiable in z and θ."""

    def joins(self, others: Sequence[LowerLevel]) -> bool:
        """Whether ``losses`` of the first of the others may compute this one's loss, too."""
        return False

    def losses(
        self, others: Sequence[LowerLevel], z: Sequence[Params], theta: Params, k: int
    ) -> list[torch.Tensor]:
        """This loss and those of others that ``joins`` let in, by one forward; z in that order."""
        assert not others
        return [self.loss(z[0], theta, k)]

    @abstractmethod
    def change(self, z: Params, theta: Params) -> Tensors:
        """θ'[n] − θ for the names that this adaptation changes; differentiable in z and θ.

        Names that θ lacks are new words of this concept: their embeddings as they are.
        """

    def tokens(self, words: Params) -> torch.Tensor:
        """C_n [S_n, D] as a function of new words, the entries of ``change`` that θ lacks."""
        raise NotImplementedError(f"{type(self).__name__} trains no new word")

    @abstractmethod
    def change_pullback(
        self, final: Callable[[], Params], theta: Params, wrt: tuple[str, ...], cotangent: Params
    ) -> tuple[Tensors, Tensors]:
        """Adjoint of ``change`` at z_K: gradients at z_K, and at the ``wrt`` names of θ.

        Args:
            final: returns z_K; called only if its value matters.
            theta: θ.
            wrt: names of θ that the caller wants gradients for.
            cotangent: gradient at ``change``.
        """

    def stop(self, state: State, theta: Params) -> Carried:
        """What another lower level of this kind needs to go on from the last state of ``path``.

        Where this one does not continue, nothing of the optimizer's is left.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be continued")

    @abstractmethod
    def start_pullback(self, cotangent: Params) -> Tensors:
        """Adjoint of ``start``, by name of θ."""


@dataclass(frozen=True)
class State:
    """Where the lower level stands before step k.

    Attributes:
        z: what is trained.
        memory: the optimizer's state for each tensor.
        gradient: ∇_z of the k-th batch's loss, where it was kept.
    """

    z: Tensors
    memory: dict[str, Vector]
    gradient: Tensors | None = None


@dataclass(frozen=True)
class Carried:
    """An attack that is to go on after θ has changed.

    Attributes:
        moved: what it trained: z − θ where z is a part of the network, z itself where z is beside
            the network (LoRA's factors).
        memory: the optimizer's state for each tensor; None where the optimizer begins anew.
        age: steps taken, as the optimizer counts them.
    """

    moved: Tensors
    memory: Mapping[str, Vector] | None
    age: int

    def to(self, device: torch.device) -> Carried:
        """The same on a device."""
        return Carried(
            {name: value.to(device) for name, value in self.moved.items()},
            self.memory
            and {name: tuple(m.to(device) for m in memory) for name, memory in self.memory.items()},
            self.age,
        )


def start(task: LowerLevel, theta: Params) -> State:
    """State before the first step."""
    z = task.start(theta)
    if task.memory is not None:
        return State(z, dict(task.memory))
    return State(z, {name: task.rule(name).init(value) for name, value in z.items()})


def stepping_together(task: LowerLevel, z: Params) -> Iterator[tuple[Optimizer, list[str]]]:
    """The names whose tensors take a step in one call: of one rule, dtype and device."""
    groups: dict[tuple[object, ...], tuple[Optimizer, list[str]]] = {}
    for name, value in z.items():
        rule = task.rule(name)
        groups.setdefault((rule, value.dtype, value.device), (rule, []))[1].append(name)
    yield from groups.values()


def advance(
    task: LowerLevel, state: State, gradient: Params, k: int, *, overwrite: bool = False
) -> State:
    """State after step k; with ``overwrite``, the optimizer's state takes the memory it had."""
    z: Tensors = {}
    memory: dict[str, Vector] = {}
    for rule, names in stepping_together(task, state.z):
        stepped = rule.step(
            [state.z[name] for name in names],
            [gradient[name] for name in names],
            [state.memory[name] for name in names],
            task.age + k,
            overwrite=overwrite,
        )
        z.update(zip(names, stepped[0], strict=True))
        memory.update(zip(names, stepped[1], strict=True))
    return State({name: z[name] for name in state.z}, memory)


def gradient(task: LowerLevel, state: State, theta: Params, k: int) -> Tensors:
    """∇_z of the k-th batch's loss, without a graph."""
    return loss_and_gradient(task, state, theta, k)[1]


def loss_and_gradient(
    task: LowerLevel, state: State, theta: Params, k: int
) -> tuple[torch.Tensor, Tensors]:
    """The k-th batch's loss and its ∇_z, without a graph."""
    (found,) = losses_and_gradients([task], [state], theta, k)
    return found


def losses_and_gradients(
    tasks: Sequence[LowerLevel], states: Sequence[State], theta: Params, k: int
) -> list[tuple[torch.Tensor, Tensors]]:
    """The same for lower levels that share a forward and a backward.

    Each loss reads its own z alone, so that the gradient of their sum has every one's.
    """
    z = [{name: v.detach().requires_grad_() for name, v in state.z.items()} for state in states]
    with torch.enable_grad():
        losses = tasks[0].losses(tasks[1:], z, theta, k)
    leaves = [value for own in z for value in own.values()]
    # some networks have weights that no picture reads
    grads = iter(torch.autograd.grad(losses, leaves, materialize_grads=True))
    gradients = [{name: next(grads) for name in own} for own in z]
    return [(loss.detach(), g) for loss, g in zip(losses, gradients, strict=True)]


def descend(
    task: LowerLevel, theta: Params, steps: int, *, keep_gradients: bool = False
) -> list[State]:
    """The first ``steps`` steps without a graph; states 0 to ``steps``."""
    states = [start(task, theta)]
    for k in range(steps):
        g = gradient(task, states[-1], theta, k)
        after = advance(task, states[-1], g, k)
        if keep_gradients:
            states[-1] = replace(states[-1], gradient=g)
        states.append(after)
    return states


def path(task: LowerLevel, theta: Params) -> Iterator[State]:
    """The K states after each step, without a graph, in the memory of one step.

    A state is emptied when the next is asked for. The last one has nothing of the optimizer's,
    unless the attack continues.
    """
    for (state,) in paths([task], theta):
        yield state


def paths(
    tasks: Sequence[LowerLevel],
    theta: Params,
    kept: Sequence[list[State]] = (),
    *,
    with_gradients: bool = False,
) -> Iterator[list[State]]:
    """The same for lower levels that share their forwards: all states after each step.

    Args:
        tasks: the lower levels.
        theta: θ.
        kept: for each of them a list, which takes its states 0 to K, as ``descend`` gives them;
            none of these is emptied then.
        with_gradients: keep the steps' gradients, too.
    """
    if kept:
        states = [start(task, theta) for task in tasks]
    else:
        states = [State(task.start(theta), dict(task.memory or {})) for task in tasks]
    for k in range(tasks[0].steps):
        found = losses_and_gradients(tasks, states, theta, k)
        for i, (task, (_, g)) in enumerate(zip(tasks, found, strict=True)):
            goes_on = task.continues or k + 1 < task.steps
            if kept:
                before = states[i]
                kept[i].append(replace(before, gradient=g) if with_gradients else before)
                after = advance(task, before, g, k)
                states[i] = after if goes_on else State(after.z, {})
            else:
                # others may hold the memory that a continued attack starts from, so that its first
                # step leaves that memory as it is
                own = k > 0 or task.memory is None
                states[i] = _consume(task, states[i], g, k, overwrite=own, keep_memory=goes_on)
        del found, g
        yield list(states)
    for path_of_one, last in zip(kept, states, strict=False):
        path_of_one.append(last)


def path_bytes(task: LowerLevel, theta: Params, *, with_gradients: bool = False) -> int:
    """Bytes of what ``paths`` keeps of one lower level."""
    total = 0
    for name, value in task.start(theta).items():
        memory = len(task.rule(name).init(value.new_empty(0)))
        total += value.nbytes * (1 + task.steps * (1 + memory + with_gradients))
    return total


def _consume(
    task: LowerLevel, state: State, g: Tensors, k: int, *, overwrite: bool, keep_memory: bool
) -> State:
    """As ``advance``, but some tensors after the other, so that what each read is free after it."""
    z: Tensors = {}
    memory: dict[str, Vector] = {}
    for names in _shares(state.z):
        share = State({}, {})
        for name in names:
            value = share.z[name] = state.z.pop(name)
            # the optimizer's state of a tensor is made here: after the last step, nobody keeps it
            share.memory[name] = state.memory.pop(name, ()) or task.rule(name).init(value)
        own = {name: g.pop(name) for name in names}
        after = advance(task, share, own, k, overwrite=overwrite)
        z.update(after.z)
        if keep_memory:
            memory.update(after.memory)
    return State(z, memory)


def _shares(tensors: Params) -> list[list[str]]:
    """The names of tensors in groups of ``SHARE`` bytes, or of one larger tensor."""
    shares: list[list[str]] = []
    room = 0
    for name, value in tensors.items():
        if not shares or value.nbytes > room:
            shares.append([])
            room = SHARE
        shares[-1].append(name)
        room -= value.nbytes
    return shares


def last_state(task: LowerLevel, theta: Params) -> State:
    """State after all K steps, without a graph, in the memory of one step; as ``path`` ends."""
    (last,) = deque(path(task, theta), maxlen=1)
    return last


def unroll(task: LowerLevel, theta: Params) -> list[Tensors]:
    """z_1(θ) … z_K(θ) with the whole graph kept: differentiable, in memory that grows with K."""
    first = start(task, theta)
    z = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in first.z.items()}
    state = State(z, first.memory)
    states = []
    for k in range(task.steps):
        loss = task.loss(state.z, theta, k)
        leaves = list(state.z.values())
        grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        state = advance(task, state, dict(zip(state.z, grads, strict=True)), k)
        states.append(state.z)
    return states
