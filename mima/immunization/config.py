"""What a run is: every setting, checked, with its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    field_validator,
    model_validator,
)

from mima.choices import (
    Hypergradient,
    MergeRule,
    Method,
    Precision,
    Retention,
    Task,
    UpperObjective,
)
from mima.errors import MimaError, nearest
from mima.options import TrainingOptions
from mima.settings import Settings, parse_config
from mima.storage.plain_data import read_yaml

RECIPES: dict[str, dict[str, Any]] = {
    "relearn": {"erase_first": True, "upper": {"lr": 3e-5}},
    "personalize": {"new_words": True, "token_steps": 100, "upper": {"lr": 2e-5}},
}
"""What a task sets where nothing else does: the published learning rates of the upper level."""


class LowerConfig(Settings):
    """The lower level: the attacker whose adaptation is simulated."""

    steps: int = Field(1, ge=1)
    """K, unrolled steps per concept."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Update rule; Adam's state is unrolled too."""
    lr: float | tuple[float, float] = 5e-6
    """Step size; of two numbers, each attack draws its own log-uniformly between them."""
    batch_size: int = Field(1, ge=1)
    """Pictures per step."""
    parameters: str | None = "cross_attention"
    """S_l: ``cross_attention``, ``cross_attention_kv``, ``attention``, ``denoiser``, ``lora``
    (factors on every attention projection), or a regular expression on parameter names; None for
    no weights, where ``train_token`` trains something."""
    train_token: bool = False
    """Train the embedding of the concept's new word: alone (``parameters`` None), as Textual
    Inversion does, or beside weights (``cross_attention_kv``), as Custom Diffusion does."""
    token_lr: float | None = Field(None, gt=0)
    """Step size of the new words' embeddings. Default: ``lr``."""
    rank: int = Field(8, ge=1)
    """Rank of the LoRA factors."""
    alpha: float | None = Field(None, gt=0)
    """LoRA's alpha; the factors' product is scaled by alpha / rank. Default: the rank."""
    prior_weight: float = Field(0.0, ge=0)
    """Weight of the loss on class pictures."""
    age: tuple[int, int] | None = None
    """An attacker lives on: it takes ``steps`` more steps in each outer step, from θ as it is by
    then and what it has changed so far, until it has taken as many as it drew log-uniformly between
    these two; then another begins from θ. None: each outer step has attackers of its own."""

    @field_validator("parameters")
    @classmethod
    def _is_no_former_spelling(cls, value: str | None) -> str | None:
        weights, plus, token = (value or "").rpartition("+")
        if token == "token":
            now = f"'{weights}'" if plus else "null"
            raise ValueError(f"new words are trained by train_token: true, with parameters: {now}")
        return value

    @property
    def highest_lr(self) -> float:
        """The largest step size of any attack."""
        return max(self.lr) if isinstance(self.lr, tuple) else self.lr

    @field_validator("lr")
    @classmethod
    def _is_positive_and_in_order(
        cls, value: float | tuple[float, float]
    ) -> float | tuple[float, float]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 0 < low <= high:
            raise ValueError("must be > 0, and of two numbers the first must not be the larger")
        return value

    @model_validator(mode="after")
    def _trains_something(self) -> LowerConfig:
        if self.parameters is None and not self.train_token:
            raise ValueError("parameters: null leaves nothing to train without train_token")
        if self.token_lr is not None and not self.train_token:
            raise ValueError("token_lr: without train_token no new word is trained")
        self._check_age()
        return self

    def _check_age(self) -> None:
        if self.age is None:
            return
        low, high = self.age
        if not 1 <= low <= high:
            raise ValueError(f"age: must be two numbers, 1 <= low <= high, got [{low}, {high}]")
        if high <= self.steps:
            raise ValueError(
                f"age: no attacker of at most {high} steps outlives an outer step of steps "
                f"{self.steps}"
            )
        if self.train_token:
            raise ValueError("age: new words (train_token) begin anew in each outer step")


