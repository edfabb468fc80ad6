"""geglu: the gated activation of a transformer's feed-forward, in one pass."""

from __future__ import annotations

from torch import Tensor

from mima.ops import _checks
from mima.ops._layers import define, layer
from mima.ops.backends import arguments

_OP = "geglu"
define(
    *(_OP, arguments.Geglu),
    fake=lambda given: given.x.new_empty((*given.x.shape[:-1], given.x.shape[-1] // 2)),
)


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate one half of the last dimension by the other: y = a · gelu(b), x = [a b].

    gelu(b) = b Φ(b), by the error function. Differentiable any number of times; the first two
    derivatives are single operators.

    Args:
        x: [..., 2 D]; float32, bfloat16, float16 or float64.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        A contiguous tensor [..., D].

    Raises:
        TypeError: not a tensor of one of the dtypes.
        ValueError: the last dimension has no two halves.
        BackendError: `backend` cannot serve.

    Examples:
        >>> geglu(torch.tensor([2.0, 0.0]))
        tensor([0.])
    """
    _checks.require_floating(_OP, "x", x)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"{_OP}: x must be [..., 2 D], got {list(x.shape)}")
    return layer(_OP, backend, (), x)
