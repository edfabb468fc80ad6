"""The differentiable merge of adaptations: a plan made once, a layer applied at each step."""

# N = concepts, S_n = tokens of concept n, D = text embedding, O = output, R = rows of C_reg

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mima import ops, reference

Params = Mapping[str, torch.Tensor]
"""Weights by their names in a model."""


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
        captions: [D, D] or smaller, float64: the triangular factor of C_reg, which stands for it in
            ``for_tokens``; no graph leads through it.
    """

    C: list[torch.Tensor]
    M: list[torch.Tensor]
    weights: torch.Tensor
    lam: float
    condition: float
    ridge: float
    captions: torch.Tensor

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
        words, so that the hard constraint (``lam=0``) contradicts itself: it is refused where rows
        of ``C`` are linearly dependent.

        Args:
            C: N tensors [S_n, D].
            C_reg: [R, D] embeddings of ordinary captions, which the merge leaves alone. With
                R < D or a deficient rank, a small ridge is added and logged.
            lam: softness, ≥ 0.
            weights: [N] positive shares; default 1/N each.

        Returns:
            The plan, in the dtype of ``C``; differentiable any number of times in ``C``, ``C_reg``
            and ``weights``.

        Raises:
            TypeError: C not floating-point, or of several dtypes or devices.
            ValueError: shapes that do not fit, no concept, embeddings that are not finite or all
                zero, a negative ``lam``, or one of 0 where rows of ``C`` are linearly dependent.
        """
        C = list(C)
        if not C:
            raise ValueError("MergePlan: C must have one tensor per concept, got none")
        if weights is None:
            weights = torch.full((len(C),), 1 / max(len(C), 1), dtype=torch.float64)
        weights = torch.as_tensor(weights, dtype=torch.float64, device=C_reg.device)
        captions = reference.caption_factor(C_reg)
        singular, ridge = reference.caption_spectrum(captions, len(C_reg))
        M = reference.merge_plan(C, captions, lam, weights, ridge=ridge)
        sizes = torch.cat([C_n.detach().abs().flatten() for C_n in C])
        if sizes.numel() and not 0 < float(sizes.max()) < math.inf:
            raise ValueError("MergePlan: C must be finite and not all zero")
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
            captions=captions.detach(),
        )

    def for_tokens(self, C: Sequence[torch.Tensor]) -> MergePlan:
        """The plan for other embeddings of the concepts, with the same captions and shares.

        Where tokens are trained, C and with it M move. The captions enter through their factor
        alone, so that this costs a solve of size D, however many there are.

        Args:
            C: N tensors [S_n, D].

        Returns:
            The plan; differentiable any number of times in ``C``.
        """
        return self._again(list(C), self.weights)

    def of(self, concepts: Sequence[int]) -> MergePlan:
        """The plan of some of the concepts, with the same captions; their shares sum to 1.

        Args:
            concepts: their places, in the order that the plan is to have.

        Returns:
            The plan; differentiable any number of times in ``C``.
        """
        shares = self.weights[list(concepts)]
        return self._again([self.C[n] for n in concepts], shares / shares.sum())

    def _again(self, C: list[torch.Tensor], weights: torch.Tensor) -> MergePlan:
        M = reference.merge_plan(C, self.captions, self.lam, weights, ridge=self.ridge)
        return replace(self, C=C, M=M, weights=weights)

    @property
    def drift_bound(self) -> torch.Tensor:
        """[N]: concept n moves a weight at most this many times as far as its own adaptation did.

        ``‖(W_n − W0) C_nᵀ M_n‖_F ≤ drift_bound[n] · ‖W_n − W0‖_F``
        """
        return torch.stack([_spectral_norm(c, m) for c, m in zip(self.C, self.M, strict=True)])


def _spectral_norm(C_SD: torch.Tensor, M_SD: torch.Tensor) -> torch.Tensor:
    # ‖Cᵀ M‖₂ = ‖R M‖₂ for Cᵀ = QR: a small problem, since S is a handful of tokens
    if C_SD.shape[0] == 0:
        return torch.zeros((), dtype=torch.float64, device=C_SD.device)
    _, R = torch.linalg.qr(C_SD.detach().double().mT)
    norm: torch.Tensor = torch.linalg.matrix_norm(R @ M_SD.detach().double(), ord=2)
    return norm


