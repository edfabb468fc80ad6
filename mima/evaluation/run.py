"""Attack two models alike, over a grid, in parallel processes, and write down what happened."""

# R = references, B = pictures

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mima._version import installed_versions
from mima.adaptation import LoRA, configure
from mima.checkpoint import fingerprint
from mima.concepts import Concept, load_concepts
from mima.config import Method
from mima.distributed import local_device
from mima.errors import MimaError
from mima.evaluation.adapters import Adapter, merged
from mima.evaluation.alignment import cmmd, text_features
from mima.evaluation.attack import by_prompt, trajectory
from mima.evaluation.attacks import Attack, GridConfig, attack_grid, grid_config, material
from mima.evaluation.cache import CachedSimilarity
from mima.evaluation.metrics import GapCurve, sgr
from mima.evaluation.records import (
    AttackRow,
    Benign,
    ConceptRecord,
    CurvePoint,
    Evaluation,
    EvaluationFolder,
    ModelPair,
    Role,
    ScorePair,
    Side,
)
from mima.evaluation.sampling import Job, Sampler
from mima.evaluation.similarity import PictureProtocol, TextImageEncoder, load_similarity
from mima.evaluation.summary import summarize
from mima.families import family_of, load_pipeline
from mima.output import check_folder, write_picture
from mima.pictures import Picture
from mima.problem import ordinary_captions, spread

logger = logging.getLogger(__name__)

SIDES: tuple[Side, Side] = ("original", "immunized")
FEATURES_FILE = "features.sqlite"
# sampling seeds of attacks with different seeds never meet
SEED_STRIDE = 1000

Advance = Callable[[int], None]
Progress = Callable[[int, int, str], None]
"""Called with work done, all work, and what was just finished, if anything."""


