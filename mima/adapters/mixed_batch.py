"""Many LoRA adapters under one model: each picture of a batch is drawn with its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from mima.adapters.adapter import Adapter, LowRank, lora_layers
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import Pipeline, shared_copy, with_modules
from mima.ops._checks import known_in_range
from mima.ops.batched_lora import batched_lora


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

        ``places`` are those of all adapters, −1 where one leaves the layer alone, and −1 at the
        end, for pictures without any. Rows are a multiple of pictures: guidance doubles the batch.
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
        self, base: torch.nn.Linear, factors: Sequence[LowRank | None], rows: Rows
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        present = [f for f in factors if f is not None]
        # lists, in which torch registers no parameters: this layer does not own them
        self._A = [f.A for f in present]
        self._B = [f.B for f in present]
        # on the device: batched_lora would copy a list there in every forward
        self._scale = torch.tensor(
            [f.scale for f in present], dtype=torch.float32, device=base.weight.device
        )
        following = itertools.count()
        self._places = (*(-1 if f is None else next(following) for f in factors), -1)
        self._rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, ..., d] -> [b, ..., o]."""
        kind = x.device.type
        # autocast's dtype, as in peft; without autocast the input's, to which adapters are cast
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


def can_share_batches(pipeline: Pipeline) -> bool:
    """Whether a pipeline holds a LoRA, no DoRA, and on linear layers only."""
    layers = lora_layers(family_of(pipeline).denoiser).values()
    plain = [
        isinstance(layer.get_base_layer(), torch.nn.Linear) and not any(layer.use_dora.values())
        for layer in layers
    ]
    return bool(plain) and all(plain)


def with_adapters(pipeline: Pipeline, adapters: Sequence[Adapter]) -> tuple[Any, Rows]:
    """A pipeline that shares the weights of another and draws each picture with its own adapter.

    Args:
        pipeline: the model under the adapters. Of a LoRA that its denoiser holds, the layers that
            `adapters` name are taken off.
        adapters: LoRA of the denoiser, which may differ in rank and in the layers that they
            change. Their factors are used as they are whenever a batch comes.

    Returns:
        The pipeline, and where to say before each call which picture has which adapter.

    Raises:
        MimaError: an adapter changes another layer than a linear one.
    """
    family = family_of(pipeline)
    part = family.denoiser_name
    mixed, rows = shared_copy(family.denoiser), Rows()
    for weight in dict.fromkeys(name for adapter in adapters for name in adapter.factors):
        name = weight.removeprefix(f"{part}.").removesuffix(".weight")
        base: Any = mixed.get_submodule(name)
        if isinstance(base, LoraLayer):
            base = base.get_base_layer()
        if not isinstance(base, torch.nn.Linear):
            kind = type(base).__name__
            raise MimaError(f"lora: {name} is a {kind}; only linear layers share a batch")
        parent, _, child = name.rpartition(".")
        layer = MixedLinear(base, [adapter.factors.get(weight) for adapter in adapters], rows)
        setattr(mixed.get_submodule(parent), child, layer)
    return with_modules(pipeline, **{part: mixed}), rows
