"""Erase concepts by a closed-form edit of the weights that read text.

After Unified Concept Editing (UCE, Gandikota et al., WACV 2024, arXiv 2308.14761). For a weight W0
[o, D] that reads text embeddings, rows x_e of prompts that name the concept, values v_e that they
should get instead, and rows x_p of prompts to preserve:

    min_W  s_e · Σ_c mean_e ‖W x_e − v_e‖² + s_p · mean_p ‖(W − W0) x_p‖² + r ‖W − W0‖²_F

With G = s_e · Σ_c mean_e x_e x_eᵀ + s_p · mean_p x_p x_pᵀ + r I, which no weight is part of:

    W = W0 + s_e · Σ_c mean_e (v_e − W0 x_e) (G⁻¹ x_e)ᵀ

Σ_c is over the concepts and mean_e over the rows of one, so that each concept counts the same
however many prompts name it; r is `ridge` times the mean diagonal of the rest of G, which is
factored once, in float64, for all keys and values of the model. SDXL is told the pooled
text besides: the columns that read it, of the weight that embeds the added conditions, are edited
by the same formula. In SD3 and Flux, whose attention is joint, what keys and values read depends on
the picture; there the edit is of the two weights that read text alone, those that embed the tokens
and the pooled text.
"""

# B = prompts, S = tokens, E = rows to edit, N = rows to preserve, D = text embedding
# o = outputs of one weight

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mima.adapters.adapter import check_unadapted
from mima.choices import Technique
from mima.concepts import Concept
from mima.concepts.naming import left_out, names, replaced
from mima.errors import MimaError
from mima.families import Family, family_of
from mima.families.pipelines import Pipeline, with_modules
from mima.families.text import TextReader

logger = logging.getLogger(__name__)

ENCODING_BATCH = 64
EMBEDDED_AT_ONCE = 2**28
"""Bytes of token embeddings, in float64, that are summed up at once."""


@dataclass(frozen=True)
class Edit:
    """What a prompt should mean from now on.

    Attributes:
        source: a prompt that names what is to be erased.
        target: the prompt that it should be read as.
    """

    source: str
    target: str


