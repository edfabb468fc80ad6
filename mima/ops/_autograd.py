"""What the operators' autograd functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: object) -> tuple[Any, ...]:
    """Apply a function whose outputs are a tuple of tensors.

    Their `forward` takes `*args`: PyTorch inspects and binds its signature at each call, which
    costs microseconds per named parameter.
    """
    outputs: tuple[Any, ...] = function.apply(*args)
    return outputs


def apply_backward(function: type[torch.autograd.Function], *args: object) -> tuple[Any, ...]:
    """Apply a function that is the backward of another.

    Inside torch.compile, which neither traces a Function within the backward of another nor
    differentiates that backward, it runs as a plain function.
    """
    if torch.compiler.is_compiling():
        outputs: tuple[Any, ...] = function.forward(*args)
        return outputs
    return apply(function, *args)


def filled(d: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients, with zeros for those that autograd left out."""
    return [torch.zeros_like(x) if d_x is None else d_x for d_x, x in zip(d, like, strict=True)]


def total(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the terms there are."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def vmap_formula(
    formula: Callable[..., Sequence[Tensor]], info: Any, in_dims: Any, args: Sequence[object]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Batch an operator by batching its plain PyTorch formula, which takes the same arguments.

    The kernels have no batch dimension; under torch.func.vmap the reference is what runs.
    """
    outputs = torch.vmap(
        lambda *unbatched: tuple(formula(*unbatched)),
        in_dims=tuple(in_dims),
        randomness=info.randomness,
    )(*args)
    return outputs, (0,) * len(outputs)
