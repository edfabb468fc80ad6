"""Names that settings choose from, and their bounds; imports nothing heavy, for the commands."""

from __future__ import annotations

from typing import Literal

MOST = 2**31 - 1
"""Steps of a run."""
MOST_AT_ONCE = 4096
"""Pictures of one batch, and the rank of an update: beyond, memory ends before anything is told."""
LARGEST_SEED = 2**63 - 1
"""What torch takes on every device."""
SEED_STRIDE = 1000
"""Pictures of attacks with different seeds are drawn from multiples of it on, and never meet."""
LARGEST_ATTACK_SEED = LARGEST_SEED // SEED_STRIDE - 1

Method = Literal["none", "imma", "joint", "compose", "mima", "alternating"]
"""How a model is immunized: see ``ImmunizeConfig.method``."""

MergeRule = Literal["projected", "average", "sum"]
"""How adapted weights are merged within a step: see ``ImmunizeConfig.merge``."""

UpperObjective = Literal["neg", "log", "hinge", "pair", "anchor", "zero", "entropy"]
"""What the upper level wants of an attacked model: see ``mima.immunization.objectives``."""

PathWeights = Literal["uniform", "late"]
"""How much each state of an attack counts: see ``UpperConfig.path_weights``."""

AttackerCaptions = Literal["as_is", "without_name", "rare_token", "empty"]
"""What an attacker calls a concept: see ``LowerConfig.captions``."""

BenignTarget = Literal["match", "held_out"]
"""What benign adaptations are to come to: see ``mima.immunization.benign``."""

LearningRateSchedule = Literal["constant", "cosine"]
"""How a learning rate changes over a run: see ``UpperConfig.lr_schedule``, ``Adaptation``."""

Retention = Literal["class_images", "distill"]
"""How a model is kept useful: see ``UpperConfig.retain``."""

RetentionCaptions = Literal["own", "other", "ordinary", "as_is", "without_name", "empty"]
"""What class pictures are read under: see ``UpperConfig.retain_captions``."""

UpperOptimizer = Literal["adamw", "muon"]
"""How the defender steps: see ``UpperConfig.optimizer``."""

Hypergradient = Literal["exact", "finite_difference", "first_order"]
"""How the lower level is differentiated: see ``mima.bilevel.hypergradient``."""

Precision = Literal["float32", "float16", "bfloat16"]
"""Of weights, or of what is computed with them."""

Task = Literal["relearn", "personalize"]
"""What an attacker wants: see ``mima.immunization.recipes.TASKS``."""

Recipe = Literal["default", "paper", "apdm", "sophon", "tar"]
"""Named settings: see ``mima.immunization.recipes``."""

WeightingScheme = Literal["none", "logit_normal", "sigma_sqrt", "mode", "cosmap"]
"""How rectified flow draws and weighs noise levels: see ``mima.families.TrainingOptions``."""

ErasureMethod = Literal["uce", "esd-x", "esd-u", "esd-full"]
"""UCE, or one of ``mima.erasure.VARIANTS`` of ESD."""

Technique = Literal["replace", "tensor"]
"""What UCE does to values: see ``mima.erasure.erase``."""

MergeMethod = Literal["projected", "weighted"]
"""How finished adapters are merged: see ``mima.merge_adapters``."""

AdaptationMethod = Literal[
    "lora", "dreambooth", "dreambooth-lora", "textual-inversion", "custom-diffusion", "pivotal"
]
"""How a model is adapted: see ``mima.adaptation.METHODS``."""

Preset = Literal["quick", "headline", "standard", "adversarial"]
"""What an evaluation attacks with: see ``mima.evaluation.PRESETS``."""

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Kinds of device that torch computes on."""

PictureProtocol = Literal["standard", "published"]
"""How pictures are prepared for an encoder: see ``mima.evaluation.preprocessing``."""
