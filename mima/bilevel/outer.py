"""The gradient of one outer step, in two passes over the concepts: memory of one concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate, pullback
from mima.bilevel.lower import LowerLevel, Params, Tensors
from mima.distributed import ALONE, Ranks, union
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
        residual: ``‖(φ − W_n) C_nᵀ‖ / ‖(W_n − W0) C_nᵀ‖`` over all projected weights and concepts:
            how far they miss the merge's constraint; 0 where nothing is projected.
    """

    gradient: Tensors
    losses: dict[str, float]
    drift: float
    residual: float = 0.0

    @property
    def norm(self) -> float:
        """Length of the gradient."""
        return float(torch.stack([g.norm() for g in self.gradient.values()]).norm())


def outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Sequence[Sequence[UpperTerm]],
    *,
    mode: str,
    wrt: tuple[str, ...],
    ranks: Ranks = ALONE,
) -> OuterGradient:
    """Gradient of ``J(θ) = Σ upper(Merge({θ'[n](θ)}))``.

    Merge is linear, so the first pass needs each concept's contribution only, and the second asks
    each concept for one vector-Jacobian product:

        φ = θ + Σ_n delta_n(θ'[n] − θ)
        dJ/dθ = φ̄ + Σ_n (∂(θ'[n] − θ)/∂θ)ᵀ pullback_n(φ̄)

    A concept is asked for by its index when its turn comes, and again in the second pass, so that
    ``tasks`` and ``upper`` may make it anew each time, as long as they make it the same.

    Args:
        theta: θ by name, every parameter that any concept or the defender changes.
        tasks: the lower level of each concept.
        merge: the merge layer, its concepts in the order of ``tasks``.
        upper: each concept's terms of the objective, to be summed; each is differentiated by
            itself.
        mode: ``exact``, ``finite_difference`` or ``first_order``.
        wrt: the names that the defender may change.
        ranks: the processes that share the concepts out. Each sum over concepts is one all-reduce.

    Returns:
        The gradient, the same in every process; equal to that of ``naive_outer_gradient`` up to
        rounding.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    mine = ranks.share(len(tasks))
    moved: Tensors = {}
    asked = {}
    for n in mine:
        task = tasks[n]
        change = task.change(lower.adapt(task, theta), theta)
        accumulate(moved, merge.delta(n, change))
        asked[n] = merge.asked(n, change)
    moved = ranks.sum(moved, theta)
    missed = {n: merge.missed(n, asked[n], moved) for n in mine}

    phi = {n: v + moved[n] if n in moved else v for n, v in theta.items()}
    phi_bar, losses = upper_gradient(phi, upper, ranks)

    total = {name: phi_bar[name] for name in wrt}
    if mode != "first_order":
        second: Tensors = {}
        for n in mine:
            accumulate(second, pullback(mode, tasks[n], theta, wrt, merge.pullback(n, phi_bar)))
        accumulate(total, ranks.sum(second, total))
    return OuterGradient(total, losses, drift(theta, moved), residual(missed, ranks))


def upper_gradient(
    phi: Params, upper: Sequence[Sequence[UpperTerm]], ranks: Ranks = ALONE
) -> tuple[Tensors, dict[str, float]]:
    """Gradient of ``Σ upper(φ)`` at φ, a term at a time, and the losses by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in phi.items()}
    phi_bar: Tensors = {name: torch.zeros_like(value) for name, value in leaves.items()}
    seen: list[dict[str, float]] = []
    for n in ranks.share(len(upper)):
        seen.append({})
        for term in upper[n]:
            with torch.enable_grad():
                loss = term.loss(leaves)
                objective = term.objective(loss)
            grads = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
            for total, grad in zip(phi_bar.values(), grads, strict=True):
                if grad is not None:
                    total += grad
            seen[-1][term.name] = float(loss.detach())
    return ranks.sum(phi_bar, leaves), union(ranks.interleave(seen, len(upper)))


def unmerged_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    upper: Sequence[Sequence[UpperTerm]],
    *,
    mode: str,
    wrt: tuple[str, ...],
    ranks: Ranks = ALONE,
) -> OuterGradient:
    """Gradient of ``Σ_n upper_n(θ'[n](θ))``: each concept faces its own adaptation, no merge.

    IMMA's objective (Zheng & Yeh, ECCV 2024), summed over concepts.
    """
    alone = MergeLayer(torch.ones(1))
    gradient: Tensors = {}
    seen: list[tuple[dict[str, float], float]] = []
    for n in ranks.share(len(tasks)):
        one = outer_gradient(theta, [tasks[n]], alone, [upper[n]], mode=mode, wrt=wrt)
        accumulate(gradient, one.gradient)
        seen.append((one.losses, one.drift))
    everyone = ranks.interleave(seen, len(tasks))
    return OuterGradient(
        ranks.sum(gradient, {name: theta[name] for name in wrt}),
        union(losses for losses, _ in everyone),
        max(drift for _, drift in everyone),
    )


def naive_outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Sequence[Sequence[UpperTerm]],
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
    terms = [term for of_concept in upper for term in of_concept]
    losses = {term.name: term.loss(phi) for term in terms}
    objective = torch.stack([term.objective(losses[term.name]) for term in terms]).sum()
    grads = torch.autograd.grad(objective, [leaves[name] for name in wrt])
    return OuterGradient(
        dict(zip(wrt, grads, strict=True)),
        {name: float(loss.detach()) for name, loss in losses.items()},
        drift(theta, {name: phi[name].detach() - value for name, value in theta.items()}),
    )


def drift(theta: Params, moved: Params) -> float:
    """``‖φ − θ‖ / ‖θ‖`` for ``moved`` = φ − θ."""
    far = sum(float(value.square().sum()) for value in moved.values())
    size = sum(float(value.square().sum()) for value in theta.values())
    return (far / size) ** 0.5 if size else 0.0


def residual(missed: dict[int, tuple[float, float]], ranks: Ranks) -> float:
    """The constraint's residual from what ``MergeLayer.missed`` says of each concept."""
    pairs = [pair for of_rank in ranks.gather(list(missed.values())) for pair in of_rank]
    asked = sum(wanted for _, wanted in pairs)
    return float((sum(gap for gap, _ in pairs) / asked) ** 0.5) if asked else 0.0
