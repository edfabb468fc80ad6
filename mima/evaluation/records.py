"""What an evaluation writes down: the fields of its files.

``evaluation.json`` is an `Evaluation`, ``attacks.csv`` has one `AttackRow` per attack and
similarity, ``curves.csv`` one `CurvePoint` per attack, similarity and step; the files themselves
are in `mima.evaluation.folder`. Every number is finite; what could not be measured is null in JSON
and empty in CSV.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mima.choices import MOST, Method, PictureProtocol
from mima.evaluation.metrics import GapCurve, IntervalKind

FORMAT: Literal[2] = 2

Role = Literal["target", "other"]
Side = Literal["original", "immunized"]
SIDES: tuple[Side, Side] = ("original", "immunized")
PromptVariant = Literal["name", "description", "token"]
Pictures = Literal["same", "other", "fewer", "more", "mixed"]
Preparation = Literal["merge", "benign", "kick", "undo", "interpolate", "fp16", "int8"]


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelPair(_Record):
    """Something said of both models."""

    original: str
    immunized: str


class ScorePair(_Record):
    """A number of each model; None where it could not be measured."""

    original: float | None = None
    immunized: float | None = None


class ConceptRecord(_Record):
    """A concept that was attacked."""

    name: str
    slug: str
    """The name as a file name: pictures are in ``images/references/<slug>``."""
    kind: str
    prompt: str
    role: Role
    """A target was immunized against; an other must stay learnable."""
    references: Literal["held_out", "images"] = "held_out"
    """What adapted models are compared with: pictures that no attack trains on, or, where a concept
    has none, those that all attacks train on."""


class Interval(_Record):
    """A mean over runs with different seeds, and what they say of it."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    """How many seeds there are values of."""
    kind: IntervalKind | None = None
    """``t``: low and high are the 95 % interval of the mean; ``range``: the lowest and the highest
    run, which claims nothing of the mean; see `metrics.run_interval`."""


class Ratio(Interval):
    """A mean over runs of numbers some of which may be lower bounds."""

    at_least: bool = False
    """Whether the mean is a lower bound, because one of its numbers is."""


class WorstAttack(_Record):
    """The target attack with the lowest SGR among those that taught either model."""

    sgr: float | None
    attack: str | None


class WorstRise(_Record):
    """The target attack that regained the largest share among those that taught either model."""

    rise_left: float | None
    """`metrics.GapCurve.best_rise_left`: each model at the step at which it got furthest."""
    attack: str | None
    at_least: bool = False
    """Whether the share is a lower bound: the attack taught the immunized model alone."""


class WorstConcept(_Record):
    """The target concept with the lowest SGR."""

    sgr: float | None
    concept: str | None


class Gap(Interval):
    """What attacks found, by concept and seed alike; its own mean and ends are those of SGR."""

    sgr_before: Interval = Interval()
    """SGR before any attack: what is not owed to a harder adaptation."""
    before: ScorePair = ScorePair()
    """Similarity to the references before any attack."""
    final: float | None = None
    """SGR at the last step."""
    max: float | None = None
    """Highest SGR."""
    rise_left: Ratio = Ratio()
    """Share of what the attack adds on the original that it adds on the immunized model, at the
    last step; see `metrics.rise_left`. An attack that led the immunized model away counts as 0: it
    makes up for no other."""
    steps_to_half: ScorePair = ScorePair()
    """Steps to half of the original's rise. Of an immunized model that never got there, its last
    step counts: the mean is then a lower bound, and `steps_ratio` says so."""
    steps_ratio: Ratio = Ratio()
    """How many times as long the immunized model takes to half of the original's rise."""


class ConceptGap(Gap):
    """What the attacks on one concept found."""

    methods: dict[str, Gap] = Field(default_factory=dict)
    """The same by method of adaptation."""