def evaluate(
    original: Any,
    immunized: Any,
    concepts: Any,
    *,
    output: str | Path,
    others: Any = (),
    preset: str = "quick",
    settings: Mapping[str, Any] | None = None,
    similarities: Sequence[str | Path] = ("clip",),
    protocol: PictureProtocol = "standard",
    processes: int | None = None,
    device: str | None = None,
    name: str | None = None,
    method: Method | None = None,
    captions: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack a model before and after immunization, and measure how much harder learning became.

    Every attack of the grid trains both models on the same batches with the same noise and draws
    the same pictures. Pictures, rows and the summary are written as they come; called again with
    the same arguments, a stopped evaluation goes on after the last finished attack.

    Degenerate cases. Where an attack fails on the original model, M(x_r, x_A) ≤ 0, SGR is 0. A
    concept without held-out pictures is compared with its training pictures, with a warning and a
    note in its record; one picture is a mean of one; a concept without pictures cannot be made. An
    attack whose training diverges is compared up to the last step that both models reached, and has
    no SGR if that is step 0.

    Args:
        original: the model before immunization: a diffusers folder, a .safetensors file, a hub id,
            ``"embedded"``, or a pipeline in memory (with one process).
        immunized: the model after it, likewise.
        concepts: concepts immunized against, or whatever `load_concepts` reads. Those of kind
            ``"benign"`` count as others.
        output: folder for the results: see `mima.evaluation.records`.
        others: concepts that must stay learnable; may be empty.
        preset: ``"quick"``, ``"standard"`` or ``"adversarial"``.
        settings: settings of `GridConfig` that replace the preset's.
        similarities: what `load_similarity` opens; the first is the primary one, and the first that
            embeds texts measures benign quality.
        protocol: how pictures are prepared for them; see `mima.evaluation.similarity`.
        processes: attacks at a time, each with one thread. Default: one per core on a CPU; one on a
            GPU or for pipelines in memory, in this process and with its threads.
        device: where to compute; by default a GPU where there is one.
        name: label of the run; default ``method``, or the immunized model's name.
        method: how the model was immunized, for comparisons.
        captions: a file of ordinary prompts, one per line; default those that ship with mima.
        overwrite: discard what an earlier evaluation left in `output`.
        progress: called with work done, all work (training steps and pictures), and the name of an
            attack that was just finished, or "".

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        MimaError: a model, concept, setting or the output folder cannot be used; or the folder
            holds an evaluation with other settings.

    Example:
        >>> result = evaluate("model", "immunized", ["cat"], output="results", others=["dog"])
        >>> result.summary["clip"].worst_attack.sgr
    """
    config = grid_config(preset, settings)
    sampler = _sampler(config)
    found, kept = load_concepts(concepts), load_concepts(others) if len(others) else []
    by_slug = _with_slugs([*found, *kept])
    roles: dict[str, Role] = {
        slug: "other" if concept in kept or concept.kind == "benign" else "target"
        for slug, concept in by_slug.items()
    }
    if "target" not in roles.values():
        raise MimaError("evaluate: needs a concept that the model was immunized against")
    names = _similarity_names(similarities)
    in_memory = [not isinstance(model, (str, Path)) for model in (original, immunized)]
    device = str(local_device()) if device is None else device
    if processes is None:
        single = any(in_memory) or torch.device(device).type != "cpu"
        processes = 1 if single else len(os.sched_getaffinity(0))
    if processes < 1 or (processes > 1 and any(in_memory)):
        raise MimaError(
            "evaluate: processes must be at least 1, and 1 for pipelines in memory, "
            f"got {processes}"
        )
    folder = EvaluationFolder(Path(output).expanduser().absolute())
    _claim(folder, overwrite=overwrite)

    bench = Bench(
        models={"original": original, "immunized": immunized},
        concepts=by_slug,
        roles=roles,
        config=config,
        sampler=sampler,
        similarities=dict(zip(names, map(str, similarities), strict=True)),
        protocol=protocol,
        folder=folder,
        device=device,
        prompts=spread(ordinary_captions(_path(captions)), config.benign_prompts),
    )
    with _one_thread(processes > 1):
        worker = Worker(bench)
    targets = {slug: c for slug, c in by_slug.items() if roles[slug] == "target"}
    rest = {slug: c for slug, c in by_slug.items() if roles[slug] == "other"}
    grid = attack_grid(config, targets, rest)
    evaluation = Evaluation(
        name=name or method or _label(immunized),
        method=method,
        models=ModelPair(original=_label(original), immunized=_label(immunized)),
        preset=preset,
        protocol=protocol,
        similarities=names,
        seeds=config.seeds,
        concepts=tuple(
            ConceptRecord(
                name=concept.name,
                slug=slug,
                kind=concept.kind,
                prompt=concept.prompt,
                role=roles[slug],
                references="held_out" if concept.held_out else "images",
            )
            for slug, concept in by_slug.items()
        ),
        config={
            "grid": config.model_dump(mode="json"),
            "sampler": asdict(sampler),
            "similarities": {name: str(s) for name, s in zip(names, similarities, strict=True)},
            "weights": worker.fingerprints(),
        },
        versions=installed_versions(),
        complete=False,
    )
    _go_on(folder, evaluation)
    ledger = Ledger(folder, evaluation, grid)
    tasks: list[Attack | Side] = [side for side in SIDES if not bench.benign_done(side)]
    tasks += ledger.pending()
    bench.write_references()
    ledger.write()
    total = sum(bench.work(task) for task in tasks)
    done = 0

    def advance(amount: int, finished: str = "") -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(done, total, finished)

    advance(0)
    if processes == 1 or len(tasks) <= 1:
        worker.advance = advance
        results: Iterator[tuple[Attack | Side, Outcome | None]] = (
            (task, worker.run(task)) for task in tasks
        )
    else:
        results = _in_parallel(bench, tasks, min(processes, len(tasks)), advance)
    for task, outcome in results:
        if isinstance(task, Attack):
            assert outcome is not None
            ledger.add(outcome)
            advance(0, task.id)
    return ledger.finish(worker.benign())


@dataclass(frozen=True)
class Outcome:
    """What one attack showed."""

    rows: list[AttackRow]
    points: list[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that the processes of one evaluation share; plain data but for the models."""

    models: Mapping[Side, Any]
    concepts: Mapping[str, Concept]
    roles: Mapping[str, Role]
    config: GridConfig
    sampler: Sampler
    similarities: Mapping[str, str]
    protocol: PictureProtocol
    folder: EvaluationFolder
    device: str
    prompts: Sequence[str]

    def with_role(self, role: Role) -> list[Concept]:
        """The concepts of one role."""
        return [concept for slug, concept in self.concepts.items() if self.roles[slug] == role]

    def material(self, attack: Attack) -> tuple[Concept, dict[str, list[Picture]]]:
        """What an attack trains on, and its references by prompt, as the files written of them."""
        concept = self.concepts[attack.slug]
        described, references = material(attack, concept, rare_token=self.config.rare_token)
        other = attack.images == "other"
        place = self.training_folder if other else self.folder.reference_folder
        files = _numbered(place(attack.slug), len(references))
        pictures = [Picture(f, p.prompt) for f, p in zip(files, references, strict=True)]
        return described, by_prompt(pictures, self.config.max_prompts)

    def training_files(self, attack: Attack) -> list[Path]:
        """The files of what an attack trains on."""
        concept = self.concepts[attack.slug]
        if attack.images == "other":
            return _numbered(self.folder.reference_folder(attack.slug), len(concept.held_out))
        return _numbered(self.training_folder(attack.slug), len(concept.images))

    def jobs(self, attack: Attack) -> list[Job]:
        """What is drawn at each evaluated step."""
        _, references = self.material(attack)
        seeds = range(self.config.pictures_per_prompt)
        return [
            Job(prompt, attack.seed * SEED_STRIDE + seed) for prompt in references for seed in seeds
        ]

    def work(self, task: Attack | Side) -> int:
        """Training steps and pictures of a task."""
        if not isinstance(task, Attack):
            return len(self.prompts)
        pictures = len(self.config.steps_of(task)) * len(self.jobs(task))
        preparation = self.config.preparation_steps * self.loras_before(task)
        return 2 * (task.steps + pictures + preparation)

    def loras_before(self, attack: Attack) -> int:
        """How many LoRAs its preparation trains."""
        targets = len(self.with_role("target"))
        return {"none": 0, "merge": targets, "benign": 1}[attack.preparation]

    def training_folder(self, slug: str) -> Path:
        """Where a concept's training pictures are written."""
        return self.folder.path / "images" / "training" / slug

    def benign_files(self, side: Side) -> list[Path]:
        """Where one model's pictures of ordinary prompts are written."""
        return _numbered(self.folder.path / "images" / "benign" / side, len(self.prompts))

    def benign_done(self, side: Side) -> bool:
        """Whether they all are."""
        return all(file.is_file() for file in self.benign_files(side))

    def write_references(self) -> None:
        """Write every concept's references and training pictures."""
        for slug, concept in self.concepts.items():
            if not concept.held_out:
                logger.warning(
                    "concept %s has no held_out pictures: adapted models are compared with those "
                    "that they were trained on, so that learning looks like memorising",
                    concept.name,
                )
            for place, pictures in (
                (self.folder.reference_folder(slug), concept.held_out or concept.images),
                (self.training_folder(slug), concept.images),
            ):
                place.mkdir(parents=True, exist_ok=True)
                for file, picture in zip(_numbered(place, len(pictures)), pictures, strict=True):
                    picture.load().save(file)


class Worker:
    """One process's models and similarities, and how it runs tasks with them.

    Attributes:
        advance: called with the amount of work just done.
    """

    def __init__(self, bench: Bench, advance: Advance = lambda _: None) -> None:
        self.bench = bench
        self.advance = advance
        self.pipelines = {
            side: load_pipeline(
                str(model) if isinstance(model, Path) else model, device=bench.device
            )
            for side, model in bench.models.items()
        }
        self.similarities = [
            CachedSimilarity(
                load_similarity(source, protocol=bench.protocol, device=bench.device),
                name=name,
                protocol=bench.protocol,
                path=bench.folder.path / FEATURES_FILE,
            )
            for name, source in bench.similarities.items()
        ]
        self._prepared: dict[Side, tuple[object, Any]] = {}

    def fingerprints(self) -> dict[str, str]:
        """A hash of each model's denoiser."""
        return {
            side: fingerprint(dict(family_of(pipeline).denoiser.state_dict()))
            for side, pipeline in self.pipelines.items()
        }

    def run(self, task: Attack | Side) -> Outcome | None:
        """Run an attack, or draw one model's pictures of ordinary prompts."""
        if isinstance(task, Attack):
            return self._attack(task)
        jobs = [Job(prompt, index) for index, prompt in enumerate(self.bench.prompts)]
        files = self.bench.benign_files(task)
        pictures = self.bench.sampler.draw(self.pipelines[task], jobs)
        for file, image in zip(files, pictures, strict=True):
            write_picture(file, image)
            self.advance(1)
        return None

    def benign(self) -> Benign:
        """Compare the models' pictures of ordinary prompts."""
        chosen = [s for s in self.similarities if isinstance(s.model, TextImageEncoder)]
        prompts = list(self.bench.prompts)
        if not chosen or not prompts:
            return Benign()
        encoder = chosen[0]
        assert isinstance(encoder.model, TextImageEncoder)
        texts_BD = text_features(prompts, encoder.model)
        features = {side: encoder.features(self.bench.benign_files(side)) for side in SIDES}
        alignment = {side: float((f * texts_BD).sum(dim=-1).mean()) for side, f in features.items()}
        return Benign(
            prompt_alignment=ScorePair(**alignment),
            cmmd=cmmd(features["original"], features["immunized"]),
        )

    def _attack(self, attack: Attack) -> Outcome:
        started = time.perf_counter()
        bench, jobs = self.bench, self.bench.jobs(attack)
        concept, references = bench.material(attack)
        reached = {}
        for side in SIDES:

            def keep(step: int, index: int, image: Image.Image, side: Side = side) -> None:
                place = bench.folder.image_folder(attack.id, side, step)
                write_picture(place / f"{index}.png", image)

            drawn = trajectory(
                self._start(side, attack),
                concept,
                attack.adaptation,
                bench.config.steps_of(attack),
                jobs,
                bench.sampler,
                advance=self.advance,
                on_picture=keep,
            )
            if drawn.diverged is not None:
                logger.warning("%s, %s model: %s", attack.id, side, drawn.diverged)
            reached[side] = drawn.steps
        steps = [step for step in reached["original"] if step in reached["immunized"]]
        seconds = time.perf_counter() - started
        rows, points = [], []
        for similarity in self.similarities:
            row, curve = self._measure(attack, similarity, steps, references, seconds)
            rows.append(row)
            points += curve
        return Outcome(rows, points)

    def _measure(
        self,
        attack: Attack,
        similarity: CachedSimilarity,
        steps: Sequence[int],
        references: Mapping[str, Sequence[Picture]],
        seconds: float,
    ) -> tuple[AttackRow, list[CurvePoint]]:
        folder, width = self.bench.folder, self.bench.config.pictures_per_prompt
        curves: dict[Side, list[float]] = {side: [] for side in SIDES}
        nearest: dict[Side, float] = {}
        for side in SIDES:
            for step in steps:
                files = folder.images(attack.id, side, step)
                means = [
                    similarity.table(
                        files[place * width : (place + 1) * width],
                        [_file(picture) for picture in group],
                    ).mean()
                    for place, group in enumerate(references.values())
                ]
                curves[side].append(float(torch.stack(means).double().mean()))
            last = folder.images(attack.id, side, steps[-1])
            table_BR = similarity.table(last, self.bench.training_files(attack))
            nearest[side] = float((1 - table_BR).amin(dim=1).mean())
        pairs = list(zip(steps, curves["original"], curves["immunized"], strict=True))
        points = [
            CurvePoint(
                attack=attack.id,
                similarity=similarity.name,
                step=step,
                original=a,
                immunized=b,
                sgr=sgr(a, b),
            )
            for step, a, b in pairs
        ]
        gap = None
        if steps[-1] > 0:
            gap = GapCurve(
                concept=attack.concept,
                steps=tuple(steps),
                original=tuple(curves["original"]),
                immunized=tuple(curves["immunized"]),
            )
        row = AttackRow(
            attack=attack.id,
            concept=attack.concept,
            role=attack.role,
            method=attack.adaptation.method,
            lr=attack.adaptation.learning_rate,
            lr_factor=attack.lr_factor,
            steps=attack.steps,
            prompt_variant=attack.prompt_variant,
            images=attack.images,
            preparation=attack.preparation,
            seed=attack.seed,
            similarity=similarity.name,
            sgr_mean=gap and gap.mean,
            sgr_final=gap and gap.final,
            sgr_max=gap and gap.best,
            nearest_original=nearest["original"],
            nearest_immunized=nearest["immunized"],
            seconds=seconds,
            learned=max(curves["original"]) > curves["original"][0],
        )
        return row, points

    def _start(self, side: Side, attack: Attack) -> Any:
        """The model that an attack starts from; of prepared ones, the last is kept."""
        pipeline = self.pipelines[side]
        if attack.preparation == "none":
            return pipeline
        key = (attack.preparation, attack.seed)
        if side not in self._prepared or self._prepared[side][0] != key:
            self._prepared[side] = key, self._prepare(pipeline, attack)
        else:
            # work that was announced and need not be done
            self.advance(self.bench.loras_before(attack) * self.bench.config.preparation_steps)
        return self._prepared[side][1]

    def _prepare(self, pipeline: Any, attack: Attack) -> Any:
        """Merge LoRAs of all targets, or of the other concepts' pictures, into the weights."""
        config = self.bench.config
        lora = replace(
            configure("lora", config.methods.get("lora", {})),
            steps=config.preparation_steps,
            seed=attack.seed,
        )
        assert isinstance(lora, LoRA)
        subjects = self.bench.with_role("target")
        if attack.preparation == "benign":
            pictures = [p for concept in self.bench.with_role("other") for p in concept.images]
            subjects = [Concept("benign", pictures[0].prompt, pictures)]
        adapters = []
        for subject in subjects:
            run = lora.adapt(pipeline, subject, on_step=lambda _: self.advance(1))
            adapters.append(Adapter.of(run.pipeline))
        return merged(pipeline, adapters)


@dataclass
class Ledger:
    """The rows so far, on disk after every attack."""

    folder: EvaluationFolder
    evaluation: Evaluation
    grid: Sequence[Attack]
    rows: list[AttackRow] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take over what an earlier call has finished of this grid."""
        ids = {attack.id for attack in self.grid}
        self.rows = [row for row in self.folder.attacks() if row.attack in ids]
        self.points = [point for point in self.folder.curves() if point.attack in ids]

    def pending(self) -> list[Attack]:
        """Attacks without rows."""
        done = {row.attack for row in self.rows}
        return [attack for attack in self.grid if attack.id not in done]

    def add(self, outcome: Outcome) -> None:
        """Write down a finished attack."""
        self.rows += outcome.rows
        self.points += outcome.points
        self.write()

    def write(self, *, complete: bool = False, benign: Benign | None = None) -> Evaluation:
        """Write rows, in the order of the grid, and the summary of them."""
        order = {attack.id: place for place, attack in enumerate(self.grid)}
        self.rows.sort(key=lambda row: order[row.attack])
        self.points.sort(key=lambda point: order[point.attack])
        self.folder.write_rows(self.rows, self.points)
        old = self.evaluation
        summary = {s: summarize(self.rows, old.concepts, s) for s in old.similarities}
        others = [concept.name for concept in old.concepts if concept.role == "other"]
        primary = summary[old.similarities[0]].sgr
        adaptability = {name: primary[name].mean for name in others}
        self.evaluation = old.model_copy(
            update={
                "summary": summary,
                "complete": complete,
                "benign": (benign or old.benign).model_copy(update={"adaptability": adaptability}),
            }
        )
        self.folder.write_evaluation(self.evaluation)
        return self.evaluation

    def finish(self, benign: Benign) -> Evaluation:
        """Write that all is done."""
        return self.write(complete=True, benign=benign)


class _Stopped(Exception):  # noqa: N818 - no error: the main process asked for it
    pass


_worker: Worker


def _start_process(bench: Bench, queue: Any, stop: Any) -> None:
    """Set up a worker process: one thread, no Ctrl-C of its own, gone when its parent is."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    def advance(amount: int) -> None:
        if stop.is_set():
            raise _Stopped
        queue.put(amount)

    _worker = Worker(bench, advance)


def _run_task(task: Attack | Side) -> Outcome | None:
    return _worker.run(task)


def _in_parallel(
    bench: Bench, tasks: Sequence[Attack | Side], processes: int, advance: Advance
) -> Iterator[tuple[Attack | Side, Outcome | None]]:
    """Run tasks in processes, and give back each with its outcome as it ends."""
    # not fork: torch and CUDA have threads by now
    context = multiprocessing.get_context("forkserver")
    queue, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_process, initargs=(bench, queue, stop)
    )

    def report() -> None:
        while not queue.empty():
            advance(queue.get())

    try:
        with _one_thread(True):
            pending: dict[Future[Outcome | None], Attack | Side] = {
                pool.submit(_run_task, task): task for task in tasks
            }
        while pending:
            ended, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            report()
            for future in ended:
                yield pending.pop(future), future.result()
    finally:
        # running attacks end within a step; what waits is not begun
        stop.set()
        drain = threading.Thread(target=_drain, args=(queue,), daemon=True)
        drain.start()
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        drain.join()


