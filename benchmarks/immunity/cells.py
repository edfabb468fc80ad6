"""What the study is made of: problems, methods, seeds, and cuts of different size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mima.assets import assets
from mima.choices import Task
from mima.errors import MimaError, nearest
from mima.immunization.config import ImmunizeConfig
from mima.immunization.recipes import EMBEDDED_RATE, MARGIN, RECIPES, USUAL_RATE

CEILING = "ceiling"
"""The method of a cell that attacks a model which never saw the concepts."""
UNTRAINED = "none"
"""The method of a cell that attacks the model as it was, a control: every gap must be 0."""
NOT_IMMUNIZED = (CEILING, UNTRAINED)
"""Methods that have no immunization, and so none of its seeds."""
BENIGN = ("benign-panda", "benign-tractor", "benign-pizza")
"""Concepts that an immunization may simulate benign adaptations to; no cell is measured on them."""
OTHERS = ("benign-style-twemoji", "benign-cupcake", "benign-owl")
"""Concepts that must stay learnable. No immunization adapts to them. Of the twemoji style every one
sees class pictures, of captions that name it: it is retained, and measures what that leaves."""


@dataclass(frozen=True)
class Problem:
    """What is immunized against.

    Attributes:
        task: ``relearn``, of concepts that were erased, or ``personalize``, of unseen ones.
        targets: embedded concepts.
    """

    task: Task
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """Safe as a file name."""
        return "_".join((self.task, *self.targets))


@dataclass(frozen=True)
class Cell:
    """One immunized model, and every attack on it.

    Attributes:
        problem: what is immunized against.
        method: a name of `methods`, or `CEILING`.
        seed: of the immunization; the attacks have seeds of their own.
    """

    problem: Problem
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Safe as a file name, and what the command line takes."""
        return f"{self.problem.name}.{self.method}.seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A part of the study, with everything that its cells have in common.

    Attributes:
        plan: what is immunized against, and each by which methods.
        seeds: of the immunizations.
        budget: simulated attack steps for each target, the same for every method.
        grid: settings of the evaluation's grid, see `mima.evaluation.GridConfig`.
        model: what is immunized.
        similarities: judges; the first decides what trials choose.
        settings: settings of every immunization that win over the method's.
        others: concepts that must stay learnable.
    """

    plan: Mapping[Problem, tuple[str, ...]]
    seeds: tuple[int, ...]
    budget: int
    grid: Mapping[str, Any]
    model: str = "embedded"
    similarities: tuple[str, ...] = ("embedded", "embedded-clip")
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = OTHERS

    def cells(self) -> Iterator[Cell]:
        """Every cell; those of the first seed first. IMMA is for one concept."""
        for seed in self.seeds:
            for problem, names in self.plan.items():
                for method in names:
                    if method == "imma" and len(problem.targets) > 1:
                        continue
                    if method in NOT_IMMUNIZED and seed != self.seeds[0]:
                        continue
                    yield Cell(problem, method, seed)

    def cell(self, name: str) -> Cell:
        """The cell of a name.

        Raises:
            MimaError: there is none.
        """
        by_name = {cell.name: cell for cell in self.cells()}
        if name not in by_name:
            raise MimaError(f"cell {name!r} is unknown; {nearest(name, by_name)}")
        return by_name[name]


Make = Callable[[Task, Mapping[str, Any]], ImmunizeConfig]


def methods() -> dict[str, Make]:
    """How a model may be immunized, by name.

    The baselines and ``mima`` simulate short attacks on keys and values (``SHORT``), the published
    update what it allows of them; the rest are the recipes that the package has, with the rates
    that the embedded model is usually trained at.
    """
    named: dict[str, Make] = {
        name: _short(name)
        for name in (UNTRAINED, "imma", "joint", "compose", "alternating", "mima")
    }
    for name, recipe in RECIPES.items():
        if name == "default":
            usual = partial(recipe, rate=EMBEDDED_RATE, benign=True)
            named["default"] = _of_recipe(usual)
            named["default-muon"] = _of_recipe(partial(usual, **MUON))
        else:
            # SOPHON's models were small themselves
            scale = 1.0 if name == "sophon" else EMBEDDED_RATE / USUAL_RATE
            named[name] = _of_recipe(recipe, scale)
    return named


MUON: Mapping[str, Any] = {
    "upper": {
        "optimizer": "muon",
        "lr": 10 * EMBEDDED_RATE,
        "objective": "hinge",
        "margin": MARGIN,
        "retain_captions": (
            *(3 * ("own",)),
            *(3 * ("ordinary",)),
            *(3 * ("without_name",)),
            "empty",
        ),
    }
}
"""What ``default-muon`` has otherwise than the recipe: a defender that steps by Muon, the bound of
the recipe's long runs, and every ordinary caption among what retains. Like all others it has half
of the recipe's class pictures."""
SHORT: Mapping[str, Any] = {
    "hypergradient": "first_order",
    "lower": {"steps": 4, "lr": 1e-3, "batch_size": 4, "parameters": "cross_attention_kv"},
    "upper": {
        "lr": 2e-4,
        "weight_decay": 0.0,
        "batch_size": 4,
        "prior_weight": 6.0,
        "prior_batch_size": 24,
        "loss_cap": 1.4,
    },
}
"""Attacks of few steps, the objective at their end alone."""


