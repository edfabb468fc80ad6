"""Lower-level optimizers as functions: a step returns new tensors and can be differentiated."""

# A step takes all tensors at once: z and g are lists, and so is the state, a vector per tensor

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from mima import ops

Vector = tuple[torch.Tensor, ...]
TensorList = list[torch.Tensor]


class Optimizer(Protocol):
    """One rule ``(z, g, state) → (z⁺, state⁺)``, elementwise and differentiable in all three.

    Tensors that take a step together are of one dtype and device.
    """

    @property
    def reads_gradient(self) -> bool:
        """Whether the derivative of the rule depends on the gradient's value."""

    def init(self, z: torch.Tensor) -> Vector:
        """One tensor's state before the first step."""

    def step(
        self,
        z: Sequence[torch.Tensor],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
        *,
        overwrite: bool = False,
    ) -> tuple[TensorList, list[Vector]]:
        """Step k (from 0). With ``overwrite``, state⁺ may take the state's memory."""

    def pullback(
        self,
        z_bar: Sequence[torch.Tensor],
        state_bar: Sequence[Vector],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
    ) -> tuple[TensorList, TensorList, list[Vector]]:
        """Adjoint of step k: gradients at z, g and the state for those at z⁺ and state⁺.

        Args:
            z_bar: at z⁺.
            state_bar: at state⁺.
            g: the step's gradients; nothing where the rule's derivative does not read them.
            state: before the step.
            k: the step.
        """


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``m⁺ = momentum · m + g,  z⁺ = z − lr · m⁺``; without momentum there is no m.

    `mima.ops.combine` computes the step and its pullback, both of which are linear.
    """

    lr: float
    """Step size, > 0."""
    momentum: float = 0.0
    """Decay of the sum of gradients, in [0, 1)."""

    reads_gradient = False

    def init(self, z: torch.Tensor) -> Vector:
        return (torch.zeros_like(z),) if self.momentum else ()

    def step(
        self,
        z: Sequence[torch.Tensor],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
        *,
        overwrite: bool = False,
    ) -> tuple[TensorList, list[Vector]]:
        lr, momentum = self.lr, self.momentum
        if not momentum:
            (after,) = ops.combine([z, g], [[1, -lr]])
            return after, [() for _ in after]
        m = [m for (m,) in state]
        rule = [[1, -lr, -lr * momentum], [0, 1, momentum]]
        after, m = ops.combine([z, g, m], rule, into=[None, m] if overwrite else None)
        return after, [(x,) for x in m]

    def pullback(
        self,
        z_bar: Sequence[torch.Tensor],
        state_bar: Sequence[Vector],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
    ) -> tuple[TensorList, TensorList, list[Vector]]:
        lr, momentum = self.lr, self.momentum
        if not momentum:
            (g_bar,) = ops.combine([z_bar], [[-lr]])
            return list(z_bar), g_bar, [() for _ in g_bar]
        rule = [[-lr, 1], [-lr * momentum, momentum]]
        g_bar, m_bar = ops.combine([z_bar, [m for (m,) in state_bar]], rule)
        return list(z_bar), g_bar, [(m,) for m in m_bar]


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with decoupled decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), state unrolled.

    `mima.ops.adam_step` computes the step and its pullback.
    """

    lr: float
    """Step size, > 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0."""
    weight_decay: float = 0.0
    """Decoupled decay per step, in units of lr."""

    reads_gradient = True

    def init(self, z: torch.Tensor) -> Vector:
        return torch.zeros_like(z), torch.zeros_like(z)

    def step(
        self,
        z: Sequence[torch.Tensor],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
        *,
        overwrite: bool = False,
    ) -> tuple[TensorList, list[Vector]]:
        m, v = _columns(state)
        z, m, v = ops.adam_step(z, g, m, v, **asdict(self), step=k, overwrite=overwrite)
        return z, list(zip(m, v, strict=True))

    def pullback(
        self,
        z_bar: Sequence[torch.Tensor],
        state_bar: Sequence[Vector],
        g: Sequence[torch.Tensor],
        state: Sequence[Vector],
        k: int,
    ) -> tuple[TensorList, TensorList, list[Vector]]:
        bars, moments = _columns(state_bar), _columns(state)
        d_z, d_g, d_m, d_v = ops.adam_step_pullback(
            z_bar, *bars, g, *moments, **asdict(self), step=k
        )
        return d_z, d_g, list(zip(d_m, d_v, strict=True))


def _columns(state: Sequence[Vector]) -> tuple[TensorList, TensorList]:
    """Adam's two moments, a list each."""
    return [m for m, _ in state], [v for _, v in state]
