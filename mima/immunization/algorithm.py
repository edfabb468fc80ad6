"""Algorithm 1 of MIMA: multi-concept immunization through differentiable merging.

Zheng & Yeh, AAAI 2025, arXiv 2412.15320:

max_{θ ∈ S_u}  Σ_n L(x_u[n], c[n]; Merge({θ'[n]}))
s.t.  θ'[n] = argmin_{θ ∈ S_l} L(x_l[n], c[n]; θ)  for all n
"""

# N = concepts, K = lower-level steps, θ'[n] = weights adapted to concept n, φ = merged weights

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch

from mima.concepts import Concept
from mima.concepts.concept import learnable
from mima.concepts.reading import load_concepts
from mima.distributed import ALONE, Ranks, device_of, join, looking_after_each_other
from mima.erasure import erase, load_erased
from mima.errors import MimaError
from mima.families import ModelSource, family_of, origin_of, source_of
from mima.families.frozen import hold_frozen, with_quantized_held
from mima.families.new_words import text_parts
from mima.families.pipelines import named_weights, scheduler_settings, with_modules
from mima.families.recomputed import recomputed_blocks
from mima.immunization.alternating import alternate
from mima.immunization.checks import (
    check_concepts,
    check_delta,
    check_drawn,
    check_erased,
    check_model,
    check_places,
    check_shards,
    warn_of_model,
)
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import encode_concepts, saw
from mima.immunization.levels import Problem
from mima.immunization.merge import merge_layer
from mima.immunization.offload import idle_modules, make_whole, out_of_memory_while
from mima.immunization.outer_loop import Ascent
from mima.immunization.own_model import (
    gathered,
    locked_together,
    move_others,
    own_copy,
    sharded,
    with_new_words,
    write_result,
)
from mima.immunization.parameters import trained_names
from mima.immunization.planning.plan import large, plan
from mima.immunization.planning.result import Plan
from mima.immunization.progress import Callback, StepReport, tracker_kinds
from mima.immunization.result import ImmunizeResult
from mima.immunization.trained_words import TrainedWord
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.inputs import expanded
from mima.storage.output import check_folder
from mima.storage.runs import claim, default_folder, describe_run, logs_folder
from mima.training.captions import ordinary_captions

__all__ = ["Callback", "ImmunizeResult", "StepReport", "ascend", "immunize"]


def ascend(
    problem: Problem,
    callbacks: Sequence[Callback] = (),
    folder: CheckpointFolder | None = None,
    *,
    logs: Path | None = None,
    stage: str = "",
) -> list[StepReport]:
    """Algorithm 1: gradient steps on the upper level, in place on the model's own weights."""
    with Ascent(problem, callbacks, folder, logs=logs, stage=stage) as run:
        for step in run.steps():
            # θ'[n] = argmin L(x_l[n], c[n]; θ), K steps on batches drawn now, or K more of those
            lower = problem.lower_levels(step, run.alive)
            # −L(x_u[n], c[n]; φ) + w · L(class; φ), on other pictures
            upper = problem.upper_path(step, run.alive)
            # φ = Merge({θ'[n]}), and dJ/dθ through φ, through Merge, through the K steps
            outer = problem.hypergradient(run.theta, lower, upper, run.moved)
            # w · L(class; θ), apart where the ascent is measured against it
            retain = problem.retaining_gradient(run.theta, step, run.alive)
            # θ ← θ − η dJ/dθ on S_u, clipped or balanced, by AdamW
            run.update(outer, retain=retain)
            # otherwise these gradients would be in memory beside the next step's attacks
            del outer, retain
    return run.history


