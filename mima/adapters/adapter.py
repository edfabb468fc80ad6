"""What an adapter changes of a model: low-rank updates, new values, embeddings of new words."""

# o, d = rows and columns of a weight, r = rank, K = vectors of a new word, D = text embedding

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from mima.errors import MimaError
from mima.families import Family, family_of
from mima.families.pipelines import Pipeline, readers


@dataclass(frozen=True)
class LowRank:
    """An update ``scale · B A`` of a weight, whose dimensions after the first count as one.

    Attributes:
        A: [r, d].
        B: [o, r].
        scale: alpha / r, or alpha / √r for rank-stabilised LoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """The update itself [o, d], computed as peft computes it when it merges."""
        return (self.B @ self.A) * self.scale

    def copied(self) -> LowRank:
        """A copy of the update, which shares no tensor with it."""
        return LowRank(self.A.detach().clone(), self.B.detach().clone(), self.scale)


@dataclass(frozen=True)
class Adapter:
    """What one adapter changes of a pipeline.

    Parameters go by their component and name, as in ``unet.conv_in.weight``.

    Attributes:
        name: the folder's or file's name.
        factors: low-rank updates.
        values: new values of parameters.
        words: new words, and their embeddings [K, D].
        prompt: the prompt that asks for the concept, where its folder says so.
    """

    name: str
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    words: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prompt: str | None = None

    @classmethod
    def of(cls, pipeline: Pipeline) -> Adapter:
        """The LoRA that a pipeline's denoiser holds: its factors themselves, not copies.

        Raises:
            MimaError: there is none, or one of a kind that is no low-rank update.
        """
        family = family_of(pipeline)
        factors = low_rank_updates(family.denoiser, "default", "lora")
        if not factors:
            raise MimaError("lora: the pipeline holds no adapter")
        return cls("lora", {f"{family.denoiser_name}.{n}": one for n, one in factors.items()})

    def copied(self) -> Adapter:
        """A copy of the adapter, whose factors training does not reach."""
        return replace(self, factors={name: one.copied() for name, one in self.factors.items()})

    def changes(self, name: str) -> bool:
        """Whether the adapter changes a parameter."""
        return name in self.factors or name in self.values

    def adapted(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The adapter's weight of a name; the given one where the adapter does not change it."""
        if name in self.factors:
            return weight.clone().add_(self.factors[name].delta().view_as(weight).to(weight.device))
        return self.values[name].to(weight) if name in self.values else weight


def check_unadapted(family: Family) -> None:
    """Refuse a model that adapters are loaded into.

    Raises:
        MimaError: its denoiser or a text encoder holds one.
    """
    parts = [family.denoiser, *(reader.encoder for reader in readers(family.pipeline))]
    if any(getattr(part, "peft_config", None) for part in parts):
        raise MimaError(
            "model: adapters are loaded already; fuse_lora() and unload_lora_weights() first"
        )


def lora_layers(module: torch.nn.Module) -> dict[str, Any]:
    """The LoRA layers of peft in a module, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def low_rank_updates(module: torch.nn.Module, adapter: str, where: str) -> dict[str, LowRank]:
    """One adapter's updates of a module that peft has put it into, by name of the weight.

    ``adapter`` is the name that peft knows it by; ``where`` begins error messages.

    Returns:
        The factors that peft trains; those of convolutions as matrices.

    Raises:
        MimaError: the adapter does something else than add ``scale · B A``.
    """
    updates = {}
    for name, layer in lora_layers(module).items():
        if adapter in layer.lora_embedding_A:
            raise MimaError(f"{where}: LoRA of embeddings ({name}) is not supported")
        if adapter not in layer.lora_A:
            continue
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        problem = None
        if layer.use_dora.get(adapter):
            problem = "DoRA, whose update is not a low-rank matrix"
        elif layer.lora_B[adapter].bias is not None:
            problem = "a bias beside the low-rank matrices"
        elif getattr(layer, "fan_in_fan_out", False) or math.prod(B.shape[2:]) != 1:
            problem = f"a {type(layer.get_base_layer()).__name__} of this kind"
        if problem:
            raise MimaError(f"{where}: {name} has {problem}; this is not supported")
        scale = float(layer.scaling[adapter])
        updates[f"{name}.weight"] = LowRank(A.flatten(1), B.flatten(1), scale)
    return updates