def erase(
    pipeline: Pipeline,
    concepts: Sequence[Concept | str | Sequence[Edit]],
    *,
    preserve: Sequence[str | Concept] = (),
    target: str = "",
    technique: Technique = "replace",
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    ridge: float = 1e-3,
) -> Any:
    """Erase concepts from a model, all at once, and keep the rest.

    A concept's name (`Concept.name`; hyphens and underscores read as spaces) is looked for in its
    own prompts and in the captions of `preserve`. Wherever it stands it is replaced by `target`,
    and the prompt is made to mean what is left: "a cat emoji in mono style" becomes "a emoji in
    mono style" for the concept cat, and "a emoji" where mono style is erased as well. All other
    captions keep their meaning. Without a `target`, prepositions and articles that would be left
    hanging go with the name: for the concept mono style, "a cat emoji in mono style" becomes "a
    cat emoji".

    Args:
        pipeline: a diffusers pipeline, which stays as it is.
        concepts: what to erase; a name alone needs no pictures, and a list of `Edit`s says exactly
            how.
        preserve: ordinary captions, or concepts whose prompts are to keep their meaning. The
            more they cover, the less the rest of the model changes.
        target: words that take the place of a concept's name; nothing by default.
        technique: `"replace"` moves a value to the target's, `"tensor"` moreover removes from it
            what points in the old value's direction.
        erase_scale: weight of the edited prompts.
        preserve_scale: weight of the preserved prompts.
        ridge: weight of staying near the old weights, relative to the mean diagonal of G; it also
            makes the solution unique where the prompts leave it open.

    Returns:
        A pipeline of the same class with a denoiser of its own, no weight of which is shared with
        the input. Text encoder and VAE are not changed and are shared.

    Raises:
        MimaError: a concept whose name is in none of its prompts.
        TypeError: one concept instead of a list.
        ValueError: no concepts, or a setting out of its range.

    Examples:
        >>> erased = erase(pipeline, [cat], preserve=["a photo of a dog", "a red house"])
    """
    for name, value in (("erase_scale", erase_scale), ("ridge", ridge)):
        if not value > 0:
            raise ValueError(f"erase: {name} must be above 0, got {value}")
    if not preserve_scale >= 0:
        raise ValueError(f"erase: preserve_scale must be at least 0, got {preserve_scale}")
    if technique not in ("replace", "tensor"):
        raise ValueError(f"erase: technique must be replace or tensor, got {technique!r}")
    captions = _captions(preserve)
    groups = edit_groups("erase", concepts, captions, target)
    edited = {edit.source for group in groups for edit in group}
    preserved = [caption for caption in captions if caption not in edited]
    logger.info(
        "erasing %d concepts: %d prompts edited, %d preserved",
        len(groups),
        sum(map(len, groups)),
        len(preserved),
    )

    original = family_of(pipeline)
    check_unadapted(original)
    denoiser = copy.deepcopy(original.denoiser)
    erased = with_modules(pipeline, **{original.denoiser_name: denoiser})
    family = family_of(erased)

    # all rows are read before any weight changes
    rows = []
    for reader in family.text_readers():
        pairs = [_rows(family, reader, group) for group in groups]
        # every concept weighs the same, however many prompts name it
        weights = torch.cat([torch.full((len(x),), 1 / len(x)) for x, _ in pairs])
        source_ED = torch.cat([x for x, _ in pairs])
        target_ED = torch.cat([t for _, t in pairs])
        weighted_ED = source_ED * (erase_scale * weights.to(source_ED)).unsqueeze(1)
        gram_DD = weighted_ED.mT @ source_ED
        if preserved and preserve_scale > 0:
            kept_DD, count = _gram(family, reader, preserved, gram_DD)
            gram_DD += kept_DD * (preserve_scale / count)
        gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
        # G⁻¹ x_e, weighted, for every edited row
        solved_DE = torch.cholesky_solve(weighted_ED.mT, torch.linalg.cholesky(gram_DD))
        rows.append((reader, source_ED, target_ED, solved_DE))

    with torch.no_grad():
        for reader, source_ED, target_ED, solved_DE in rows:
            for name in reader.names:
                weight = denoiser.get_parameter(name)[:, : reader.columns]
                old_oD = weight.to(source_ED)
                old_Eo = source_ED @ old_oD.mT
                new_Eo = target_ED @ old_oD.mT
                if technique == "tensor":
                    direction_Eo = torch.nn.functional.normalize(old_Eo, dim=-1)
                    # where the prompt already means its target there is nothing to remove
                    changed_E1 = (source_ED != target_ED).any(dim=-1, keepdim=True)
                    along_E1 = (new_Eo * direction_Eo).sum(dim=-1, keepdim=True)
                    new_Eo = new_Eo - along_E1 * direction_Eo * changed_E1
                delta_oD = (new_Eo - old_Eo).mT @ solved_DE.mT
                weight.copy_(old_oD + delta_oD)
    return erased


def edits_of(
    concept: Concept | str,
    captions: Sequence[str] = (),
    target: str = "",
    *,
    others: Sequence[Concept | str] = (),
) -> list[Edit]:
    """One edit for each prompt that names a concept, its name replaced by `target`.

    Args:
        concept: its name is looked for in its prompts as whole words or their plural, in any case.
            A name alone is its only prompt.
        captions: further prompts that may name it.
        target: words that take the place of the name; without any it is left out.
        others: what is erased at once. Where a prompt names them, too, their names are replaced as
            well, or one concept's edits would keep what another's remove.

    Raises:
        MimaError: none of the concept's own prompts names it, or its name is empty.
    """
    called = _name(concept)
    if not called.strip():
        raise MimaError("erase: a concept's name is empty")
    own = _captions([concept])
    if not any(names(prompt, called) for prompt in own):
        raise MimaError(
            f"concept {called!r}: none of its prompts contains its name (one is {own[0]!r}), so "
            "there is nothing to replace; name it as its prompts do, or in Python pass Edits"
        )
    erased = [called, *map(_name, others)]
    return [
        Edit(prompt, replaced(prompt, erased, target) if target else left_out(prompt, erased))
        for prompt in dict.fromkeys([*own, *captions])
        if names(prompt, called)
    ]


def edit_groups(
    who: str,
    concepts: Sequence[Concept | str | Sequence[Edit]],
    captions: Sequence[str],
    target: str,
) -> list[list[Edit]]:
    """The edits of each concept, arguments as for `edits_of`; `who` begins error messages."""
    # a single name would be read letter by letter
    if isinstance(concepts, (str, Concept)):
        raise TypeError(f"{who}: concepts must be a list, got {concepts!r}")
    if not concepts:
        raise ValueError(f"{who}: concepts is empty")
    named = [one for one in concepts if isinstance(one, (Concept, str))]
    groups = [
        edits_of(one, captions, target, others=named) if isinstance(one, (Concept, str)) else [*one]
        for one in concepts
    ]
    if not all(groups):
        raise ValueError(f"{who}: a list of edits is empty")
    return groups