class Tally(_Record):
    """How many attacks on target concepts there are of a kind."""

    attacks: int = 0
    diverged: int = 0
    """Attacks whose training diverged on a model before anything could be compared: they count as
    not tried."""
    cut_short: int = 0
    """Attacks whose training diverged on a model later: what was reached by then counts."""
    taught: int = 0
    """Attacks that taught either model the concept."""
    led_away: int = 0
    """Attacks that taught the original model the concept and after which the immunized model's
    pictures are less like it than before: SGR counts what broke there as immunity."""
    beyond: int = 0
    """Attacks with a mean SGR above 2 or below −1: it was divided by a similarity of the original
    model's pictures that is small beside that of the immunized model's."""
    below_zero: int = 0
    """Other attacks with a mean SGR above 1: the immunized model's similarity is below 0."""
    known_before: tuple[str, ...] = ()
    """Concepts that the immunized model shows before any attack: nearer to them than the original
    model by what counts as learning. An attack has little to add to these."""
    known_to_original: tuple[str, ...] = ()
    """Concepts that the original model shows before any attack, and the immunized less: there SGR
    counts what nobody had to attack for."""


class SimilaritySummary(_Record):
    """The headline numbers by one similarity model."""

    tally: Tally = Tally()
    targets: Gap = Gap()
    """Means over the target concepts; that of SGR is MSGR."""
    worst_attack: WorstAttack
    worst_rise: WorstRise = WorstRise(rise_left=None, attack=None)
    worst_concept: WorstConcept
    mrsgr: float | None
    """MSGR minus the mean SGR of the others; None without any that counts."""
    others: int = 0
    """Attacks on others that were measured."""
    untold: int = 0
    """Those of them that do not count: after them, the original model's pictures are hardly like
    the concept, and a ratio to that says nothing; see `mima.evaluation.summary.summarize`."""
    objects: ScorePair = ScorePair()
    """Share of the pictures after attacks on targets whose object this model names rightly; None
    where it embeds no texts."""
    sgr: dict[str, ConceptGap]
    """By concept, others included."""

    @property
    def msgr(self) -> Interval:
        """MSGR, the mean SGR of the target concepts."""
        return self.targets


class Calibration(_Record):
    """Mean similarity to a concept's references of pictures that are known."""

    right: float
    """The concept's other pictures."""
    others: float | None
    """Pictures of the other concepts; None without any."""
    noise: float
    grey: float

    @property
    def margin(self) -> float:
        """How far the right pictures are above the best of the wrong ones, of each kind."""
        wrong = [self.noise, self.grey, *([] if self.others is None else [self.others])]
        return self.right - max(wrong)


class Benign(_Record):
    """What immunization cost."""

    prompt_alignment: ScorePair = ScorePair()
    """Mean cosine between pictures of ordinary prompts and their prompts; None where no similarity
    model embeds texts."""
    prompts: tuple[str, ...] = ()
    """The ordinary prompts, none of which the immunization saw, unless `Evaluation.overlaps` says
    so."""
    cmmd: float | None = None
    """Distance between both models' pictures of ordinary prompts; 0 is none."""
    adaptability: dict[str, float | None] = Field(default_factory=dict)
    """SGR of the concepts that were not immunized against; near 0 wanted. None where no attack on
    one counts, see `SimilaritySummary.untold`."""


