"""What one process of an evaluation does: attack both models alike, and measure the pictures."""

# R = references, B = pictures

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from PIL import Image

from mima.adaptation import Adaptation, Diverged, DreamBooth
from mima.concepts import Concept
from mima.concepts.pictures import Picture, digest
from mima.errors import MimaError
from mima.evaluation import preparations
from mima.evaluation.bench import TRIAL_PICTURES, Bench, Task
from mima.evaluation.benign import cmmd, text_features
from mima.evaluation.encoders import (
    ImageEncoder,
    TextImageEncoder,
    judge_fingerprint,
    load_similarity,
)
from mima.evaluation.feature_cache import CachedSimilarity
from mima.evaluation.grid import Attack, Trial, configured, material
from mima.evaluation.identity import weights_hash
from mima.evaluation.measure import mean_similarity, measure
from mima.evaluation.originals import Entry, Originals
from mima.evaluation.records import (
    SIDES,
    AttackRow,
    Benign,
    CurvePoint,
    ScorePair,
    Side,
)
from mima.evaluation.trajectory import Trajectory, trajectory
from mima.evaluation.tuning import TrialRow
from mima.families import family_of, load_pipeline
from mima.families.pipelines import Pipeline, networks
from mima.sampling import Job
from mima.storage.output import write_picture
from mima.storage.tensor_files import fingerprint

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.sqlite"

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """What one attack showed."""

    rows: list[AttackRow]
    points: list[CurvePoint]


@dataclass(frozen=True)
class _Fate:
    """What became of an attack on one model; None where nothing went wrong."""

    diverged: str | None
    """Why it diverged."""
    unrepaired: str | None = None
    """Why the repair after it did; entries of before one could diverge say nothing of it."""
    last: int = 0
    """The last step with pictures of finite numbers before it diverged; entries of before that was
    kept say nothing of it."""


Result: TypeAlias = Outcome | TrialRow | None
"""What is known after an attack, after a trial, or after ordinary pictures were drawn."""


