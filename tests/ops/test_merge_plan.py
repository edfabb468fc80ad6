"""The merge plan against its formula and its constraints."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mima import reference
from mima.merging import MergeLayer, MergePlan
from mima.reference import RIDGE, caption_factor, caption_spectrum, merge_plan


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _concepts(lengths: tuple[int, ...], d: int) -> list[Tensor]:
    return [_randn(s, d, seed=n + 1) for n, s in enumerate(lengths)]


def _formula(C: list[Tensor], C_reg: Tensor, lam: float, weights: Tensor) -> Tensor:
    """(C G⁻¹ Cᵀ + Λ)⁻¹ C G⁻¹, as it is written."""
    rows = torch.cat(C)
    inverse = torch.linalg.inv(C_reg.mT @ C_reg)
    gram = rows @ inverse @ rows.mT
    share = torch.cat([w.expand(len(C_n)) for w, C_n in zip(weights, C, strict=True)])
    softness = torch.diag(lam * gram.diagonal().mean() / share)
    return torch.linalg.solve(gram + softness, rows @ inverse)


@pytest.mark.parametrize("lam", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize("lengths", [(1,), (3, 2), (2, 0, 4)])
def test_is_the_formula(lengths: tuple[int, ...], lam: float) -> None:
    C, C_reg = _concepts(lengths, 8), _randn(60, 8)
    weights = torch.linspace(0.2, 0.9, len(lengths), dtype=torch.float64)
    plan = merge_plan(C, C_reg, lam, weights)
    assert [len(M_n) for M_n in plan] == list(lengths)
    torch.testing.assert_close(torch.cat(plan), _formula(C, C_reg, lam, weights))


def test_default_weights_are_equal_shares() -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(60, 8)
    shares = torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(merge_plan(C, C_reg), merge_plan(C, C_reg, 1e-4, shares))


def test_hard_constraint_is_met_and_the_objective_stationary() -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(60, 8)
    W0, W = _randn(5, 8, seed=7), [_randn(5, 8, seed=8), _randn(5, 8, seed=9)]
    (phi,) = reference.projected_merge([W0], [[W_n] for W_n in W], C, merge_plan(C, C_reg, 0.0))
    for W_n, C_n in zip(W, C, strict=True):
        torch.testing.assert_close(phi @ C_n.mT, W_n @ C_n.mT)
    # Stationary on the constraint: the gradient of the objective lies in the span of the rows of C.
    gradient = (phi - W0) @ C_reg.mT @ C_reg
    rows = torch.cat(C)
    inside = torch.linalg.lstsq(rows.mT, gradient.mT).solution
    torch.testing.assert_close(rows.mT @ inside, gradient.mT)


def test_softness_vanishes_into_the_hard_constraint() -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(60, 8)
    hard = torch.cat(merge_plan(C, C_reg, 0.0))
    errors = [
        (torch.cat(merge_plan(C, C_reg, lam)) - hard).norm().item() for lam in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_shared_tokens_explode_hard_and_not_soft() -> None:
    shared = _randn(1, 16, seed=3)
    C = [torch.cat([c, shared + 1e-6 * n]) for n, c in enumerate(_concepts((2, 2), 16))]
    C_reg = _randn(200, 16)
    hard, soft = (torch.cat(merge_plan(C, C_reg, lam)).norm() for lam in (0.0, 1e-4))
    assert hard > 1e4 * soft


def test_ill_conditioned_captions_cost_the_plan_less_than_the_formula() -> None:
    # cond(C_reg) = 1e4, of which the formula's G has the square.
    d = 12
    left, right = (torch.linalg.qr(_randn(n, d, seed=n)).Q for n in (80, d))
    C_reg = left * torch.logspace(0, -4, d, dtype=torch.float64) @ right.mT
    C = [_randn(2, d, seed=5), _randn(3, d, seed=6)]
    plan = torch.cat(merge_plan(C, C_reg, 0.0))
    formula = _formula(C, C_reg, 0.0, torch.ones(2, dtype=torch.float64))
    missed = [
        (torch.cat(C) @ M.mT - torch.eye(5, dtype=torch.float64)).abs().max().item()
        for M in (plan, formula)
    ]
    assert missed[0] < 0.1 * missed[1]


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_first_and_second_derivatives(lam: float) -> None:
    C, C_reg, weights = _concepts((2, 1), 5), _randn(9, 5), torch.tensor([0.4, 0.6]).double()
    leaves = [x.requires_grad_() for x in (*C, C_reg, weights)]

    def f(a: Tensor, b: Tensor, C_reg: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(merge_plan([a, b], C_reg, lam, weights))

    if lam == 0:  # of which the weights are no input
        leaves[-1].requires_grad_(False)
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


def test_derivatives_with_a_ridge() -> None:
    C, C_reg = _concepts((2, 1), 5), _randn(3, 5)
    leaves = [x.requires_grad_() for x in (*C, C_reg)]

    def f(a: Tensor, b: Tensor, C_reg: Tensor) -> tuple[Tensor, ...]:
        return tuple(merge_plan([a, b], C_reg, 0.1, ridge=0.5))

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("how", ["few", "dependent"])
def test_singular_captions_get_a_ridge_that_is_logged(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    d = 8
    C_reg = _randn(5, d) if how == "few" else _randn(40, 5, seed=2) @ _randn(5, d)
    C = _concepts((2,), d)
    with caplog.at_level(logging.WARNING):
        (M,) = merge_plan(C, C_reg, 0.0)
    (record,) = caplog.records
    told = f"the captions' {len(C_reg)} tokens span 5 of 8 directions"
    assert told in record.getMessage()
    torch.testing.assert_close(C[0] @ M.mT, torch.eye(2, dtype=torch.float64))
    # Directions that no caption uses are nearly free to change, so that the captions' outputs stay.
    delta = (_randn(3, 2, seed=4) @ M) @ C_reg.mT
    assert delta.abs().max() < 1e-6


def test_the_ridge_is_relative_to_the_largest_singular_value() -> None:
    for diagonal, d, ridge in (
        ([10.0, 1.0], 2, 0.0),
        ([10.0, 1.0], 3, 10 * RIDGE),
        ([10.0, 1e-9], 2, 10 * RIDGE),
    ):
        singular, found = caption_spectrum(torch.eye(2, d) * torch.tensor([*diagonal, 0.0][:d]), 2)
        assert found == pytest.approx(ridge)
        torch.testing.assert_close(singular, torch.tensor(diagonal))


@pytest.mark.parametrize("m", [3, 40])
def test_the_factor_of_the_captions_stands_for_them(m: int) -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(m, 8)
    R = caption_factor(C_reg)
    torch.testing.assert_close(R.mT @ R, C_reg.mT @ C_reg)
    for M_n, from_factor in zip(merge_plan(C, C_reg), merge_plan(C, R), strict=True):
        torch.testing.assert_close(from_factor, M_n)


def test_low_precision_in_low_precision_out() -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(60, 8)
    exact = merge_plan(C, C_reg)
    for dtype in (torch.float32, torch.bfloat16):
        plan = merge_plan([C_n.to(dtype) for C_n in C], C_reg.to(dtype))
        for M_n, truth in zip(plan, exact, strict=True):
            assert M_n.dtype == dtype
            # The rounding of C and C_reg, times the condition number.
            torch.testing.assert_close(
                M_n.double(), truth, rtol=0, atol=20 * torch.finfo(dtype).eps
            )


def test_nothing_to_plan() -> None:
    assert merge_plan([], _randn(9, 4)) == []
    (M,) = merge_plan([_randn(0, 4)], _randn(9, 4))
    assert M.shape == (0, 4)


def test_mistakes_are_named() -> None:
    C, C_reg = _concepts((3, 2), 8), _randn(60, 8)
    with pytest.raises(ValueError, match=r"lam must be at least 0, got -1"):
        merge_plan(C, C_reg, -1.0)
    with pytest.raises(ValueError, match=r"C\[1\] must be \[s, 8\] to match C_reg \[60, 8\]"):
        merge_plan([C[0], _randn(2, 7)], C_reg)
    with pytest.raises(ValueError, match=r"C_reg must be \[m, d\], .* got \[0, 8\]"):
        merge_plan(C, _randn(0, 8))
    with pytest.raises(ValueError, match=r"weights must be \[2\], one per concept, got \[3\]"):
        merge_plan(C, C_reg, 1e-4, torch.ones(3))
    with pytest.raises(ValueError, match=r"weights must be positive, got \[1.0, 0.0\]"):
        merge_plan(C, C_reg, 1e-4, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"lam must be positive when rows of C are linearly"):
        merge_plan([C[0], C[0]], C_reg, 0.0)
    with pytest.raises(ValueError, match=r"lam must be positive for 9 tokens of dimension 8"):
        merge_plan([_randn(9, 8)], C_reg, 0.0)
    with pytest.raises(ValueError, match=r"lam must be finite, got inf"):
        merge_plan(C, C_reg, float("inf"))
    for bad in (C_reg * 0, C_reg * float("nan"), C_reg * float("inf")):
        with pytest.raises(ValueError, match=r"C_reg must be finite and not all zero"):
            merge_plan(C, bad)
    with pytest.raises(ValueError, match=r"C_reg must be \[m, d\], .* got \[60, 0\]"):
        merge_plan(C, C_reg[:, :0])
    with pytest.raises(TypeError, match=r"C must be floating-point .* torch.int64"):
        merge_plan([C[0].long()], C_reg)
    with pytest.raises(TypeError, match=r"one dtype .* for C\[1\], torch.float16"):
        merge_plan([C[0], C[1].half()], C_reg)
    with pytest.raises(ValueError, match=r"C must have one tensor per concept, got none"):
        MergePlan.from_embeddings([], C_reg)
    for bad in (C[0] * 0, C[0] * float("nan")):
        with pytest.raises(ValueError, match=r"C must be finite and not all zero"):
            MergePlan.from_embeddings([bad], C_reg)


def test_a_layer_names_what_does_not_fit() -> None:
    layer = MergeLayer(torch.tensor([0.5, 0.5]))
    theta = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match=r"adapted must have length 2, one per weight, got 1"):
        layer(theta, [theta])
    with pytest.raises(ValueError, match=r"adapted\[1\] lacks b"):
        layer(theta, [theta, {"a": torch.ones(2)}])


def test_the_documented_adjoint_is_the_gradient() -> None:
    """The closed form in docs/math.md, hard constraint, so that Λ contributes nothing."""
    draws = torch.Generator().manual_seed(3)
    C = torch.randn(4, 7, generator=draws, dtype=torch.float64, requires_grad=True)
    C_reg = torch.randn(20, 7, generator=draws, dtype=torch.float64, requires_grad=True)
    (M,) = merge_plan([C], C_reg, lam=0.0)
    upstream = torch.randn(4, 7, generator=draws, dtype=torch.float64)
    expected = torch.autograd.grad(M, [C, C_reg], upstream)
    with torch.no_grad():
        H = torch.linalg.inv(C_reg.T @ C_reg)
        Y = torch.linalg.solve(C @ H @ C.T, upstream)
        S = Y @ M.T
        d_C = (Y - (S + S.T) @ C) @ H
        d_G = -H @ C.T @ (Y - S @ C) @ H
        d_C_reg = C_reg @ (d_G + d_G.T)
    torch.testing.assert_close(expected, (d_C, d_C_reg))