def configured(cell: Cell, cut: Cut) -> ImmunizeConfig:
    """The settings of a cell's immunization, with as many outer steps as the budget allows.

    Raises:
        MimaError: no such method.
    """
    known = methods()
    if cell.method not in known:
        raise MimaError(f"method {cell.method!r} is unknown; {nearest(cell.method, known)}")
    common = {
        # ordinary captions, since the embedded concepts' class prompts say nothing but "an emoji"
        "captions": assets() / "captions.txt",
        # of the recipe, its own number
        **({} if cell.method == "default" else {"num_class_images": 192}),
        # the embedded model's own, also where a recipe has that of Stable Diffusion 1.4
        "resolution": None,
        "seed": cell.seed,
        "checkpoint_every": 20,
        **cut.settings,
    }
    config, count = known[cell.method](cell.problem.task, common), len(cell.problem.targets)
    steps = max(1, round(cut.budget * count / attack_steps(config, count)))
    # a recipe may depend on their number
    return known[cell.method](cell.problem.task, common | {"steps": steps})


def attack_steps(config: ImmunizeConfig, count: int) -> float:
    """Steps of simulated attacks in one outer step: what methods are given the same number of.

    Not counted: benign adaptations, outer steps on states that an earlier attack left, and class
    pictures, of which the recipe has more than rivals. Equal work is not equal time.

    Args:
        config: the settings.
        count: how many concepts there are.
    """
    if config.method == "none":
        return float(count)
    lower = config.lower if isinstance(config.lower, (list, tuple)) else [config.lower]
    steps = sum(attacker.steps for attacker in lower) / len(lower)
    # each concept has outer steps of its own
    own = 1 if config.method == "compose" else min(config.concepts_per_step or count, count)
    if config.method == "compose":
        steps *= count
    steps /= config.attack_every
    # every other step of the published update ascends at weights that the one before committed
    share = 0.5 if config.method == "alternating" else 1.0
    return share * own * steps


def _short(method: str) -> Make:
    def make(task: Task, settings: Mapping[str, Any]) -> ImmunizeConfig:
        plain = {**SHORT, "method": method, "new_words": task == "personalize"}
        if method == "alternating":
            plain["lower"] = {**SHORT["lower"], "steps": 1}
            plain["upper"] = {**SHORT["upper"], "loss_cap": None}
        return ImmunizeConfig.model_validate({**plain, **settings})

    return make


def _of_recipe(recipe: Callable[..., ImmunizeConfig], scale: float = 1.0) -> Make:
    """A recipe with all its step sizes scaled."""

    def make(task: Task, settings: Mapping[str, Any]) -> ImmunizeConfig:
        # the study erases once for all methods
        own = {"erase_first": False} if task == "relearn" else {}
        config = recipe(task, **own, **settings)
        if scale == 1.0:
            return config
        plain = config.model_dump()
        lower = plain["lower"]
        for level in (*(lower if isinstance(lower, (list, tuple)) else (lower,)), plain["upper"]):
            lr = level["lr"]
            level["lr"] = tuple(x * scale for x in lr) if isinstance(lr, tuple) else lr * scale
        return ImmunizeConfig.model_validate(plain)

    return make


STYLES = ("style-mono", "style-fluent")
OBJECTS = ("tiger", "hamburger", "penguin", "rocket", "mushroom", "strawberry")
UNSEEN = ("unseen-fox", "unseen-teapot", "unseen-castle", "unseen-flamingo")

_SAMPLER = {"steps": 12, "guidance": 3.0, "scheduler": "dpm++", "batch_size": 16}
_LORA = {"rank": 8, "learning_rate": 5e-4, "batch_size": 4}
_DREAMBOOTH = {"learning_rate": 1e-4, "batch_size": 4}
_ATTACKS: dict[str, dict[str, Any]] = {
    "lora": {**_LORA, "steps": 200},
    "dreambooth": {**_DREAMBOOTH, "steps": 200},
    "custom-diffusion": {"learning_rate": 1e-4, "batch_size": 4, "steps": 200},
    "textual-inversion": {"learning_rate": 5e-3, "batch_size": 4, "steps": 200},
}
EVERY = (
    *(CEILING, UNTRAINED, "imma", "joint", "compose", "alternating", "mima"),
    *(*RECIPES, "default-muon"),
)
"""All methods."""

