import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mima.evaluation import GapCurve, GapSummary, bootstrap_interval, mrsgr, msgr, rsgr, sgr
from mima.evaluation.metrics import has_learned

similarities = st.floats(-1, 1)


@pytest.mark.parametrize(
    ("original", "immunized", "expected"),
    [(0.8, 0.6, 0.25), (0.8, 0.8, 0.0), (0.8, 0.0, 1.0), (0.5, 0.6, -0.2), (0.5, -0.5, 2.0)],
)
def test_sgr_is_the_relative_gap(original, immunized, expected):
    assert sgr(original, immunized) == pytest.approx(expected)


@pytest.mark.parametrize("original", [0.0, -0.1])
def test_sgr_of_an_attack_that_failed_anyway_is_zero(original):
    assert sgr(original, -0.5) == 0.0


@pytest.mark.parametrize(
    ("similarities", "expected"),
    [
        ([0.2, 0.29], True),
        ([0.2, 0.3, 0.1], True),  # at any step
        ([0.2, 0.27], False),  # a twelfth of what is lacking
        ([0.2, 0.1], False),
        ([0.2], False),
        ([1.0, 1.0], False),
        ([-0.5, -0.2], True),
    ],
)
def test_learned_is_a_tenth_of_what_was_lacking(similarities, expected):
    assert has_learned(similarities) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_sgr_refuses_what_is_not_finite(value, place):
    arguments = [0.5, 0.5]
    arguments[place] = value
    with pytest.raises(ValueError, match=f"{('original', 'immunized')[place]} must be a finite"):
        sgr(*arguments)


@given(similarities, similarities)
def test_sgr_is_always_finite_for_cosines_worth_measuring(original, immunized):
    if original <= 0 or original > 1e-300:
        assert math.isfinite(sgr(original, immunized))


def test_means_over_concepts():
    assert msgr([0.1, 0.5]) == pytest.approx(0.3)
    assert rsgr(0.5, 0.1) == pytest.approx(0.4)
    # every target against every other concept
    targets, others = [0.6, 0.4, 0.2], [0.1, -0.1]
    pairs = [rsgr(target, other) for target in targets for other in others]
    assert mrsgr(targets, others) == pytest.approx(np.mean(pairs)) == pytest.approx(0.4)


def test_means_over_nothing_are_refused():
    with pytest.raises(ValueError, match="targets is empty"):
        msgr([])
    with pytest.raises(ValueError, match="others is empty"):
        mrsgr([0.1], [])


def curve(original=(0.3, 0.5, 0.8, 1.0), immunized=(0.2, 0.4, 0.4, 0.9), concept="cat"):
    return GapCurve(concept=concept, steps=(0, 25, 50, 100), original=original, immunized=immunized)


def test_curve_leaves_the_start_out_of_its_summaries():
    gap = curve()
    assert gap.sgr == pytest.approx((1 / 3, 0.2, 0.5, 0.1))
    assert gap.by_step == pytest.approx({25: 0.2, 50: 0.5, 100: 0.1})
    assert gap.mean == pytest.approx(0.8 / 3)
    assert (gap.final, gap.worst, gap.best) == pytest.approx((0.1, 0.1, 0.5))
    assert gap.to_dict()["sgr"] == pytest.approx({"25": 0.2, "50": 0.5, "100": 0.1})
    assert gap.to_dict()["similarity"]["original"] == [0.3, 0.5, 0.8, 1.0]


@pytest.mark.parametrize(
    ("steps", "message"),
    [((0,), "a step after 0"), ((25, 25), "must ascend"), ((), "a step after 0")],
)
def test_curve_refuses_bad_steps(steps, message):
    values = (0.5,) * len(steps)
    with pytest.raises(ValueError, match=message):
        GapCurve(concept="cat", steps=steps, original=values, immunized=values)
    with pytest.raises(ValueError, match="one length"):
        GapCurve(concept="cat", steps=(1, 2), original=(0.5,), immunized=(0.5, 0.5))


def test_summary_shows_the_worst_concept_beside_the_mean():
    weak = curve(immunized=(0.3, 0.5, 0.8, 0.9), concept="weak")
    kept = curve(immunized=(0.3, 0.5, 0.76, 1.0), concept="kept")
    summary = GapSummary(targets=(curve(), weak), others=(kept,))
    assert summary.msgr == pytest.approx((0.8 / 3 + 0.1 / 3) / 2)
    assert summary.worst_sgr == pytest.approx(0.1 / 3)
    assert summary.final_msgr == pytest.approx(0.1)
    assert summary.other_sgr == pytest.approx(0.05 / 3)
    assert summary.mrsgr == pytest.approx(summary.msgr - 0.05 / 3)
    alone = GapSummary(targets=(curve(),))
    assert alone.other_sgr is None
    assert alone.mrsgr is None


def test_bootstrap_interval_matches_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(0.3, 0.1, size=400)
    low, high = bootstrap_interval(values, confidence=0.95)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval([0.4]) == (0.4, 0.4)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_bootstrap_interval_refuses_bad_input():
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([0.1], confidence=1.0)
