"""Many LoRA adapters under one model: each picture of a batch is drawn with its own."""

# n = pictures, b = rows of a forward pass (n, or 2n under guidance), t = tokens, d -> o = features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from mima.adaptation.copies import component_name, shared_copy, with_modules
from mima.adaptation.lora import ADAPTER
from mima.errors import MimaError
from mima.families import family_of
from mima.ops import batched_lora, merge_lora


@dataclass(frozen=True)
class Factors:
    """One layer's update: scale · B A."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


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
        layers = {}
        denoiser = family_of(pipeline).denoiser
        for name, module in denoiser.named_modules():
            if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
                continue
            if not isinstance(module.get_base_layer(), torch.nn.Linear):
                kind = type(module.get_base_layer()).__name__
                raise MimaError(f"lora: {name} is a {kind}; only linear layers share a batch")
            A, B = (denoiser.get_parameter(f"{name}.lora_{x}.{ADAPTER}.weight") for x in "AB")
            scale = float(module.scaling[ADAPTER])
            layers[name] = Factors(A.detach().clone(), B.detach().clone(), scale)
        if not layers:
            raise MimaError("lora: the pipeline holds no adapter")
        return cls(layers)


def can_share_batches(pipeline: Any) -> bool:
    """Whether a pipeline holds a LoRA, and on linear layers only."""
    layers = [m for m in family_of(pipeline).denoiser.modules() if isinstance(m, LoraLayer)]
    return bool(layers) and all(isinstance(m.get_base_layer(), torch.nn.Linear) for m in layers)


class Rows:
    """Which adapter each picture of the present batch has.

    Attributes:
        index: [n] int64, −1 for none.
    """

    index: torch.Tensor


class MixedLinear(torch.nn.Module):
    """A linear layer whose adapter differs from picture to picture: `mima.ops.batched_lora`.

    Args:
        base: the layer, shared.
        factors: one update per adapter; None where an adapter leaves this layer alone.
        rows: says which picture has which.
    """

    def __init__(self, base: torch.nn.Linear, factors: Sequence[Factors | None], rows: Rows):
        super().__init__()
        self.base = base
        self.rows = rows
        like = base.weight
        none = Factors(
            like.new_zeros(0, base.in_features), like.new_zeros(base.out_features, 0), 1.0
        )
        chosen = [none if f is None else f for f in factors]
        self.A = [f.A.to(like) for f in chosen]
        self.B = [f.B.to(like) for f in chosen]
        self.scale = [f.scale for f in chosen]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, ..., d] -> [b, ..., o]; under guidance the batch of pictures comes twice."""
        index = self.rows.index
        assert len(x) % len(index) == 0, f"{len(x)} rows for {len(index)} pictures"
        y = batched_lora(
            x.reshape(len(x), -1, x.shape[-1]),
            self.base.weight,
            self.A,
            self.B,
            self.scale,
            index.repeat(len(x) // len(index)),
            bias=self.base.bias,
        )
        return y.reshape(*x.shape[:-1], -1)


def with_adapters(pipeline: Any, adapters: Sequence[Adapter]) -> tuple[Any, Rows]:
    """A pipeline that shares the weights of another and draws each picture with its own adapter.

    Args:
        pipeline: the model under the adapters, itself without any.
        adapters: may differ in rank and in the layers that they change.

    Returns:
        The pipeline, and where to say before each call which picture has which adapter.
    """
    denoiser = family_of(pipeline).denoiser
    copy = shared_copy(denoiser)
    rows = Rows()
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        base = copy.get_submodule(name)
        assert isinstance(base, torch.nn.Linear)
        parent, _, child = name.rpartition(".")
        mixed = MixedLinear(base, [adapter.layers.get(name) for adapter in adapters], rows)
        setattr(copy.get_submodule(parent), child, mixed)
    return with_modules(pipeline, **{component_name(pipeline, denoiser): copy}), rows


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
