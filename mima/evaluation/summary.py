"""From the rows of all attacks to the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mima.evaluation.metrics import bootstrap_interval, mrsgr
from mima.evaluation.records import (
    AttackRow,
    ConceptGap,
    ConceptRecord,
    Interval,
    SimilaritySummary,
    WorstAttack,
    WorstConcept,
)


def summarize(
    rows: Sequence[AttackRow], concepts: Sequence[ConceptRecord], similarity: str
) -> SimilaritySummary:
    """The headline numbers by one similarity model.

    A concept's SGR is the mean of its attacks' mean SGR; MSGR the mean over target concepts.
    Intervals are bootstrapped over seeds: of a concept, the values of its seeds are the means over
    the attacks with that seed; of MSGR, the means over target concepts of these. With one seed they
    have no width. The worst attack is the one with the lowest mean SGR on a target concept among
    those that taught the original model the concept (among all, if none did): where nothing is
    learned anyway, a low SGR says nothing.

    Args:
        rows: of all similarity models; attacks without an SGR are left out.
        concepts: targets and others.
        similarity: whose rows are looked at.

    Returns:
        None stands for whatever has no row yet.
    """
    mine = [row for row in rows if row.similarity == similarity and row.sgr_mean is not None]
    targets = [concept.name for concept in concepts if concept.role == "target"]
    others = [concept.name for concept in concepts if concept.role == "other"]
    gaps = {
        concept.name: _gap([row for row in mine if row.concept == concept.name])
        for concept in concepts
    }
    means = {name: gap.mean for name, gap in gaps.items() if gap.mean is not None}
    target_means = {name: means[name] for name in targets if name in means}
    other_means = [means[name] for name in others if name in means]
    worst = min(target_means, key=lambda name: target_means[name], default=None)
    return SimilaritySummary(
        msgr=_msgr(mine, target_means),
        worst_attack=_worst_attack([row for row in mine if row.role == "target"]),
        worst_concept=WorstConcept(
            sgr=None if worst is None else target_means[worst], concept=worst
        ),
        mrsgr=mrsgr(list(target_means.values()), other_means)
        if target_means and other_means
        else None,
        sgr=gaps,
    )


def _gap(rows: Sequence[AttackRow]) -> ConceptGap:
    if not rows:
        return ConceptGap(mean=None, low=None, high=None, final=None, max=None)
    low, high = bootstrap_interval(list(_by_seed(rows).values()))
    return ConceptGap(
        mean=_mean([row.sgr_mean for row in rows]),
        low=low,
        high=high,
        final=_mean([row.sgr_final for row in rows]),
        max=_mean([row.sgr_max for row in rows]),
    )


def _msgr(rows: Sequence[AttackRow], target_means: dict[str, float]) -> Interval:
    if not target_means:
        return Interval(mean=None, low=None, high=None)
    seeds = [_by_seed([row for row in rows if row.concept == name]) for name in target_means]
    common = set.intersection(*(set(one) for one in seeds))
    values = [float(np.mean([one[seed] for one in seeds])) for seed in sorted(common)]
    low, high = bootstrap_interval(values) if values else (None, None)
    return Interval(mean=_mean(list(target_means.values())), low=low, high=high)


def _by_seed(rows: Sequence[AttackRow]) -> dict[int, float]:
    """Mean SGR of the attacks with each seed."""
    groups: dict[int, list[float | None]] = {}
    for row in rows:
        groups.setdefault(row.seed, []).append(row.sgr_mean)
    return {seed: _mean(values) for seed, values in groups.items()}


def _worst_attack(rows: Sequence[AttackRow]) -> WorstAttack:
    candidates = [row for row in rows if row.learned] or list(rows)
    worst = min(candidates, key=lambda row: (row.sgr_mean, row.attack), default=None)
    if worst is None:
        return WorstAttack(sgr=None, attack=None)
    return WorstAttack(sgr=worst.sgr_mean, attack=worst.attack)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))
