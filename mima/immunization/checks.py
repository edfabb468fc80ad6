"""What a run refuses: its arguments at once, its model before pictures are drawn or encoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mima.adapters.adapter import check_unadapted
from mima.concepts import Concept
from mima.concepts.naming import names_of
from mima.distributed import world_size
from mima.erasure import edits_of
from mima.errors import MimaError
from mima.families import Family, family_of
from mima.families.new_words import check_token
from mima.families.pipelines import Pipeline
from mima.immunization.config import ImmunizeConfig
from mima.immunization.parameters import trained_names
from mima.immunization.recipes import EMBEDDED_RATE
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.inputs import expanded, resolved
from mima.training.captions import is_of_emoji, warn_of_emoji

logger = logging.getLogger(__name__)


def check_concepts(
    concepts: Sequence[Concept], benign: Sequence[Concept], config: ImmunizeConfig
) -> None:
    """Refuse concepts that the settings ask more of, or do not ask for."""
    if benign and not config.reads_benign:
        raise MimaError(
            "benign: nothing reads these concepts; set upper.benign or lower.benign_start"
        )
    if config.reads_benign and not benign:
        name = "lower.benign_start" if config.upper.benign is None else "upper.benign"
        raise MimaError(
            f"{name}: there are no benign concepts; name some: immunize(..., benign=[...]), or "
            "benign: in the run's file"
        )
    both = {concept.name for concept in benign} & {concept.name for concept in concepts}
    if both:
        raise MimaError(
            f"benign: {', '.join(sorted(both))} cannot both stay learnable and become immune"
        )
    wordless = [c.name for c in concepts if c.token is None]
    if config.train_tokens and wordless:
        raise MimaError(
            f"lower.train_token: trains each concept's new word; no token: {', '.join(wordless)}"
        )
    if config.new_words and len(wordless) == len(concepts):
        raise MimaError(
            "new_words: no concept has a token, so there is no new word to learn; name one "
            "for each instance, such as <new1>, or use the task relearn"
        )
    if config.method == "imma" and len(concepts) != 1:
        raise MimaError(
            f"method: imma immunizes against one concept, got {len(concepts)}; "
            "use joint, compose or mima"
        )


def check_erased(erased: str | Path | None, config: ImmunizeConfig) -> None:
    """Refuse an erased checkpoint that is not there, or beside which the concepts are erased."""
    if erased is not None and config.erase_first:
        raise MimaError(f"erase_first: the concepts are erased in {erased} already; leave it out")
    if erased is not None and not expanded(erased).exists():
        raise MimaError(f"erased: {erased} does not exist")


def check_delta(erased: str | Path | None, config: ImmunizeConfig) -> None:
    """Refuse to write the changed weights alone of a run that changes none."""
    if config.method == "none" and not config.erase_first and erased is None:
        raise MimaError("delta: method none changes nothing, so there is nothing to write")


def check_shards(config: ImmunizeConfig, *, dry_run: bool) -> None:
    """Refuse numbers of processes that shards cannot be dealt to."""
    if config.shards == 1:
        return
    size = world_size()
    # a plan is made before the processes are started
    if size % config.shards and not (dry_run and size == 1):
        raise MimaError(
            f"shards: {config.shards} processes hold one model between them, but {size} were "
            f"started; start a multiple of {config.shards}: torchrun --nproc-per-node "
            f"{config.shards} -m mima immunize ..."
        )


def check_places(output: Path | None, checkpoint: Path | None) -> None:
    """Refuse a folder for checkpoints, which is removed at the end, that is not a run's alone.

    Raises:
        MimaError: it holds or is within the output, or it holds files of somebody else.
    """
    if checkpoint is None:
        return
    CheckpointFolder(checkpoint).check_own()
    if output is None:
        return
    written, removed = resolved(output.absolute()), resolved(checkpoint.absolute())
    if written.is_relative_to(removed) or removed.is_relative_to(written):
        raise MimaError(
            f"checkpoint: {checkpoint} and the output {output} hold each other; the folder of "
            "checkpoints is removed once the output is written: give it a place of its own"
        )


def check_model(pipeline: Pipeline, concepts: Sequence[Concept], config: ImmunizeConfig) -> None:
    """Refuse a model that a later part of the run would refuse, or that could not be written.

    Reads no weight, so that a plan refuses it, too.
    """
    family = family_of(pipeline)
    check_unadapted(family)
    family.check_vae()
    _check_captions(family, config)
    nameless = [concept.name for concept in concepts if not names_of(concept)]
    kinds = {kind for attacker in config.attackers for kind in attacker.captions}
    for kind in sorted(kinds & {"without_name", "rare_token"}):
        if nameless:
            raise MimaError(
                f"lower.captions: {kind} needs a name to replace; the prompt does not contain it: "
                f"{', '.join(nameless)}"
            )
    if config.erase_first:
        for concept in concepts:
            edits_of(concept)
    if config.shards > 1:
        check_splittable(pipeline)
    if config.train_tokens and config.merges and not family.reads_text_alone:
        raise MimaError(
            f"lower.train_token: the text projections of {type(pipeline).__name__} read more than "
            "text, so that the merge cannot be made anew for a trained word; method joint can"
        )
    if config.new_words:
        new = [concept for concept in concepts if concept.token is not None]
        for n, concept in enumerate(new):
            check_token(pipeline, concept)
            if concept.token in [other.token for other in new[:n]]:
                raise MimaError(
                    f"concept {concept.name!r}: another concept has the token {concept.token!r} too"
                )


def warn_of_model(pipeline: Pipeline, concepts: Sequence[Concept], config: ImmunizeConfig) -> None:
    """Warn of settings that do little, or something else, for these concepts and this model."""
    nameless = [concept.name for concept in concepts if not names_of(concept)]
    if nameless and config.has_prior and "without_name" in config.upper.retain_captions:
        logger.warning(
            "upper.retain_captions: without_name needs a name to leave out, and the prompt does "
            "not contain it: %s; class pictures are retained under their own captions instead",
            ", ".join(nameless),
        )
    if reads_captions(concepts, config):
        warn_of_emoji(pipeline, config.captions)
    _warn_of_rates(pipeline, config)


def _check_captions(family: Family, config: ImmunizeConfig) -> None:
    """Refuse attackers' captions that the merge keeps nothing of."""
    called = {kind for attacker in config.attackers for kind in attacker.captions}
    elsewhere = called & {"rare_token", "without_name"}
    if not elsewhere or config.method != "mima" or config.merge != "projected":
        return
    _, names = trained_names(family, config)
    if not set(names).isdisjoint(family.text_projections()):
        raise MimaError(
            "lower.captions: of keys and values the projected merge keeps what the concepts' own "
            f"prompts ask for; what is learned under {' and '.join(sorted(elsewhere))} needs merge "
            "'average' or 'sum', or method 'joint'"
        )