def _drain(queue: Any) -> None:
    """Empty a queue until None comes, so that nobody blocks on a full pipe."""
    while queue.get() is not None:
        pass


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Let processes started here compute with one thread each, from their first import on."""
    if not wanted:
        yield
        return
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _sampler(config: GridConfig) -> Sampler:
    try:
        return Sampler(**config.sampler)
    except (TypeError, ValueError) as error:
        raise MimaError(f"setting sampler: {error}") from error


def _claim(folder: EvaluationFolder, *, overwrite: bool) -> None:
    """Make sure that the folder is new, or an earlier evaluation's."""
    if folder.exists() and not overwrite:
        return
    check_folder(folder.path, overwrite=overwrite)
    if folder.path.exists():
        shutil.rmtree(folder.path)
    folder.path.mkdir(parents=True)


def _go_on(folder: EvaluationFolder, now: Evaluation) -> None:
    """Refuse to mix two evaluations in one folder.

    Raises:
        MimaError: what is there was made with other settings, each of which is named.
    """
    if not folder.exists():
        return
    then = folder.evaluation()
    same = ("models", "protocol", "similarities", "seeds", "concepts")
    differing = [name for name in same if getattr(then, name) != getattr(now, name)]
    differing += [key for key in now.config if then.config.get(key) != now.config[key]]
    if differing:
        raise MimaError(
            f"output {folder.path} holds an evaluation with other {', '.join(differing)}; "
            "choose another folder, or use --overwrite"
        )
    if then.versions != now.versions:
        logger.warning("going on under other versions: %s, now %s", then.versions, now.versions)


