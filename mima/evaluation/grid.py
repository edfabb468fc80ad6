"""The attack grid: everything an attacker may vary, as a list of attacks with names."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, field_validator

from mima.adaptation import METHODS, Adaptation, configure
from mima.choices import LARGEST_ATTACK_SEED
from mima.concepts import Concept
from mima.concepts.naming import names_of, with_word, without_name
from mima.concepts.pictures import Picture
from mima.errors import MimaError, check_choice, nearest
from mima.evaluation.attack_families import ATTACK_FAMILIES, AttackFamily
from mima.evaluation.records import Pictures, Preparation, PromptVariant, Role, Side
from mima.evaluation.tuning import Choice, Tuning, above_zero
from mima.settings import Settings, parse_config, set_nested

logger = logging.getLogger(__name__)

# methods that train a token call the concept by a word in brackets, which no vocabulary holds
NEW_WORD = "<{}>"
TRAINS_A_TOKEN = frozenset({"textual-inversion", "pivotal"})
LONGEST_LABEL = 80
"""Bytes of the name of a method in the grid."""
NEEDS_OTHERS = frozenset({"benign", "kick"})
"""Preparations that train on the other concepts' pictures."""


class GridConfig(Settings):
    """What is attacked how, and how it is measured; `PRESETS` has some by name."""

    preset: str = "custom"
    """Where the settings came from."""
    methods: dict[str, dict[str, Any]] = Field({"lora": {}}, min_length=1)
    """Adaptation methods, each with settings that differ from its defaults. A method may come more
    than once, under names of your own, with ``method`` among its settings."""
    families: tuple[str, ...] = ()
    """Besides, with everything else at its first value: families of attacks, by their names in
    `mima.evaluation.attack_families.ATTACK_FAMILIES`; see docs/attacks.md."""
    tune: Tuning = Tuning()
    """What every attack may try on each model before it begins; nothing by default."""
    lr_factors: tuple[float, ...] = Field((1.0,), min_length=1)
    """Learning rates, as multiples of the method's."""
    step_factors: tuple[int, ...] = Field((1,), min_length=1)
    """Training lengths, as multiples of the method's steps."""
    prompts: tuple[PromptVariant, ...] = Field(("name",), min_length=1)
    """What the attacker calls the concept: its captions as they are, the same without its name, or
    with a rare token in place of the name."""
    images: tuple[Pictures, ...] = Field(("same",), min_length=1)
    """Pictures that are trained on, and that adapted models are compared with: ``same``, those that
    immunization saw, and the held-out ones; ``other``, the held-out ones, and those that
    immunization saw; ``fewer``, every fourth of the first, of fewer than four every second;
    ``more``, the first and every second held-out one, and the rest of these; ``mixed``, as many
    pictures of the other concepts among the first."""
    preparations: tuple[Preparation, ...] = ()
    """Besides, with everything else at its first value: what is done to a model before the attack.
    ``merge``, train a LoRA on each target concept and merge them into the weights; ``benign``,
    train a LoRA on the other concepts and merge it; ``kick``, add noise to the weights, then
    fine-tune all of them on the other concepts; ``undo``, take the strongest rank-8 part of what
    immunization changed out of each weight; ``interpolate``, go half of the way back to the
    original model; ``fp16`` and ``int8``, round the weights to so many bits. LoRAs that are merged
    have the settings of `methods.lora`, but are of the denoiser alone, without ``dora``."""
    preparation_steps: int = Field(50, ge=1)
    """Training steps of each LoRA or fine-tuning of a preparation."""
    repair_steps: int = Field(0, ge=0)
    """After each attack, fine-tune the attacked model for so many steps on the other concepts, and
    measure once more: pictures that immunization broke may come back. 0 does not."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Each is one attack: its batches, noise and initial values, and the noise of its pictures."""
    evaluations: int = Field(4, ge=1)
    """After how many equal parts of the training the model is sampled; before it, always."""
    max_prompts: int | None = Field(None, ge=1)
    """Prompts per concept, evenly spread over those of the references. None: all."""
    pictures_per_prompt: int = Field(1, ge=1)
    """Pictures per prompt, with different noise."""
    sampler: dict[str, Any] = Field(default_factory=dict)
    """Settings of `mima.evaluation.Sampler`."""
    benign_prompts: int = Field(48, ge=0)
    """Ordinary prompts on which both models are compared."""
    rare_token: str = Field("sks", min_length=1)
    """Stands for the name in attacks with a rare token."""

    _positive = field_validator("lr_factors", "step_factors")(above_zero)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"must differ, for equal seeds are one run; got {values}")
        if not all(0 <= value <= LARGEST_ATTACK_SEED for value in values):
            raise ValueError(f"must be >= 0 and <= {LARGEST_ATTACK_SEED}; got {values}")
        return values

    @field_validator("methods")
    @classmethod
    def _labels(cls, values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in values.items():
            # a part of the names of folders
            too_long = len(name.encode(errors="replace")) > LONGEST_LABEL
            if not name or "/" in name or not name.isprintable() or too_long:
                raise ValueError(
                    f"{name!r} is no name of at most {LONGEST_LABEL} letters without a slash"
                )
            method = settings.get("method", name)
            if name in METHODS and method != name:
                raise ValueError(f"{name!r} stands for that method, not for {method!r}")
        return values

    @field_validator("families")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for name in values:
            if name not in ATTACK_FAMILIES:
                raise ValueError(f"{name!r} is unknown; {nearest(name, ATTACK_FAMILIES)}")
        return values

    def steps_of(self, attack: Attack) -> tuple[int, ...]:
        """Steps at which an attack's models are sampled: 0 and `evaluations` equal parts."""
        parts = (round(attack.steps * i / self.evaluations) for i in range(self.evaluations + 1))
        return tuple(sorted(set(parts)))


_QUICK_LORA = {"rank": 8, "learning_rate": 5e-4, "batch_size": 4, "steps": 50}
_QUICK_DREAMBOOTH = {"learning_rate": 1e-4, "batch_size": 4, "steps": 200}
_QUICK_SAMPLER = {"steps": 12, "guidance": 3.0, "scheduler": "dpm++", "batch_size": 16}
_ALL_METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dreambooth": {},
    # what --scale_lr makes of the rates of diffusers' commands: times the pictures of a step
    "textual-inversion": {"learning_rate": 2e-3, "batch_size": 4},
    "custom-diffusion": {"learning_rate": 4e-5},
}