def _warn_of_rates(pipeline: Pipeline, config: ImmunizeConfig) -> None:
    """Warn of attacks on a model like the embedded one at the rates of larger ones."""
    adam = [attacker for attacker in config.attackers if attacker.optimizer == "adam"]
    if config.method in ("none", "alternating") or len(adam) < len(config.attackers):
        return
    if config.highest_lr <= EMBEDDED_RATE / 5 and is_of_emoji(pipeline):
        logger.warning(
            "lower.lr: attacks at %g at most; models like the embedded one are trained at %g, and "
            "so slow an attack teaches them nothing: raise lower.lr, or set rate: %g with the "
            "recipe default",
            config.highest_lr,
            EMBEDDED_RATE,
            EMBEDDED_RATE,
        )


def check_splittable(pipeline: Pipeline) -> None:
    """Refuse a denoiser that cannot be held in shards.

    Raises:
        MimaError: a weight of it goes by several names.
    """
    if family_of(pipeline).shares_weights:
        raise MimaError(
            f"shards: weights of this {type(pipeline).__name__} go by several names and cannot be "
            "split; use 1"
        )


def reads_captions(concepts: Sequence[Concept], config: ImmunizeConfig) -> bool:
    """Whether a run reads ordinary captions: in its merge, to erase, or for class pictures."""
    drawn = config.has_prior and any(not (c.class_images or c.class_prompt) for c in concepts)
    projects = config.merges and config.merge == "projected"
    return projects or drawn or config.erase_first


def check_drawn(concepts: Sequence[Concept], config: ImmunizeConfig, *, on_cpu: bool) -> None:
    """Refuse class pictures that no process could draw.

    Raises:
        MimaError: a concept brings none, and only a GPU could draw them.
    """
    lacking = [concept.name for concept in concepts if not concept.class_images]
    if not on_cpu and config.has_prior and lacking:
        raise MimaError(
            "shards: class pictures are drawn by a whole model, which no GPU holds here; give "
            f"class_images (mima sample draws some) to {', '.join(lacking)}"
        )
