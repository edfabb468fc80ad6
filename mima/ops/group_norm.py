"""group_norm and layer_norm: normalisation, with the activation that follows, in one pass."""

from __future__ import annotations

import math

from torch import Tensor

from mima.ops import _checks
from mima.ops._layers import define, layer
from mima.ops.backends import arguments

define("group_norm", arguments.GroupNorm, fake=lambda given: given.x.new_empty(given.x.shape))


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise groups of channels: y = γ x̂ + β, or with ``silu`` y σ(y).

    As `torch.nn.functional.group_norm`, followed by `silu`. Differentiable any number of times; the
    first two derivatives are single operators.

    Args:
        x: [B, C, ...]; float32, bfloat16, float16 or float64.
        weight: γ [C] of the dtype of `x`, or None for 1.
        bias: β [C], likewise, or None for 0.
        groups: how many groups; a divisor of C.
        eps: added to the variance, ≥ 0.
        silu: whether the activation follows.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        A contiguous tensor shaped as `x`.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree; nothing to normalise.
        BackendError: `backend` cannot serve.

    Examples:
        >>> group_norm(torch.tensor([[1.0, 3.0]]), None, None, 1, eps=0.0)
        tensor([[-1.,  1.]])
    """
    op = "group_norm"
    _checks.require_floating(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [B, C, ...], got {list(x.shape)}")
    _require_affine(op, x, weight, bias, x.shape[1])
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups must divide the {x.shape[1]} channels of x, got {groups}")
    return _normalise(op, x, weight, bias, groups, eps, silu, backend)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise the last dimension: `group_norm` with every row as a sample of one group.

    As `torch.nn.functional.layer_norm`. Differentiable any number of times; the first two
    derivatives are single operators.

    Args:
        x: [..., D]; float32, bfloat16, float16 or float64.
        weight: [D] of the dtype of `x`, or None for 1.
        bias: [D], likewise, or None for 0.
        eps: added to the variance, ≥ 0.
        backend: "reference", "triton" or "native"; None chooses.

    Returns:
        A contiguous tensor shaped as `x`.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: shapes that do not agree; nothing to normalise.
        BackendError: `backend` cannot serve.

    Examples:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), None, None, eps=0.0)
        tensor([[-1.,  1.]])
    """
    op = "layer_norm"
    _checks.require_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must be [..., D], got {list(x.shape)}")
    _require_affine(op, x, weight, bias, x.shape[-1])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _normalise(op, rows, weight, bias, 1, eps, False, backend).view(x.shape)


def _require_affine(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int
) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.require_like(op, name, value, x, "x", (channels,))


def _normalise(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    backend: str | None,
) -> Tensor:
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be ≥ 0, got {eps}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have elements to normalise, got {list(x.shape)}")
    numbers = int(groups), float(eps), bool(silu)
    return layer("group_norm", backend, numbers, x, weight, bias)
