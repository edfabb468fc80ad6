"""Many LoRA adapters under one model: each picture of a batch is drawn with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from mima.adaptation.copies import component_name, with_modules
from mima.adaptation.mixed import (
    Factors,
    Rows,
    factors_of,
    lora_layers,
    not_linear,
    with_mixed_layers,
)
from mima.errors import MimaError
from mima.families import family_of
from mima.ops import merge_lora


@dataclass(frozen=True)
class Adapter:
    """A LoRA as it was at one moment, apart from the model that it was trained in.

    Attributes:
        layers: by name of the denoiser's linear layer.
    """

    layers: Mapping[str, Factors]

    @classmethod
    def of(cls, pipeline: Any) -> Adapter:
        """Copy the adapter that `mima.adaptation.LoRA` is training in a pipeline.

        Raises:
            MimaError: it adapts other layers than linear ones, or there is none.
        """
        layers = lora_layers(family_of(pipeline).denoiser)
        for name, kind in not_linear(layers).items():
            raise MimaError(f"lora: {name} is a {kind}; only linear layers share a batch")
        if not layers:
            raise MimaError("lora: the pipeline holds no adapter")
        live = factors_of(layers)
        return cls(
            {
                name: Factors(f.A.detach().clone(), f.B.detach().clone(), f.scale)
                for name, f in live.items()
            }
        )


def can_share_batches(pipeline: Any) -> bool:
    """Whether a pipeline holds a LoRA, and on linear layers only."""
    layers = lora_layers(family_of(pipeline).denoiser)
    return bool(layers) and not not_linear(layers)


def with_adapters(pipeline: Any, adapters: Sequence[Adapter]) -> tuple[Any, Rows]:
    """A pipeline that shares the weights of another and draws each picture with its own adapter.

    Args:
        pipeline: the model under the adapters, itself without any.
        adapters: may differ in rank and in the layers that they change.

    Returns:
        The pipeline, and where to say before each call which picture has which adapter.
    """
    denoiser = family_of(pipeline).denoiser
    rows = Rows()
    mixed = with_mixed_layers(denoiser, [adapter.layers for adapter in adapters], rows)
    return with_modules(pipeline, **{component_name(pipeline, denoiser): mixed}), rows


@torch.no_grad()
def merged(pipeline: Any, adapters: Sequence[Adapter]) -> Any:
    """The pipeline with the adapters' mean update merged into its weights.

    W + Σ_n s_n B_n A_n / N by `mima.ops.merge_lora`; all adapters change the same layers.
    """
    denoiser = family_of(pipeline).denoiser
    copy = deepcopy(denoiser)
    weights = [1 / len(adapters)] * len(adapters)
    for name in adapters[0].layers:
        layer = copy.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        factors = [adapter.layers[name] for adapter in adapters]
        layer.weight.copy_(
            merge_lora(
                layer.weight,
                [f.A.to(layer.weight) for f in factors],
                [f.B.to(layer.weight) for f in factors],
                [f.scale for f in factors],
                weights,
            )
        )
    return with_modules(pipeline, **{component_name(pipeline, denoiser): copy})
