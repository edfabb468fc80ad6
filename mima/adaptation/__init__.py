"""Teach a pipeline a concept from a few pictures: as an attacker does, and as an owner does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mima.adaptation.base import Adaptation, Diverged, Injection, Run
from mima.adaptation.custom_diffusion import CustomDiffusion
from mima.adaptation.dreambooth import DreamBooth, DreamBoothLoRA
from mima.adaptation.lora import LoRA
from mima.adaptation.pivotal import Pivotal
from mima.adaptation.textual_inversion import TextualInversion
from mima.adaptation.together import Together
from mima.errors import check_choice
from mima.settings import checked

METHODS: dict[str, type[Adaptation]] = {
    method.method: method
    for method in (
        LoRA,
        DreamBooth,
        DreamBoothLoRA,
        TextualInversion,
        CustomDiffusion,
        Pivotal,
    )
}
"""Every adaptation method by its name on the command line and in configurations."""

__all__ = [
    "METHODS",
    "Adaptation",
    "CustomDiffusion",
    "Diverged",
    "DreamBooth",
    "DreamBoothLoRA",
    "Injection",
    "LoRA",
    "Pivotal",
    "Run",
    "TextualInversion",
    "Together",
    "configure",
]


def configure(method: str, settings: Mapping[str, Any]) -> Adaptation:
    """A method with its settings, of the types that it declares.

    Args:
        method: its name in `METHODS`.
        settings: values of the method's attributes; what is left out has its default.

    Returns:
        The method, ready to start.

    Raises:
        MimaError: no such method or setting, or a value that it cannot have.
    """
    check_choice("method", method, METHODS)
    return checked(METHODS[method], f"method {method}", settings)
