"""The differentiable merge of adaptations: a plan made once, a layer applied at each step."""

# N = concepts, S_n = tokens of concept n, D = text embedding, O = output, R = rows of C_reg

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from mima import ops, reference

Params = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What the projected merge needs of the text: computed once while the text encoder is frozen.

    ``φ = W0 + Σ_n (W_n − W0) C_nᵀ M_n`` for every layer that reads these embeddings.

    Attributes:
        C: per concept, [S_n, D] embeddings of its tokens.
        M: per concept, [S_n, D] rows of ``(C G⁻¹ Cᵀ + Λ)⁻¹ C G⁻¹``, G = C_regᵀ C_reg.
        weights: [N] share of each concept.
        lam: softness of the constraint; 0 is the hard one.
        condition: condition number of C_reg, ridge included.
        ridge: ρ; ρ² was added to the diagonal of G. 0 where C_reg has full rank.
        drift_bound: [N]; concept n moves a weight at most this many times as far as its own
            adaptation did: ``‖(W_n − W0) C_nᵀ M_n‖_F ≤ drift_bound[n] · ‖W_n − W0‖_F``.
    """

    C: list[torch.Tensor]
    M: list[torch.Tensor]
    weights: torch.Tensor
    lam: float
    condition: float
    ridge: float
    drift_bound: torch.Tensor

    @classmethod
    def from_embeddings(
        cls,
        C: Sequence[torch.Tensor],
        C_reg: torch.Tensor,
        *,
        lam: float = 1e-4,
        weights: torch.Tensor | Sequence[float] | None = None,
    ) -> MergePlan:
        """Build the plan in float64 from token embeddings, by QR and triangular solves.

        ``min_φ ‖(φ − W0) C_regᵀ‖²_F  s.t.  φ C_nᵀ = W_n C_nᵀ`` (Kumari et al., Custom Diffusion,
        CVPR 2023), softened by ``Λ = lam · mean(diag(C G⁻¹ Cᵀ)) · diag(1 / w)``. Concepts share
        words, so that the hard constraint (``lam=0``) contradicts itself and explodes.

        Args:
            C: N tensors [S_n, D].
            C_reg: [R, D] embeddings of ordinary captions, which the merge leaves alone. With
                R < D or a deficient rank, a small ridge is added and logged.
            lam: softness, ≥ 0.
            weights: [N] positive shares; default 1/N each.

        Returns:
            The plan, in the dtype of ``C``; differentiable twice in ``C``, ``C_reg``, ``weights``.

        Raises:
            ValueError: shapes that do not fit, no concept, a negative ``lam``.
        """
        C = list(C)
        if weights is None:
            weights = torch.full((len(C),), 1 / max(len(C), 1), dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64, device=C_reg.device)
        M = reference.merge_plan(C, C_reg, lam, weights)
        singular = torch.linalg.svdvals(torch.linalg.qr(C_reg.detach().double(), mode="r")[1])
        ridge = reference.plan_ridge(singular, C_reg.shape[1])
        largest = float(singular[0])
        smallest = float(singular[-1]) if len(singular) == C_reg.shape[1] else 0.0
        condition = math.hypot(largest, ridge) / (math.hypot(smallest, ridge) or math.ulp(largest))
        return cls(
            C=C,
            M=M,
            weights=weights,
            lam=lam,
            condition=condition,
            ridge=ridge,
            drift_bound=torch.stack([_spectral_norm(c, m) for c, m in zip(C, M, strict=True)]),
        )


def _spectral_norm(C_SD: torch.Tensor, M_SD: torch.Tensor) -> torch.Tensor:
    # ‖Cᵀ M‖₂ = ‖R M‖₂ for Cᵀ = QR: a small problem, since S is a handful of tokens
    if C_SD.shape[0] == 0:
        return torch.zeros((), dtype=torch.float64, device=C_SD.device)
    _, R = torch.linalg.qr(C_SD.detach().double().mT)
    norm: torch.Tensor = torch.linalg.matrix_norm(R @ M_SD.detach().double(), ord=2)
    return norm


class MergeLayer:
    """Merge({θ'[n]}) on named parameters: projected where text is read, averaged elsewhere.

    The layer is linear in the adaptations, ``φ = θ + Σ_n delta(n, θ'[n] − θ)``, and ``pullback`` is
    the adjoint of ``delta``. One concept can therefore be merged, and differentiated, at a time.

    Args:
        weights: [N] shares; they sum to 1 in the paper.
        plan: the merge plan, or None to average everything.
        projected: names of the [O, D] weights that the plan serves.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        plan: MergePlan | None = None,
        projected: Collection[str] = (),
    ) -> None:
        if plan is None and projected:
            raise ValueError("MergeLayer: projected names need a plan, got plan=None")
        if plan is not None and len(plan.C) != len(weights):
            raise ValueError(
                f"MergeLayer: plan is for {len(plan.C)} concepts, weights for {len(weights)}"
            )
        self.weights = weights
        self.plan = plan
        self.projected = frozenset(projected)

    def __call__(self, base: Params, adapted: Sequence[Params]) -> dict[str, torch.Tensor]:
        """Merge all concepts at once; differentiable twice in everything.

        Args:
            base: θ, by name.
            adapted: θ'[n] for each concept, the same names and shapes.

        Returns:
            φ, by name.
        """
        projected = [name for name in base if name in self.projected]
        averaged = [name for name in base if name not in self.projected]
        merged: dict[str, torch.Tensor] = {}
        if projected:
            assert self.plan is not None
            W0 = [base[name] for name in projected]
            W = [[theta[name] for name in projected] for theta in adapted]
            values = ops.projected_merge(W0, W, self.plan.C, self.plan.M)
            merged.update(zip(projected, values, strict=True))
        if averaged:
            thetas = [[theta[name] for name in averaged] for theta in adapted]
            values = ops.weighted_merge([base[name] for name in averaged], thetas, self.weights)
            merged.update(zip(averaged, values, strict=True))
        return {name: merged[name] for name in base}

    def delta(self, n: int, change: Params) -> dict[str, torch.Tensor]:
        """What concept n's change θ'[n] − θ adds to the merged weights."""
        return self._linear(n, change, adjoint=False)

    def pullback(self, n: int, cotangent: Params) -> dict[str, torch.Tensor]:
        """Gradient at θ'[n] for a gradient ``cotangent`` at φ: the adjoint of ``delta``."""
        return self._linear(n, cotangent, adjoint=True)

    def asked(self, n: int, change: Params) -> dict[str, torch.Tensor]:
        """``A_n = (W_n − W0) C_nᵀ`` [O, S_n]: what concept n wants of each projected weight."""
        if self.plan is None:
            return {}
        C_SD = self.plan.C[n]
        return {name: x @ C_SD.mT for name, x in change.items() if name in self.projected}

    def missed(self, n: int, asked: Params, moved: Params) -> tuple[float, float]:
        """``‖(φ − W0) C_nᵀ − A_n‖²`` and ``‖A_n‖²``, summed over the projected weights."""
        if self.plan is None or not asked:
            return 0.0, 0.0
        C_SD = self.plan.C[n]
        gaps = [(moved[name] @ C_SD.mT - A_OS).square().sum() for name, A_OS in asked.items()]
        wanted = [A_OS.square().sum() for A_OS in asked.values()]
        return float(torch.stack(gaps).sum()), float(torch.stack(wanted).sum())

    def _linear(self, n: int, x: Params, *, adjoint: bool) -> dict[str, torch.Tensor]:
        projected = [name for name in x if name in self.projected]
        out = {name: value * self.weights[n] for name, value in x.items() if name not in projected}
        if projected:
            assert self.plan is not None
            C, M = self.plan.C[n], self.plan.M[n]
            if adjoint:  # x Cᵀ M and x Mᵀ C are each other's adjoint
                C, M = M, C
            W = [x[name] for name in projected]
            zero = [torch.zeros_like(w) for w in W]
            out.update(zip(projected, ops.projected_merge(zero, [W], [C], [M]), strict=True))
        return out