class UpperConfig(Settings):
    """The upper level: what the defender changes, and for what."""

    lr: float = Field(3e-5, gt=0)
    """AdamW's step size."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's decoupled decay."""
    batch_size: int = Field(1, ge=1)
    """Pictures per concept and step."""
    parameters: str = "cross_attention"
    """S_u: the same names as ``lower.parameters``, but for ``lora``."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the loss on class pictures, which keeps the model useful."""
    prior_batch_size: int | None = Field(None, ge=1)
    """Class pictures per concept and step. Default: ``batch_size``."""
    concepts_per_forward: int = Field(1, ge=1)
    """Concepts, class pictures included, whose losses one forward and one backward compute: faster
    where the device is not filled, and memory for the activations of as many."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients longer than this are scaled down to it."""
    loss_cap: float | None = Field(None, gt=0)
    """With ``neg``: a concept whose loss exceeds this no longer pulls: it counts as immunized.
    None: no cap."""
    objective: UpperObjective = "neg"
    """What the attacked weights are to do on a concept's pictures: ``neg``, a large loss (the
    paper's); ``log``, a large logarithm of it, whose gradient fades slowly; ``hinge``, a loss by
    ``margin`` above that of the model as it was before immunization, and no more; ``anchor``,
    predict what that model predicts; ``zero``, predict 0."""
    margin: float = Field(0.0, ge=0)
    """With ``hinge``, in nats: a picture pulls until its loss is e^margin times that of the model
    before immunization. With ``ascent_ratio``, the objective's gradient is scaled by the share of
    pictures that pull, too: what is nearly satisfied pulls weakly."""
    path_every: int | None = Field(None, ge=1)
    """m: the objective counts at every m-th state of each simulated attack, and at the last, with
    other pictures at each. None: at the last alone."""
    retain: Retention = "class_images"
    """What keeps the model useful: a low loss on class pictures, or (``distill``) the predictions
    on them of the model as it was before immunization."""
    ascent_ratio: float | None = Field(None, gt=0)
    """ρ: the objective's gradient is scaled to ρ times the running mean of the length of the
    retaining one, which is taken at θ instead of φ, and nothing is clipped. None: both are summed
    as they are, at φ, and clipped together."""


