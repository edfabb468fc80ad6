"""Measure immunity: attack a model, sample from it, compare what it learned with the references."""

from mima.evaluation.alignment import prompt_alignment
from mima.evaluation.attack import AttackCurve, attack, compare
from mima.evaluation.metrics import (
    GapCurve,
    GapSummary,
    bootstrap_interval,
    mrsgr,
    msgr,
    rsgr,
    sgr,
)
from mima.evaluation.sampling import Sampler
from mima.evaluation.similarity import (
    ClipEncoder,
    DinoEncoder,
    ImageEncoder,
    TextImageEncoder,
    load_encoder,
    similarity,
)

__all__ = [
    "AttackCurve",
    "ClipEncoder",
    "DinoEncoder",
    "GapCurve",
    "GapSummary",
    "ImageEncoder",
    "Sampler",
    "TextImageEncoder",
    "attack",
    "bootstrap_interval",
    "compare",
    "load_encoder",
    "mrsgr",
    "msgr",
    "prompt_alignment",
    "rsgr",
    "sgr",
    "similarity",
]