PRESETS: dict[str, GridConfig] = {
    # of two target concepts 1,200 steps and 496 pictures, on two threads of one core 2.6 minutes
    "quick": GridConfig(
        preset="quick",
        methods={"lora": _QUICK_LORA},
        lr_factors=(1.0, 3.0),
        evaluations=2,
        max_prompts=6,
        sampler=_QUICK_SAMPLER,
        benign_prompts=32,
    ),
    # for figures that are quoted: of two target concepts 11,200 steps and 1,200 pictures, on two
    # threads of one core 23 minutes
    "headline": GridConfig(
        preset="headline",
        methods={"lora": _QUICK_LORA | {"steps": 200}, "dreambooth": _QUICK_DREAMBOOTH},
        tune=Tuning(trials=8, steps=100),
        evaluations=4,
        max_prompts=6,
        sampler=_QUICK_SAMPLER,
        benign_prompts=48,
    ),
    # the published experiments: each method with its published settings
    "standard": GridConfig(preset="standard", methods=_ALL_METHODS),
    "adversarial": GridConfig(
        preset="adversarial",
        methods=_ALL_METHODS,
        lr_factors=(1.0, 0.3, 3.0, 10.0),
        step_factors=(1, 3, 10),
        prompts=("name", "description", "token"),
        images=("same", "other"),
        preparations=("merge", "benign"),
    ),
}
"""Grids by name."""


