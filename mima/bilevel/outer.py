"""The gradient of one outer step, in two passes over the concepts: memory of one concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate, pullback
from mima.bilevel.lower import LowerLevel, Params, Tensors
from mima.merging import MergeLayer


@dataclass(frozen=True)
class UpperTerm:
    """One summand of the upper objective, which is minimised: ``weight · min(loss(φ), cap)``.

    Attributes:
        name: what reports call it.
        loss: a function of the merged parameters φ.
        weight: −1 for a concept that is to become hard to learn, > 0 for what is to be kept.
        cap: losses above it no longer pull; None for no cap.
    """

    name: str
    loss: Callable[[Params], torch.Tensor]
    weight: float
    cap: float | None = None

    def objective(self, loss: torch.Tensor) -> torch.Tensor:
        """The summand for a value of the loss."""
        return self.weight * (loss if self.cap is None else loss.clamp(max=self.cap))


@dataclass(frozen=True)
class OuterGradient:
    """dJ/dθ and what was seen on the way.

    Attributes:
        gradient: by name, for the names that were asked for.
        losses: the loss of each upper term, by its name.
        drift: ``‖φ − θ‖ / ‖θ‖``, how far the merge moved the weights.
    """

    gradient: Tensors
    losses: dict[str, float]
    drift: float

    @property
    def norm(self) -> float:
        """Length of the gradient."""
        return float(torch.stack([g.norm() for g in self.gradient.values()]).norm())


def outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Sequence[UpperTerm],
    *,
    mode: str,
    wrt: tuple[str, ...],
) -> OuterGradient:
    """Gradient of ``J(θ) = Σ upper(Merge({θ'[n](θ)}))``.

    Merge is linear, so the first pass needs each concept's contribution only, and the second asks
    each concept for one vector-Jacobian product:

        φ = θ + Σ_n delta_n(θ'[n] − θ)
        dJ/dθ = φ̄ + Σ_n (∂(θ'[n] − θ)/∂θ)ᵀ pullback_n(φ̄)

    Args:
        theta: θ by name, every parameter that any concept or the defender changes.
        tasks: the lower level of each concept.
        merge: the merge layer, its concepts in the order of ``tasks``.
        upper: terms of the objective, to be summed; each is differentiated by itself.
        mode: ``exact``, ``finite_difference`` or ``first_order``.
        wrt: the names that the defender may change.

    Returns:
        The gradient; equal to that of ``naive_outer_gradient`` up to rounding.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    phi = dict(theta)
    for n, task in enumerate(tasks):
        change = task.change(lower.adapt(task, theta), theta)
        accumulate(phi, merge.delta(n, change))

    phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
    phi_bar: Tensors = {}
    losses = {}
    for term in upper:
        with torch.enable_grad():
            loss = term.loss(phi)
            objective = term.objective(loss)
        grads = torch.autograd.grad(
            objective, list(phi.values()), allow_unused=True, materialize_grads=True
        )
        accumulate(phi_bar, dict(zip(phi, grads, strict=True)))
        losses[term.name] = float(loss.detach())

    total = {name: phi_bar[name] for name in wrt}
    if mode != "first_order":
        for n, task in enumerate(tasks):
            accumulate(total, pullback(mode, task, theta, wrt, merge.pullback(n, phi_bar)))
    return OuterGradient(total, losses, _drift(theta, phi))


def unmerged_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    upper: Sequence[Sequence[UpperTerm]],
    *,
    mode: str,
    wrt: tuple[str, ...],
) -> OuterGradient:
    """Gradient of ``Σ_n upper_n(θ'[n](θ))``: each concept faces its own adaptation, no merge.

    IMMA's objective (Zheng & Yeh, ECCV 2024), summed over concepts.
    """
    alone = MergeLayer(torch.ones(1))
    gradient: Tensors = {}
    losses: dict[str, float] = {}
    drifts = []
    for task, terms in zip(tasks, upper, strict=True):
        one = outer_gradient(theta, [task], alone, terms, mode=mode, wrt=wrt)
        accumulate(gradient, one.gradient)
        losses.update(one.losses)
        drifts.append(one.drift)
    return OuterGradient(gradient, losses, max(drifts))


def naive_outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Sequence[UpperTerm],
    *,
    wrt: tuple[str, ...],
) -> OuterGradient:
    """The same gradient with every concept's graph held at once: the definition, for tests.

    Run it inside ``twice_differentiable_attention`` if the loss has attention.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
    adapted = []
    for task in tasks:
        change = task.change(lower.unroll(task, leaves), leaves)
        adapted.append({n: v + change[n] if n in change else v for n, v in leaves.items()})
    phi = merge(leaves, adapted)
    losses = {term.name: term.loss(phi) for term in upper}
    objective = torch.stack([term.objective(losses[term.name]) for term in upper]).sum()
    grads = torch.autograd.grad(objective, [leaves[name] for name in wrt])
    return OuterGradient(
        dict(zip(wrt, grads, strict=True)),
        {name: float(loss.detach()) for name, loss in losses.items()},
        _drift(theta, phi),
    )


def _drift(theta: Params, phi: Params) -> float:
    moved = sum(float((phi[n].detach() - v).square().sum()) for n, v in theta.items())
    size = sum(float(v.square().sum()) for v in theta.values())
    return (moved / size) ** 0.5 if size else 0.0