class MergeLayer:
    """Merge({θ'[n]}) on named parameters: projected where text is read, averaged elsewhere.

    The layer is linear in the adaptations: φ − θ is a sum of what each concept's change θ'[n] − θ
    contributes, and ``pullback`` is the adjoint of a concept's contribution. One concept can
    therefore be merged, and differentiated, at a time: ``add_averaged`` adds its share of what is
    averaged to a running sum, in place; of its projected weights only ``asked``,
    ``A_n = (W_n − W0) C_nᵀ``, [O, S_n] for each, has to be kept until ``spread`` adds them.

    Args:
        weights: [N] shares; they sum to 1 in the paper.
        plan: the merge plan, or None to average everything.
        projected: names of the [O, D] weights that the plan serves.
        trained_tokens: whether the lower levels train tokens: ``plan`` then holds for their start,
            and ``for_tokens`` gives the layer for what became of them.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        plan: MergePlan | None = None,
        projected: Collection[str] = (),
        *,
        trained_tokens: bool = False,
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
        self.trained_tokens = trained_tokens and plan is not None

    def for_tokens(self, C: Sequence[torch.Tensor]) -> MergeLayer:
        """The layer for other embeddings of the concepts' tokens, a function of them."""
        assert self.plan is not None
        plan = self.plan.for_tokens(C)
        return MergeLayer(self.weights, plan, self.projected, trained_tokens=True)

    def of(self, concepts: Sequence[int]) -> MergeLayer:
        """The layer of some of the concepts, by their places; their shares sum to 1."""
        if list(concepts) == [*range(len(self.weights))]:
            return self
        shares = self.weights[list(concepts)]
        plan = self.plan and self.plan.of(concepts)
        return MergeLayer(
            shares / shares.sum(), plan, self.projected, trained_tokens=self.trained_tokens
        )

    def __call__(self, base: Params, adapted: Sequence[Params]) -> dict[str, torch.Tensor]:
        """Merge all concepts at once; differentiable any number of times in everything.

        Args:
            base: θ, by name.
            adapted: θ'[n] for each concept, the same names and shapes.

        Returns:
            φ, by name.

        Raises:
            ValueError: a number of concepts that is not that of the weights; names that an
                adaptation lacks; shapes that do not agree.
        """
        if len(adapted) != len(self.weights):
            raise ValueError(
                f"MergeLayer: adapted must have length {len(self.weights)}, one per weight, "
                f"got {len(adapted)}"
            )
        for n, theta in enumerate(adapted):
            if missing := base.keys() - theta.keys():
                raise ValueError(f"MergeLayer: adapted[{n}] lacks {', '.join(sorted(missing))}")
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

    def add_averaged(self, moved: dict[str, torch.Tensor], n: int, change: Params) -> None:
        """Add the averaged part of what concept n's change contributes to φ − θ, in place.

        Args:
            moved: φ − θ so far, by name; what it lacks is taken in.
            n: the concept.
            change: θ'[n] − θ, by name. The projected part is that of ``asked`` and ``spread``.
        """
        names = [name for name in change if name not in self.projected]
        if not names:
            return
        for name in names:
            if name not in moved:
                like = change[name]
                moved[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        sums = [moved[name] for name in names]
        ops.combine([sums, [change[name] for name in names]], [[1, self._shares[n]]], into=[sums])

    @cached_property
    def _shares(self) -> list[float]:
        return [float(share) for share in self.weights]

    def asked(self, change: Params, C_SD: torch.Tensor) -> torch.Tensor:
        """``A_n = (W_n − W0) C_nᵀ``: what a concept wants of the projected weights, all in one.

        Args:
            change: θ'[n] − θ.
            C_SD: [S_n, D] embeddings of the concept's tokens.

        Returns:
            [ΣO, S_n], the weights one above the other in the order of ``change``.
        """
        layers = self._layers(change)
        return ops.token_outputs(layers, C_SD) if layers else C_SD.new_empty(0, len(C_SD))

    def spread(self, asked: Mapping[int, torch.Tensor], like: Params) -> dict[str, torch.Tensor]:
        """``Σ_n A_n M_n`` over some concepts: their projected part of φ − θ, by name.

        Args:
            asked: A_n by concept, all from changes with the names of ``like``.
            like: names and shapes.
        """
        if self.plan is None or not asked:
            return {}
        names = [name for name in like if name in self.projected]
        moved = [
            torch.zeros_like(like[name], memory_format=torch.contiguous_format) for name in names
        ]
        if moved:
            M_SD = torch.cat([self.plan.M[n] for n in asked])
            ops.add_token_outputs_(moved, torch.cat(list(asked.values()), dim=1), M_SD)
        return dict(zip(names, moved, strict=True))

    def pullback(self, n: int, cotangent: Params) -> dict[str, torch.Tensor]:
        """Gradient at θ'[n] for a gradient ``cotangent`` at φ: the adjoint of its contribution."""
        rest = {name: value for name, value in cotangent.items() if name not in self.projected}
        (values,) = ops.weighted_merge_pullback(list(rest.values()), self.weights[n : n + 1])
        pulled = dict(zip(rest, values, strict=True))
        if self.plan is not None:
            own = {name: value for name, value in cotangent.items() if name in self.projected}
            C, M = [self.plan.C[n]], [self.plan.M[n]]
            (values,) = ops.projected_merge_pullback(list(own.values()), C, M)
            pulled |= zip(own, values, strict=True)
        return pulled

    def plan_pullback(self, asked: torch.Tensor, cotangent: Params) -> torch.Tensor:
        """``M̄_n = A_nᵀ φ̄`` [S_n, D]: gradient at concept n's rows of the plan."""
        assert self.plan is not None
        layers = self._layers(cotangent)
        return ops.token_sums(layers, asked) if layers else torch.zeros_like(self.plan.M[0])

    def token_pullback(self, n: int, change: Params, cotangent: Params) -> torch.Tensor:
        """``C̄_n = (φ̄ M_nᵀ)ᵀ (W_n − W0)`` [S_n, D]: gradient at C_n through A_n, M held fixed."""
        assert self.plan is not None
        M_SD = self.plan.M[n].detach()
        layers = self._layers(change)
        if not layers:
            return torch.zeros_like(M_SD)
        return ops.token_sums(layers, ops.token_outputs(self._layers(cotangent), M_SD))

    def missed(self, asked: Mapping[int, torch.Tensor], moved: Params) -> tuple[float, float]:
        """``Σ_n ‖(φ − W0) C_nᵀ − A_n‖²`` and ``Σ_n ‖A_n‖²`` over some concepts.

        Args:
            asked: A_n by concept.
            moved: φ − W0, in the order of the changes that A_n was made from.
        """
        if self.plan is None or not asked:
            return 0.0, 0.0
        A = torch.cat(list(asked.values()), dim=1)
        gap = self.asked(moved, torch.cat([self.plan.C[n] for n in asked])) - A
        return float(gap.square().sum()), float(A.square().sum())

    def _layers(self, x: Params) -> list[torch.Tensor]:
        return [value for name, value in x.items() if name in self.projected]