def grid_config(preset: str, settings: Mapping[str, Any] | None = None) -> GridConfig:
    """One of the `PRESETS`, some settings replaced, also a part of one, ``methods.lora.steps``.

    Raises:
        MimaError: no such preset, or settings that are unknown or out of range.
    """
    check_choice("preset", preset, PRESETS)
    raw = PRESETS[preset].model_dump()
    for name, value in (settings or {}).items():
        if name == "preset":
            raise MimaError("setting preset: a preset is chosen by --preset, or preset=, not set")
        set_nested(raw, name, value)
    config = parse_config(GridConfig, raw, source=f"preset {preset} with the given settings")
    # as they were understood, not as they were written: 1e-4 is a text in YAML
    methods = {name: _understood(config, name) for name in config.methods}
    config = config.model_copy(update={"methods": methods})
    for name in config.families:
        _of_family(config, name)
        if name in config.methods and name not in METHODS:
            raise MimaError(
                f"setting methods.{name}: is the name of a family that the grid has, too; give the "
                "method another"
            )
    return config


def configured(config: GridConfig, name: str) -> Adaptation:
    """A method of the grid with its settings there; of one that the grid lacks, its defaults.

    Raises:
        MimaError: no such method or setting, or a value that it cannot have.
    """
    settings = dict(config.methods.get(name, {}))
    return configure(str(settings.pop("method", name)), settings)


def _understood(config: GridConfig, name: str) -> dict[str, Any]:
    own, values = config.methods[name], asdict(configured(config, name))
    return {key: own[key] if key == "method" else values[key] for key in own}


