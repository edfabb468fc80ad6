"""Measure immunity: attack a model, sample from it, compare what it learned with the references."""

from typing import TYPE_CHECKING

from mima._lazy import load_on_use

if TYPE_CHECKING:
    from mima.evaluation.alignment import cmmd, prompt_alignment
    from mima.evaluation.attack import AttackCurve, attack, compare
    from mima.evaluation.attacks import PRESETS, GridConfig
    from mima.evaluation.metrics import (
        GapCurve,
        GapSummary,
        bootstrap_interval,
        mrsgr,
        msgr,
        rsgr,
        sgr,
    )
    from mima.evaluation.records import Evaluation, EvaluationFolder
    from mima.evaluation.run import evaluate
    from mima.evaluation.sampling import Sampler
    from mima.evaluation.similarity import (
        ClipEncoder,
        DinoEncoder,
        ImageEncoder,
        Lpips,
        TextImageEncoder,
        load_encoder,
        load_similarity,
        similarity,
    )

_MODULE_OF = {
    "AttackCurve": "mima.evaluation.attack",
    "ClipEncoder": "mima.evaluation.similarity",
    "DinoEncoder": "mima.evaluation.similarity",
    "Evaluation": "mima.evaluation.records",
    "EvaluationFolder": "mima.evaluation.records",
    "GapCurve": "mima.evaluation.metrics",
    "GapSummary": "mima.evaluation.metrics",
    "GridConfig": "mima.evaluation.attacks",
    "ImageEncoder": "mima.evaluation.similarity",
    "Lpips": "mima.evaluation.similarity",
    "PRESETS": "mima.evaluation.attacks",
    "Sampler": "mima.evaluation.sampling",
    "TextImageEncoder": "mima.evaluation.similarity",
    "attack": "mima.evaluation.attack",
    "bootstrap_interval": "mima.evaluation.metrics",
    "cmmd": "mima.evaluation.alignment",
    "compare": "mima.evaluation.attack",
    "evaluate": "mima.evaluation.run",
    "load_encoder": "mima.evaluation.similarity",
    "load_similarity": "mima.evaluation.similarity",
    "mrsgr": "mima.evaluation.metrics",
    "msgr": "mima.evaluation.metrics",
    "prompt_alignment": "mima.evaluation.alignment",
    "rsgr": "mima.evaluation.metrics",
    "sgr": "mima.evaluation.metrics",
    "similarity": "mima.evaluation.similarity",
}

__all__ = [
    "PRESETS",
    "AttackCurve",
    "ClipEncoder",
    "DinoEncoder",
    "Evaluation",
    "EvaluationFolder",
    "GapCurve",
    "GapSummary",
    "GridConfig",
    "ImageEncoder",
    "Lpips",
    "Sampler",
    "TextImageEncoder",
    "attack",
    "bootstrap_interval",
    "cmmd",
    "compare",
    "evaluate",
    "load_encoder",
    "load_similarity",
    "mrsgr",
    "msgr",
    "prompt_alignment",
    "rsgr",
    "sgr",
    "similarity",
]

load_on_use(__name__, _MODULE_OF)
