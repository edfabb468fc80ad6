"""Teach a pipeline a concept from a few pictures: as an attacker does, and as an owner does."""

from __future__ import annotations

from mima.adaptation.base import Adaptation, Injection, Run
from mima.adaptation.custom_diffusion import CustomDiffusion
from mima.adaptation.dreambooth import DreamBooth, DreamBoothLoRA
from mima.adaptation.lora import LoRA
from mima.adaptation.textual_inversion import TextualInversion
from mima.adaptation.together import Together

METHODS: dict[str, type[Adaptation]] = {
    method.method: method
    for method in (LoRA, DreamBooth, DreamBoothLoRA, TextualInversion, CustomDiffusion)
}
"""Every adaptation method by its name on the command line and in configurations."""

__all__ = [
    "METHODS",
    "Adaptation",
    "CustomDiffusion",
    "DreamBooth",
    "DreamBoothLoRA",
    "Injection",
    "LoRA",
    "Run",
    "TextualInversion",
    "Together",
]