def _of_family(config: GridConfig, name: str, step_factor: int = 1) -> Adaptation:
    """A family's adaptation, made of its method's when that has its steps."""
    family = ATTACK_FAMILIES[name]
    if family.base == "pivotal" and "pivotal" not in config.methods:
        lora = config.methods.get("lora", {})
        base = configure("pivotal", {k: v for k, v in lora.items() if k != "method"})
        return replace(base, steps=base.steps * step_factor)
    base = configured(config, family.base)
    return family.adapt(replace(base, steps=base.steps * step_factor))


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack of the grid; the original and the immunized model suffer it alike.

    Attributes:
        concept: name of the attacked concept.
        slug: the same as a file name.
        role: what immunization wanted of the concept.
        label: name of the method in the grid, or of the family.
        adaptation: method and settings, with this attack's rate, steps and seed.
        lr_factor: rate as a multiple of the method's.
        prompt_variant: what the concept is called.
        images: which pictures are trained on.
        preparation: what is done before.
        transplant: trained on the original model only, and put into both.
        outside: trains only the parameters that both models have in common.
        tuned: settings of the trials by model, the best first; the next is for an attack that
            diverges. A model without any is attacked as configured.
    """

    concept: str
    slug: str
    role: Role
    label: str
    adaptation: Adaptation
    lr_factor: float
    prompt_variant: PromptVariant
    images: Pictures
    preparation: Literal["none", Preparation]
    transplant: bool = False
    outside: bool = False
    tuned: Mapping[Side, tuple[Adaptation, ...]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.adaptation.steps

    @property
    def seed(self) -> int:
        """Of training, and of the pictures' noise."""
        return self.adaptation.seed

    @property
    def id(self) -> str:
        """A name that is safe as a file name and says what the attack is."""
        return f"{self.key}_seed{self.seed}"

    @property
    def key(self) -> str:
        """The same without the seed."""
        parts = (
            self.slug,
            self.label,
            f"x{self.lr_factor:g}",
            f"{self.steps}steps",
            self.prompt_variant,
            self.images,
            self.preparation,
        )
        return "_".join(parts)

    def on(self, side: Side) -> tuple[Adaptation, ...]:
        """Method and settings on one of the models, and what to go on with if they diverge."""
        return self.tuned.get(side, (self.adaptation,))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial run of an attack on one model.

    Attributes:
        attack: with its first seed.
        side: the model.
        number: of the choice, from 0.
        adaptation: the attack's, as this trial has it.
    """

    attack: Attack
    side: Side
    number: int
    adaptation: Adaptation

    @classmethod
    def of(cls, attack: Attack, side: Side, number: int, choice: Choice, tuning: Tuning) -> Trial:
        """The trial of a choice."""
        settings = replace(attack.adaptation, steps=tuning.steps or attack.steps)
        return cls(attack=attack, side=side, number=number, adaptation=choice.apply(settings))


def attack_grid(
    config: GridConfig, targets: Mapping[str, Concept], others: Mapping[str, Concept]
) -> list[Attack]:
    """All attacks of a grid, the first seed of everything first.

    Target concepts get the whole grid; the others one attack per method and seed, with everything
    else at its first value. What a concept has no material for is left out, with a warning: other
    images without held-out pictures, other prompts where the concept's prompt does not hold its
    name, whatever trains on other concepts without any, prior preservation without a class. Methods
    that train a word call every concept by a new one. Concepts come by their slugs.

    Raises:
        MimaError: two attacks that differ have one name.
    """
    attacks = []
    for seed in config.seeds:
        for slug, concept in targets.items():
            attacks += list(_on_target(config, slug, concept, seed, bool(others)))
        for slug, concept in others.items():
            attacks += list(_on_other(config, slug, concept, seed, len(others) > 1))
    known: dict[str, Attack] = {}
    for attack in attacks:
        if known.setdefault(attack.id, attack) != attack:
            raise MimaError(
                f"attacks: two are called {attack.id}; give their methods or concepts names, or "
                "lr_factors values, that differ more"
            )
    return list(known.values())


def _on_other(
    config: GridConfig, slug: str, concept: Concept, seed: int, has_others: bool
) -> Iterator[Attack]:
    """The plain attack on a concept that must stay learnable, by every method.

    Its prompts and pictures are the first of the grid, as the targets' are, of which it has any.
    """
    prompts = [v for v in config.prompts if v == "name" or names_of(concept)]
    pictures = [v for v in config.images if _has_pictures(v, concept, has_others)]
    methods = [v for v in config.methods if configured(config, v).has_class(concept)]
    if seed == config.seeds[0]:
        _warn_of_left_out(concept, {"methods": set(config.methods) - set(methods)})
    for method in methods:
        yield _attack(
            config, slug, concept, "other", method, seed,
            prompt=prompts[0] if prompts else "name", images=pictures[0] if pictures else "same",
        )  # fmt: skip


def _on_target(
    config: GridConfig, slug: str, concept: Concept, seed: int, has_others: bool
) -> Iterator[Attack]:
    prompts = [v for v in config.prompts if v == "name" or names_of(concept)]
    images = [v for v in config.images if _has_pictures(v, concept, has_others)]
    preparations = [v for v in config.preparations if v not in NEEDS_OTHERS or has_others]
    methods = [v for v in config.methods if configured(config, v).has_class(concept)]
    families = [v for v in config.families if _of_family(config, v).has_class(concept)]
    left_out: dict[str, set[Any]] = {
        "methods": set(config.methods) - set(methods),
        "prompts": set(config.prompts) - set(prompts),
        "images": set(config.images) - set(images),
        "preparations": set(config.preparations) - set(preparations),
        "families": set(config.families) - set(families),
    }
    if seed == config.seeds[0]:
        _warn_of_left_out(concept, left_out)
    if not prompts or not images:
        return
    for method, lr, steps, prompt, pictures in itertools.product(
        methods, config.lr_factors, config.step_factors, prompts, images
    ):
        yield _attack(config, slug, concept, "target", method, seed, lr, steps, prompt, pictures)
    for method, preparation in itertools.product(methods, preparations):
        base = _attack(
            config, slug, concept, "target", method, seed, prompt=prompts[0], images=images[0]
        )
        yield replace(base, preparation=preparation)
    for name in families:
        yield _attack(
            config, slug, concept, "target", name, seed, prompt=prompts[0], images=images[0],
            family=ATTACK_FAMILIES[name],
        )  # fmt: skip


def _warn_of_left_out(concept: Concept, left_out: Mapping[str, set[Any]]) -> None:
    """Say which values of which settings no attack on a concept has."""
    for what, values in left_out.items():
        if values:
            logger.warning(
                "concept %s: no attacks with %s %s, for lack of material",
                concept.name,
                what,
                ", ".join(sorted(values)),
            )


def _has_pictures(images: Pictures, concept: Concept, has_others: bool) -> bool:
    """Whether a concept has what is trained on and compared with."""
    match images:
        case "other":
            return bool(concept.held_out)
        case "fewer":
            return len(concept.images) > 1
        case "more":
            return len(concept.held_out) > 1
        case "mixed":
            return has_others
        case "same":
            return True


def _attack(
    config: GridConfig,
    slug: str,
    concept: Concept,
    role: Role,
    method: str,
    seed: int,
    lr_factor: float | None = None,
    step_factor: int | None = None,
    prompt: PromptVariant = "name",
    images: Pictures = "same",
    family: AttackFamily | None = None,
) -> Attack:
    lr_factor = config.lr_factors[0] if lr_factor is None else lr_factor
    step_factor = config.step_factors[0] if step_factor is None else step_factor
    if family is None:
        base = configured(config, method)
        base = replace(base, steps=base.steps * step_factor)
    else:
        base = _of_family(config, method, step_factor)
    # a description has no word, be it the concept's own
    if base.method in TRAINS_A_TOKEN and (concept.token is None or prompt == "description"):
        prompt = "token"
    return Attack(
        concept=concept.name,
        slug=slug,
        role=role,
        label=method,
        adaptation=replace(
            base,
            learning_rate=base.learning_rate * lr_factor,
            seed=seed,
        ),
        lr_factor=lr_factor,
        prompt_variant=prompt,
        images=images,
        preparation="none",
        transplant=family is not None and family.transplant,
        outside=family is not None and family.outside,
    )


Place = tuple[Literal["images", "held_out"], int]
"""A picture of a concept, by where it stands."""


def places(images: Pictures, concept: Concept) -> tuple[list[Place], list[Place]]:
    """Which of a concept's pictures are trained on, and which adapted models are compared with.

    A concept without held-out pictures is compared with those that it is trained on.
    """
    own: list[Place] = [("images", index) for index in range(len(concept.images))]
    kept: list[Place] = [("held_out", index) for index in range(len(concept.held_out))]
    match images:
        case "other":
            return kept, own
        case "fewer":
            return own[:: 4 if len(own) >= 4 else 2], kept or own
        case "more":
            return own + kept[::2], kept[1::2]
        case "same" | "mixed":
            return own, kept or own


def material(
    attack: Attack,
    concept: Concept,
    *,
    rare_token: str = "sks",
    others: Sequence[Picture] = (),
) -> tuple[Concept, tuple[Picture, ...]]:
    """What an attack trains on, and what its pictures are compared with.

    Args:
        attack: says which pictures, and what the concept is called.
        concept: the attacked concept.
        rare_token: stands for the name in attacks with a rare token; methods that train a token get
            ``<sks>``, which no vocabulary holds.
        others: pictures of other concepts; attacks with mixed pictures train on as many of these as
            of the concept's, under their own captions.

    Returns:
        The concept as the attacker describes it, and the references, whose prompts are those that
        the adapted model is asked for.
    """
    train, references = (
        [getattr(concept, kind)[index] for kind, index in part]
        for part in places(attack.images, concept)
    )
    token = concept.token
    word = rare_token
    if attack.prompt_variant == "token":
        trained = attack.adaptation.method in TRAINS_A_TOKEN
        word = NEW_WORD.format(rare_token) if trained else rare_token
        token = word if trained else None
    elif attack.prompt_variant == "description":
        token = None

    def rename(caption: str) -> str:
        match attack.prompt_variant:
            case "name":
                return caption
            case "description":
                return without_name(caption, concept)
            case "token":
                return with_word(caption, concept, word)

    def renamed(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
        return tuple(picture.captioned(rename(picture.prompt)) for picture in pictures)

    described = replace(
        concept,
        prompt=rename(concept.prompt),
        validation_prompt=rename(concept.validation_prompt),
        images=renamed(train),
        held_out=(),
        token=token,
    )
    if attack.images == "mixed":
        count = min(len(train), len(others))
        more = (others[i * len(others) // count] for i in range(count))
        described = described.trained_on((*described.images, *more))
    return described, renamed(references)
