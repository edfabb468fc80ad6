"""Model families: how to open a model, and what differs between kinds of model."""

from mima.families.base import Family
from mima.families.loading import (
    FAMILIES,
    ModelSource,
    family_of,
    load_pipeline,
    origin_of,
    source_of,
)
from mima.families.text import Conditioning
from mima.merging import Params
from mima.options import TrainingOptions

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Family",
    "ModelSource",
    "Params",
    "TrainingOptions",
    "family_of",
    "load_pipeline",
    "origin_of",
    "source_of",
]
