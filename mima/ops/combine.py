"""combine: linear combinations of lists of tensors, a whole model's in one call, also in place."""

# P = tensors of a list, J = given lists, I = resulting lists

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mima import reference
from mima.ops import _checks
from mima.ops._autograd import (
    Operator,
    apply,
    apply_backward,
    call,
    call_in_place,
    raw_operator,
    refuse_graph,
)
from mima.ops.backends import choice

_OP = "combine"
MOST = 3
"""Lists on either side."""
Lists = Sequence[Sequence[Tensor]]
Factors = tuple[tuple[float, ...], ...]


def combine(
    x: Lists,
    factors: Sequence[Sequence[float]],
    *,
    into: Sequence[Sequence[Tensor] | None] | None = None,
    backend: str | None = None,
) -> list[list[Tensor]]:
    """Combine lists of tensors: out_i = Σ_j f_ij x_j, tensor by tensor.

    With ``[[1, w]]`` it adds a share of an adaptation to what is merged so far, with ``[[1, −lr]]``
    it takes a step of SGD. A factor of 0 leaves its list out, whatever that holds. Differentiable
    any number of times in `x`.

    Args:
        x: J lists, 1 to 3, of P tensors each, the lists' p-th tensors of one shape; float32,
            bfloat16, float16 or float64, and all arguments of one dtype and device.
        factors: I rows, 1 to 3, of J finite numbers.
        into: for each row None, or P tensors that the results are written into: one of the lists
            of `x`, or others. Not where a graph is recorded.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        I lists of P tensors; those of `into` where given.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; `into` that is not contiguous,
            or where a gradient is asked for.
        BackendError: `backend` cannot serve.

    Examples:
        >>> phi, change = [torch.zeros(2)], [torch.ones(2)]
        >>> combine([phi, change], [[1, 0.5]], into=[phi])
        [[tensor([0.5000, 0.5000])]]
        >>> phi
        [tensor([0.5000, 0.5000])]
    """
    rows = _rows(factors, len(x))
    names = [f"x[{j}]" for j in range(len(x))]
    _checks.require_lists(_OP, names, x)
    P = len(x[0])
    if into is None:
        if not P:
            return [[] for _ in rows]
        made = apply(Combine, rows, backend or "", *chain.from_iterable(x))
        return [list(made[i * P : (i + 1) * P]) for i in range(len(rows))]
    _checks.require_length(_OP, "into", into, len(rows), "one per row of factors")
    for i, values in enumerate(into):
        if values is None:
            continue
        # a list of x has been looked at
        if not any(values is given for given in x):
            _checks.require_lists(_OP, ["x[0]", f"into[{i}]"], [x[0], values])
        for p, value in enumerate(values):
            if not value.is_contiguous():
                raise ValueError(f"{_OP}: into[{i}][{p}] must be contiguous")
    out = [_empty(x[0], [1.0], 1) if w is None else list(w) for w in into]
    refuse_graph(_OP, "into must be None", chain.from_iterable([*x, *out]))
    if P:
        flat = list(chain.from_iterable(rows))
        lists = list(chain.from_iterable(out)), list(chain.from_iterable(x))
        call_in_place(_in_place, *lists, flat, len(x), backend or "")
    return out


def _rows(factors: Sequence[Sequence[float]], num_lists: int) -> Factors:
    rows = tuple(tuple(float(factor) for factor in row) for row in factors)
    if not (1 <= num_lists <= MOST and 1 <= len(rows) <= MOST):
        raise ValueError(
            f"{_OP}: x and factors must have length 1 to {MOST}, got {num_lists} and {len(rows)}"
        )
    for i, row in enumerate(rows):
        _checks.require_length(_OP, f"factors[{i}]", row, num_lists, "one per list of x")
    return rows


def _factor_rows(factors: Sequence[float], num_lists: int) -> Factors:
    return tuple(tuple(factors[i : i + num_lists]) for i in range(0, len(factors), num_lists))


def _fill(
    out: Sequence[Tensor], x: Sequence[Tensor], factors: Sequence[float], num_lists: int, name: str
) -> None:
    backend = choice.resolve(_OP, x[0], name)
    backend.combine_into(out, x, _factor_rows(factors, num_lists))


def _made(x: Sequence[Tensor], factors: Sequence[float], num_lists: int, name: str) -> list[Tensor]:
    out = _empty(x, factors, num_lists)
    _fill(out, x, factors, num_lists, name)
    return out


def _empty(
    x: Sequence[Tensor], factors: Sequence[float], num_lists: int, name: str = ""
) -> list[Tensor]:
    first = x[: len(x) // num_lists]
    return [
        torch.empty_like(v, memory_format=torch.contiguous_format)
        for _ in range(len(factors) // num_lists)
        for v in first
    ]


_functional = raw_operator(
    _OP, "(Tensor[] x, float[] factors, int num_lists, str backend) -> Tensor[]", _made, fake=_empty
)
_in_place = raw_operator(
    f"{_OP}_",
    "(Tensor(a!)[] out, Tensor[] x, float[] factors, int num_lists, str backend) -> ()",
    _fill,
    fake=lambda *args: None,
    writes=("out",),
)


def _formula(rows: Factors, backend: str, *x: Tensor) -> list[Tensor]:
    P = len(x) // len(rows[0])
    lists = [x[i : i + P] for i in range(0, len(x), P)]
    return list(chain.from_iterable(reference.combine(lists, rows)))


class Combine(Operator):
    """(factors, backend, *x) -> I lists of tensors, one after the other.

    Linear, so that its gradient is itself with the factors transposed.
    """

    formula = staticmethod(_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        rows, backend, *x = args
        return tuple(call(_functional, x, list(chain.from_iterable(rows)), len(rows[0]), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rows, ctx.backend, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        rows = ctx.rows
        P = len(d_out) // len(rows)
        needs = ctx.needs_input_grad[2:]
        # a row for each list that is asked for
        asked = [j for j in range(len(rows[0])) if any(needs[j * P : (j + 1) * P])]
        transposed = tuple(tuple(row[j] for row in rows) for j in asked)
        grads: list[Tensor | None] = [None] * len(needs)
        if asked:
            made = apply_backward(Combine, transposed, ctx.backend, *d_out)
            for i, j in enumerate(asked):
                grads[j * P : (j + 1) * P] = made[i * P : (i + 1) * P]
        return None, None, *grads
