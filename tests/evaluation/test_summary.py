"""What many attacks say together: means over seeds, the worst, differences in pairs."""

import pytest

from mima.evaluation.records import AttackRow, ConceptRecord, CurvePoint
from mima.evaluation.summary import paired_difference, summarize


def row(concept, seed, mean, *, role="target", learned=True, similarity="clip", name="", **more):
    """An attack; one with a name is at three times the rate."""
    measured = dict.fromkeys(
        ("sgr_before", "before_original", "before_immunized", "rise_left", "rise_left_best",
         "half_original", "half_immunized", "steps_ratio")
    ) | {"steps_ratio_at_least": False, "learned_immunized": False} | more  # fmt: skip
    return AttackRow(
        attack=f"{concept}{seed}{name}", concept=concept, role=role, method="lora", lr=1,
        lr_factor=3 if name else 1, steps=1, prompt_variant="name", images="same",
        preparation="none", seed=seed,
        similarity=similarity, sgr_mean=mean, sgr_final=mean and mean - 0.1,
        sgr_max=mean and mean + 0.1, nearest_original=None, nearest_immunized=None, seconds=1,
        learned=learned, **measured,
    )  # fmt: skip


CONCEPTS = [
    ConceptRecord(name=name, slug=name, kind="object", prompt=name, role=role)
    for name, role in (("a", "target"), ("b", "target"), ("c", "other"), ("d", "other"))
]


def test_summary_of_rows():
    rows = [
        row("a", 0, 0.2), row("a", 0, 0.4, name="x"), row("a", 1, 0.6),
        row("a", 1, 0.8, name="x"), row("b", 0, 0.1),
        row("b", 1, 0.3), row("b", 1, -0.5, learned=False, name="failed"),
        row("c", 0, 0.05, role="other"), row("a", 0, 0.9, similarity="dino"),
        row("b", 0, None, name="diverged"),
    ]  # fmt: skip
    summary = summarize(rows, CONCEPTS, "clip")
    a, b = summary.sgr["a"], summary.sgr["b"]
    # of the seeds' means 0.3 and 0.7
    assert (a.mean, a.final, a.max) == pytest.approx((0.5, 0.4, 0.6))
    assert (a.low, a.high, a.runs, a.kind) == (pytest.approx(0.3), pytest.approx(0.7), 2, "range")
    # of the settings' means 0.2 and −0.5, of which one lacks a seed
    assert b.mean == pytest.approx(-0.15)
    assert b.low is None
    assert a.methods["lora"].mean == a.mean
    assert summary.sgr["d"].mean is None
    assert summary.msgr.mean == pytest.approx(0.175)
    # of the seeds' means over concepts, (0.3 + 0.1) / 2 and (0.7 + 0.3) / 2
    whole = summarize([r for r in rows if r.attack != "b1failed"], CONCEPTS, "clip")
    assert (whole.msgr.low, whole.msgr.high) == pytest.approx((0.2, 0.5))
    # the attack with −0.5 taught neither model anything
    assert (summary.worst_attack.attack, summary.worst_attack.sgr) == ("b0", 0.1)
    assert summary.worst_concept.concept == "b"
    # the targets' at the rate that the other concept was attacked with, (0.4 + 0.2) / 2
    assert summary.mrsgr == pytest.approx(0.3 - 0.05)
    empty = summarize([], CONCEPTS, "clip")
    assert empty.msgr.mean is empty.worst_attack.attack is empty.worst_concept.sgr is None
    assert empty.worst_rise.attack is empty.targets.rise_left.mean is None
    unlearned = [r.model_copy(update={"learned": False}) for r in rows]
    assert summarize(unlearned, CONCEPTS, "clip").worst_attack.sgr == -0.5


def test_a_setting_that_lost_seeds_counts_as_much_as_another():
    rows = [row("a", seed, 0.4) for seed in (0, 1, 2)]
    rows += [row("a", seed, None if seed else 0.1, name="stronger") for seed in (0, 1, 2)]
    rows += [row("c", seed, 0.4, role="other") for seed in (0, 1, 2)]
    summary = summarize(rows, CONCEPTS, "clip")
    assert summary.msgr.mean == pytest.approx(0.25)
    assert (summary.msgr.low, summary.msgr.high) == (None, None)
    # no other concept was attacked at that rate
    assert summary.mrsgr == pytest.approx(0)


