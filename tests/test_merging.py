"""The merge on named parameters, against its formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mima import reference
from mima.merging import MergeLayer, MergePlan

# K reads text of dimension D, beside weights that do not
D = 6
SHAPES = {"k": (4, D), "bias": (3,), "v": (5, D), "conv": (2, 3, 1, 1)}
PROJECTED = ("k", "v")
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TOKENS = (2, 0, 3)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(seed: int) -> dict[str, Tensor]:
    return {
        name: randn(*shape, seed=10 * seed + i) for i, (name, shape) in enumerate(SHAPES.items())
    }


def make_plan(count: int = 3, lam: float = 1e-2) -> MergePlan:
    C = [randn(TOKENS[n], D, seed=900 + n) for n in range(count)]
    return MergePlan.from_embeddings(C, randn(40, D, seed=99), lam=lam, weights=WEIGHTS[:count])


def written_out(base, adapted, plan, weights, projected) -> dict[str, Tensor]:
    """``W0 + Σ (W_n − W0) C_nᵀ M_n`` for the projected, ``θ + Σ w_n (θ_n − θ)`` for the rest."""
    merged = {}
    for name, origin in base.items():
        merged[name] = origin.clone()
        for n, theta in enumerate(adapted):
            change = theta[name] - origin
            if name in projected:
                merged[name] = merged[name] + change @ plan.C[n].T @ plan.M[n]
            else:
                merged[name] = merged[name] + weights[n] * change
    return merged


def assert_same(ours, truth) -> None:
    assert list(ours) == list(truth)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["projected", "average"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_parameter_is_merged_by_its_rule(rule, count):
    plan, projected = (make_plan(count), PROJECTED) if rule == "projected" else (None, ())
    weights = WEIGHTS[:count]
    layer = MergeLayer(weights, plan, projected)
    base, adapted = parameters(1), [parameters(2 + n) for n in range(count)]
    assert_same(layer(base, adapted), written_out(base, adapted, plan, weights, projected))


def contribution(layer, n, change) -> dict[str, Tensor]:
    """What concept n's change adds to the merged weights, by name."""
    moved: dict[str, Tensor] = {}
    layer.add_averaged(moved, n, change)
    if layer.plan is not None:
        moved |= layer.spread({n: layer.asked(change, layer.plan.C[n])}, change)
    return {name: moved[name] for name in change}


@pytest.mark.parametrize("rule", ["projected", "average"])
def test_one_concept_at_a_time_adds_up_to_all(rule):
    plan, projected = (make_plan(), PROJECTED) if rule == "projected" else (None, ())
    layer = MergeLayer(WEIGHTS, plan, projected)
    base, adapted = parameters(1), [parameters(2 + n) for n in range(3)]
    moved: dict[str, Tensor] = {}
    asked = {}
    for n, theta in enumerate(adapted):
        change = {name: theta[name] - base[name] for name in base}
        layer.add_averaged(moved, n, change)
        if plan is not None:
            asked[n] = layer.asked(change, plan.C[n])
    moved |= layer.spread(asked, base)
    assert_same({name: base[name] + moved[name] for name in base}, layer(base, adapted))


def test_the_sum_is_added_to_in_place():
    layer, change = MergeLayer(WEIGHTS), parameters(2)
    moved: dict[str, Tensor] = {}
    layer.add_averaged(moved, 0, change)
    before = dict(moved)
    layer.add_averaged(moved, 1, change)
    assert all(moved[name] is value for name, value in before.items())
    assert_same(moved, {name: 0.8 * value for name, value in change.items()})


def test_spread_is_the_projected_part_of_all_contributions():
    layer, changes = (
        MergeLayer(WEIGHTS, make_plan(), PROJECTED),
        [parameters(2 + n) for n in range(3)],
    )
    asked = {n: layer.asked(changes[n], layer.plan.C[n]) for n in (0, 2)}
    moved = layer.spread(asked, changes[0])
    parts = [contribution(layer, n, changes[n]) for n in (0, 2)]
    assert_same(moved, {name: parts[0][name] + parts[1][name] for name in PROJECTED})
    assert layer.spread({}, changes[0]) == {}


def test_parameters_that_a_concept_leaves_alone_stay():
    """A lower level on keys alone says nothing of the rest."""
    layer = MergeLayer(WEIGHTS, make_plan(), PROJECTED)
    for change in ({"k": randn(*SHAPES["k"], seed=5)}, {"bias": randn(3, seed=6)}):
        assert contribution(layer, 0, change).keys() == change.keys()


def test_pullback_is_the_adjoint_of_a_contribution():
    layer = MergeLayer(WEIGHTS, make_plan(), PROJECTED)
    for n in range(3):
        change, cotangent = parameters(2 + n), parameters(7)
        moved = contribution(layer, n, change)
        there = sum(float((moved[k] * cotangent[k]).sum()) for k in change)
        back = sum(float((layer.pullback(n, cotangent)[k] * change[k]).sum()) for k in change)
        assert there == pytest.approx(back, rel=1e-10)


def test_the_adjoints_in_the_text():
    """⟨A M, φ̄⟩ = ⟨M̄, M⟩, and ⟨(D Cᵀ) M, φ̄⟩ = ⟨C̄, C⟩."""
    layer = MergeLayer(WEIGHTS, make_plan(), PROJECTED)
    change, cotangent = parameters(2), parameters(7)
    C, M = layer.plan.C[2], layer.plan.M[2]
    asked = layer.asked(change, C)
    moved = layer.spread({2: asked}, change)
    there = sum(float((moved[k] * cotangent[k]).sum()) for k in PROJECTED)
    assert float((layer.plan_pullback(asked, cotangent) * M).sum()) == pytest.approx(there)
    assert float((layer.token_pullback(2, change, cotangent) * C).sum()) == pytest.approx(there)