def _with_slugs(concepts: Sequence[Concept]) -> dict[str, Concept]:
    """Concepts by a distinct file name each."""
    named: dict[str, Concept] = {}
    for concept in concepts:
        if concept.name in [other.name for other in named.values()]:
            raise MimaError(f"evaluate: two concepts are named {concept.name!r}")
        base = slug = re.sub(r"[^a-z0-9]+", "-", concept.name.lower()).strip("-")[:40] or "concept"
        number = 1
        while slug in named:
            number += 1
            slug = f"{base}-{number}"
        named[slug] = concept
    return named


def _similarity_names(sources: Sequence[str | Path]) -> tuple[str, ...]:
    """What tables call the similarities: short names, or the last part of a path."""
    if not sources:
        raise MimaError("evaluate: needs a similarity model")
    names = tuple(str(source).rstrip("/").rpartition("/")[2] for source in sources)
    if len(set(names)) < len(names):
        raise MimaError(f"similarities: two are called alike: {', '.join(names)}")
    return names


def _label(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else f"{type(model).__name__} in memory"


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _numbered(folder: Path, count: int) -> list[Path]:
    return [folder / f"{index}.png" for index in range(count)]


def _file(picture: Picture) -> Path:
    assert isinstance(picture.image, Path)
    return picture.image
