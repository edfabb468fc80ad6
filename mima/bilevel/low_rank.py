"""A weight with a low-rank update beside it, whose sum linear layers do not form."""

# O = output, D = input features, R = rank

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mima.ops import batched_lora
from mima.ops._checks import known_in_range


class LowRankWeight(torch.Tensor):
    """``W + scale · B A`` [O, D], in the place of a network's weight; ``B A`` is not formed.

    A linear layer that is given it, as by ``torch.func.functional_call``, computes
    `mima.ops.batched_lora` on a GPU, and on a CPU two thin products beside the layer's own, which
    for a single adapter are as fast there. Gradients flow to W, A and B. Any other operation reads
    the sum.

    With several adapters, ``index`` says which is each sample's, the first dimension of a layer's
    input; the layer computes `mima.ops.batched_lora`, and there is no sum to be read.

    Args:
        weight: W [O, D].
        A: an [R, D] for each adapter.
        B: an [O, R] for each adapter.
        scale: a number for each adapter.
        index: [samples], the adapter of each (``indices``); None where there is one.
    """

    weight: torch.Tensor
    A: Sequence[torch.Tensor]
    B: Sequence[torch.Tensor]
    scale: tuple[float, ...]
    sample_index: torch.Tensor | None

    def __new__(
        cls,
        weight: torch.Tensor,
        A: Sequence[torch.Tensor],
        B: Sequence[torch.Tensor],
        scale: Sequence[float],
        index: torch.Tensor | None = None,
    ) -> LowRankWeight:
        self: LowRankWeight = torch.Tensor._make_subclass(cls, weight.detach())
        self.weight, self.A, self.B = weight, A, B
        self.scale, self.sample_index = tuple(scale), index
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and not kwargs and isinstance(args[1], cls):
            return _linear(*args)
        # shape, dtype and the like are those of W; other functions read the sum
        plain = _weight if func in _DESCRIBES else _sum
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})


# a plan replaces the name while it counts
_LINEAR = F.linear
_DESCRIBES = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta", "is_cuda")
}


def _weight(x: Any) -> Any:
    return x.weight if isinstance(x, LowRankWeight) else x


def _sum(x: Any) -> Any:
    if not isinstance(x, LowRankWeight):
        return x
    if x.sample_index is not None:
        raise RuntimeError(
            "a weight with several adapters can be read by linear layers alone; "
            "set lower.concepts_per_forward to 1 for this network"
        )
    return x.weight + x.scale[0] * (x.B[0] @ x.A[0])


def _is_fused(x: torch.Tensor) -> bool:
    """Whether one call of the operator takes the place of three products.

    It saves launches on a GPU. On a CPU it costs a small layer more than it saves, most where it is
    differentiated twice; its gain there is several adapters in a forward.
    """
    return x.is_cuda


def _linear(
    x: torch.Tensor, adapted: LowRankWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., D] -> [..., O]."""
    index = adapted.sample_index
    if index is None and not _is_fused(x):
        update = F.linear(F.linear(x, adapted.A[0]), adapted.B[0])
        return torch.add(F.linear(x, adapted.weight, bias), update, alpha=adapted.scale[0])
    kind = x.device.type
    # the factors follow the input, as autocast would have it, which knows no meta device
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
    y = batched_lora(
        # one adapter: all tokens are those of one sample
        x.reshape(1 if index is None else len(index), -1, x.shape[-1]).to(dtype),
        adapted.weight.to(dtype),
        [A.to(dtype) for A in adapted.A],
        [B.to(dtype) for B in adapted.B],
        _scale(adapted.scale, x.device),
        _index(x.device) if index is None else index,
        bias=None if bias is None else bias.to(dtype),
    )
    return y.reshape(*x.shape[:-1], -1)


# Every layer and step has the same scales and indices: kept on a GPU, no layer copies or waits.
@functools.lru_cache(maxsize=64)
def _scale(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


@functools.cache
def _index(device: torch.device) -> torch.Tensor:
    return indices((1,), device)


@functools.lru_cache(maxsize=64)
def indices(samples: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The adapter of each sample, where adapter n has so many of them, one after the other."""
    places = [n for n, count in enumerate(samples) for _ in range(count)]
    index = torch.tensor(places, dtype=torch.int64, device=device)
    known_in_range(index, len(samples))
    return index
