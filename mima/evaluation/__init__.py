"""Measure immunity: attack a model, sample from it, compare what it learned with the references."""

from mima.evaluation.benign import cmmd, prompt_alignment
from mima.evaluation.comparison import attack_original, evaluate
from mima.evaluation.encoders import (
    ClipEncoder,
    DinoEncoder,
    ImageEncoder,
    TextImageEncoder,
    load_encoder,
    load_similarity,
    similarity,
)
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import PRESETS, GridConfig
from mima.evaluation.lpips import Lpips
from mima.evaluation.metrics import (
    GapCurve,
    HalfRise,
    mrsgr,
    msgr,
    rise_left,
    rsgr,
    run_interval,
    sgr,
)
from mima.evaluation.records import Evaluation
from mima.evaluation.summary import paired_difference
from mima.evaluation.trajectory import AttackCurve, attack, compare
from mima.sampling import Sampler

__all__ = [
    "PRESETS",
    "AttackCurve",
    "ClipEncoder",
    "DinoEncoder",
    "Evaluation",
    "EvaluationFolder",
    "GapCurve",
    "GridConfig",
    "HalfRise",
    "ImageEncoder",
    "Lpips",
    "Sampler",
    "TextImageEncoder",
    "attack",
    "attack_original",
    "cmmd",
    "compare",
    "evaluate",
    "load_encoder",
    "load_similarity",
    "mrsgr",
    "msgr",
    "paired_difference",
    "prompt_alignment",
    "rise_left",
    "rsgr",
    "run_interval",
    "sgr",
    "similarity",
]
