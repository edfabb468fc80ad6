"""How many pictures go through the network in one outer step, and in which way."""

# N = concepts, K = lower-level steps, S_u and S_l = what the defender and the attacks change

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

from mima.concepts import Concept
from mima.families.pipelines import Pipeline
from mima.immunization.config import BenignConfig, ImmunizeConfig, LowerConfig
from mima.immunization.objectives import READS_START

Work = dict[str, float]
"""Pictures that go through the network, by the way that they go."""
FORWARD, THERE_AND_BACK = ("forward",), ("forward", "backward")


def _work(count: float, ways: Sequence[str], twice: float = 0.0) -> Work:
    told = {way: count * (way in ways) for way in THERE_AND_BACK}
    return {**told, "backward of backward": twice}


def _total(*parts: tuple[float, Work]) -> Work:
    """The sum of so many times each."""
    return {way: sum(times * part[way] for times, part in parts) for way in _work(0, ())}


def pictures_of_a_step(config: ImmunizeConfig, count: int, benign: int) -> Work:
    """How many pictures go forward, backward, and backward through a backward in one outer step.

    The mean over the run's steps and over what attackers draw: of steps that simulate an attack and
    those that it serves again, of ``alternating``'s two kinds of step, of kinds of attackers, of
    steps with and without benign adaptations.

    Args:
        config: the settings.
        count: N.
        benign: concepts that must stay learnable.
    """
    up, attackers = config.upper, config.attackers
    prior = up.prior_size if up.prior_weight else 0
    apart = up.ascent_ratio is not None
    above = up.batch_size * (2 if up.objective == "pair" else 1) + (0 if apart else prior)
    if config.method == "none":
        return _work(0, ())
    if config.method == "alternating":
        below = attackers[0].batch_size * (2 if attackers[0].prior_weight else 1)
        found = _work(count * (below + above) / 2, THERE_AND_BACK)
    else:
        shares = sum(attacker.share for attacker in attackers)
        attack = _total(*((a.share / shares, _attack(a, config)) for a in attackers))
        upper = len(attackers[0].states(up.path_every)) * above
        again = upper * (up.objective in READS_START) + prior * apart * (up.retain == "distill")
        done = concepts_of_a_step(config, count)
        found = _total(
            (done / config.attack_every, attack),
            (done, _work(upper + prior * apart, THERE_AND_BACK)),
            (done, _work(again, FORWARD)),
            (1, _benign_work(config, up.benign, benign) if up.benign else _work(0, ())),
        )
    if config.gradient_checkpointing:
        found["forward"] += found["backward"]
    return found


def concepts_of_a_step(config: ImmunizeConfig, count: int) -> int:
    """How many of the concepts an outer step is about."""
    return 1 if config.method == "compose" else min(config.concepts_per_step or count, count)


def _adaptation(low: LowerConfig, mode: str) -> Work:
    """K steps, and the second pass that differentiates through them.

    At most: where the second pass finds the path as the first has walked it, K − 1 steps less.
    """
    K, below = low.steps, low.batch_size * (2 if low.prior_weight else 1)
    if mode == "exact":
        # of each step's gradient: backward with a graph
        return _work((3 * K - 1) * below, THERE_AND_BACK, K * below)
    if mode == "finite_difference":
        # Adam's rule reads the gradient of the last step as well
        return _work((4 * K - 1 + (low.optimizer == "adam")) * below, THERE_AND_BACK)
    return _work(K * below, THERE_AND_BACK)


def _attack(low: LowerConfig, config: ImmunizeConfig) -> Work:
    """One attack in one outer step, with what it begins with on a benign concept."""
    attack = _adaptation(low, config.hypergradient)
    if low.benign_start is None:
        return attack
    begun = sum(low.benign_start) / 2 * low.batch_size / outer_steps(low)
    # the second pass over the concepts makes an attack anew
    passes = 2 if config.method == "mima" and config.hypergradient != "first_order" else 1
    return _total((1, attack), (passes, _work(begun, THERE_AND_BACK)))


def outer_steps(low: LowerConfig) -> float:
    """How many outer steps an attacker lives through, in the mean."""
    if low.age is None:
        return 1.0
    youngest, oldest = low.age
    # each age as often as a log-uniform draw gives it
    lives = (
        math.ceil(age / low.steps) * math.log((age + 1) / age)
        for age in range(youngest, oldest + 1)
    )
    return sum(lives) / math.log((oldest + 1) / youngest)


def _benign_work(config: ImmunizeConfig, benign: BenignConfig, count: int) -> Work:
    """Benign adaptations of one outer step, in the mean."""
    low = config.benign_lower
    times = math.ceil(config.steps / benign.every) * min(benign.concepts_per_step, count)
    held_out = len(low.states(benign.path_every)) * config.upper.batch_size
    parts = [
        (times / config.steps, _adaptation(low, config.hypergradient)),
        (times / config.steps, _work(held_out, THERE_AND_BACK)),
    ]
    if benign.target == "match":
        # the model before immunization takes each path once
        paths = min(times, benign.paths * count)
        parts += [
            (paths / config.steps, _adaptation(low, "first_order")),
            (paths / config.steps, _work(held_out, FORWARD)),
        ]
    return _total(*parts)


def lacking(concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
    """Concepts whose class pictures are to be drawn."""
    return sum(not concept.class_images for concept in concepts) if config.has_prior else 0


def drawn(pipeline: Pipeline, concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
    """Forwards of one picture that draw the class pictures, with guidance."""
    steps = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return lacking(concepts, config) * config.num_class_images * int(steps) * 2
