"""A run's own model: opened or copied, given new words, put together again and written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mima.adaptation import TextualInversion
from mima.concepts import Concept
from mima.distributed import Ranks, device_of
from mima.errors import MimaError
from mima.families import Family, ModelSource, family_of, load_pipeline
from mima.families.frozen import cast, hold_frozen
from mima.families.new_words import text_parts
from mima.families.pipelines import (
    Pipeline,
    networks,
    networks_beside,
    own_networks,
    with_modules,
)
from mima.immunization.config import ImmunizeConfig
from mima.immunization.result import ImmunizeResult
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.lock import locked
from mima.storage.output import fresh_folder

if TYPE_CHECKING:
    from mima.families.sharded import ShardedDenoiser


def own_copy(model: Any, device: str | torch.device | None) -> Any:
    """Open a model in the dtype of its files; of a pipeline in memory, copy what changes of it.

    Nothing else is copied but the modules around its weights, so that the run can move them.
    """
    if isinstance(model, ModelSource):
        pipeline = load_pipeline(model, dtype=None, device=device_of(device))
        for network in networks(pipeline).values():
            hold_frozen(network)
        return pipeline
    family = family_of(model)
    own = own_networks(model)
    for network in own.values():
        # encodings would else have a text encoder's dropout
        network.eval()
    denoiser = own[family.denoiser_name]
    if family.dtype == torch.float64:
        cast(denoiser, torch.float32)
    hold_frozen(denoiser)
    pipeline = with_modules(model, **own)
    return pipeline if device is None else pipeline.to(device_of(device))


def move_others(pipeline: Pipeline, family: Family, where: torch.device) -> None:
    """Move what encodes pictures and prompts to a device; the denoiser stays where it is."""
    for network in networks_beside(pipeline, family.denoiser).values():
        network.to(where)


def with_new_words(pipeline: Pipeline, concepts: Sequence[Concept], config: ImmunizeConfig) -> Any:
    """The pipeline with every concept's new word, its embedding trained for ``token_steps``."""
    for concept in concepts:
        if concept.token is None:
            continue
        inversion = TextualInversion(
            seed=config.seed,
            resolution=config.resolution,
            training=config.training,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        run = inversion.start(pipeline, concept)
        run.advance(config.token_steps)
        pipeline = with_modules(pipeline, **text_parts(run.pipeline))
    return pipeline


def sharded(
    family: Family, trained: Collection[str], ranks: Ranks, config: ImmunizeConfig
) -> ShardedDenoiser:
    """Let the processes that hold a model between them have their shards of the denoiser."""
    # torch.distributed's own imports take a second
    from mima.families.sharded import ShardedDenoiser

    assert ranks.mesh is not None
    return ShardedDenoiser(family, trained, ranks.mesh, getattr(torch, config.precision))


def gathered(pipeline: Pipeline, family: Family, *, main: bool) -> Pipeline:
    """The pipeline with a denoiser that is whole in the main process' CPU memory, nowhere else."""
    assert family.sharded is not None
    part = family.denoiser_name
    cpu = torch.device("cpu")
    whole = with_modules(pipeline, **{part: family.sharded.whole(cpu if main else None)})
    return whole.to(cpu) if main else whole


@contextmanager
def locked_together(ranks: Ranks, paths: Sequence[Path]) -> Iterator[None]:
    """Keep other runs from what this one writes; the main process has the locks."""
    with ExitStack() as locks:

        def lock() -> None:
            for path in paths:
                locks.enter_context(locked(path))

        ranks.together(lock)
        yield


def write_result(
    result: ImmunizeResult,
    output: Path,
    folder: CheckpointFolder | None,
    *,
    overwrite: bool,
    delta: bool,
) -> None:
    """Write a result whole, and remove what was kept while the run lasted."""
    try:
        with fresh_folder(output, overwrite=overwrite) as staging:
            result.save_pretrained(staging, delta=delta)
    except MimaError as error:
        kept = f"; {folder.path} is intact: resume" if folder else ""
        raise MimaError(f"{error}{kept}") from error
    if folder:
        folder.remove()
