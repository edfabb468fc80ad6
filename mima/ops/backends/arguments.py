"""What operators are given: the arguments of each, written once.

Their schemas follow from the fields (`schema`), and backends take the tuples:
``<name>_forward(inputs)`` and ``<name>_backward(d_out, saved, needs)``. What `saved` is has a tuple
of its own where that differs from the inputs. Of each gradient, which is a tensor or a list of
them, `needs` says whether it is needed; one that is not is None or empty.
"""

# N = concepts or adapters, P = tensors, L = layers, s_n = tokens of concept n, [o, d] = one weight,
# r_n = rank of adapter n, b = samples, t = tokens of one; flat lists are concept-major

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

Tensors = Sequence[Tensor]
Needs = Sequence[bool]
"""Whether a gradient is needed, for each of an operator's."""
Directions = Sequence[Tensor | None]
"""Of a second derivative: one for each tensor among an operator's inputs; None is zero."""


class WeightedMerge(NamedTuple):
    """base_p + Σ_n w_n (θ_np − base_p) for each p."""

    base: Tensors  # P
    thetas: Tensors  # N P
    weights: Tensor  # [N]


class ProjectedMerge(NamedTuple):
    """W0_l + Σ_n (W_nl − W0_l) C_nᵀ M_n for each l."""

    W0: Tensors  # L of [o_l, d]
    W: Tensors  # N L
    C: Tensors  # N of [s_n, d]
    M: Tensors  # N of [s_n, d]


class BatchedLora(NamedTuple):
    """x_b Wᵀ + bias + s_i (x_b A_iᵀ) B_iᵀ, i = index[b], [b, t, o]."""

    x: Tensor  # [b, t, d]
    weight: Tensor  # [o, d]
    A: Tensors  # N of [r_n, d]
    B: Tensors  # N of [o, r_n]
    scale: Tensor  # [N]
    indices: Tensor  # [b], −1 for no adapter; `index` is a method of tuples
    bias: Tensor | None  # [o]


class BatchedLoraSaved(NamedTuple):
    """Likewise, but what the forward kept of x Aᵀ instead of the bias."""

    x: Tensor
    weight: Tensor
    A: Tensors
    B: Tensors
    scale: Tensor
    indices: Tensor
    projection: Tensor | None


class MergeLora(NamedTuple):
    """W + Σ_n w_n s_n B_n A_n, [o, d]."""

    weight: Tensor  # [o, d]
    A: Tensors  # N of [r_n, d]
    B: Tensors  # N of [o, r_n]
    scale: Tensor  # [N]
    weights: Tensor  # [N]


class AdamStep(NamedTuple):
    """P tensors, gradients and moments, and the rule."""

    z: Tensors
    g: Tensors
    m: Tensors
    v: Tensors
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class AdamStepSaved(NamedTuple):
    """Likewise, without z."""

    g: Tensors
    m: Tensors
    v: Tensors
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class GroupNorm(NamedTuple):
    """γ x̂ + β over groups of channels, or its SiLU."""

    x: Tensor  # [b, C, ...]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    groups: int
    eps: float
    silu: bool


class Geglu(NamedTuple):
    """a · gelu(b), x = [a b]."""

    x: Tensor  # [..., 2 d]


class Attention(NamedTuple):
    """softmax(scale · q kᵀ) v for each of n heads, [n, T, e]."""

    q: Tensor  # [n, T, d]
    k: Tensor  # [n, S, d]
    v: Tensor  # [n, S, e]
    scale: float

    @property
    def width(self) -> int:
        """Columns of a head, of which kernels serve no more than so many."""
        return max(self.q.shape[2], self.v.shape[2])


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Tensors: "Tensor[]",
    float: "float",
    int: "int",
    bool: "bool",
}


def schema(arguments: type[Any]) -> list[str]:
    """Return a tuple's fields as torch.library writes them: ``["Tensor x", "Tensor[] A"]``."""
    return [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items()]