@overload
def immunize(
    model: Any,
    concepts: Sequence[Concept] | Any,
    config: ImmunizeConfig | None = None,
    *,
    benign: Sequence[Concept] | Any = (),
    dry_run: Literal[False] = False,
    erased: str | Path | None = None,
    output: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    delta: bool = False,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
) -> ImmunizeResult: ...
@overload
def immunize(
    model: Any,
    concepts: Sequence[Concept] | Any,
    config: ImmunizeConfig | None = None,
    *,
    benign: Sequence[Concept] | Any = (),
    dry_run: Literal[True],
    erased: str | Path | None = None,
    output: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    delta: bool = False,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
) -> Plan: ...
def immunize(
    model: Any,
    concepts: Sequence[Concept] | Any,
    config: ImmunizeConfig | None = None,
    *,
    benign: Sequence[Concept] | Any = (),
    dry_run: bool = False,
    erased: str | Path | None = None,
    output: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    delta: bool = False,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
) -> ImmunizeResult | Plan:
    """Make a model a bad starting point for learning the concepts, and keep it good otherwise.

    Under ``torchrun`` or ``accelerate launch`` the processes share the concepts out; the main one
    calls the callbacks and writes the files.

    Args:
        model: a diffusers pipeline (left as it is: the result holds a copy of what changes), a
            diffusers folder, a .safetensors file, a hub id, ``"embedded"``, or a ``ModelSource``.
        concepts: N concepts, or whatever ``load_concepts`` reads.
        config: the settings; ``docs/guide.md`` has the defaults, and where published ones differ.
            None is ``ImmunizeConfig()``, which was measured nowhere; what is recommended is
            ``mima.immunization.recipes.default``.
        benign: other concepts, which must stay learnable, or whatever ``load_concepts`` reads; for
            ``upper.benign`` and ``lower.benign_start``. Their pictures whose captions name one of
            ``concepts`` are left out.
        dry_run: load no weights, and say what the run would train and need.
        erased: a checkpoint in which the concepts are erased, made from ``model`` by whatever
            means, to begin with (see ``load_erased``).
        output: a new or empty folder for the immunized model; None writes nothing.
        checkpoint: a folder for checkpoints and metrics while the run lasts, removed once
            ``output`` is written; by default ``output`` with ``.checkpoint`` appended.
        resume: go on from the last checkpoint, if there is one. On a CPU the result is
            bit-identical to that of a run that was never interrupted.
        overwrite: replace an earlier model in ``output``, and an earlier run's checkpoint.
        delta: write only the changed weights to ``output`` (see ``load_delta``).
        device: where to compute. By default where a pipeline in memory is; otherwise a GPU where
            there is one, and this process's own among several. A dry run also takes a GPU of
            another machine, see ``mima.immunization.planning.devices.device_memory``.
        callbacks: called with a ``StepReport`` after each outer step; one that returns ``"stop"``
            ends the run there, whose result is then the model after that step. Whatever else they
            return is ignored.

    Returns:
        The immunized pipeline, in float32 on that device (or, with a warning, in the CPU's memory,
        where the device is too small for it), with its history. While the run lasts, weights that
        it does not train stay in the dtype of their files, and are computed with in float32. Of a
        dry run, its plan.

    Raises:
        MimaError: the model, a concept, a setting or the output folder cannot be used, which is
            checked before long work starts; or the run diverges or cannot be written.

    Examples:
        >>> config = recipes.default("relearn", rate=1e-4, steps=200)
        >>> result = immunize("embedded", ["tiger", "style-mono"], config)
        >>> result.save_pretrained("immunized")
    """
    config = ImmunizeConfig() if config is None else config
    if not isinstance(config, ImmunizeConfig):
        raise MimaError(
            f"config: expected an ImmunizeConfig, got a {type(config).__name__}; of plain settings "
            "make one by mima.immunization.recipes.unnamed(task, **settings), or by another recipe"
        )
    concepts = load_concepts(concepts)
    # an empty sequence is no description of a concept
    benign = [] if isinstance(benign, Sequence) and not benign else load_concepts(benign)
    check_concepts(concepts, benign, config)
    benign = learnable(benign, concepts)
    check_shards(config, dry_run=dry_run)
    place = None if output is None else expanded(output)
    if place is not None:
        check_folder(place, overwrite=overwrite, resume=resume)
        checkpoint = checkpoint or default_folder(place)
    kept = None if checkpoint is None else expanded(checkpoint)
    check_places(place, kept)
    check_erased(erased, config)
    if delta and place is not None:
        check_delta(erased, config)
    logs = kept if place is None else logs_folder(place)
    tracker_kinds(config.trackers, logs)
    captions = ordinary_captions(config.captions)
    source = source_of(model)
    if source is None:
        model = with_quantized_held(model)
    if dry_run or (config.shards == 1 and large(source or model)):
        opening = source or model
        found = plan(
            opening,
            concepts,
            config,
            benign=benign,
            device=device,
            output=place,
            delta=delta,
            measure=not large(opening),
        )
        if dry_run:
            return found
        if found.refusal is not None:
            raise MimaError(found.refusal)
    where = family_of(model).device if source is None and device is None else device_of(device)
    ranks = join(where)
    with looking_after_each_other():
        return _immunized(
            model,
            source,
            concepts,
            config,
            benign,
            ranks,
            captions=captions,
            erased=erased,
            output=place,
            folder=None if kept is None else CheckpointFolder(kept),
            logs=logs,
            resume=resume,
            overwrite=overwrite,
            delta=delta,
            device=device,
            where=where,
            callbacks=callbacks,
        )


