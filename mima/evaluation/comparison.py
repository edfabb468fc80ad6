"""Attack two models alike, over a grid, in parallel processes, and write down what happened."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

from mima._version import installed_versions
from mima.choices import Method, PictureProtocol
from mima.concepts import Concept
from mima.concepts.concept import learnable
from mima.concepts.reading import load_concepts
from mima.distributed import device_of, looking_after_each_other
from mima.errors import MimaError
from mima.evaluation.bench import Bench, Task
from mima.evaluation.calibration import calibrate
from mima.evaluation.estimate import Estimate, estimate
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import (
    Attack,
    Trial,
    attack_grid,
    grid_config,
)
from mima.evaluation.identity import (
    configurations_of,
    encoders_of,
    pictures_of,
    scheduler_of,
    short_hash,
    texts_of,
)
from mima.evaluation.ledger import (
    CONFIGURATIONS,
    ENCODERS,
    PICTURES,
    PROMPTS,
    SCHEDULERS,
    TEXTS,
    Ledger,
    check,
    claim,
    refuse_other_settings,
)
from mima.evaluation.originals import originals_folder
from mima.evaluation.plan import AttackPlan
from mima.evaluation.processes import in_parallel, one_by_one, one_thread, refuse_before_main
from mima.evaluation.ranks import SharedFolder, join_patiently, over_ranks
from mima.evaluation.records import SIDES, Calibration, ConceptRecord, Evaluation, ModelPair, Role
from mima.evaluation.seen import benign_prompts, lent, record_of, seen_by, trained_on
from mima.evaluation.tuning import TrialRow, TuningLog, hardly_trained
from mima.evaluation.worker import Outcome, Worker
from mima.families import family_of, source_of
from mima.families.pipelines import Pipeline, networks, readers
from mima.sampling import Sampler
from mima.settings import checked
from mima.storage.inputs import expanded, resolved
from mima.storage.lock import locked
from mima.storage.output import slug
from mima.training.captions import ordinary_captions, warn_of_emoji

logger = logging.getLogger(__name__)

HASHES: dict[str, Callable[[Pipeline], Any]] = {
    ENCODERS: encoders_of,
    SCHEDULERS: scheduler_of,
    CONFIGURATIONS: configurations_of,
}
"""What a record keeps of both models, so that others in their places are recognised."""

NO_ATTACK = (
    "evaluate: no attack on a target is left for lack of material; give concepts that have what "
    "the settings methods, prompts, images and families ask for"
)

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
    originals: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Estimate], None] | None = None,
) -> Evaluation:
    """Attack a model before and after immunization, and measure how much harder learning became.

    Every attack of the grid trains both models on the same batches with the same noise and draws
    the same pictures. Pictures, rows and the summary are written as they come; called again with
    the same arguments, a stopped evaluation goes on after the last finished attack.

    Under ``torchrun`` the processes share the attacks out, each on its own device; all have to see
    the same folder, and the main one writes rows and summary and calls `progress` and `announce`.

    Degenerate cases. Where an attack fails on the original model, M(x_r, x_A) ≤ 0, SGR is 0. A
    concept without held-out pictures is compared with its training pictures, with a warning and a
    note in its record; one picture is a mean of one; a concept without pictures cannot be made. An
    attack whose training diverges on either model is measured up to the last step of which both
    have finite pictures; without any after 0 it counts as not tried, and has no SGR.

    Args:
        original: the model before immunization: a diffusers folder, a .safetensors file, a hub id,
            ``"embedded"``, a ``ModelSource``, or a pipeline in memory (with one process).
        immunized: the model after it, likewise.
        concepts: concepts immunized against, or whatever `load_concepts` reads. Those of kind
            ``"benign"`` count as others.
        output: folder for the results: see `mima.evaluation.folder`.
        others: concepts that must stay learnable; may be empty. Their pictures whose captions name
            a concept immunized against are left out.
        preset: a name of `mima.evaluation.PRESETS`.
        settings: settings of `GridConfig` that replace the preset's.
        similarities: what `load_similarity` opens; the first is the primary one, and the first that
            embeds texts measures benign quality.
        protocol: how pictures are prepared for them; see `mima.evaluation.preprocessing`.
        processes: attacks at a time, each with one thread. Default: one per core on a CPU; one on a
            GPU, for pipelines in memory, or in each process that torchrun started, in this process
            and with its threads. Several import the script that calls this, which has to do so
            below ``if __name__ == "__main__":``.
        device: where to compute; by default a GPU where there is one.
        name: label of the run; default ``method``, or the immunized model's name.
        method: how the model was immunized, for comparisons; by default what ``mima.json`` in the
            folder of ``immunized`` says.
        captions: a file of ordinary prompts, one per line; default those that ship with mima.
        originals: a folder that keeps what attacks and trials show on the original model, for other
            evaluations that attack it alike; it grows. Of attacks with a preparation, and of the
            family ``outside``, nothing is kept.
        overwrite: discard what an earlier evaluation left in `output`.
        progress: called with work done, all work (training steps and pictures), and the name of an
            attack that was just finished, or "".
        announce: called once before the work begins with how much there is, and about how long it
            takes here, which two training steps and some pictures are timed for.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        MimaError: a model, concept, setting or the output folder cannot be used; or the folder
            holds an evaluation with other settings.

    Examples:
        >>> result = evaluate("model", "immunized", ["cat"], output="results", others=["dog"])
        >>> result.summary["clip"].worst_attack.sgr
    """
    refuse_before_main()
    kept = originals_folder(originals)
    asked = _asked(concepts, others, preset, settings, similarities)
    config, sampler, by_slug, roles = (
        asked[name] for name in ("config", "sampler", "concepts", "roles")
    )
    names = tuple(asked["similarities"])
    method = method or _method_of(immunized)
    in_memory = [source_of(model) is None for model in (original, immunized)]
    device = str(device_of(device))
    ranks = join_patiently(device)
    if processes is None:
        single = any(in_memory) or torch.device(device).type != "cpu" or ranks.size > 1
        processes = 1 if single else len(os.sched_getaffinity(0))
    if processes < 1 or (processes > 1 and any(in_memory)):
        raise MimaError(
            "evaluate: processes must be at least 1, and 1 for pipelines in memory, "
            f"got {processes}"
        )
    if processes > 1 and ranks.size > 1:
        raise MimaError(f"evaluate: torchrun's {ranks.size} processes are all; leave processes out")
    folder = EvaluationFolder(resolved(expanded(output)))
    ranks.together(lambda: check(folder, overwrite=overwrite))

    seen = seen_by(immunized)
    source = None if captions is None else Path(captions)
    ordinary = ordinary_captions(source)
    prompts, known = benign_prompts(ordinary, seen, config.benign_prompts)
    bench = Bench(
        models={"original": original, "immunized": immunized},
        **asked,
        protocol=protocol,
        folder=folder,
        device=device,
        prompts=prompts,
        originals=kept,
    )
    targets, rest = bench.with_role("target"), bench.with_role("other")
    grid = attack_grid(config, targets, rest)
    if not any(attack.role == "target" for attack in grid):
        raise MimaError(NO_ATTACK)
    with one_thread(processes > 1):
        worker = Worker(bench)
    _check_alike(*(worker.pipelines[side] for side in SIDES))
    if prompts:
        warn_of_emoji(worker.pipelines["original"], source)
    if outside := [attack for attack in grid if attack.outside]:
        count = sum(weight.numel() for weight in worker.trained_outside(outside[0]).values())
        if count:
            logger.info("families outside: %d weights are trained", count)
        else:
            logger.warning("families outside: nothing is left to train; left out")
            grid = [attack for attack in grid if not attack.outside]
    if config.repair_steps and not bench.repairs:
        logger.warning("repair_steps: no attacked model is repaired, for lack of other concepts")
    for pipeline in worker.pipelines.values():
        # family_of refuses resolutions and options that the model cannot have
        family_of(pipeline, resolution=sampler.size)
        for said in {(attack.adaptation.resolution, attack.adaptation.training) for attack in grid}:
            family_of(pipeline, resolution=said[0], training=said[1])
    worker.check(grid)
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
        immunization_seed=seen.seed,
        overlaps=(
            *seen.untold,
            *seen.overlaps(list(targets.values()), list(rest.values())),
            *known,
            *trained_on(list(by_slug.values()), lent(grid, config, targets, rest)),
        ),
        config={
            "grid": config.model_dump(mode="json"),
            "sampler": asdict(sampler),
            "similarities": bench.similarities,
            "judges": worker.judges,
            "weights": worker.fingerprints(),
            **{
                key: {side: hashed(one) for side, one in worker.pipelines.items()}
                for key, hashed in HASHES.items()
            },
            PICTURES: {slug: pictures_of(concept) for slug, concept in by_slug.items()},
            TEXTS: {slug: texts_of(concept) for slug, concept in by_slug.items()},
            PROMPTS: short_hash(prompts),
        },
        versions=installed_versions(),
        complete=False,
    )
    shared = SharedFolder(folder.path)
    tasks: deque[Task] = deque()
    ledger = plan = None
    total = done = 0

    def begin() -> None:
        nonlocal ledger, plan, total
        # everything could be opened: only now are earlier results discarded
        claim(folder, overwrite=overwrite)
        refuse_other_settings(folder, evaluation)
        ledger = Ledger(folder, evaluation, grid)
        tuning = TuningLog(folder.path, config.tune)
        _take_over(shared, ledger, tuning)
        plan = AttackPlan(tuning, ledger.pending())
        tasks.extend(side for side in SIDES if not bench.benign_done(side))
        tasks.extend(plan.first())
        # the description is the first file: whoever finds the folder sees whose it is
        if not folder.exists():
            folder.write_evaluation(evaluation)
        bench.write_references()
        known = _calibrations(worker, [c for c in by_slug.values() if c.held_out])
        ledger.evaluation = evaluation.model_copy(update={"calibration": known})
        ledger.write()
        if ranks.size > 1:
            shared.clear()
        total = sum(bench.work(task) for task in [*tasks, *plan.waiting])

    def advance(amount: int, finished: str = "") -> None:
        nonlocal done
        done += amount
        if progress is not None and ranks.main:
            progress(done, total, finished)

    with ExitStack() as held:
        held.enter_context(looking_after_each_other())
        ranks.together(lambda: held.enter_context(locked(folder.path)))
        ranks.together(begin)
        if announce is not None and tasks:
            assert plan is not None
            announce(estimate(bench, worker, [*tasks, *plan.waiting], processes * ranks.size))
        advance(0)
        if ranks.size > 1:
            worker.advance = advance
            results = over_ranks(ranks, shared, bench, worker, tasks, advance)
        elif processes == 1 or len(tasks) <= 1:
            worker.advance = advance
            results = one_by_one(worker, tasks)
        else:
            results = in_parallel(bench, tasks, min(processes, len(tasks)), advance)
        for task, result in results:
            assert ledger is not None
            assert plan is not None
            if isinstance(task, Attack):
                assert isinstance(result, Outcome)
                ledger.add(result)
                advance(0, task.id)
            elif isinstance(task, Trial):
                assert isinstance(result, TrialRow)
                tasks += plan.tried(result)
        if ledger is not None:
            assert plan is not None
            idle = hardly_trained(plan.log.rows)
            ledger.evaluation = ledger.evaluation.model_copy(update={"hardly_trained": idle})
            evaluation = ledger.write(worker.benign())
            shared.remove()
        return ranks.broadcast(evaluation)


def attack_original(
    original: Any,
    concepts: Any,
    *,
    originals: str | Path,
    others: Any = (),
    preset: str = "quick",
    settings: Mapping[str, Any] | None = None,
    similarities: Sequence[str | Path] = ("clip",),
    protocol: PictureProtocol = "standard",
    device: str | None = None,
) -> None:
    """Attack a model ahead of its immunization, in this process, and keep what the attacks show.

    An `evaluate` that is given the same arguments, the same folder `originals` and any immunized
    model goes on from there. Nothing is done of what is kept already, nor of attacks of which
    nothing is kept.

    Args:
        original: the model before immunization; see `evaluate`, as of all that follows.
        concepts: concepts that it is to be immunized against.
        originals: the folder that keeps what attacks and trials show; it grows.
        others: concepts that must stay learnable; may be empty.
        preset: a name of `mima.evaluation.PRESETS`.
        settings: settings of `GridConfig` that replace the preset's.
        similarities: the first judges trials.
        protocol: how pictures are prepared for it.
        device: where to compute.

    Raises:
        MimaError: the model, a concept, a setting or the folder cannot be used.
    """
    kept = originals_folder(originals)
    asked = _asked(concepts, others, preset, settings, similarities)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(
            models={"original": original},
            **asked,
            protocol=protocol,
            folder=EvaluationFolder(Path(work)),
            device=str(device_of(device)),
            prompts=(),
            originals=kept,
        )
        bench.write_references()
        worker = Worker(bench)
        grid = [
            attack
            for attack in attack_grid(
                bench.config, bench.with_role("target"), bench.with_role("other")
            )
            if worker.kept_of(attack, attack.adaptation) is not None
        ]
        worker.check(grid)
        plan = AttackPlan(
            TuningLog(bench.folder.path, bench.config.tune), grid, sides=("original",)
        )
        tasks: deque[Task] = deque(plan.first())
        for task, result in one_by_one(worker, tasks):
            if isinstance(task, Trial):
                assert isinstance(result, TrialRow)
                tasks += plan.tried(result)


def _asked(
    concepts: Any,
    others: Any,
    preset: str,
    settings: Mapping[str, Any] | None,
    similarities: Sequence[str | Path],
) -> dict[str, Any]:
    """Those fields of `Bench` that say what is attacked, how, and who judges."""
    config = grid_config(preset, settings)
    sampler = checked(Sampler, "setting sampler", config.sampler)
    found, kept = load_concepts(concepts), load_concepts(others) if len(others) else []
    by_slug = _with_slugs([*found, *kept])
    roles: dict[str, Role] = {
        slug: "other" if concept in kept or concept.kind == "benign" else "target"
        for slug, concept in by_slug.items()
    }
    if "target" not in roles.values():
        raise MimaError("evaluate: needs a concept that the model was immunized against")
    targets = [concept for slug, concept in by_slug.items() if roles[slug] == "target"]
    slugs = [slug for slug, role in roles.items() if role == "other"]
    left = learnable([by_slug[slug] for slug in slugs], targets)
    by_slug |= zip(slugs, left, strict=True)
    names = _similarity_names(similarities)
    return {
        "concepts": by_slug,
        "roles": roles,
        "config": config,
        "sampler": sampler,
        "similarities": dict(zip(names, map(str, similarities), strict=True)),
    }


def _check_alike(original: Pipeline, immunized: Pipeline) -> None:
    """Refuse two models whose weights differ in names or shapes: no attack is the same on both."""
    kinds = [type(pipeline).__name__ for pipeline in (original, immunized)]
    before, after = _shapes(original), _shapes(immunized)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            raise MimaError(
                "evaluate: the immunized model has another architecture than the original "
                f"({' and '.join(kinds)}): {name} is {before.get(name, 'missing')} in the original "
                f"and {after.get(name, 'missing')} in the immunized one"
            )


def _shapes(pipeline: Pipeline) -> dict[str, list[int]]:
    """The shape of every weight that attacks train or draw with, by component and name."""
    # of models that learned words, text encoders have more rows
    rows = {id(reader.rows) for reader in readers(pipeline)}
    parts = networks(pipeline)
    return {
        f"{part}.{name}": list(value.shape[1:] if id(value) in rows else value.shape)
        for part in family_of(pipeline).parts
        if part in parts
        for name, value in parts[part].named_parameters()
    }


def _take_over(shared: SharedFolder, ledger: Ledger, tuning: TuningLog) -> None:
    """Write down what processes of an earlier call had finished when it was stopped."""
    wanted = {attack.id for attack in ledger.pending()}
    for _, result in shared.arrived():
        if isinstance(result, Outcome) and result.rows[0].attack in wanted:
            ledger.add(result)
        elif isinstance(result, TrialRow) and result.trial in tuning.missing(
            result.attack, result.side
        ):
            tuning.add(result)


def _calibrations(worker: Worker, concepts: Sequence[Concept]) -> dict[str, dict[str, Calibration]]:
    """What each similarity says of pictures that are known, by concept."""
    if not concepts:
        return {}
    return {
        similarity.name: {
            known.concept: Calibration(
                right=known.right,
                others=fmean(known.others.values()) if known.others else None,
                noise=known.noise,
                grey=known.grey,
            )
            for known in calibrate(similarity.model, concepts)
        }
        for similarity in worker.similarities
    }


def _with_slugs(concepts: Sequence[Concept]) -> dict[str, Concept]:
    """Concepts by a distinct file name each."""
    named: dict[str, Concept] = {}
    for concept in concepts:
        if concept.name in [other.name for other in named.values()]:
            raise MimaError(f"evaluate: two concepts are named {concept.name!r}")
        base = name = slug(concept.name, longest=40, default="concept")
        number = 1
        while name in named:
            number += 1
            name = f"{base}-{number}"
        named[name] = concept
    return named


def _method_of(model: Any) -> Method | None:
    """How a folder that ``immunize`` wrote was immunized, where its record says so."""
    config = (record_of(model) or {}).get("config")
    found = config.get("method") if isinstance(config, dict) else None
    return next((method for method in get_args(Method) if method == found), None)


def _similarity_names(sources: Sequence[str | Path]) -> tuple[str, ...]:
    """What tables call the similarities: short names, or the last part of a path."""
    if not sources:
        raise MimaError("evaluate: needs a similarity model")
    names = tuple(str(source).rstrip("/").rpartition("/")[2] for source in sources)
    if len(set(names)) < len(names):
        raise MimaError(f"similarities: two are called alike: {', '.join(names)}")
    return names


def _label(model: Any) -> str:
    source = source_of(model)
    return f"{type(model).__name__} in memory" if source is None else source.label