def test_an_attack_that_succeeds_on_the_immunized_model_alone_is_the_worst():
    alone = {"learned": False, "learned_immunized": True, "rise_left_best": 1.6}
    rows = [
        row("a", 0, 0.4, rise_left_best=0.5),
        row("a", 0, -0.3, name="alone", **alone),
        row("b", 0, 0.2, rise_left_best=0.9),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    assert (summary.worst_attack.attack, summary.worst_attack.sgr) == ("a0alone", -0.3)
    assert (summary.worst_rise.attack, summary.worst_rise.rise_left) == ("a0alone", 1.6)
    assert summary.worst_rise.at_least
    assert not summarize(rows[:1], CONCEPTS, "clip").worst_rise.at_least


def test_rises_are_means_over_what_has_them_and_bounds_stay_bounds():
    rows = [
        row(
            "a",
            0,
            0.4,
            rise_left=0.5,
            steps_ratio=2.0,
            sgr_before=0.1,
            half_original=0.5,
            half_immunized=0.75,
        ),
        row("a", 1, 0.4, rise_left=0.3, steps_ratio=4.0, sgr_before=0.3),
        row(
            "b",
            0,
            0.2,
            rise_left=0.9,
            steps_ratio=8.0,
            steps_ratio_at_least=True,
            half_original=0.125,
        ),
        row("b", 1, 0.2, rise_left=None),
        # another concept without any rise
        row("c", 0, 0.0, role="other", learned=False),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    rise, ratio = summary.targets.rise_left, summary.targets.steps_ratio
    # seed 1 has none for b: the mean of 0.4 and 0.9, and no interval
    assert rise.mean == pytest.approx(0.65)
    assert (rise.low, rise.high, rise.runs) == (None, None, 0)
    assert (ratio.mean, ratio.at_least) == (5.5, True)
    # what never came counts with the last of its steps, of which there is one
    half = summary.targets.steps_to_half
    assert (half.original, half.immunized) == (0.3125, 0.875)
    assert not rise.at_least
    # or the last before it diverged
    cut = row("a", 0, 0.4, half_original=0.25, diverged_after=3)
    assert summarize([cut], CONCEPTS, "clip").targets.steps_to_half.immunized == 3
    bound = row("a", 2, 0.1, rise_left=0.5, rise_left_at_least=True, objects_original=0.5)
    summary_ = summarize([*rows, bound], CONCEPTS, "clip")
    assert summary_.targets.rise_left.at_least
    assert (summary_.objects.original, summary_.objects.immunized) == (0.5, None)
    assert (summary.sgr["a"].steps_ratio.mean, summary.sgr["a"].steps_ratio.at_least) == (3, False)
    assert summary.targets.sgr_before.mean == pytest.approx(0.2)
    assert summary.sgr["c"].rise_left.mean is None


def test_a_mean_drops_no_seed_that_another_concept_lacks():
    rows = [row("a", 0, 0.2), row("a", 1, 0.4), row("b", 0, 0.4), row("b", 1, None, learned=False)]
    others = [row("c", seed, 0.1, role="other") for seed in (0, 1)]
    summary = summarize([*rows, *others], CONCEPTS, "clip")
    assert summary.msgr.mean == pytest.approx(0.35)
    assert (summary.msgr.low, summary.msgr.kind) == (None, None)
    assert summary.mrsgr == pytest.approx(0.25)
    # b held at seed 0 alone, and a fell at seeds 1 and 2
    rises = [row("a", seed, 0.1, rise_left=value) for seed, value in enumerate((0.1, 1.0, 1.0))]
    rises += [row("b", 0, 0.1, rise_left=0.1), row("b", 1, 0.0, learned=False)]
    assert summarize(rises, CONCEPTS, "clip").targets.rise_left.mean == pytest.approx(0.4)


def test_other_concepts_that_the_original_does_not_draw_say_nothing():
    def ends(one, original):
        return [
            CurvePoint(attack=one.attack, similarity="clip", step=step, original=value,
                       immunized=0.3, sgr=0.0, rise_left=None)
            for step, value in ((4, original), (0, 0.9), (2, 0.9))
        ]  # fmt: skip

    flat = row("c", 0, -15.0, role="other", learned=False)
    faint = row("c", 1, -3.0, role="other", learned=True)
    taught = row("c", 2, 0.1, role="other")
    drawn = row("d", 0, 0.2, role="other", learned=False)
    rows = [row("a", 0, 0.4), flat, faint, taught, drawn]
    points = [
        *ends(rows[0], 0.01), *ends(flat, 0.0), *ends(faint, 0.2), *ends(taught, 0.5),
        *ends(drawn, 0.25),
    ]  # fmt: skip
    summary = summarize(rows, CONCEPTS, "clip", points)
    assert summary.sgr["c"].mean == summary.sgr["c"].methods["lora"].mean == pytest.approx(0.1)
    # a concept that was drawn before any attack, and still is
    assert summary.sgr["d"].mean == pytest.approx(0.2)
    assert summary.mrsgr == pytest.approx(0.4 - 0.15)
    assert (summary.others, summary.untold) == (4, 2)
    # of a target, every attack counts
    assert summary.sgr["a"].mean == pytest.approx(0.4)
    # a mean over steps is none of one at which the original showed nothing of it
    dip = CurvePoint(attack=drawn.attack, similarity="clip", step=1, original=0.1,
                     immunized=0.3, sgr=-2.0, rise_left=None)  # fmt: skip
    assert summarize(rows, CONCEPTS, "clip", [*points, dip]).sgr["d"].mean is None
    none = summarize([rows[0], flat], CONCEPTS, "clip", points)
    assert none.mrsgr is none.sgr["c"].mean is none.sgr["c"].methods["lora"].mean is None


def test_attacks_are_counted_by_what_became_of_them():
    nearer = {"before_original": 0.2, "before_immunized": 0.4}
    rows = [
        # the immunized model's pictures broke, which is no more immune than learning nothing
        row("a", 0, 0.9, name="away", rise_left=-2.0, **nearer),
        row("a", 0, 0.1, rise_left=1.0, **nearer),
        row("b", 0, None, name="diverged", learned=False, diverged_after=0),
        row(
            "b",
            0,
            7.0,
            learned=False,
            before_original=0.2,
            before_immunized=0.25,
            diverged_after=25,
        ),
        row("c", 0, None, role="other", learned=False),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    assert summary.targets.rise_left.mean == pytest.approx(0.5)
    counts = summary.tally
    assert (counts.attacks, counts.diverged, counts.taught) == (4, 1, 2)
    assert counts.cut_short == 1
    assert (counts.led_away, counts.beyond, counts.known_before) == (1, 1, ("a",))
    # a similarity near 0 moves SGR either way
    below = [row("b", 0, -3.0, learned=False, before_original=0.01, before_immunized=0.04)]
    assert summarize(below, CONCEPTS, "clip").tally.beyond == 1
    # that of the immunized model alone is another thing
    assert counts.below_zero == 0
    gone = [row("b", 0, value) for value in (1.0, 1.1, 2.0)]
    gone_ = summarize(gone, CONCEPTS, "clip").tally
    assert (gone_.beyond, gone_.below_zero) == (0, 2)
    assert counts.known_to_original == ()
    erased = [row("b", 0, 0.7, before_original=0.6, before_immunized=0.2)]
    assert summarize(erased, CONCEPTS, "clip").tally.known_to_original == ("b",)
    # noise of pictures is neither
    still = [row("a", 0, 0.2, rise_left=-0.05, before_original=0.2, before_immunized=0.22)]
    assert summarize(still, CONCEPTS, "clip").tally.led_away == 0
    assert summarize(still, CONCEPTS, "clip").tally.known_before == ()


@pytest.mark.parametrize("count", [1, 10])
def test_a_summary_of_few_and_of_many_concepts(count):
    concepts = [
        ConceptRecord(name=f"n{n}", slug=f"n{n}", kind="object", prompt="", role="target")
        for n in range(count)
    ]
    rows = [row(c.name, seed, n / 10) for n, c in enumerate(concepts) for seed in (0, 1)]
    summary = summarize(rows, concepts, "clip")
    assert summary.msgr.mean == pytest.approx((count - 1) / 20)
    assert summary.worst_concept.concept == "n0"
    assert (summary.mrsgr, len(summary.sgr)) == (None, count)


def test_differences_are_paired_attack_by_attack():
    # attacks differ much, methods little: the same little at every attack
    hard = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    base = [row("a", seed, value) for seed, value in enumerate(hard)]
    better = [row("a", seed, value + 0.05) for seed, value in enumerate(hard)]
    better.append(row("a", 9, 0.9))
    difference = paired_difference(better, base)
    assert (difference.mean, difference.runs, difference.kind) == (pytest.approx(0.05), 6, "t")
    assert difference.low == pytest.approx(difference.high) == pytest.approx(0.05)
    assert paired_difference(better, []).mean is None


def test_pairs_are_of_one_judge_and_of_targets():
    rows = [row("a", 0, 0.2), row("a", 0, 0.4, similarity="dino")]
    with pytest.raises(ValueError, match="rows of similarity clip, dino; give one's"):
        paired_difference(rows, rows)
    others = [row("c", 0, 0.2, role="other")]
    with pytest.raises(ValueError, match="expected attacks on targets, got others"):
        paired_difference(others, others)
