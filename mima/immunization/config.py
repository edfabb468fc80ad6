"""What an immunization is: every setting, checked, with its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from mima.choices import (
    LARGEST_SEED,
    MOST,
    Hypergradient,
    MergeRule,
    Method,
    Precision,
)
from mima.immunization.level_config import Attackers, BenignConfig, LowerConfig, UpperConfig
from mima.options import TrainingOptions
from mima.settings import Settings

__all__ = ["BenignConfig", "ImmunizeConfig", "LowerConfig", "UpperConfig"]


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
    """Concepts that an outer step of ``mima`` or ``joint`` immunizes against, and merges: in turn,
    in an order that is drawn, but for those whose attackers live on, which stay. Cost and memory
    are then the same for any number of concepts. None: all."""
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
    steps: int = Field(1000, ge=1, le=MOST)
    """Outer steps."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seeds every draw."""
    lower: Attackers = LowerConfig()
    """The lower level; of several attackers, each attack is by one of them, drawn by ``share``."""
    upper: UpperConfig = UpperConfig()
    """The upper level."""
    lam: float = Field(1e-4, ge=0)
    """Softness of the projected merge's constraint; 0 is hard, and refused where prompts share
    words, as "a photo of a …" does."""
    captions: Path | None = None
    """A text file of ordinary captions, one per line, that the merge and erasure leave alone, and
    of which missing class pictures are drawn, also those of a concept with a ``class_prompt``.
    Default: the captions that ship with mima, which are about emoji; class pictures are then drawn
    of a concept's ``class_prompt``, where it has one."""
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
    """Keep the moments of the upper level's optimizer in the CPU's memory, and bring those of one
    parameter at a time to the device; of a model on the CPU, on Linux, in a file on the disk of the
    checkpoints: slower, less memory, the same values."""
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
    """accelerate's experiment trackers, such as ``tensorboard`` and ``wandb``. Those that write
    files have a folder beside the output, with ``.logs`` appended."""

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
    def benign_lower(self) -> LowerConfig:
        """The benign adaptation that is simulated, where ``upper.benign`` asks for one."""
        benign = self.upper.benign.lower if self.upper.benign else None
        return benign or self.attackers[0].as_benign

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
    def reads_text(self) -> bool:
        """Whether outer steps encode prompts: new words', or captions drawn for each merge."""
        return self.train_tokens or self.method == "alternating"

    @property
    def merges(self) -> bool:
        """Whether the method merges what the concepts' attackers learned."""
        return self.method not in ("none", "imma", "joint")

    @property
    def has_prior(self) -> bool:
        """Whether any level reads class pictures."""
        if self.method == "none":
            return False
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
        if self.upper.ascent_ratio is not None:
            del plain["upper"]["max_grad_norm"]
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
        differentiates = self.method not in ("none", "alternating")
        rounded = self.precision == "bfloat16" and differentiates
        if rounded and self.hypergradient == "finite_difference":
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
            if attacker.concepts_per_forward > 1 and self.method in ("imma", "joint", "compose"):
                raise ValueError(
                    "lower.concepts_per_forward: only concepts that are merged are attacked at "
                    f"once; with method {self.method!r} it is 1"
                )
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

    def _place(self, adapter: LowerConfig) -> str:
        return "lower" if adapter in self.attackers else "upper.benign.lower"

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
        for adapter in self.adapters:
            of_lora = adapter.alpha is not None or adapter.rank != LowerConfig().rank
            if of_lora and adapter.parameters != "lora":
                where = self._place(adapter)
                raise ValueError(
                    f"{where}.rank, {where}.alpha: they are LoRA's; set {where}.parameters: lora, "
                    f"got {adapter.parameters!r}"
                )
            if adapter.benign_start == (0, 0):
                raise ValueError("lower.benign_start: [0, 0] steps are none; leave it out")
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
        if upper.retain_captions != ("own",) and upper.retain != "distill":
            raise ValueError("upper.retain_captions: other than own needs upper.retain 'distill'")
        if upper.benign is not None:
            self._check_benign(upper.benign)
        if upper.ascent_ratio is not None and upper.concepts_per_forward > 1:
            raise ValueError("upper.concepts_per_forward: with upper.ascent_ratio it is 1")
        if self.merge == "sum" and self.method != "mima":
            raise ValueError(f"merge: 'sum' is of method 'mima', got method {self.method!r}")
        if self.merge != "projected" and not self.merges:
            raise ValueError(f"merge: method {self.method!r} merges nothing; leave it out")
        if self.concepts_per_step is not None and self.method not in ("mima", "joint"):
            raise ValueError(
                "concepts_per_step: steps of methods 'mima' and 'joint' alone are about some of "
                f"the concepts, got method {self.method!r}"
            )

    def _check_benign(self, benign: BenignConfig) -> None:
        if self.upper.ascent_ratio is None:
            raise ValueError("upper.benign: it is part of what retains; set upper.ascent_ratio")
        adaptation = self.benign_lower
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
        if self.upper.optimizer == "muon":
            raise ValueError(
                f"{what}, and Muon's step of a matrix needs all its rows; use upper.optimizer "
                "'adamw'"
            )
        for adapter in self.adapters:
            if adapter.parameters == "lora":
                raise ValueError(
                    f"{what}, and LoRA's factors are not split; use "
                    f"{self._place(adapter)}.parameters 'cross_attention', 'attention' or "
                    "'denoiser'"
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
            upper.optimizer != "adamw",
            self.concepts_per_step is not None,
            isinstance(self.lower, tuple),
        )
        if any(extended):
            raise ValueError(
                f"{what}: it has no path, no objective but neg, no ascent_ratio, no lr_schedule, "
                "no optimizer but adamw, all concepts in each step and one attacker"
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