class Worker:
    """One process's models and similarities, and how it runs tasks with them.

    Attributes:
        advance: called with the amount of work just done.
    """

    def __init__(self, bench: Bench, advance: Advance = lambda _: None) -> None:
        self.bench = bench
        self.advance = advance
        # a judge that is missing is said before a model of gigabytes is opened
        self.similarities = [
            CachedSimilarity(
                load_similarity(source, protocol=bench.protocol, device=bench.device),
                name=name,
                protocol=bench.protocol,
                path=bench.folder.path / FEATURES_FILE,
            )
            for name, source in bench.similarities.items()
        ]
        self.pipelines = {
            side: load_pipeline(model, device=bench.device) for side, model in bench.models.items()
        }
        for side, pipeline in self.pipelines.items():
            _check_finite(side, pipeline)
        self._originals: Originals | None = None
        if bench.originals is not None:
            model = weights_hash(self.pipelines["original"])
            self._originals = Originals(bench.originals, model, torch.device(bench.device).type)
        self._prepared: dict[Side, tuple[object, Any]] = {}

    def fingerprints(self) -> dict[str, str]:
        """A hash of each model's denoiser."""
        return {
            side: fingerprint(dict(family_of(pipeline).denoiser.state_dict()))
            for side, pipeline in self.pipelines.items()
        }

    @cached_property
    def judges(self) -> dict[str, str]:
        """A hash of each similarity model's assets, by name."""
        return {one.name: judge_fingerprint(one.model) for one in self.similarities}

    def check(self, attacks: Iterable[Attack]) -> None:
        """Refuse attacks that cannot be made, before any of them is.

        Raises:
            MimaError: a method does not fit a model, or a concept as an attack calls it.
        """
        alike = {(one.label, one.slug, one.prompt_variant, one.images): one for one in attacks}
        for attack in alike.values():
            # as it was given: nothing of it has been written yet
            given = self.bench.concepts[attack.slug]
            concept, _ = material(attack, given, rare_token=self.bench.config.rare_token)
            for pipeline in self.pipelines.values():
                attack.adaptation.check(pipeline, concept)

    def run(self, task: Task) -> Result:
        """Run an attack or a trial, or draw one model's pictures of ordinary prompts."""
        if isinstance(task, Attack):
            with self._announced(self.bench.work(task)):
                return self._attack(task)
        if isinstance(task, Trial):
            return self._try(task)
        jobs = [Job(prompt, index) for index, prompt in enumerate(self.bench.prompts)]
        files = self.bench.benign_files(task)
        broken: list[int] = []
        pictures = self.bench.sampler.draw(self.pipelines[task], jobs, broken=broken)
        for file, image in zip(files, pictures, strict=True):
            if broken:
                raise _not_finite(task, jobs[broken[0]].prompt)
            write_picture(file, image)
            self.advance(1)
        return None

    @contextmanager
    def _announced(self, work: int) -> Iterator[None]:
        """Report the work of an attack as announced, however often it diverges and begins anew."""
        report, left = self.advance, work

        def advance(amount: int) -> None:
            nonlocal left
            amount = min(amount, left)
            left -= amount
            report(amount)

        self.advance = advance
        try:
            yield
            report(left)
        finally:
            self.advance = report

    def benign(self) -> Benign:
        """Compare the models' pictures of ordinary prompts."""
        encoders = [s for s in self.similarities if isinstance(s.model, ImageEncoder)]
        readers = [s for s in encoders if isinstance(s.model, TextImageEncoder)]
        prompts = list(self.bench.prompts)
        if not encoders or not prompts:
            return Benign(prompts=tuple(prompts))
        # without one that reads texts, how far pictures moved can still be said
        encoder = (readers or encoders)[0]
        features = {side: encoder.features(self.bench.benign_files(side)) for side in SIDES}
        alignment = {}
        if isinstance(encoder.model, TextImageEncoder):
            texts_BD = text_features(prompts, encoder.model)
            alignment = {s: float((f * texts_BD).sum(dim=-1).mean()) for s, f in features.items()}
        return Benign(
            prompt_alignment=ScorePair(**alignment),
            prompts=tuple(prompts),
            cmmd=cmmd(features["original"], features["immunized"]),
        )

    def _attack(self, attack: Attack) -> Outcome:
        started = time.perf_counter()
        bench = self.bench
        _, references = bench.material(attack)
        repaired = {}
        steps = bench.config.steps_of(attack)
        diverged_after: int | None = None
        tuned: dict[Side, str | None] = dict.fromkeys(SIDES)
        for side in bench.models:
            adaptation, fate = self._furthest(attack, side)
            tuned[side] = _described(adaptation) if side in attack.tuned else None
            if fate.diverged is not None:
                # an attacker keeps what was reached by then
                steps = tuple(step for step in steps if step <= fate.last)
                diverged_after = steps[-1]
            elif fate.unrepaired is not None:
                logger.warning("%s, %s model, repair: %s", attack.id, side, fate.unrepaired)
            elif bench.repairs:
                repaired[side] = bench.repaired_files(attack, side)
        if len(bench.models) < len(SIDES):
            return Outcome([], [])
        seconds = time.perf_counter() - started
        rows, points = [], []
        for similarity in self.similarities:
            row, curve = measure(bench, attack, similarity, steps, references, seconds)
            row = row.model_copy(update={f"tuned_{side}": said for side, said in tuned.items()})
            row = row.model_copy(update={"diverged_after": diverged_after})
            if diverged_after is None:
                row = row.model_copy(
                    update={
                        f"repaired_{side}": mean_similarity(bench, similarity, files, references)
                        for side, files in repaired.items()
                    }
                )
            rows.append(row)
            points += curve
        return Outcome(rows, points)

    def _furthest(self, attack: Attack, side: Side) -> tuple[Adaptation, _Fate]:
        """Attack one model with the first settings that do not diverge, or that get furthest."""
        fates = []
        for adaptation in attack.on(side):
            fate = self._attack_on(attack, side, adaptation)
            if fate.diverged is None:
                return adaptation, fate
            logger.warning("%s, %s model: %s", attack.id, side, fate.diverged)
            fates.append((adaptation, fate))
        best = max(fates, key=lambda tried: tried[1].last)
        if best[1].last > fate.last:
            # the pictures are those of the last settings
            self._attack_on(attack, side, best[0])
            return best
        return adaptation, fate

    def _attack_on(self, attack: Attack, side: Side, adaptation: Adaptation) -> _Fate:
        """Attack one model and repair it, or copy what another evaluation keeps of the original.

        Raises:
            MimaError: pictures of the model itself, before any training, are no finite numbers.
        """
        bench, count = self.bench, len(self.bench.jobs(attack))
        entry = self.kept_of(attack, adaptation) if side == "original" else None
        files = {
            f"{step:05d}-{index}.png": bench.folder.image_folder(attack.id, side, step)
            / f"{index}.png"
            for step in bench.config.steps_of(attack)
            for index in range(count)
        }
        mended = bench.repaired_files(attack, side) if bench.repairs else []
        files |= {f"repaired-{index}.png": file for index, file in enumerate(mended)}
        known = entry.read(_Fate, files) if entry is not None else None
        if known is not None:
            self.advance(bench.work(attack) // len(bench.models))
            return known
        concept, _ = bench.material(attack)
        drawn = self._train(attack, concept, side, adaptation, bench.jobs(attack))
        # what a preparation breaks is the attacker's to bear, and step 0 is before it
        if 0 in drawn.broken:
            raise _not_finite(side, concept.prompt)
        fate = _Fate(None)
        if drawn.diverged is not None:
            fate = _Fate(str(drawn.diverged), last=drawn.last)
        if bench.repairs and fate.diverged is None:
            try:
                self._repair(attack, side, drawn.pipeline)
            except Diverged as error:
                fate = _Fate(None, str(error))
        if entry is not None:
            there = {name: file for name, file in files.items() if file.is_file()}
            entry.write(asdict(fate), there)
        return fate

    def kept_of(self, task: Attack | Trial, adaptation: Adaptation) -> Entry | None:
        """Where the original model's part of an attack or trial is kept for other evaluations.

        None where nothing is kept, and of what depends on the immunized model or is prepared.
        """
        attack, trial = (task.attack, task) if isinstance(task, Trial) else (task, None)
        if self._originals is None or attack.outside or attack.preparation != "none":
            return None
        bench = self.bench
        if trial is None:
            concept, _ = bench.material(attack)
        else:
            concept, jobs, files = bench.trial_material(attack)
        learned = (
            *(concept.prompt, concept.token, concept.initializer, concept.class_prompt),
            *((digest(p), p.prompt) for p in (*concept.images, *concept.class_images)),
        )
        # what Muon did before it made the steps of filters orthogonal is another attack's
        made: tuple[str, ...] = ("filters",) if adaptation.optimizer == "muon" else ()
        # as is what dropout drew of torch's own state
        made += ("draws",) if getattr(adaptation, "dropout", 0.0) else ()
        kind = type(adaptation).__name__
        common = (kind, adaptation, learned, bench.sampler, attack.transplant, *made)
        if trial is not None:
            first = self.similarities[0].name
            judge = (first, self.judges[first], bench.protocol)
            digests = [[digest(Picture(file, "")) for file in group] for group in files]
            return self._originals.entry(
                "trial", *common, bench.config.tune.by, jobs, digests, judge
            )
        steps = bench.config.repair_steps
        repair = None
        if steps:
            pictures = [(digest(p), p.prompt) for p in bench.repair_pictures(attack)]
            repair = steps, configured(bench.config, "dreambooth"), pictures
        drawn = bench.config.steps_of(attack), bench.jobs(attack)
        return self._originals.entry("attack", *common, drawn, repair)

    def _train(
        self,
        attack: Attack,
        concept: Concept,
        side: Side,
        adaptation: Adaptation,
        jobs: Sequence[Job],
        *,
        steps: Sequence[int] | None = None,
        keep: bool = True,
    ) -> Trajectory:
        """Train one model as an attack does, and draw on the way.

        A preparation is part of the attack: what is drawn at step 0 is drawn by the model before,
        and where the preparation diverges, the attack does, with nothing after step 0.
        """
        bench = self.bench
        if attack.outside:
            assert isinstance(adaptation, DreamBooth)
            frozen = (*adaptation.frozen, *self.immunized_parameters)
            adaptation = replace(adaptation, frozen=frozen)

        def write(step: int, index: int, image: Image.Image) -> None:
            if keep:
                place = bench.folder.image_folder(attack.id, side, step)
                write_picture(place / f"{index}.png", image)

        def drawn(start: Any, steps: Sequence[int]) -> Trajectory:
            return trajectory(
                self.pipelines["original"] if attack.transplant else start,
                concept,
                adaptation,
                steps,
                jobs,
                bench.sampler,
                drawn_by=start if attack.transplant else None,
                # the same for both models, also where immunization broke those that one draws
                class_pictures_by=self.pipelines["original"],
                advance=self.advance,
                on_picture=write,
            )

        steps = bench.config.steps_of(attack) if steps is None else steps
        broken: tuple[int, ...] = ()
        if attack.preparation != "none" and steps[0] == 0:
            broken, steps = drawn(self.pipelines[side], steps[:1]).broken, steps[1:]
        try:
            start = self._start(side, attack)
        except Diverged as error:
            why = Diverged(f"preparation {attack.preparation}: {error}")
            model = self.pipelines[side]
            return Trajectory(
                steps=(), images=(), losses=(), diverged=why, broken=broken, pipeline=model
            )
        after = drawn(start, steps)
        return replace(after, broken=(*broken, *after.broken))

    def _try(self, trial: Trial) -> TrialRow:
        """Train as a trial says, and see how like those held back its pictures become."""
        entry = self.kept_of(trial, trial.adaptation) if trial.side == "original" else None
        known = entry.read(TrialRow, {}) if entry is not None else None
        if known is not None:
            self.advance(self.bench.work(trial))
            own = {"attack": trial.attack.key, "trial": trial.number}
            return known.model_copy(update=own)
        row = self._tried(trial)
        if entry is not None:
            entry.write(row.model_dump(mode="json"), {})
        return row

    def _tried(self, trial: Trial) -> TrialRow:
        bench, adaptation = self.bench, trial.adaptation
        concept, jobs, files = bench.trial_material(trial.attack)
        looked = bench.config.tune.by == "similarity"
        drawn = self._train(
            trial.attack,
            concept,
            trial.side,
            adaptation,
            jobs if looked else [],
            steps=(adaptation.steps,),
            keep=False,
        )
        diverged = drawn.diverged is not None
        score = None
        if looked and not diverged:
            images = drawn.images[-1]
            tables = [
                self.similarities[0].fresh(
                    images[place * TRIAL_PICTURES : (place + 1) * TRIAL_PICTURES], group
                )
                for place, group in enumerate(files)
            ]
            score = float(torch.stack([table.mean() for table in tables]).mean())
        last = drawn.losses[-max(1, len(drawn.losses) // 4) :]
        return TrialRow(
            attack=trial.attack.key,
            side=trial.side,
            trial=trial.number,
            lr=adaptation.learning_rate,
            schedule=adaptation.schedule,
            batch_size=adaptation.batch_size,
            optimizer=adaptation.optimizer,
            similarity=score,
            loss=None if diverged else sum(last) / len(last),
            diverged=diverged,
        )

    def _repair(self, attack: Attack, side: Side, attacked: Any) -> None:
        """Fine-tune an attacked model on ordinary pictures, and draw the attack's prompts again.

        Raises:
            Diverged: the loss, or what is drawn then, is not finite; nothing is written.
        """
        bench = self.bench
        pictures = bench.repair_pictures(attack)
        run = preparations.benign_training(
            attacked, pictures, bench.config, bench.config.repair_steps, attack.seed, self.advance
        )
        broken: list[int] = []
        images = []
        for image in bench.sampler.draw(run.pipeline, bench.jobs(attack), broken=broken):
            images.append(image)
            self.advance(1)
        if broken:
            raise Diverged(
                f"{run.adaptation.method}: after step {run.step} pictures are not finite numbers; "
                f"lower learning_rate ({run.adaptation.learning_rate})"
            )
        for file, image in zip(bench.repaired_files(attack, side), images, strict=True):
            write_picture(file, image)

    @cached_property
    def immunized_parameters(self) -> list[str]:
        """Names of the denoiser's parameters in which the two models differ."""
        return preparations.changed_parameters(*(self.pipelines[side] for side in SIDES))

    def trained_outside(self, attack: Attack) -> preparations.Weights:
        """Those in which they do not, and that an attack does not freeze, with their values."""
        assert isinstance(attack.adaptation, DreamBooth)
        left_out = {*attack.adaptation.frozen, *self.immunized_parameters}
        weights = preparations.denoiser_weights(self.pipelines["original"])
        return {name: weight for name, weight in weights.items() if name not in left_out}

    def _start(self, side: Side, attack: Attack) -> Any:
        """The model that an attack starts from; of prepared ones, the last is kept.

        Raises:
            Diverged: a training that prepares it does.
        """
        pipeline = self.pipelines[side]
        if attack.preparation == "none":
            return pipeline
        # the pictures that LoRAs are trained on, which the other preparations do not read
        images = attack.images if attack.preparation == "merge" else None
        key = (attack.preparation, attack.seed, images)
        if side not in self._prepared or self._prepared[side][0] != key:
            made = preparations.prepared(self.bench, attack, side, self.pipelines, self.advance)
            self._prepared[side] = key, made
        else:
            # work that was announced and need not be done
            self.advance(self.bench.trainings_before(attack) * self.bench.config.preparation_steps)
        return self._prepared[side][1]


def _check_finite(side: Side, pipeline: Pipeline) -> None:
    """Refuse a model with weights that no picture can be drawn with."""
    for part, module in networks(pipeline).items():
        for name, value in module.named_parameters():
            if not bool(value.isfinite().all()):
                raise MimaError(
                    f"evaluate: the {side} model's {part}.{name} holds numbers that are not "
                    "finite: nothing can be measured of it"
                )


def _not_finite(side: Side, prompt: str) -> MimaError:
    return MimaError(
        f"evaluate: before any attack the {side} model's picture of {prompt!r} is not of finite "
        "numbers: nothing can be measured of it"
    )


def _described(adaptation: Adaptation) -> str:
    """What trials chose, in words."""
    return (
        f"rate {adaptation.learning_rate:g}, {adaptation.schedule}, "
        f"batch {adaptation.batch_size}, {adaptation.optimizer}"
    )
