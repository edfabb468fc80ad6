"""Teach a pipeline a concept from a few pictures: LoRA and its like."""

from mima.adaptation.base import Adaptation, Run
from mima.adaptation.lora import LoRA

__all__ = ["Adaptation", "LoRA", "Run"]