class ImmunizeConfig(Settings):
    """One immunization. Defaults follow the published re-learning experiments."""

    method: Method = "mima"
    """``mima``, or a baseline: ``none``, ``imma`` (one concept), ``joint`` (no merge), ``compose``
    (each concept alone, merged at the end). ``alternating`` is MIMA's published update
    (``mima.immunization.alternating``), in which every other step commits a merge: it takes plain
    gradient steps whatever ``lower.optimizer``, differentiates through no step whatever
    ``hypergradient``, and has a hard constraint whatever ``lam``."""
    merge: MergeRule = "projected"
    """Of ``mima`` and ``compose``: projected for keys and values and averaged elsewhere; averaged
    everywhere; or, within the steps of ``mima``, summed: φ = θ + Σ (θ'[n] − θ), since an average of
    N attacks shows 1/N of each."""
    concepts_per_step: int | None = Field(None, ge=1)
    """Concepts, drawn anew each outer step, that the step immunizes against; with ``joint`` or
    merge ``sum``. Its cost is then the same for any number of concepts. None: all."""
    hypergradient: Hypergradient = "exact"
    """How the lower level is differentiated; see ``mima.bilevel.hypergradient``."""
    resolution: int | None = Field(None, ge=1)
    """Side in pixels that the pictures are scaled and cropped to. Default: what the model was
    trained on."""
    training: TrainingOptions = TrainingOptions()
    """Noise levels, loss weighting and conditions of every loss, simulated attacks' included; by
    default as diffusers' scripts have them for the model's family (docs/families.md)."""
    steps: int = Field(1000, ge=1)
    """Outer steps."""
    seed: int = Field(0, ge=0)
    """Seeds every draw."""
    lower: LowerConfig = LowerConfig()
    """The lower level."""
    upper: UpperConfig = UpperConfig()
    """The upper level."""
    lam: float = Field(1e-4, ge=0)
    """Softness of the projected merge's constraint; 0 is hard."""
    captions: Path | None = None
    """A text file of ordinary captions, one per line, that the merge leaves alone and from which
    missing class pictures are generated. Default: the captions that ship with mima."""
    num_captions: int = Field(200, ge=1)
    """How many captions the merge plan reads."""
    num_class_images: int = Field(64, ge=1)
    """Class pictures generated per concept where it brings none."""
    erase_first: bool = False
    """Erase the concepts before immunizing (the re-learning task)."""
    new_words: bool = False
    """Add each concept's ``token`` to tokenizer and text encoder, as one word that starts from its
    ``initializer``, while the model is immunized (the personalization task). The result has the
    vocabulary that the model came with, so that anyone may add the word again. To train the words
    in each lower level, and differentiate through it, set ``lower.train_token``."""
    token_steps: int = Field(0, ge=0)
    """Steps of Textual Inversion that train each new word's embedding, and nothing else, before
    the model is immunized; 0 leaves the initializer's."""
    precision: Precision = "float32"
    """What the denoiser computes in, by autocast; weights and their updates stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward passes instead of keeping them: slower, less memory."""
    offload_optimizer: bool = False
    """Keep the moments of the upper level's AdamW in the CPU's memory, and bring those of one
    parameter at a time to the device: slower, less memory, the same values."""
    checkpoint_every: int | None = Field(50, ge=1)
    """Outer steps between checkpoints, where the run has an output folder. None: only at the end,
    and when it is interrupted."""
    max_skipped: int = Field(10, ge=0)
    """Steps in a row that may be left out because a loss or gradient was not finite; with
    method ``alternating``, even ones in a row, or odd ones."""
    divergence: float | None = Field(10.0, gt=1)
    """Stop when the mean loss on class pictures over the last ten steps exceeds this many times
    that over the first ten: the model is being destroyed, not immunized. None: never."""
    trackers: tuple[str, ...] = ()
    """accelerate's experiment trackers, such as ``tensorboard`` and ``wandb``."""

    @classmethod
    def for_task(cls, task: Task, **settings: Any) -> ImmunizeConfig:
        """The recipe of a task, ``relearn`` or ``personalize``, with settings that win over it."""
        return cls.model_validate(with_recipe(task, settings))

    def read(self) -> dict[str, Any]:
        """The settings that a run of this method reads, as plain data: what its card may say."""
        plain = self.model_dump(mode="json")
        if self.method == "none":
            return {
                name: plain[name]
                for name in ("method", "resolution", "seed", "captions", "erase_first")
            }
        unread = set()
        if self.method in ("imma", "joint"):
            unread |= {"merge"}
        if self.method in ("imma", "joint") or self.merge != "projected":
            unread |= {"lam", "num_captions"}
        if self.method == "alternating":
            unread |= {"hypergradient", "lam"}
            del plain["lower"]["optimizer"]
        if self.lower.parameters != "lora":
            del plain["lower"]["rank"], plain["lower"]["alpha"]
        return {name: value for name, value in plain.items() if name not in unread}

    @field_validator("merge", mode="before")
    @classmethod
    def _merge_is_no_method(cls, value: object) -> object:
        if value == "none":
            raise ValueError("to merge nothing is a method of its own: write method: joint")
        return value

    @field_validator("hypergradient", mode="before")
    @classmethod
    def _hypergradient_is_no_method(cls, value: object) -> object:
        if value == "alternating":
            raise ValueError("the published update is a method: write method: alternating")
        return value

    @model_validator(mode="after")
    def _cross_checks(self) -> ImmunizeConfig:
        if self.upper.parameters == "lora":
            raise ValueError("upper.parameters: 'lora' is an adapter; the defender changes weights")
        if self.lower.train_token and not self.new_words:
            raise ValueError("lower.train_token: there are no new words without new_words")
        if self.lower.train_token and self.upper.concepts_per_forward > 1:
            raise ValueError(
                "upper.concepts_per_forward: with lower.train_token each concept's text is encoded "
                "with its own new word; it is 1"
            )
        if self.token_steps and not self.new_words:
            raise ValueError("token_steps: there are no new words to train without new_words")
        if self.upper.concepts_per_forward > 1 and self.method in ("imma", "joint", "compose"):
            raise ValueError(
                "upper.concepts_per_forward: only merged weights are the same for all concepts; "
                f"with method {self.method!r} it is 1"
            )
        self._check_path()
        if self.method == "alternating":
            self._check_alternating()
        if self.precision == "float16":
            raise ValueError(
                "precision: float16 gradients underflow without loss scaling, and a Hessian "
                "product has no scale of its own that could be checked; use bfloat16"
            )
        if self.precision == "bfloat16" and self.hypergradient == "finite_difference":
            raise ValueError(
                "precision: bfloat16 rounds gradients more coarsely than finite_difference moves "
                "the weights; use exact, first_order, or float32"
            )
        return self

    def _check_path(self) -> None:
        upper, every = self.upper, self.upper.path_every
        if every is not None and every >= self.lower.steps:
            raise ValueError(
                f"upper.path_every: {every} asks for states on the way of lower.steps "
                f"{self.lower.steps}; it must be smaller, or left out"
            )
        if upper.loss_cap is not None and upper.objective != "neg":
            raise ValueError(f"upper.loss_cap: objective {upper.objective!r} has no use for a cap")
        if upper.margin and upper.objective != "hinge":
            raise ValueError(f"upper.margin: it is of objective 'hinge', got {upper.objective!r}")
        if upper.ascent_ratio is not None and not upper.prior_weight:
            raise ValueError("upper.ascent_ratio: with prior_weight 0 nothing retains")
        if upper.retain == "distill" and upper.ascent_ratio is None:
            raise ValueError("upper.retain: 'distill' needs upper.ascent_ratio")
        if upper.ascent_ratio is not None and upper.concepts_per_forward > 1:
            raise ValueError("upper.concepts_per_forward: with upper.ascent_ratio it is 1")
        extended = (
            upper.objective != "neg",
            every is not None,
            upper.ascent_ratio is not None,
            self.concepts_per_step is not None,
            isinstance(self.lower.lr, tuple),
            self.lower.age is not None,
        )
        if self.method == "alternating" and any(extended):
            raise ValueError(
                "method: 'alternating' is the published MIMA update: it has no path, no objective "
                "but neg, no ascent_ratio, all concepts in each step, one lower.lr and no lower.age"
            )
        if self.lower.train_token and self.merge == "sum":
            raise ValueError("merge: 'sum' has no place for lower.train_token's new words")
        if self.merge == "sum" and self.method != "mima":
            raise ValueError(f"merge: 'sum' is of method 'mima', got method {self.method!r}")
        if self.concepts_per_step is not None and not (
            self.method == "joint" or self.merge == "sum"
        ):
            raise ValueError(
                "concepts_per_step: the shares of a merge are of all concepts; use merge 'sum' or "
                f"method 'joint', got method {self.method!r}, merge {self.merge!r}"
            )

    def _check_alternating(self) -> None:
        what = "method: 'alternating' is the published MIMA update"
        if self.merge != "projected":
            raise ValueError(f"{what}, which merges keys and values; not for merge {self.merge!r}")
        lower = self.lower
        if lower.parameters in ("lora", None) or lower.train_token or lower.steps != 1:
            raise ValueError(
                f"{what}: one lower step on the weights; got lower.parameters "
                f"{lower.parameters!r}, lower.train_token {lower.train_token}, "
                f"lower.steps {lower.steps}"
            )


