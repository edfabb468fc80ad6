"""Many LoRA adapters under one model: each picture of a batch is drawn with its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import component_name, shared_copy, with_modules
from mima.ops import merge_lora
from mima.ops._checks import known_in_range
from mima.ops.batched_lora import batched_lora

ADAPTER = "default"
"""What peft calls the adapter that is being trained: its own default."""


@dataclass(frozen=True)
class Factors:
    """One layer's update: scale · B A, with A [r, d] and B [o, r]."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


class Rows:
    """Which adapter each picture of the present batch has.

    Every layer reads the same few numbers in every forward. They are known on the host, so they are
    checked there and copied once a batch: no layer waits for the device.
    """

    def __init__(self) -> None:
        self._adapters: tuple[int, ...] = ()
        self._indices: dict[tuple[object, ...], torch.Tensor] = {}

    def choose(self, adapters: Iterable[int]) -> None:
        """Say which adapter each picture of the next batch has, −1 for none."""
        self._adapters = tuple(adapters)
        self._indices = {}

    def index(
        self, places: tuple[int, ...], num_factors: int, num_rows: int, device: torch.device
    ) -> torch.Tensor:
        """Return the place of each row's adapter among a layer's factors: [num_rows] int64.

        Args:
            places: of each adapter among the layer's factors, −1 where it leaves the layer alone;
                and −1 at the end, for pictures without an adapter.
            num_factors: of the layer.
            num_rows: a multiple of the pictures; under guidance the batch of pictures comes twice.
            device: of the result.
        """
        key = places, num_rows, device
        if key not in self._indices:
            count = len(self._adapters)
            assert num_rows % count == 0, f"{num_rows} rows for {count} pictures"
            rows = [places[adapter] for adapter in self._adapters] * (num_rows // count)
            host = torch.tensor(rows, dtype=torch.int64, device="cpu")
            if device.type == "cuda":
                host = host.pin_memory()
            index = host.to(device, non_blocking=True)
            known_in_range(index, num_factors)
            self._indices[key] = index
        return self._indices[key]


class MixedLinear(torch.nn.Module):
    """A linear layer whose adapter differs from picture to picture: `mima.ops.batched_lora`.

    Args:
        base: the layer, whose frozen weights are shared.
        factors: N updates, as they are whenever a batch comes; None where an adapter leaves this
            layer alone.
        rows: says which picture has which.
    """

    def __init__(
        self, base: torch.nn.Linear, factors: Sequence[Factors | None], rows: Rows
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        present = [f for f in factors if f is not None]
        # in lists, which hide parameters: they belong to whoever trains them
        self._A = [f.A for f in present]
        self._B = [f.B for f in present]
        # as the operator takes it, on the device: a list would be copied there in every forward
        self._scale = torch.tensor(
            [f.scale for f in present], dtype=torch.float32, device=base.weight.device
        )
        following = itertools.count()
        self._places = (*(-1 if f is None else next(following) for f in factors), -1)
        self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, ..., d] -> [b, ..., o]."""
        kind = x.device.type
        # as peft does under autocast, and as it does not without: the adapters follow the input
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = batched_lora(
            x.reshape(len(x), -1, x.shape[-1]).to(dtype),
            self.weight.to(dtype),
            [A.to(dtype) for A in self._A],
            [B.to(dtype) for B in self._B],
            self._scale,
            self._rows.index(self._places, len(self._A), len(x), x.device),
            bias=None if self.bias is None else self.bias.to(dtype),
        )
        return y.reshape(*x.shape[:-1], -1)


def lora_layers(denoiser: torch.nn.Module) -> dict[str, Any]:
    """The LoRA layers of peft in a denoiser, by name."""
    return {name: m for name, m in denoiser.named_modules() if isinstance(m, LoraLayer)}


def not_linear(layers: Mapping[str, Any]) -> dict[str, str]:
    """Those that adapt other layers than linear ones, which cannot be mixed, with their kind."""
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    return {
        name: type(base).__name__
        for name, base in bases.items()
        if not isinstance(base, torch.nn.Linear)
    }


def factors_of(layers: Mapping[str, Any]) -> dict[str, Factors]:
    """The trainable factors of LoRA layers themselves, not copies."""
    return {
        name: Factors(
            layer.lora_A[ADAPTER].weight,
            layer.lora_B[ADAPTER].weight,
            float(layer.scaling[ADAPTER]),
        )
        for name, layer in layers.items()
    }


def with_mixed_layers(
    denoiser: torch.nn.Module, adapters: Sequence[Mapping[str, Factors]], rows: Rows
) -> torch.nn.Module:
    """A denoiser that shares another's weights and takes each row through its own adapter.

    Args:
        denoiser: with linear layers, or LoRA layers on them, wherever `adapters` say.
        adapters: N updates by layer; they may differ in rank and in the layers that they change.
        rows: where to say before each call which picture has which adapter.
    """
    mixed = shared_copy(denoiser)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        base = mixed.get_submodule(name)
        if isinstance(base, LoraLayer):
            base = base.get_base_layer()
        assert isinstance(base, torch.nn.Linear)
        parent, _, child = name.rpartition(".")
        layer = MixedLinear(base, [adapter.get(name) for adapter in adapters], rows)
        setattr(mixed.get_submodule(parent), child, layer)
    return mixed


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
