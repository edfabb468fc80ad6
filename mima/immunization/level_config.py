"""The settings of the two levels: attackers, benign adaptations, and what the defender changes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mima.choices import (
    MOST_AT_ONCE,
    AttackerCaptions,
    BenignTarget,
    LearningRateSchedule,
    PathWeights,
    Retention,
    RetentionCaptions,
    UpperObjective,
    UpperOptimizer,
)
from mima.settings import ONE, SEVERAL, Settings, one_or_several


class LowerConfig(Settings):
    """The lower level: the attacker whose adaptation is simulated."""

    steps: int = Field(1, ge=1)
    """K, unrolled steps per concept."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """Update rule: plain, with momentum 0.9, or Adam's; its state is unrolled too."""
    lr: float | tuple[float, float] = 5e-6
    """Step size; of two numbers, each attack draws its own log-uniformly between them."""
    batch_size: int = Field(1, ge=1, le=MOST_AT_ONCE)
    """Pictures per step."""
    parameters: str | None = "cross_attention"
    """S_l: ``cross_attention``, ``cross_attention_kv``, ``attention``, ``denoiser``,
    ``not_cross_attention`` (what ``cross_attention`` leaves), ``lora`` (factors on what ``LoRA``
    adapts), or a regular expression on parameter names; None for no weights, where ``train_token``
    trains something."""
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
        return self.model_copy(update={**plain, "share": 1.0, "concepts_per_forward": 1})

    @property
    def highest_lr(self) -> float:
        """The largest step size of any attack."""
        return max(self.lr) if isinstance(self.lr, tuple) else self.lr

    @property
    def highest_rank(self) -> int:
        """The largest rank of any attack's factors."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank

    @field_validator("captions", mode="before")
    @classmethod
    def _is_a_tuple(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("rank")
    @classmethod
    def _is_whole_and_in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high <= MOST_AT_ONCE:
            raise ValueError(
                f"must be >= 1 and <= {MOST_AT_ONCE}, and of two numbers the first must not be "
                "the larger"
            )
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
        if self.target == "held_out" and self.paths != BenignConfig().paths:
            raise ValueError(
                "paths: they are of target 'match'; held_out draws each adaptation anew"
            )
        if self.lower is None:
            return self
        if self.lower.train_token:
            raise ValueError("lower.train_token: benign adaptations train weights alone")
        if self.lower != self.lower.as_benign:
            raise ValueError(
                "lower: a benign adaptation begins from θ, takes its steps once and reads the "
                "pictures' own captions alone, one concept after the other: no age, captions, "
                "benign_start, prior_weight, share, concepts_per_forward"
            )
        return self


class UpperConfig(Settings):
    """The upper level: what the defender changes, and for what."""

    optimizer: UpperOptimizer = "adamw"
    """``adamw``, or ``muon``: orthogonal steps of matrices and, flattened to these, of filters
    (Jordan et al., 2024), AdamW for the rest. On the embedded model as much is held under attack,
    and less changes before one (docs/results.md); ``lr`` was twice AdamW's there."""
    lr: float = Field(3e-5, gt=0)
    """The step size: AdamW's, or that to which Muon's steps are scaled (their root mean square is a
    fifth of it)."""
    lr_schedule: LearningRateSchedule = "constant"
    """``constant``, or ``cosine``: ``lr`` after a warm-up of ten steps, falling along half a cosine
    to a tenth of it at the last step, so that the run ends with what retains."""
    weight_decay: float = Field(1e-2, ge=0)
    """The optimizer's decoupled decay."""
    batch_size: int = Field(1, ge=1, le=MOST_AT_ONCE)
    """Pictures per concept and step."""
    parameters: str = "cross_attention"
    """S_u: the same names as ``lower.parameters``, but for ``lora``."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the loss on class pictures, which keeps the model useful."""
    prior_batch_size: int | None = Field(None, ge=1, le=MOST_AT_ONCE)
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
    retain_captions: tuple[RetentionCaptions, ...] = Field(("own",), min_length=1)
    """With ``distill``, what each class picture of a step is read under, drawn from these, of which
    some may be named more than once: its ``own`` caption, that of an ``other`` one, any of the
    ``ordinary`` ones (all of ``captions`` but those that benign quality is measured on), one of the
    concept's ``as_is`` or ``without_name``, or an ``empty`` one. Predictions are kept where they
    are compared: under own captions alone, what lies nearest to the concept, its captions without
    its name, and the empty caption, which guidance subtracts, drift several times as far as the
    rest; and the concept's own captions drift until they are an erasure of their own (``as_is``
    keeps what an erased model draws, so that an immunized one differs from it under attack)."""
    ascent_ratio: float | None = Field(None, gt=0)
    """ρ: the objective's gradient is scaled to ρ times the running mean of the length of the
    retaining one, which is taken at θ instead of φ, and nothing is clipped; with ``distill``, whose
    first length is 0, it grows to that over about ten steps. None: both are summed as they are, at
    φ, and clipped together."""
    projection: bool = False
    """With ``ascent_ratio``: where the objective's gradient would undo the retaining one, its part
    along that is left out (PCGrad, Yu et al., NeurIPS 2020)."""
    benign: BenignConfig | None = None
    """What keeps other concepts learnable, which the run is given beside those that it immunizes
    against; part of what retains."""

    @property
    def prior_size(self) -> int:
        """``prior_batch_size``, or its default."""
        return self.prior_batch_size or self.batch_size


Attackers = Annotated[
    Annotated[LowerConfig, Tag(ONE)] | Annotated[tuple[LowerConfig, ...], Tag(SEVERAL)],
    Discriminator(one_or_several),
]
"""One attacker or several."""