def test_gradients_are_those_of_the_formulas():
    plan = make_plan()
    layer, up = MergeLayer(WEIGHTS, plan, PROJECTED), parameters(8)
    names = list(SHAPES)

    def gradients(merge):
        base = {k: v.requires_grad_() for k, v in parameters(1).items()}
        adapted = [{k: v.requires_grad_() for k, v in parameters(2 + n).items()} for n in range(3)]
        phi = merge(base, adapted)
        inputs = [base[k] for k in names] + [theta[k] for theta in adapted for k in names]
        return torch.autograd.grad([phi[k] for k in names], inputs, [up[k] for k in names])

    ours = gradients(layer)
    truth = gradients(lambda base, adapted: written_out(base, adapted, plan, WEIGHTS, PROJECTED))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_the_gradient_goes_through_trained_tokens():
    """C_n is a variable, and M a function of every C."""
    start = make_plan()
    captions, weights = randn(40, D, seed=99), WEIGHTS
    layer = MergeLayer(weights, start, PROJECTED, trained_tokens=True)
    base, adapted, up = parameters(1), [parameters(2 + n) for n in range(3)], parameters(8)

    def gradients(merge):
        C = [C_SD.clone().requires_grad_() for C_SD in start.C]
        phi = merge(C)
        return torch.autograd.grad([phi[k] for k in PROJECTED], C, [up[k] for k in PROJECTED])

    def by_hand(C):
        M = reference.merge_plan(C, captions, start.lam, weights)
        concepts = list(zip(adapted, C, M, strict=True))
        return {
            k: base[k] + sum((t[k] - base[k]) @ c.T @ m for t, c, m in concepts) for k in PROJECTED
        }

    ours = gradients(lambda C: layer.for_tokens(C)(base, adapted))
    torch.testing.assert_close(ours, gradients(by_hand), rtol=1e-8, atol=1e-10)


def test_the_merge_of_some_concepts_is_that_of_a_run_of_these_alone():
    captions, some = randn(40, D, seed=99), [2, 0]
    layer = MergeLayer(WEIGHTS, make_plan(), PROJECTED)
    C = [randn(TOKENS[n], D, seed=900 + n) for n in some]
    shares = torch.tensor([2 / 7, 5 / 7], dtype=torch.float64)
    alone = MergePlan.from_embeddings(C, captions, lam=1e-2, weights=shares)
    base, adapted = parameters(1), [parameters(2 + n) for n in some]
    truth = written_out(base, adapted, alone, shares, PROJECTED)
    assert_same(layer.of(some)(base, adapted), truth)
    assert layer.of([0, 1, 2]) is layer
    average = MergeLayer(WEIGHTS).of(some)
    assert_same(average(base, adapted), written_out(base, adapted, alone, shares, ()))


def test_missed_is_zero_for_a_hard_constraint_and_not_for_a_soft_one():
    changes = [parameters(2 + n) for n in range(3)]
    residuals = []
    for lam in (0.0, 1e-2, 1.0):
        layer = MergeLayer(WEIGHTS, make_plan(lam=lam), PROJECTED)
        asked = {n: layer.asked(changes[n], layer.plan.C[n]) for n in range(3)}
        moved = layer.spread(asked, changes[0])
        gap, wanted = layer.missed(asked, {k: moved[k] for k in changes[0] if k in moved})
        by_hand = sum(
            float(((moved[k] - changes[n][k]) @ layer.plan.C[n].T).square().sum())
            for n in range(3)
            for k in PROJECTED
        )
        assert gap == pytest.approx(by_hand, rel=1e-8, abs=1e-20)
        assert wanted == pytest.approx(sum(float(A.square().sum()) for A in asked.values()))
        residuals.append((gap / wanted) ** 0.5)
    assert residuals[0] < 1e-10 < 1e-3 < residuals[1] < residuals[2] < 1


def test_the_drift_bound_holds_and_is_reached():
    plan = make_plan()
    for n, bound in enumerate(plan.drift_bound.tolist()):
        change = randn(4, D, seed=3 + n)
        moved = change @ plan.C[n].T @ plan.M[n]
        assert moved.norm() <= bound * change.norm() * (1 + 1e-12)
        if TOKENS[n]:
            U, S, _ = torch.linalg.svd(plan.C[n].T @ plan.M[n])
            assert S[0].item() == pytest.approx(bound)
            worst = U[:, :1].T
            assert (worst @ plan.C[n].T @ plan.M[n]).norm().item() == pytest.approx(bound)
        else:
            assert bound == 0


def test_shares_move_the_soft_compromise():
    """Of two concepts that want different things of one token, the larger share misses less."""
    token = randn(1, D, seed=1)
    changes = [{"k": randn(4, D, seed=2 + n)} for n in range(2)]
    missed = []
    for shares in ((0.5, 0.5), (0.9, 0.1)):
        weights = torch.tensor(shares, dtype=torch.float64)
        plan = MergePlan.from_embeddings(
            [token, token], randn(40, D, seed=99), lam=0.1, weights=weights
        )
        layer = MergeLayer(weights, plan, ["k"])
        moved = sum(contribution(layer, n, changes[n])["k"] for n in range(2))
        missed.append(float(((moved - changes[0]["k"]) @ token.T).norm()))
    assert missed[1] < 0.5 * missed[0]


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match=r"projected names need a plan, got plan=None"):
        MergeLayer(WEIGHTS, None, PROJECTED)
    with pytest.raises(ValueError, match=r"plan is for 2 concepts, weights for 3"):
        MergeLayer(WEIGHTS, make_plan(2), PROJECTED)
