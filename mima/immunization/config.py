"""What a run is: every setting, checked, with its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from mima.choices import (
    AttackerCaptions,
    BenignTarget,
    Hypergradient,
    LearningRateSchedule,
    MergeRule,
    Method,
    PathWeights,
    Precision,
    Recipe,
    Retention,
    Task,
    UpperObjective,
)
from mima.errors import MimaError
from mima.options import TrainingOptions
from mima.settings import ONE, SEVERAL, Settings, one_or_several, parse_config
from mima.storage.plain_data import read_yaml


class LowerConfig(Settings):
    """The lower level: the attacker whose adaptation is simulated."""

    steps: int = Field(1, ge=1)
    """K, unrolled steps per concept."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """Update rule: plain, with momentum 0.9, or Adam's; its state is unrolled too."""
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
    rank: int | tuple[int, int] = 8
    """Rank of the LoRA factors; of two numbers, each attack draws its own log-uniformly between
    them."""
    alpha: float | None = Field(None, gt=0)
    """LoRA's alpha; the factors' product is scaled by alpha / rank. Default: the rank."""
    prior_weight: float = Field(0.0, ge=0)
    """Weight of the loss on class pictures."""
    concepts_per_forward: int = Field(1, ge=1)
    """With ``lora``: concepts whose attacks take their steps in one forward and one backward, each
    with its own factors: faster where the device is not filled, and memory for the activations of
    as many. Gradients are the same up to rounding; second derivatives are taken one by one."""
    captions: tuple[AttackerCaptions, ...] = ("as_is",)
    """What the attacker's captions call the concept, one of these for each attack: ``as_is``, its
    pictures' own captions; ``without_name``, these without its name; ``rare_token``, with the word
    sks in place of the name; ``empty``, none at all. The upper level asks by the same captions."""
    benign_start: tuple[int, int] | None = None
    """The attacker begins with so many steps on a benign concept, drawn uniformly between these
    two, as who fine-tunes a fine-tuned model does. None: it begins from θ."""
    share: float = Field(1.0, gt=0)
    """Of several attackers, how often this one is drawn, relative to the others."""
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

    def states(self, every: int | None) -> tuple[int, ...]:
        """The states of the path, by their steps: every so many, and the last."""
        return (self.steps,) if every is None else (*range(every, self.steps, every), self.steps)

    @property
    def as_benign(self) -> LowerConfig:
        """The same adaptation as somebody who means no harm takes it, from θ and once."""
        plain = {"age": None, "captions": ("as_is",), "benign_start": None, "prior_weight": 0.0}
        return self.model_copy(update=plain)

    @property
    def highest_lr(self) -> float:
        """The largest step size of any attack."""
        return max(self.lr) if isinstance(self.lr, tuple) else self.lr

    @field_validator("captions", mode="before")
    @classmethod
    def _is_a_tuple(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("rank")
    @classmethod
    def _is_whole_and_in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high:
            raise ValueError("must be >= 1, and of two numbers the first must not be the larger")
        return value

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
        if not self.captions:
            raise ValueError("captions: at least one is needed, as_is for the pictures' own")
        if self.train_token and self.captions != ("as_is",):
            raise ValueError("captions: with train_token they hold the new word; they are as_is")
        if self.train_token and self.benign_start is not None:
            raise ValueError("benign_start: no benign concept has the new word of train_token")
        if self.benign_start is not None and not 0 <= self.benign_start[0] <= self.benign_start[1]:
            raise ValueError(
                "benign_start: must be two numbers, 0 <= low <= high, "
                f"got {list(self.benign_start)}"
            )
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


class BenignConfig(Settings):
    """Benign adaptations, which are simulated so that other concepts stay learnable."""

    weight: float = Field(1.0, gt=0)
    """Weight of the term, beside what retains."""
    every: int = Field(1, ge=1)
    """Outer steps from one that has the term to the next."""
    target: BenignTarget = "match"
    """On pictures that the adaptation does not see: ``match``, predict what the model as it was
    before immunization predicts after the same adaptation; ``held_out``, a low loss."""
    paths: int = Field(3, ge=1)
    """Of ``match``: adaptations of each concept, whose batches and rates are drawn once."""
    concepts_per_step: int = Field(1, ge=1)
    """Benign concepts, drawn anew each time, that an outer step adapts to."""
    path_every: int | None = Field(None, ge=1)
    """m: the term counts at every m-th state of each adaptation, and at the last. None: there."""
    lower: LowerConfig | None = None
    """The adaptation that is simulated. None: that of the first attacker, from θ and once."""

    @model_validator(mode="after")
    def _is_benign(self) -> BenignConfig:
        if self.lower is None:
            return self
        if self.lower.train_token:
            raise ValueError("lower.train_token: benign adaptations train weights alone")
        if self.lower != self.lower.as_benign:
            raise ValueError(
                "lower: a benign adaptation begins from θ, takes its steps once and reads the "
                "pictures' own captions alone: no age, captions, benign_start, prior_weight"
            )
        return self


class UpperConfig(Settings):
    """The upper level: what the defender changes, and for what."""

    lr: float = Field(3e-5, gt=0)
    """AdamW's step size."""
    lr_schedule: LearningRateSchedule = "constant"
    """``constant``, or ``cosine``: ``lr`` after a warm-up of ten steps, falling along half a cosine
    to a tenth of it at the last step, so that the run ends with what retains."""
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
    ``margin`` above that of the model as it was before immunization, and no more; ``pair``, a loss
    that grew more than that on a class picture; ``anchor``, predict what the model predicted
    before; ``zero``, predict 0; ``entropy``, predict what is best for pictures that nothing is
    known of. See ``mima.immunization.objectives``."""
    margin: float = Field(0.0, ge=0)
    """With ``hinge``, in nats: a picture pulls until its loss is e^margin times that of the model
    before immunization. With ``ascent_ratio``, the objective's gradient is scaled by the share of
    pictures that pull, too: what is nearly satisfied pulls weakly."""
    pair_beta: float | None = Field(None, gt=0)
    """β of ``pair``: how sharply it tells a difference of squared errors. Default: 100."""
    path_every: int | None = Field(None, ge=1)
    """m: the objective counts at every m-th state of each simulated attack, and at the last, with
    other pictures at each. None: at the last alone."""
    path_weights: PathWeights = "uniform"
    """What the states of the path count: ``uniform``, all the same; ``late``, e^((k − K) / 16)
    after k of K steps, as TAR does."""
    retain: Retention = "class_images"
    """What keeps the model useful: a low loss on class pictures, or (``distill``) the predictions
    on them of the model as it was before immunization."""
    ascent_ratio: float | None = Field(None, gt=0)
    """ρ: the objective's gradient is scaled to ρ times the running mean of the length of the
    retaining one, which is taken at θ instead of φ, and nothing is clipped. None: both are summed
    as they are, at φ, and clipped together."""
    projection: bool = False
    """With ``ascent_ratio``: where the objective's gradient would undo the retaining one, its part
    along that is left out (PCGrad, Yu et al., NeurIPS 2020)."""
    benign: BenignConfig | None = None
    """What keeps other concepts learnable, which the run is given beside those that it immunizes
    against; part of what retains."""


Attackers = Annotated[
    Annotated[LowerConfig, Tag(ONE)] | Annotated[tuple[LowerConfig, ...], Tag(SEVERAL)],
    Discriminator(one_or_several),
]
"""One attacker or several."""


class ImmunizeConfig(Settings):
    """One immunization. Rates and sizes of the upper level default to the published experiments'.

    ``docs/guide.md`` says where the defaults differ from the released scripts (recipe ``paper``).
    """

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
    """Concepts that an outer step immunizes against, with ``joint`` or merge ``sum``: drawn anew,
    but for those whose attackers live on, which stay. Cost and memory are then the same for any
    number of concepts. None: all."""
    attack_every: int = Field(1, ge=1)
    """Outer steps from one simulated attack to the next. The states of an attack's path serve all
    of these steps, relative to θ as it is by then, with other pictures each time: most of a step's
    cost is the attack's. With method ``mima`` and ``first_order``."""
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
    lower: Attackers = LowerConfig()
    """The lower level; of several attackers, each attack is by one of them, drawn by ``share``."""
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
    shards: int = Field(1, ge=1)
    """How many processes hold a model between them, each 1/shards of every weight, gradient and
    moment (FSDP2); the number of processes is a multiple of it, and concepts are shared out over
    the quotient. With ``first_order``; see docs/distributed.md."""
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
        """What a run has that names no recipe, for a task; the settings win over it.

        ``mima.immunization.recipes`` has named ones.
        """
        # recipes are made of this class
        from mima.immunization.recipes import beneath

        return cls.model_validate(beneath(settings, task=task))

    @property
    def attackers(self) -> tuple[LowerConfig, ...]:
        """``lower``, always as several."""
        return self.lower if isinstance(self.lower, tuple) else (self.lower,)

    @property
    def adapters(self) -> tuple[LowerConfig, ...]:
        """All adaptations that are simulated: the attackers', and the benign one's own."""
        benign = self.upper.benign.lower if self.upper.benign else None
        return self.attackers if benign is None else (*self.attackers, benign)

    @property
    def highest_lr(self) -> float:
        """The largest step size of any attack."""
        return max(attacker.highest_lr for attacker in self.attackers)

    @property
    def reads_benign(self) -> bool:
        """Whether the run needs benign concepts."""
        starts = any(attacker.benign_start is not None for attacker in self.attackers)
        return self.upper.benign is not None or starts

    @property
    def train_tokens(self) -> bool:
        """Whether any attacker trains new words."""
        return any(attacker.train_token for attacker in self.attackers)

    @property
    def has_prior(self) -> bool:
        """Whether any level reads class pictures."""
        attackers = any(attacker.prior_weight for attacker in self.attackers)
        return bool(self.upper.prior_weight) or attackers or self.upper.objective == "pair"

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
        several = isinstance(self.lower, tuple)
        for told, attacker in zip(
            plain["lower"] if several else [plain["lower"]], self.attackers, strict=True
        ):
            if self.method == "alternating":
                del told["optimizer"]
            if attacker.parameters != "lora":
                del told["rank"], told["alpha"]
            if not several:
                del told["share"]
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
        self._check_attackers()
        if self.token_steps and not self.new_words:
            raise ValueError("token_steps: there are no new words to train without new_words")
        if self.upper.concepts_per_forward > 1 and self.method in ("imma", "joint", "compose"):
            raise ValueError(
                "upper.concepts_per_forward: only merged weights are the same for all concepts; "
                f"with method {self.method!r} it is 1"
            )
        self._check_path()
        self._check_attack_every()
        if self.method == "alternating":
            self._check_alternating()
        if self.shards > 1:
            self._check_shards()
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

    def _check_attackers(self) -> None:
        attackers = self.attackers
        if not attackers:
            raise ValueError("lower: no attacker; a list holds at least one")
        if len({attacker.steps for attacker in attackers}) > 1:
            told = ", ".join(str(attacker.steps) for attacker in attackers)
            raise ValueError(f"lower: all attackers take the same number of steps, got {told}")
        for attacker in attackers:
            if attacker.concepts_per_forward > 1 and (
                attacker.parameters != "lora" or attacker.train_token
            ):
                raise ValueError(
                    "lower.concepts_per_forward: only LoRA's factors can be each sample's own; "
                    "with other lower.parameters, and with lower.train_token, it is 1"
                )
        words = self.train_tokens
        if words and not self.new_words:
            raise ValueError("lower.train_token: there are no new words without new_words")
        if words and self.upper.concepts_per_forward > 1:
            raise ValueError(
                "upper.concepts_per_forward: with lower.train_token each concept's text is encoded "
                "with its own new word; it is 1"
            )
        if words and self.merge == "sum":
            raise ValueError("merge: 'sum' has no place for lower.train_token's new words")
        trained = {(attacker.parameters, attacker.train_token) for attacker in attackers}
        if len(trained) > 1 and self.method == "mima" and self.merge == "projected":
            raise ValueError(
                "lower: the projected merge asks each attacker for the same weights; attackers "
                "that train different ones need merge 'average' or 'sum', or method 'joint'"
            )

    def _check_path(self) -> None:
        upper, every, steps = self.upper, self.upper.path_every, self.attackers[0].steps
        if every is not None and every >= steps:
            raise ValueError(
                f"upper.path_every: {every} asks for states on the way of lower.steps "
                f"{steps}; it must be smaller, or left out"
            )
        if upper.loss_cap is not None and upper.objective != "neg":
            raise ValueError(f"upper.loss_cap: objective {upper.objective!r} has no use for a cap")
        if upper.margin and upper.objective != "hinge":
            raise ValueError(f"upper.margin: it is of objective 'hinge', got {upper.objective!r}")
        if upper.pair_beta is not None and upper.objective != "pair":
            raise ValueError(f"upper.pair_beta: it is of objective 'pair', got {upper.objective!r}")
        if upper.objective == "pair" and self.train_tokens:
            raise ValueError("upper.objective: 'pair' reads no new words (lower.train_token)")
        if upper.path_weights != "uniform" and every is None:
            raise ValueError("upper.path_weights: without path_every the last state alone counts")
        if upper.projection and upper.ascent_ratio is None:
            raise ValueError("upper.projection: without ascent_ratio there is one gradient alone")
        if upper.ascent_ratio is not None and not upper.prior_weight:
            raise ValueError("upper.ascent_ratio: with prior_weight 0 nothing retains")
        if upper.retain == "distill" and upper.ascent_ratio is None:
            raise ValueError("upper.retain: 'distill' needs upper.ascent_ratio")
        if upper.benign is not None:
            self._check_benign(upper.benign)
        if upper.ascent_ratio is not None and upper.concepts_per_forward > 1:
            raise ValueError("upper.concepts_per_forward: with upper.ascent_ratio it is 1")
        if self.merge == "sum" and self.method != "mima":
            raise ValueError(f"merge: 'sum' is of method 'mima', got method {self.method!r}")
        if self.concepts_per_step is not None and not (
            self.method == "joint" or self.merge == "sum"
        ):
            raise ValueError(
                "concepts_per_step: the shares of a merge are of all concepts; use merge 'sum' or "
                f"method 'joint', got method {self.method!r}, merge {self.merge!r}"
            )

    def _check_benign(self, benign: BenignConfig) -> None:
        if self.upper.ascent_ratio is None:
            raise ValueError("upper.benign: it is part of what retains; set upper.ascent_ratio")
        adaptation = benign.lower or self.attackers[0].as_benign
        if adaptation.train_token:
            raise ValueError("upper.benign.lower: it is needed where attackers train new words")
        if benign.path_every is not None and benign.path_every >= adaptation.steps:
            raise ValueError(
                f"upper.benign.path_every: {benign.path_every} asks for states on the way of "
                f"{adaptation.steps} steps; it must be smaller, or left out"
            )

    def _check_attack_every(self) -> None:
        if self.attack_every == 1:
            return
        if self.method != "mima" or self.hypergradient != "first_order":
            raise ValueError(
                "attack_every: the states of one attack serve several steps with method 'mima' and "
                f"first_order alone; got method {self.method!r}, hypergradient "
                f"{self.hypergradient!r}"
            )
        if any(attacker.age is not None for attacker in self.attackers):
            raise ValueError(
                "attack_every: attackers with an age go on at each step; leave one out"
            )
        if self.train_tokens:
            raise ValueError("attack_every: lower.train_token's new words serve one step")

    def _check_shards(self) -> None:
        what = f"shards: {self.shards} processes hold one model between them"
        if self.method not in ("mima", "imma", "joint"):
            raise ValueError(
                f"{what}, with method 'mima', 'imma' or 'joint'; got {self.method!r}, whose "
                "processes hold whole models: use shards 1"
            )
        if self.hypergradient != "first_order":
            raise ValueError(
                f"{what}, and blocks that are gathered for a backward cannot be differentiated "
                f"twice; use hypergradient 'first_order', got {self.hypergradient!r}"
            )
        if any(adapter.parameters == "lora" for adapter in self.adapters):
            raise ValueError(
                f"{what}, and LoRA's factors are not split; use lower.parameters "
                "'cross_attention', 'attention' or 'denoiser'"
            )
        if self.train_tokens:
            raise ValueError(
                f"{what}, through which no gradient reaches new words; leave out lower.train_token"
            )

    def _check_alternating(self) -> None:
        what = "method: 'alternating' is the published MIMA update"
        upper = self.upper
        extended = (
            upper.objective != "neg",
            upper.path_every is not None,
            upper.ascent_ratio is not None,
            upper.lr_schedule != "constant",
            self.concepts_per_step is not None,
            isinstance(self.lower, tuple),
        )
        if any(extended):
            raise ValueError(
                f"{what}: it has no path, no objective but neg, no ascent_ratio, no lr_schedule, "
                "all concepts in each step and one attacker"
            )
        if self.merge != "projected":
            raise ValueError(f"{what}, which merges keys and values; not for merge {self.merge!r}")
        lower = self.attackers[0]
        if lower.parameters in ("lora", None) or lower.train_token or lower.steps != 1:
            raise ValueError(
                f"{what}: one lower step on the weights; got lower.parameters "
                f"{lower.parameters!r}, lower.train_token {lower.train_token}, "
                f"lower.steps {lower.steps}"
            )
        drawn = (
            isinstance(lower.lr, tuple),
            lower.age is not None,
            lower.captions != ("as_is",),
            lower.benign_start is not None,
        )
        if any(drawn):
            raise ValueError(
                f"{what}, whose attackers draw nothing: it has one lower.lr, no lower.age, no "
                "lower.captions but as_is and no lower.benign_start"
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
    benign: list[Any] = Field(default_factory=list)
    """Other concepts, described alike, that must stay learnable: ``immunize.upper.benign`` and
    ``immunize.lower.benign_start`` read them."""
    recipe: Recipe | None = None
    """Named settings beneath those of ``immunize``: see ``mima.immunization.recipes``."""
    erased: Path | None = None
    """A checkpoint in which the concepts are erased, made from ``model`` by whatever means: see
    ``mima.erasure.load_erased``. Takes the place of ``immunize.erase_first``."""
    output: Path | None = None
    """Where the immunized model goes."""
    immunize: ImmunizeConfig = ImmunizeConfig()
    """The settings."""


def load_config(path: str | Path) -> ImmunizeRun:
    """Read a run from YAML (or JSON). Relative paths in it are relative to its folder.

    Raises:
        MimaError: unreadable, not YAML, or a setting that is unknown or of the wrong type or range;
            every such setting is named, unknown ones with the nearest valid name.
    """
    return parse_run(read_mapping(path), source=str(path))


def parse_run(
    raw: dict[str, Any], *, source: str, recipe: str | None = None, task: str | None = None
) -> ImmunizeRun:
    """A run from plain data, a recipe's and a task's settings beneath its own.

    Args:
        raw: what a file says.
        source: what errors call it.
        recipe: takes the place of the one that ``raw`` names.
        task: see ``mima.immunization.recipes.TASKS``.

    Raises:
        MimaError: as ``load_config``.
    """
    # recipes are made of the settings of this module
    from mima.immunization.recipes import RECIPES, beneath

    named, own = recipe or raw.get("recipe"), raw.get("immunize", {})
    # what is no recipe, or no settings, is told with all else that is wrong
    known = named is None or recipe is not None or (isinstance(named, str) and named in RECIPES)
    if (named is not None or task is not None) and known and isinstance(own, dict):
        raw = {**raw, "immunize": beneath(own, named, task, benign=bool(raw.get("benign")))}
        if named is not None:
            raw["recipe"] = named
    return parse_config(ImmunizeRun, raw, source=source)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A mapping of settings from YAML (or JSON), unchecked.

    Raises:
        MimaError: unreadable, not YAML, or no mapping.
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
    return raw
