"""Families of attacks by name: what an attacker may do beyond a published method's settings.

docs/attacks.md says where each comes from and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mima.adaptation import Adaptation
from mima.evaluation.tuning import SGD_RATE


def changed(**settings: Any) -> Callable[[Adaptation], Adaptation]:
    """An adaptation with other settings."""
    return lambda adaptation: replace(adaptation, **settings)


def _sgd(adaptation: Adaptation) -> Adaptation:
    rate = SGD_RATE * adaptation.learning_rate
    return replace(adaptation, optimizer="sgd", learning_rate=rate, use_8bit_adam=False)


def _in_two_halves(adaptation: Adaptation) -> Adaptation:
    return replace(adaptation, restart_every=max(1, adaptation.steps // 2))


@dataclass(frozen=True, kw_only=True)
class AttackFamily:
    """One named way to attack.

    Attributes:
        base: the method whose settings it starts from: those of the grid where it has them.
        adapt: makes the family's adaptation of the method's.
        transplant: train on the original model, and put what was trained into both.
        outside: train only the parameters that both models have in common.
    """

    base: str
    adapt: Callable[[Adaptation], Adaptation] = lambda adaptation: adaptation
    transplant: bool = False
    outside: bool = False


ATTACK_FAMILIES: dict[str, AttackFamily] = {
    "sgd": AttackFamily(base="dreambooth", adapt=_sgd),
    "muon": AttackFamily(base="dreambooth", adapt=changed(optimizer="muon", use_8bit_adam=False)),
    "cosine": AttackFamily(base="dreambooth", adapt=changed(schedule="cosine")),
    "ema": AttackFamily(base="dreambooth", adapt=changed(ema_decay=0.99)),
    "restart": AttackFamily(base="dreambooth", adapt=_in_two_halves),
    "outside": AttackFamily(base="dreambooth", outside=True),
    "prior": AttackFamily(base="dreambooth", adapt=changed(prior_weight=1.0, num_class_images=16)),
    # another model draws with a LoRA of the denoiser's linear layers alone
    "transplant": AttackFamily(
        base="lora",
        adapt=changed(text_encoder=False, convolutions=False, dora=False),
        transplant=True,
    ),
    "lora-r2": AttackFamily(base="lora", adapt=changed(rank=2, alpha=None)),
    "lora-r32": AttackFamily(base="lora", adapt=changed(rank=32, alpha=None)),
    "lora-r128": AttackFamily(base="lora", adapt=changed(rank=128, alpha=None)),
    "locon": AttackFamily(base="lora", adapt=changed(convolutions=True, target_modules=None)),
    "dora": AttackFamily(base="lora", adapt=changed(dora=True)),
    "lora-text": AttackFamily(base="lora", adapt=changed(text_encoder=True)),
    "dreambooth-text": AttackFamily(base="dreambooth", adapt=changed(text_encoder=True)),
    "pivotal": AttackFamily(base="pivotal"),
}
"""Every family by its name in `GridConfig.families`."""
