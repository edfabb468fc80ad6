"""attention: scaled dot-product attention whose derivatives keep no matrix of queries and keys.

The backward and its derivative form the matrix anew, some queries or keys at a time.
"""

# n = heads of all samples, T = queries, S = keys, d, e = widths of a head

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mima.ops import _checks
from mima.ops._layers import define, layer
from mima.ops.backends import arguments

_OP = "attention"
_PYTORCHS = F.scaled_dot_product_attention
define(
    *(_OP, arguments.Attention),
    fake=lambda given: given.q.new_empty((*given.q.shape[:2], given.v.shape[2])),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend without a mask: softmax(scale · q kᵀ) v.

    As `torch.nn.functional.scaled_dot_product_attention`. Differentiable any number of times; the
    first two derivatives are single operators, of memory O(T + S).

    Args:
        q: [..., T, d]; float32, bfloat16, float16 or float64, and all arguments of one dtype and
            device.
        k: [..., S, d].
        v: [..., S, e].
        scale: 1/√d by default.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        A contiguous tensor [..., T, e].

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree, or have no queries, keys or columns.
        BackendError: `backend` cannot serve.

    Examples:
        >>> attention(torch.ones(1, 2), torch.zeros(2, 2), torch.eye(2))
        tensor([[0.5000, 0.5000]])
    """
    _checks.require_floating(_OP, "q", q)
    if q.ndim < 2 or 0 in q.shape[-2:]:
        raise ValueError(f"{_OP}: q must be [..., T, d] with T, d ≥ 1, got {list(q.shape)}")
    heads, (T, d) = tuple(q.shape[:-2]), q.shape[-2:]
    _checks.require_like(_OP, "k", k, q, "q", (*heads, "S", d))
    S = k.shape[-2]
    _checks.require_like(_OP, "v", v, k, "k", (*heads, S, "e"))
    e = v.shape[-1]
    if S == 0 or e == 0:
        raise ValueError(f"{_OP}: v must be [..., S, e] with S, e ≥ 1, got {list(v.shape)}")
    n = math.prod(heads)
    flat = q.reshape(n, T, d), k.reshape(n, S, d), v.reshape(n, S, e)
    numbers = (d**-0.5 if scale is None else float(scale),)
    out = layer(_OP, backend, numbers, *flat)
    return out.view(*heads, T, e)


class TwiceDifferentiable(AbstractContextManager[None]):
    """While it is entered, what is computed will be differentiated twice."""

    _entered = 0

    @classmethod
    def is_on(cls) -> bool:
        """Whether one is entered."""
        return cls._entered > 0

    def __enter__(self) -> None:
        TwiceDifferentiable._entered += 1

    def __exit__(self, *error: object) -> None:
        TwiceDifferentiable._entered -= 1


class FusedAttention(TorchFunctionMode):
    """While it lasts, `attention` serves `scaled_dot_product_attention`, whoever calls it.

    But for what `attention` does not know, which stays with PyTorch: masks, causal attention,
    dropout, groups of heads that share keys, and shapes that are broadcast. Everything else that is
    called passes through the mode, too, at a microsecond a call.

    Args:
        at_least: elements of all heads' matrices from which `attention` serves on the CPU.
    """

    def __init__(self, at_least: int = 0) -> None:
        super().__init__()
        self._at_least = at_least

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _PYTORCHS and _serves(self._at_least, *args, **kwargs):
            return _served(*args, **kwargs)
        return func(*args, **kwargs)


def _serves(
    at_least: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    heads = query.shape[:-2]
    return (
        attn_mask is None
        and dropout_p == 0
        and not is_causal
        and not enable_gqa
        and key.shape[:-2] == heads == value.shape[:-2]
        and query.dtype in _checks.FLOATING
        and 0 not in (*query.shape, *key.shape, *value.shape)
        and (query.is_cuda or query.shape[:-1].numel() * key.shape[-2] >= at_least)
    )


def _served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # as autocast does for the function that this stands for
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    return attention(query, key, value, scale)
