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

    Args:
        weight: W [O, D].
        A: [R, D].
        B: [O, R].
        scale: a number.
    """

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def __new__(
        cls, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
    ) -> LowRankWeight:
        self: LowRankWeight = torch.Tensor._make_subclass(cls, weight.detach())
        self.weight, self.A, self.B, self.scale = weight, A, B, scale
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
        if func is F.linear and not kwargs and isinstance(args[1], cls):
            return _linear(*args)
        # what a tensor says of itself W says as well
        plain = _weight if func in _DESCRIBES else _sum
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})


_DESCRIBES = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta", "is_cuda")
}


def _weight(x: Any) -> Any:
    return x.weight if isinstance(x, LowRankWeight) else x


def _sum(x: Any) -> Any:
    return x.weight + x.scale * (x.B @ x.A) if isinstance(x, LowRankWeight) else x


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
    if not _is_fused(x):
        update = F.linear(F.linear(x, adapted.A), adapted.B)
        return torch.add(F.linear(x, adapted.weight, bias), update, alpha=adapted.scale)
    kind = x.device.type
    # the factors follow the input, as autocast would have it
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weight, A, B = (t.to(dtype) for t in (adapted.weight, adapted.A, adapted.B))
    y = batched_lora(
        # one adapter: all tokens are those of one sample
        x.reshape(1, -1, x.shape[-1]).to(dtype),
        weight,
        [A],
        [B],
        _scale(adapted.scale, x.device),
        _index(x.device),
        bias=None if bias is None else bias.to(dtype),
    )
    return y.reshape(*x.shape[:-1], -1)


# Both are the same for every layer and step: on a GPU, no layer copies them there or waits.
@functools.lru_cache(maxsize=64)
def _scale(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64, device=device)


@functools.cache
def _index(device: torch.device) -> torch.Tensor:
    index = torch.zeros(1, dtype=torch.int64, device=device)
    known_in_range(index, 1)
    return index
