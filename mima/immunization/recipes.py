"""Named settings: what is recommended, what MIMA's authors released, and those of rivals.

Each function takes a task, or None, and settings that win over its own, and returns a full
configuration. Rivals are what their public code does, as far as these settings can say it; what
they cannot say is told in each docstring. All run in one loop, on the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mima.choices import Recipe, Task
from mima.errors import MimaError, nearest
from mima.immunization.config import ImmunizeConfig

Plain = dict[str, Any]

TASKS: dict[Task, Plain] = {
    "relearn": {"erase_first": True},
    "personalize": {"new_words": True, "token_steps": 100},
}
"""What a task sets, whatever the recipe: what is done to the model before it is immunized. Only
``paper`` adds no words, since its scripts do not."""
PERSONALIZING_RATE = 2e-5
"""``upper.lr`` of the released scripts to personalize."""


DEFAULT_STEPS = 200
"""Outer steps of `default`, enough for two concepts."""
MANY_STEPS = 400
"""Outer steps from which on `default` bounds what it raises: without a bound, a run of 800 for
eight concepts broke the model, and one of 300 held three (docs/results.md)."""
USUAL_RATE = 5e-6
"""The learning rate at which Stable Diffusion 1.x is usually fine-tuned on a few pictures."""
EMBEDDED_RATE = 1e-4
"""That of the embedded model."""
MARGIN = 4.0
"""The bound, in nats above the loss of the model before immunization."""


def default(
    task: Task | None = None, *, rate: float = USUAL_RATE, benign: bool = False, **settings: Any
) -> ImmunizeConfig:
    """What is recommended: attacks on every weight, along their whole path, first order.

    Each attack is 60 steps of Adam on all weights, at a rate drawn between half of and twice the
    usual one: long enough to learn anew what a few large steps would only break. The states of its
    path serve twelve outer steps, so that a long attack costs no more than a short one. After every
    twelfth of its steps the defender raises log L on other pictures, by 0.65 of the length of what
    retains, which is to predict on class pictures what the model predicted before: under their
    captions, under the concept's without its name, which lie nearest to it, and under the empty
    one, which guidance subtracts.

    One concept is attacked at a time, so that cost and memory of a step do not grow with their
    number; the ``steps`` should: about 100 for each concept. What is broken for one concept is
    broken for others, too: from ``MANY_STEPS`` on, a picture pulls no more once its loss is
    ``MARGIN`` nats above the start's (objective ``hinge``). ``docs/results.md`` says what held,
    against whom, on the embedded model; nothing else was measured.

    Args:
        task: see ``TASKS``.
        rate: the learning rate at which models like this one are usually fine-tuned on a few
            pictures, the unit of all rates: for Stable Diffusion 1.x ``USUAL_RATE``, for the
            embedded model ``EMBEDDED_RATE``.
        benign: the run has benign concepts: on every sixth outer step, what the model becomes on
            the way of learning one of them is to predict what the model before immunization does.
        settings: win over these.
    """
    own: Plain = {
        "merge": "sum",
        "hypergradient": "first_order",
        "steps": DEFAULT_STEPS,
        "attack_every": 12,
        "concepts_per_step": 1,
        "num_class_images": 384,
        "lower": {
            "steps": 60,
            "lr": (rate / 2, 2 * rate),
            "batch_size": 4,
            "parameters": "denoiser",
        },
        "upper": {
            "parameters": "denoiser",
            "lr": 5 * rate,
            "lr_schedule": "cosine",
            "weight_decay": 0.0,
            "batch_size": 4,
            "prior_batch_size": 40,
            "objective": "log",
            "path_every": 12,
            "retain": "distill",
            # most under their own captions, three tenths under the concept's without its name
            "retain_captions": (*(6 * ("own",)), *(3 * ("without_name",)), "empty"),
            "ascent_ratio": 0.65,
        },
    }
    if _steps_of(settings) >= MANY_STEPS:
        own["upper"] |= {"objective": "hinge", "margin": MARGIN}
    if benign:
        adaptation = {**own["lower"], "steps": 12, "lr": (0.3 * rate, 3 * rate)}
        own["upper"]["benign"] = {"every": 6, "path_every": 4, "lower": adaptation}
    return _config(own, task, settings)


def paper(task: Task | None = None, **settings: Any) -> ImmunizeConfig:
    """MIMA as its authors released it (Zheng & Yeh, AAAI 2025, arXiv 2412.15320).

    github.com/amberyzheng/MIMA at b8fa843: what ``scripts/relearn_train.sh`` and
    ``personalize_train.sh`` pass to ``train.py``, and its defaults. Without a task, the first.

    The same: their update, ``alternating``, with its hard constraint and 200 captions; 1,000 steps
    of both kinds together, one picture at 512 pixels each; the whole denoiser below at 1e-5 (5e-6,
    doubled with prior preservation), cross-attention above at 3e-5 (2e-5 to personalize); class
    pictures, 200 (2 to personalize), with weight 1 on both levels; AdamW with decay 0.01 and
    clipping at 1 above. To personalize, the scripts add no new word: ``<new1>`` is read as its
    letters, and so it is here.

    Not the same: the scripts flip pictures and scale them with "far away" or "zoomed in" in the
    caption, take 20 of each concept to re-learn, draw class pictures by 50 steps with guidance 6,
    and take captions from LAION; their seed, 42, draws other numbers.
    """
    own: Plain = {
        "method": "alternating",
        "resolution": 512,
        "num_class_images": 200,
        "lower": {"lr": 1e-5, "parameters": "denoiser", "prior_weight": 1.0},
    }
    if task == "personalize":
        own |= {"num_class_images": 2, "upper": {"lr": PERSONALIZING_RATE}}
        settings = {"new_words": False, "token_steps": 0} | settings
    return _config(own, task, settings)


def apdm(task: Task | None = None, **settings: Any) -> ImmunizeConfig:
    """APDM (NeurIPS 2025, github.com/KU-VGI/APDM, ``protect.py`` and ``gen_arguments.py``).

    The same: 800 outer steps; from θ, 20 steps of DreamBooth with prior preservation on all weights
    (AdamW, 5e-6, one picture); after each, the gradient of the paired logistic loss (β 1) and of
    the loss on class pictures at the attacked weights, summed onto θ to first order; AdamW at 5e-6
    with decay 0.01, nothing clipped.

    Not the same: pairs are of the concept's class pictures in their order, where APDM has a set
    made for each concept; the attacker's AdamW has no decay; several concepts are summed, where
    APDM has one.
    """
    attacker = {"steps": 20, "lr": 5e-6, "parameters": "denoiser", "prior_weight": 1.0}
    upper = {
        "parameters": "denoiser",
        "lr": 5e-6,
        "weight_decay": 1e-2,
        "objective": "pair",
        "pair_beta": 1.0,
        "path_every": 1,
        "prior_weight": 1.0,
        "max_grad_norm": None,
    }
    return _config(RIVAL | {"steps": 800, "lower": attacker, "upper": upper}, task, settings)


def sophon(task: Task | None = None, **settings: Any) -> ImmunizeConfig:
    """SOPHON (IEEE S&P 2024, github.com/ChiangE/Sophon, ``generation/mean_squared_loss.py``).

    The same: 1,000 outer steps; from θ, 50 steps of SGD (1e-4) on all weights; after each, the
    gradient of the negated loss on other pictures, averaged to first order (MAML); the rates of the
    two levels' Adam are 1 : 5.

    Not the same: SOPHON takes its two kinds of steps in turns, each by an Adam of its own (1e-4 and
    5e-4). Here they are one step at 5e-4 of which the ascent has a fifth of the length, as Adam's
    steps of such rates have. The ordinary pictures are the concepts' class pictures; a step has one
    picture unless ``lower.batch_size`` and ``upper.batch_size`` say more, where SOPHON has 90 and
    10; the model is conditional.
    """
    attacker = {"steps": 50, "optimizer": "sgd", "lr": 1e-4, "parameters": "denoiser"}
    upper = {
        "parameters": "denoiser",
        "lr": 5e-4,
        "weight_decay": 0.0,
        "objective": "neg",
        "path_every": 1,
        "ascent_ratio": 0.2,
    }
    return _config(RIVAL | {"steps": 1000, "lower": attacker, "upper": upper}, task, settings)


def tar(task: Task | None = None, **settings: Any) -> ImmunizeConfig:
    """TAR (ICLR 2025, github.com/rishub-tamirisa/tamper-resistance, ``run_tar_bio.sh``).

    The same: 750 outer steps, each with one attack of 64 AdamW steps on all weights, batch 4, at
    2e-6, 2e-5 or 4e-5; the objective of maximal entropy after every fourth step, weighted by
    e^((k − K) / 16), to first order; what retains is nearness to the start on ordinary data;
    AdamW at 2e-5.

    Not the same: TAR is for language models, whose entropy and hidden states a denoiser lacks; see
    the objective ``entropy``, and ``distill``, which compares predictions. TAR adds its two
    gradients as they are, 4 : 1; here that is the ratio of their lengths. A third of its attackers
    begin on benign data: give ``benign`` concepts and set ``lower.benign_start``. Its learning
    rates warm up.
    """
    attacker = {"steps": 64, "batch_size": 4, "parameters": "denoiser"}
    upper = {
        "parameters": "denoiser",
        "lr": 2e-5,
        "batch_size": 4,
        "objective": "entropy",
        "path_every": 4,
        "path_weights": "late",
        "retain": "distill",
        "ascent_ratio": 4.0,
    }
    own = {
        "steps": 750,
        "concepts_per_step": 1,
        "lower": [{**attacker, "lr": lr} for lr in (2e-6, 2e-5, 4e-5)],
        "upper": upper,
    }
    return _config(RIVAL | own, task, settings)


RIVAL: Plain = {"method": "joint", "hypergradient": "first_order"}
"""What the rivals have in common: they merge nothing and leave second derivatives out."""

RECIPES: dict[Recipe, Callable[..., ImmunizeConfig]] = {
    "default": default,
    "paper": paper,
    "apdm": apdm,
    "sophon": sophon,
    "tar": tar,
}
"""All recipes by name."""


def beneath(
    settings: Mapping[str, Any],
    recipe: str | None = None,
    task: str | None = None,
    *,
    benign: bool = False,
    rate: float = USUAL_RATE,
) -> Plain:
    """Plain settings of a run with those of a recipe and of a task beneath them.

    Args:
        settings: of ``ImmunizeConfig``, plain or not; they win.
        recipe: one of ``RECIPES``; None for the defaults of ``ImmunizeConfig``, with
            ``PERSONALIZING_RATE`` where that is the task.
        task: one of ``TASKS``, or None.
        benign: the run has benign concepts; ``default`` asks.
        rate: its unit of rates; ``default`` asks.

    Raises:
        MimaError: no such recipe or task.
    """
    if recipe is not None and recipe not in RECIPES:
        raise MimaError(f"recipe {recipe!r} is unknown; {nearest(recipe, RECIPES)}")
    if task is not None and task not in TASKS:
        raise MimaError(f"task {task!r} is unknown; {nearest(task, TASKS)}")
    asked: dict[str, Any] = {}
    if recipe == "default":
        steps = _steps_of(settings) or DEFAULT_STEPS
        asked = {"benign": benign, "rate": rate, "steps": steps}
    made = (unnamed if recipe is None else RECIPES[recipe])(task, **asked)
    return _over(made.model_dump(exclude_unset=True), settings)


def _steps_of(settings: Mapping[str, Any]) -> int:
    """How many outer steps are asked for, where the objective is left to the recipe; else 0."""
    upper = settings.get("upper", {})
    said = upper.model_fields_set if isinstance(upper, BaseModel) else upper
    named = isinstance(said, Collection) and "objective" in said
    if named or "steps" not in settings:
        return 0
    try:
        return ImmunizeConfig(steps=settings["steps"]).steps
    except ValidationError:
        # it is reported with all other settings
        return 0


def unnamed(task: Task | None = None, **settings: Any) -> ImmunizeConfig:
    """The settings of a run that names no recipe: the defaults, and what its task sets."""
    own: Plain = {"upper": {"lr": PERSONALIZING_RATE}} if task == "personalize" else {}
    return _config(own, task, settings)


def _config(own: Plain, task: Task | None, settings: Mapping[str, Any]) -> ImmunizeConfig:
    if task is not None and task not in TASKS:
        raise MimaError(f"task {task!r} is unknown; {nearest(task, TASKS)}")
    known = own if task is None else own | TASKS[task]
    return ImmunizeConfig.model_validate(_over(known, settings))


def _over(own: Plain, settings: Mapping[str, Any]) -> Plain:
    """Settings that win over others, group by group, and so within groups.

    Those of one attacker win over each of several, and those of each of several over one.
    """
    combined = {**own, **settings}
    for name, value in own.items():
        more = _plain(settings.get(name))
        if isinstance(value, dict) and isinstance(more, dict):
            combined[name] = _over(value, more)
        elif isinstance(value, dict) and isinstance(more, (list, tuple)):
            combined[name] = [_over(value, _plain(one)) for one in more]
        elif isinstance(more, dict) and isinstance(value, (list, tuple)):
            combined[name] = [_over(one, more) for one in value]
    return combined


def _plain(settings: Any) -> Any:
    """Settings as plain data, without those that nobody set."""
    return settings.model_dump(exclude_unset=True) if isinstance(settings, BaseModel) else settings