class ImmunizeRun(Settings):
    """What ``mima immunize CONFIG.yaml`` reads."""

    model: str
    """A diffusers folder, a .safetensors file, a hub id, or ``embedded``."""
    revision: str | None = None
    """The hub's branch, tag or commit of the model."""
    variant: str | None = None
    """File variant such as ``fp16``."""
    single_file_config: str | None = None
    """For a single file, a folder (or hub id) of a model of the same architecture. Default: the
    published one, which diffusers fetches from the hub."""
    concepts: list[Any] = Field(min_length=1)
    """Concept descriptions: folders, files, names of embedded concepts, or inline mappings."""
    erased: Path | None = None
    """A checkpoint in which the concepts are erased, made from ``model`` by whatever means: see
    ``mima.erasure.load_erased``. Takes the place of ``immunize.erase_first``."""
    output: Path | None = None
    """Where the immunized model goes."""
    immunize: ImmunizeConfig = ImmunizeConfig()
    """The settings."""


def with_recipe(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Plain settings of a run with those of a task beneath them.

    Raises:
        MimaError: no such task.
    """
    if task not in RECIPES:
        raise MimaError(f"task {task!r} is unknown; {nearest(task, RECIPES)}")
    combined = {**RECIPES[task], **settings}
    for name, value in RECIPES[task].items():
        own = settings.get(name)
        if isinstance(value, dict) and isinstance(own, BaseModel):
            own = own.model_dump(exclude_unset=True)
        if isinstance(value, dict) and isinstance(own, dict):
            combined[name] = {**value, **own}
    return combined


def load_config(path: str | Path) -> ImmunizeRun:
    """Read a run from YAML (or JSON). Relative paths in it are relative to its folder.

    Raises:
        MimaError: unreadable, not YAML, or a setting that is unknown or of the wrong type or range;
            every such setting is named, unknown ones with the nearest valid name.
    """
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except MimaError as error:
        raise MimaError(f"config: {path}: {error}") from error
    except OSError as error:
        raise MimaError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MimaError(f"config: {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise MimaError(f"config: {path} must be a mapping of settings, got {type(raw).__name__}")
    return parse_config(ImmunizeRun, raw, source=str(path))