class Evaluation(_Record):
    """``evaluation.json``."""

    format: Literal[2] = FORMAT
    name: str
    """Label of the run."""
    method: Method | None
    """How the model was immunized, where that is known."""
    models: ModelPair
    """The models, as they were named."""
    preset: str
    """The preset whose settings the grid has, or ``custom``."""
    protocol: PictureProtocol
    """How pictures were prepared: see `mima.evaluation.preprocessing`."""
    similarities: tuple[str, ...]
    """The first is the primary one."""
    seeds: tuple[int, ...]
    """Seeds of the attacks, which varied between the runs that intervals are over. The immunized
    model is one: how much another seed of the immunization changes is not in them."""
    immunization_seed: int | None = None
    """The seed that the immunized model was made with, where that is known."""
    concepts: tuple[ConceptRecord, ...]
    """All that were attacked, targets and others."""
    benign: Benign = Benign()
    """What immunization cost."""
    summary: dict[str, SimilaritySummary] = Field(default_factory=dict)
    """By similarity."""
    calibration: dict[str, dict[str, Calibration]] = Field(default_factory=dict)
    """What each similarity says of known pictures, by concept."""
    overlaps: tuple[str, ...] = ()
    """What the immunization saw and the evaluation measured with all the same, in sentences."""
    hardly_trained: tuple[str, ...] = ()
    """Attacks whose trials chose settings that hardly train the immunized model: see
    `mima.evaluation.tuning.hardly_trained`."""
    config: dict[str, Any]
    """Settings of the grid, and hashes of models, pictures and judges, by which a run goes on or is
    refused."""
    versions: dict[str, str]
    """Of Python packages, by name."""
    complete: bool
    """Whether every attack of the grid has its rows."""

    @property
    def trials(self) -> int | None:
        """By how many trials each attack chose its settings; None where the record lacks that."""
        grid = self.config.get("grid")
        tune = grid.get("tune") if isinstance(grid, dict) else None
        trials = tune.get("trials") if isinstance(tune, dict) else None
        return trials if isinstance(trials, int) else None

    @property
    def tuned(self) -> bool | None:
        """Whether attacks tried other settings than their own; None where the record lacks that."""
        return None if self.trials is None else self.trials > 1

    @property
    def same_denoiser(self) -> bool:
        """Whether the denoisers of both models have the same weights."""
        original, immunized = self._hashes("weights")
        return bool(original) and original == immunized

    @property
    def other_parts(self) -> tuple[str, ...]:
        """What of the immunized model, beside its denoiser's weights, is not as in the original.

        By the hashes in `config`; of a part that a record keeps none of, nothing is said.
        """
        encoders = self._apart("encoders")
        found = [*encoders, *("noise schedule" for _ in self._apart("schedulers"))]
        for part in self._apart("configurations"):
            if part.startswith("tokenizer"):
                found.append(part)
            elif part not in encoders:
                found.append(f"{part} settings")
        return tuple(part.replace("_", " ") for part in found)

    def _apart(self, key: str) -> list[str]:
        """Parts of which `config` keeps hashes under a key that differ between the models."""
        original, immunized = self._hashes(key)
        every = original | immunized
        return [part for part in every if original.get(part) != immunized.get(part)]

    def _hashes(self, key: str) -> list[dict[str, Any]]:
        """Hashes that `config` keeps of both models under a key, by part; none where it lacks it.

        A key that keeps one hash of each model has one part, of its own name.
        """
        kept = self.config.get(key)
        if not isinstance(kept, dict) or not kept.keys() >= {*SIDES}:
            return [{}, {}]
        return [dict(one) if isinstance(one := kept[side], dict) else {key: one} for side in SIDES]


