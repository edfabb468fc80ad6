"""The merge of the authors' released code: class prompts, captions drawn anew, hard constraint."""

# R, S_n = tokens of captions and of concept n, D = text embedding

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mima.concepts import Concept
from mima.families import Family
from mima.immunization.config import ImmunizeConfig
from mima.merging import MergePlan
from mima.training.batches import chunks
from mima.training.captions import drawn_captions

logger = logging.getLogger(__name__)

ALMOST_HARD = 1e-10
"""Softness that stands in for a hard constraint that contradicts itself."""
OPENING = "photo of a"
"""A text that begins so is read without these words."""


def text_tokens(family: Family, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings [S, D] of the texts' tokens: without start tokens and padding, with end tokens.

    Of a text with ``OPENING`` in its first 15 letters, the first three words are left out.
    """
    rows = []
    for chunk in chunks(list(texts)):
        mask = family.token_mask(chunk)
        for row, text in zip(mask, chunk, strict=True):
            if OPENING in text[:15]:
                row[row.nonzero()[:3, 0]] = False
        rows.append(family.text_embeddings(chunk)[mask.to(family.device)])
    return torch.cat(rows)


def concept_tokens(family: Family, concepts: Sequence[Concept]) -> list[torch.Tensor]:
    """C_n [S_n, D] of each concept: its class prompt, alone and in a sentence.

    A concept without a class prompt stands by its own prompt. Rows that an earlier concept has
    already are left out.
    """
    several: list[torch.Tensor] = []
    for concept in concepts:
        name = concept.class_prompt or concept.prompt
        opening = "painting in the style of" if "art" in name else OPENING
        rows = text_tokens(family, [name, f"{opening} {name}"])
        for other in several:
            rows = rows[~(rows.unsqueeze(1) == other.unsqueeze(0)).all(dim=2).any(dim=1)]
        several.append(rows)
    return several


def merge_plan(
    family: Family,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    step: int,
    weights: torch.Tensor,
    captions: Sequence[str],
) -> MergePlan:
    """The plan of one merge, with some of the captions, drawn for the outer step that it is of.

    Texts are read by the model as it is then: what reads them may be among what is trained.
    ``weights`` [N] are the shares, which a hard constraint does not read.

    Raises:
        ValueError: as ``MergePlan.from_embeddings``.
    """
    C = concept_tokens(family, concepts)
    drawn = drawn_captions(captions, config.num_captions, config.seed, step)
    C_reg = text_tokens(family, drawn)
    if step == 0:
        for concept, rows in zip(concepts, C, strict=True):
            if not len(rows):
                logger.warning(
                    "concept %r has the class prompt of an earlier one (%r): its keys and values "
                    "are left out of the merge; the released code trains the last of such concepts "
                    "alone",
                    concept.name,
                    concept.class_prompt or concept.prompt,
                )
    try:
        return MergePlan.from_embeddings(C, C_reg, lam=0.0, weights=weights)
    except ValueError as error:
        if step == 0:
            logger.warning("%s; using lam=%g", error, ALMOST_HARD)
        return MergePlan.from_embeddings(C, C_reg, lam=ALMOST_HARD, weights=weights)
