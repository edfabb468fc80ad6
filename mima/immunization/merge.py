"""The merge of a run, from its settings and its concepts' texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Family
from mima.immunization import published
from mima.immunization.config import ImmunizeConfig
from mima.merging import MergeLayer, MergePlan
from mima.training.captions import ordinary_captions, regular_tokens


def merge_layer(
    family: Family,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    device: torch.device | None = None,
) -> MergeLayer | None:
    """The merge of a run on a device, by default the model's: None for methods that do not merge.

    Raises:
        MimaError: the concepts' texts admit no merge.
    """
    if not config.merges:
        return None
    weights = torch.full((len(concepts),), 1 / len(concepts), device=device or family.device)
    if config.merge in ("average", "sum"):
        return MergeLayer(weights)
    try:
        if config.method == "alternating":
            captions = ordinary_captions(config.captions)
            plan = published.merge_plan(family, concepts, config, 0, weights, captions)
        else:
            regular = regular_tokens(family, config.captions, config.num_captions, config.seed)
            # where the weights will be, which the model need not be yet
            plan = MergePlan.from_embeddings(
                [concept_tokens(family, concept).to(weights.device) for concept in concepts],
                regular.to(weights.device),
                lam=config.lam,
                weights=weights,
            )
    except ValueError as error:
        raise MimaError(f"merge: {error}") from error
    return MergeLayer(weights, plan, family.text_projections(), trained_tokens=config.train_tokens)


def concept_tokens(family: Family, concept: Concept) -> torch.Tensor:
    """C_n [S_n, D]: embeddings of the concept's prompt, the text its keys and values answer to."""
    return family.token_embeddings(concept.prompt)
