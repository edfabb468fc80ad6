"""Lower-level optimizers as functions: a step returns new tensors and can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

Vector = tuple[torch.Tensor, ...]


class Optimizer(Protocol):
    """One rule ``(z, g, state) → (z⁺, state⁺)``, elementwise and differentiable in all three."""

    @property
    def reads_gradient(self) -> bool:
        """Whether the derivative of the rule depends on the gradient's value."""

    def init(self, z: torch.Tensor) -> Vector:
        """State before the first step."""

    def step(
        self, z: torch.Tensor, g: torch.Tensor, state: Vector, k: int
    ) -> tuple[torch.Tensor, Vector]:
        """Step k (from 0) for one tensor."""


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``z⁺ = z − lr · g``."""

    lr: float
    """Step size, > 0."""

    reads_gradient = False

    def init(self, z: torch.Tensor) -> Vector:
        return ()

    def step(
        self, z: torch.Tensor, g: torch.Tensor, state: Vector, k: int
    ) -> tuple[torch.Tensor, Vector]:
        return torch.sub(z, g, alpha=self.lr), state


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with decoupled decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), state unrolled."""

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
        self, z: torch.Tensor, g: torch.Tensor, state: Vector, k: int
    ) -> tuple[torch.Tensor, Vector]:
        m, v = state
        beta1, beta2 = self.betas
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        v_hat = v / (1 - beta2 ** (k + 1))
        # √ has no derivative at 0: entries that never saw a gradient keep a zero root and slope
        seen = v_hat > 0
        root = torch.where(seen, torch.where(seen, v_hat, 1.0).sqrt(), 0.0)
        update = m / (1 - beta1 ** (k + 1)) / (root + self.eps)
        return z * (1 - self.lr * self.weight_decay) - self.lr * update, (m, v)