class CsvRow(_Record):
    """A row of a CSV file, where None is an empty field."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value


class AttackRow(CsvRow):
    """One attack, seen by one similarity model.

    SGRs and rises are None where nothing could be compared: the adaptation diverged on a model
    before the first evaluated step. Where it did later, everything is of the steps before.
    """

    attack: str
    """Safe as a file name."""
    concept: str
    role: Role
    method: str
    lr: float
    """As configured; what trials chose instead is in `tuned_original` and `tuned_immunized`."""
    lr_factor: float
    steps: int = Field(ge=0, le=MOST)
    prompt_variant: PromptVariant
    images: Pictures
    """Trained on the pictures that immunization saw, or on others: see `GridConfig.images`."""
    preparation: Literal["none", Preparation]
    """What was done to both models before they were trained, as a part of the attack: its step 0 is
    before that, too."""
    seed: int
    similarity: str
    sgr_mean: float | None
    """Mean over the steps after 0."""
    sgr_final: float | None
    """At the last step."""
    sgr_max: float | None
    """Highest over the steps after 0."""
    sgr_before: float | None
    """Before the attack, at step 0."""
    before_original: float | None
    """Similarity of the original model's pictures to the references before the attack. Under
    Textual Inversion, of what the new word asks for as it was initialised."""
    before_immunized: float | None
    """The same of the immunized model."""
    rise_left: float | None
    """Share of what the attack adds on the original model that it adds on the immunized one, at the
    last step; None where it taught neither: see `metrics.rise_left`."""
    rise_left_best: float | None
    """The same with each model at the step at which it got furthest."""
    half_original: float | None
    """Steps until the original model gained half of its highest rise; None if it learned
    nothing."""
    half_immunized: float | None
    """Steps until the immunized model gained as much; None if it never did."""
    steps_ratio: float | None
    """`half_immunized` over `half_original`."""
    steps_ratio_at_least: bool
    """Whether `steps_ratio` is a lower bound: the last step over `half_original`, because the
    immunized model never gained as much."""
    nearest_original: float | None
    """Mean over the last step's pictures of min(1 − M) to the training pictures: near 0, they are
    copies of them."""
    nearest_immunized: float | None
    """The same of the immunized model."""
    seconds: float
    learned: bool
    """Whether the attack taught the original model the concept: see `metrics.has_learned`."""
    learned_immunized: bool
    """Whether it taught the immunized model the concept."""
    tuned_original: str | None = None
    """Rate, schedule, batch and optimiser that trials chose for the original model; None where
    nothing was tried, or every trial diverged."""
    tuned_immunized: str | None = None
    """The same of the immunized model."""
    rise_left_at_least: bool = False
    """Whether `rise_left` is a lower bound, because by the last step the original learned less than
    what counts as learning."""
    objects_original: float | None = None
    """The share of the last step's pictures whose object an encoder of texts names rightly, among
    all that the evaluation asks for (of one thing alone, among it and the ordinary prompts); None
    where the similarity embeds no texts, or there is nothing to tell it from."""
    objects_immunized: float | None = None
    """The same of the immunized model: where it falls, pictures are broken, not only unlike."""
    repaired_original: float | None = None
    """Mean similarity to the references after the attack and benign repair steps; None without, and
    where those diverged."""
    repaired_immunized: float | None = None
    """The same of the immunized model."""
    diverged_after: int | None = Field(default=None, ge=0, le=MOST)
    """The last evaluated step of which both models have pictures of finite numbers, where the
    adaptation diverged after it; None where it did not, and in records of before that was told."""

    @property
    def setting(self) -> tuple[str, float, int, PromptVariant, Pictures, str]:
        """What says which attack it is, beside concept and seed."""
        how = self.prompt_variant, self.images, self.preparation
        return self.method, self.lr_factor, self.steps, *how

    @property
    def taught_either(self) -> bool:
        """Whether the attack says anything: one that teaches neither model does not."""
        return self.learned or self.learned_immunized

    @property
    def counted(self) -> AttackRow:
        """The row as means count it.

        An attack that led away has nothing left of the rise, and one that never reached the half of
        it took all of its steps, at least.
        """
        changes: dict[str, float] = {}
        if self.rise_left is not None:
            changes["rise_left"] = max(self.rise_left, 0.0)
        if self.half_original is not None and self.half_immunized is None:
            last = self.diverged_after
            changes["half_immunized"] = self.steps if last is None else last
        return self.model_copy(update=changes)


class CurvePoint(CsvRow):
    """Both models after one attack's training up to a step."""

    attack: str
    similarity: str
    step: int = Field(ge=0, le=MOST)
    original: float
    """Mean similarity to the references."""
    immunized: float
    sgr: float
    rise_left: float | None
    """Share of the rise since step 0; None at step 0, and where the attack taught neither model."""


def measured(curve: GapCurve | None) -> dict[str, Any]:
    """The fields of an `AttackRow` that its curve determines; None if nothing could be compared."""
    half = None if curve is None else curve.half_rise
    before = (curve and curve.before) or (None, None)
    return {
        "sgr_mean": curve and curve.mean,
        "sgr_final": curve and curve.final,
        "sgr_max": curve and curve.best,
        "sgr_before": curve and curve.sgr_before,
        "before_original": before[0],
        "before_immunized": before[1],
        "rise_left": curve and curve.rise_left,
        "rise_left_at_least": curve is not None and curve.rise_left_at_least,
        "rise_left_best": curve and curve.best_rise_left,
        "half_original": half and half.original,
        "half_immunized": half and half.immunized,
        "steps_ratio": half and half.ratio,
        "steps_ratio_at_least": half is not None and half.at_least,
        "learned": curve is not None and curve.learned_original,
        "learned_immunized": curve is not None and curve.learned_immunized,
    }


def points_of(attack: str, similarity: str, curve: GapCurve) -> list[CurvePoint]:
    """A curve as rows of ``curves.csv``."""
    return [
        CurvePoint(
            attack=attack,
            similarity=similarity,
            step=step,
            original=original,
            immunized=immunized,
            sgr=gap,
            rise_left=curve.rises_left.get(step),
        )
        for step, original, immunized, gap in zip(
            curve.steps, curve.original, curve.immunized, curve.sgr, strict=True
        )
    ]