def _immunized(
    model: Any,
    source: ModelSource | None,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    benign: Sequence[Concept],
    ranks: Ranks,
    *,
    captions: Sequence[str],
    erased: str | Path | None,
    output: Path | None,
    folder: CheckpointFolder | None,
    logs: Path | None,
    resume: bool,
    overwrite: bool,
    delta: bool,
    device: str | torch.device | None,
    where: torch.device,
    callbacks: Sequence[Callback],
) -> ImmunizeResult:
    """`immunize`, once its arguments are checked and the processes have met."""
    # no GPU is to hold the whole of a denoiser that is held in shards
    apart = source is not None and config.shards > 1
    pipeline = own_copy(source or model, "cpu" if apart else device)
    changed: list[str] = []
    if erased is not None:
        loaded = load_erased(pipeline, erased)
        pipeline, changed = loaded.pipeline, [*loaded.changed]
    family = family_of(pipeline, resolution=config.resolution, training=config.training)
    # also refuses names that match no parameter
    written_to = {name for names in trained_names(family, config) for name in names}
    edited = []
    if config.erase_first:
        edited = [name for reader in family.text_readers() for name in reader.names]
    hold_frozen(family.denoiser, {*written_to, *edited})
    check_model(pipeline, concepts, config)
    warn_of_model(pipeline, concepts, config)
    if apart:
        move_others(pipeline, family, where)
        check_drawn(concepts, config, on_cpu=where.type == "cpu")
    written = [*([] if output is None else [output]), *([folder.path] if folder else [])]
    with locked_together(ranks, written):
        if folder:
            if overwrite and not resume:
                ranks.together(folder.remove)

            def claimed() -> None:
                run = describe_run(
                    config.model_dump(mode="json"),
                    [concept.identity() for concept in concepts],
                    named_weights(pipeline),
                    scheduler_settings(pipeline),
                    [concept.identity() for concept in benign],
                    captions,
                )
                claim(folder, run, resume=resume)

            ranks.together(claimed)

        # the files may change while the run lasts, or go
        seen = saw(concepts, config, benign)
        vocabulary = text_parts(pipeline)
        if config.new_words:
            pipeline = with_new_words(pipeline, concepts, config)
            family = family_of(pipeline, resolution=config.resolution, training=config.training)
        # before class pictures are drawn: it may refuse the concepts
        merge = merge_layer(family, concepts, config, where)
        encoded = partial(encode_concepts, family, config=config, cache=folder, ranks=ranks)
        data, others = encoded(concepts), encoded(benign, benign=True)
        # besides the pipeline, it alone holds the weights before they are sharded
        del encoded
        if config.erase_first:
            pipeline = erase(pipeline, concepts, preserve=captions)
            family = family_of(pipeline, resolution=config.resolution, training=config.training)
            if not family.reads_text_alone:
                # what it edits there is what the merge's embeddings come from
                merge = merge_layer(family, concepts, config, where)
        own = ranks
        if config.shards > 1:
            own = ranks.split(config.shards, where)
            family.sharded = sharded(family, written_to, own, config)
        words = [TrainedWord.of(family, c) for c in concepts] if config.train_tokens else []
        problem = Problem(family, data, config, merge, own, words, others, captions, concepts)
        # a pipeline in memory keeps its encoders: they are the caller's
        idle = [] if source is None else idle_modules(pipeline, reads_text=config.reads_text)
        again = config.gradient_checkpointing
        recomputed = recomputed_blocks(family.denoiser, again, sharded=config.shards > 1)
        with recomputed, out_of_memory_while(idle, folder.path if folder else None):
            history = _run(problem, callbacks, folder, logs)

        if config.new_words:
            pipeline = with_modules(pipeline, **vocabulary)
        names: tuple[str, ...] = ()
        if config.method != "none":
            # the published update trains the lower level's parameters, too
            published = config.method == "alternating"
            names = problem.names if published else problem.upper_names
        names = tuple(dict.fromkeys((*names, *edited)))
        part = family.denoiser_name
        # gradients and moments are not needed any more, and the result is larger
        del problem
        if family.sharded is not None:
            pipeline = gathered(pipeline, family, main=ranks.main)
        make_whole(pipeline, family.device, own=source is not None)
        result = ImmunizeResult(
            pipeline,
            [concept.name for concept in concepts],
            config,
            history,
            prompts=[concept.prompt for concept in concepts],
            model=origin_of(model),
            opened_with=source.options if source else {},
            changed=list(dict.fromkeys((*changed, *(f"{part}.{name}" for name in names)))),
            erased=None if erased is None else str(erased),
            saw=seen,
        )
        if output is not None:
            write = partial(write_result, result, output, folder, overwrite=overwrite, delta=delta)
            ranks.together(write)
        return result


