"""Model families: how to open a model, and what differs between kinds of model."""

from mima.families.base import Conditioning, Family, Params
from mima.families.loading import (
    FAMILIES,
    ModelSource,
    family_of,
    load_pipeline,
    origin_of,
    source_of,
)

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Family",
    "ModelSource",
    "Params",
    "family_of",
    "load_pipeline",
    "origin_of",
    "source_of",
]