def _name(concept: Concept | str) -> str:
    return concept if isinstance(concept, str) else concept.name


def _captions(preserve: Sequence[str | Concept]) -> list[str]:
    prompts: list[str] = []
    for item in preserve:
        if isinstance(item, Concept):
            prompts.append(item.prompt)
            prompts += [picture.prompt for picture in (*item.images, *item.held_out)]
        else:
            prompts.append(item)
    return list(dict.fromkeys(prompts))


def _gram(
    family: Family, reader: TextReader, prompts: Sequence[str], like_DD: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The sum of x xᵀ [D, D] over all token embeddings that are read, and how many they are.

    So many at a time as `EMBEDDED_AT_ONCE` has room for: those of all captions take gigabytes.
    """
    sum_DD, count, held = torch.zeros_like(like_DD), 0, list[torch.Tensor]()

    def fold() -> None:
        nonlocal sum_DD, held
        read_ND = torch.cat(held)
        sum_DD, held = sum_DD + read_ND.mT @ read_ND, []

    for start in range(0, len(prompts), ENCODING_BATCH):
        hidden_BSD, read_BS = _embed(family, reader, prompts[start : start + ENCODING_BATCH])
        held.append(hidden_BSD[read_BS])
        count += len(held[-1])
        if sum(one.nbytes for one in held) > EMBEDDED_AT_ONCE:
            fold()
    if held:
        fold()
    return sum_DD, count


def _embed(
    family: Family, reader: TextReader, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings [B, S, D] in float64, and a mask [B, S] of those that are read.

    CLIP-conditioned models read padding as well as tokens; models with a mask do not.
    """
    hidden, masks = [], []
    masked = "encoder_attention_mask" in family.encode_prompts(prompts[:1])
    for start in range(0, len(prompts), ENCODING_BATCH):
        batch = prompts[start : start + ENCODING_BATCH]
        hidden.append(reader.embed(batch).detach().double())
        if masked:
            masks.append(family.encode_prompts(batch)["encoder_attention_mask"].bool())
        else:
            masks.append(torch.ones(hidden[-1].shape[:2], dtype=torch.bool))
    hidden_BSD = torch.cat(hidden)
    return hidden_BSD, torch.cat(masks).to(hidden_BSD.device)


def _rows(
    family: Family, reader: TextReader, edits: Sequence[Edit]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of all tokens of the sources [E, D], and of the tokens they should become."""
    source_BSD, read_BS = _embed(family, reader, [edit.source for edit in edits])
    target_BSD, shown_BS = _embed(family, reader, [edit.target for edit in edits])
    aligned = []
    for edit, target_SD, shown_S in zip(edits, target_BSD, shown_BS, strict=True):
        places = torch.arange(len(target_SD))
        start = 0
        for tokenizer, count in reader.tokenizers:
            length = len(places) - start if count is None else count
            # all of their tokens: what is left of two prompts that are cut need not end alike
            source, target = (
                family.token_ids(tokenizer, prompt, sys.maxsize)
                for prompt in (edit.source, edit.target)
            )
            counterparts = align(source, target, length)
            read = family.token_ids(tokenizer, edit.source, length)
            if len(source) > length and read[-1] == source[-1]:
                # where a prompt is cut stands its end token
                counterparts[-1] = min(len(target), length) - 1
            places[start : start + length] = start + counterparts
            start += length
        # without an end token, what follows the target's last one is never read
        last = int(shown_S.nonzero().max())
        aligned.append(target_SD[places.clamp(max=last).to(target_SD.device)])
    return source_BSD[read_BS], torch.stack(aligned)[read_BS]


def align(source: Sequence[int], target: Sequence[int], length: int) -> torch.Tensor:
    """For each token of a source prompt, the place of its counterpart in the target prompt.

    Tokens that both prompts begin with, and those that both end with, are each other's
    counterparts. What the source has in between becomes the last token of what the target has in
    between, or, if that is nothing, the token after it. Padding continues the common end.

    Args:
        source: token ids with start and end token, no padding; all, also beyond ``length``.
        target: likewise.
        length: number of positions that are read, padding included.

    Returns:
        [length] positions in the target.
    """
    shorter = min(len(source), len(target))
    start = 0
    while start < shorter and source[start] == target[start]:
        start += 1
    end = 0
    while end < shorter - start and source[-1 - end] == target[-1 - end]:
        end += 1
    source_end, target_end = len(source) - end, len(target) - end
    places = torch.arange(length)
    places[start:source_end] = max(start, target_end - 1)
    places[source_end:] += target_end - source_end
    return places.clamp(0, length - 1)