def _run(
    problem: Problem,
    callbacks: Sequence[Callback],
    folder: CheckpointFolder | None,
    logs: Path | None,
) -> list[StepReport]:
    match problem.config.method:
        case "none":
            return []
        case "compose":
            return _compose(problem, callbacks, folder, logs)
        case "alternating":
            return alternate(problem, callbacks, folder, logs=logs)
        case _:
            return ascend(problem, callbacks, folder, logs=logs)


def _compose(
    problem: Problem,
    callbacks: Sequence[Callback],
    folder: CheckpointFolder | None,
    logs: Path | None,
) -> list[StepReport]:
    """Immunize each concept alone, each from the same start, then merge the immunized models.

    The processes share the concepts out here too, and each immunizes its own.
    """
    ranks, theta = problem.ranks, problem.theta()
    base = {name: value.clone() for name, value in theta.items()}
    mine = []
    for n in ranks.share(len(problem.data)):
        data = problem.data[n]
        part = folder / f"concept-{n:03d}" if folder else None
        its_logs = logs / f"concept-{n:03d}" if logs else None
        words = problem.words[n : n + 1]
        alone = Problem(
            problem.family, [data], problem.config, None, ALONE, words, problem.benign, first=n
        )
        told = callbacks if ranks.main else ()
        history = ascend(alone, told, part, logs=its_logs, stage=data.name)
        mine.append((history, {name: value.cpu().clone() for name, value in theta.items()}))
        for name, value in theta.items():
            value.copy_(base[name])
    everyone = ranks.interleave(mine, len(problem.data))
    assert problem.merge is not None
    # one by one: all concepts' weights have room in the CPU's memory alone
    for name, value in theta.items():
        immunized = [{name: one[name].to(value)} for _, one in everyone]
        value.copy_(problem.merge({name: base[name]}, immunized)[name])
    return [report for history, _ in everyone for report in history]