_TWO_OTHERS = ("benign-style-twemoji", "benign-owl")
_TWO_ATTACKS: dict[str, Any] = {
    "methods": {
        "lora": {**_LORA, "steps": 100},
        "dreambooth": {**_DREAMBOOTH, "steps": 100},
    },
    "families": ["sgd"],
    "lr_factors": [1.0],
    "seeds": [0, 1],
    "evaluations": 4,
    "max_prompts": 6,
    "sampler": _SAMPLER,
    "benign_prompts": 48,
}

# the recipe simulates none of them but DreamBooth
_FOUR_ATTACKS: dict[str, Any] = {**_TWO_ATTACKS, "methods": _ATTACKS, "families": [], "seeds": [0]}

CUTS: dict[str, Cut] = {
    # one attack of a few steps: does everything run?
    "smoke": Cut(
        plan={Problem("relearn", ("style-mono",)): ("joint",)},
        seeds=(0,),
        budget=4,
        settings={"num_class_images": 4},
        others=("benign-owl",),
        grid={
            "methods": {"lora": {**_LORA, "steps": 4}},
            "families": ["lora-r2"],
            "lr_factors": [1.0],
            "seeds": [0],
            "evaluations": 2,
            "max_prompts": 2,
            "sampler": {**_SAMPLER, "steps": 4},
            "benign_prompts": 4,
        },
    ),
    # half an hour on two cores: see `benchmarks.immunity.study.estimate`
    "small": Cut(
        plan={Problem("relearn", STYLES): (CEILING, "joint", "mima", "apdm", "default")},
        seeds=(0,),
        budget=500,
        others=_TWO_OTHERS,
        grid=_TWO_ATTACKS,
    ),
    # two styles by all methods but IMMA, which is for one concept; objects, more and fewer
    # concepts, and unseen ones by two of them
    "breadth": Cut(
        plan={Problem("relearn", STYLES): tuple(name for name in EVERY if name != "imma")}
        | {Problem("relearn", STYLES[:1]): ("imma", "joint", "default")}
        | dict.fromkeys(
            (
                Problem("relearn", OBJECTS[:2]),
                Problem("relearn", (*STYLES, *OBJECTS[:1])),
                Problem("relearn", (*STYLES, *OBJECTS[:3])),
                Problem("relearn", (*STYLES, *OBJECTS)),
                Problem("personalize", UNSEEN[:2]),
            ),
            ("joint", "default"),
        ),
        seeds=(0, 1, 2),
        budget=500,
        others=OTHERS[:2],
        grid=_FOUR_ATTACKS,
    ),
    "full": Cut(
        plan=dict.fromkeys(
            (
                Problem("relearn", STYLES[:1]),
                Problem("relearn", OBJECTS[:1]),
                Problem("relearn", STYLES),
                Problem("relearn", OBJECTS[:3]),
                Problem("relearn", (*STYLES, *OBJECTS[:3])),
                # all that the embedded model knows and ships pictures of: there are no ten
                Problem("relearn", (*STYLES, *OBJECTS)),
                Problem("personalize", UNSEEN[:1]),
                Problem("personalize", UNSEEN[:2]),
                Problem("personalize", UNSEEN),
            ),
            EVERY,
        ),
        seeds=(0, 1, 2),
        budget=4000,
        grid={
            "methods": _ATTACKS,
            "families": ["sgd", "muon", "ema", "cosine", "restart", "outside", "lora-r32", "locon"],
            "tune": {"trials": 8, "steps": 100},
            "lr_factors": [1.0],
            "seeds": [0, 1, 2],
            "evaluations": 8,
            "max_prompts": 6,
            "sampler": _SAMPLER,
            "benign_prompts": 48,
            "repair_steps": 100,
        },
    ),
}
"""Parts of the study by name. Families of attacks are held out: no method simulates them."""


SHIPPED_CEILINGS = Path(__file__).parent / "ceilings"


def ceiling_of(problem: Problem, folder: Path | None) -> Path | None:
    """The model that was trained without a problem's concepts, if there is one.

    Args:
        problem: what is immunized against.
        folder: holds such models, each in a folder that is named as its problem; by default those
            that the study ships.
    """
    if problem.task != "relearn":
        return None
    found = (folder or SHIPPED_CEILINGS) / problem.name
    return found if found.is_dir() else None
