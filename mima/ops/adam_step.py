"""adam_step: one step of Adam for every tensor of a lower level, and its pullback, in one call."""

# P = tensors; lists z, g, m, v follow each other, and so do z⁺, m⁺, v⁺

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from mima.ops import _checks
from mima.ops._autograd import (
    Operator,
    apply,
    apply_backward,
    call,
    filled,
    flat,
    is_watched,
    raw_operators,
    refuse_graph,
    split,
)
from mima.ops.backends import arguments
from mima.ops.backends import reference as reference_backend

_OP = "adam_step"
TensorList = list[Tensor]


def adam_step(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    overwrite: bool = False,
    backend: str | None = None,
) -> tuple[TensorList, TensorList, TensorList]:
    """Take one step of Adam with decoupled decay (AdamW), a whole list of tensors at once.

        m⁺ = β₁ m + (1 − β₁) g,  v⁺ = β₂ v + (1 − β₂) g²
        z⁺ = (1 − lr · weight_decay) z − lr m̂ / (√v̂ + eps),  m̂ = m⁺ / (1 − β₁ᵏ⁺¹), v̂ likewise

    Differentiable any number of times in `z`, `g`, `m` and `v`; where v̂ is 0, its root has slope 0.

    Args:
        z: P tensors of any shapes; float32, bfloat16, float16 or float64, and all arguments of one
            dtype and device.
        g: P gradients.
        m: P first moments.
        v: P second moments, ≥ 0.
        lr: step size.
        betas: β₁ and β₂, in [0, 1).
        eps: added to the root, > 0.
        weight_decay: decoupled decay, in units of lr.
        step: k, from 0.
        overwrite: whether m⁺ and v⁺ may take the memory of `m` and `v`, which then hold nothing
            of use. Not where a graph is recorded.
        backend: "reference", "triton" or "native"; None chooses (see `mima.ops.backends.choice`).

    Returns:
        z⁺, m⁺ and v⁺: P tensors each.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; a rule's number out of its
            range; `overwrite` where a gradient is asked for, or of moments that share memory.
        BackendError: `backend` cannot serve.

    Examples:
        >>> zero = [torch.zeros(2)]
        >>> z, m, v = adam_step(zero, [torch.ones(2)], zero, zero, lr=0.1, step=0)
        >>> z
        [tensor([-0.1000, -0.1000])]
    """
    rule = _rule(lr, betas, eps, weight_decay, step)
    _checks.require_lists(_OP, ("z", "g", "m", "v"), (z, g, m, v))
    if not z:
        return [], [], []
    tensors = *z, *g, *m, *v
    if overwrite:
        refuse_graph(_OP, "overwrite must be False", tensors)
        # what PyTorch watches is not overwritten
        overwrite = not (z[0].is_meta or is_watched(tensors, Tensor.is_neg))
    if overwrite:
        _require_apart([*m, *v])
    out = apply(AdamStep, len(z), backend or "", rule, overwrite, *tensors)
    first, second, third = split(out, (len(z),) * 3, (True,) * 3)
    if overwrite:
        moments = zip((*m, *v), (*second, *third), strict=True)
        written = [x for x, made in moments if x is made and not x.is_inference()]
        # a graph that keeps them is to see that they changed
        torch.autograd.graph.increment_version(written)
    return first, second, third


def _require_apart(moments: Sequence[Tensor]) -> None:
    # of others, a copy is overwritten
    ranges = sorted([(x.data_ptr(), x.nbytes) for x in moments if x.numel() and x.is_contiguous()])
    if [after for (at, size), (after, _) in pairwise(ranges) if at + size > after]:
        raise ValueError(f"{_OP}: m and v must not share memory where overwrite is True")


def adam_step_pullback(
    bar_z: Sequence[Tensor],
    bar_m: Sequence[Tensor],
    bar_v: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    backend: str | None = None,
) -> tuple[TensorList, TensorList, TensorList, TensorList]:
    """Pull gradients back through `adam_step`, without having taken the step.

    Differentiable any number of times in all tensors. The formula is in `docs/math.md`.

    Args:
        bar_z: P gradients at z⁺.
        bar_m: P gradients at m⁺.
        bar_v: P gradients at v⁺.
        g: P tensors, as the step was given them.
        m: likewise.
        v: likewise.
        lr: of the step, as all that follow.
        betas: β₁ and β₂.
        eps: added to the root.
        weight_decay: decoupled decay.
        step: k.
        backend: "reference", "triton" or "native"; None chooses.

    Returns:
        The gradients at z, g, m and v: P tensors each; without decay, at z `bar_z` themselves.

    Raises:
        TypeError: not tensors, or dtypes or devices that differ.
        ValueError: numbers or shapes of tensors that do not agree; a rule's number out of its
            range.
        BackendError: `backend` cannot serve.

    Examples:
        >>> one, zero = [torch.ones(1)], [torch.zeros(1)]
        >>> adam_step_pullback(one, zero, zero, one, zero, zero, lr=0.5, weight_decay=1, step=0)[0]
        [tensor([0.5000])]
    """
    rule = _rule(lr, betas, eps, weight_decay, step)
    lists = bar_z, bar_m, bar_v, g, m, v
    _checks.require_lists(_OP, ("bar_z", "bar_m", "bar_v", "g", "m", "v"), lists)
    if not g:
        return [], [], [], []
    needs = weight_decay != 0, True, True, True
    out = apply(AdamStepBackward, len(g), backend or "", rule, needs, *chain.from_iterable(lists))
    d_z, d_g, d_m, d_v = split(out, (len(g),) * 4, needs)
    return d_z if needs[0] else list(bar_z), d_g, d_m, d_v


Rule = tuple[float, float, float, float, float, int]
"""lr, β₁, β₂, eps, decay, step."""


def _rule(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
) -> Rule:
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"{_OP}: betas must lie in [0, 1), got {betas}")
    if not eps > 0:
        raise ValueError(f"{_OP}: eps must be > 0, got {eps}")
    if step < 0:
        raise ValueError(f"{_OP}: step must be ≥ 0, got {step}")
    return float(lr), float(beta1), float(beta2), float(eps), float(weight_decay), int(step)


_forward, _backward = raw_operators(
    _OP,
    arguments.AdamStep,
    "Tensor[]",
    saved=arguments.AdamStepSaved,
    fake=lambda given: [x.new_empty(x.shape) for _ in range(3) for x in given.z],
    like=lambda d_out, saved: (saved.g, saved.g, saved.m, saved.v),
)


def _lists(tensors: Sequence[Any], P: int) -> list[list[Any]]:
    """Cut what follows each other into lists of P."""
    return [list(tensors[i : i + P]) for i in range(0, len(tensors), P)]


def _forward_formula(
    P: int, backend: str, rule: Rule, overwrite: bool, *tensors: Tensor
) -> TensorList:
    z, g, m, v = _lists(tensors, P)
    return reference_backend.adam_step_forward(arguments.AdamStep(z, g, m, v, *rule))


def _backward_formula(
    P: int, backend: str, rule: Rule, needs: Sequence[bool], *tensors: Tensor
) -> TensorList:
    g, m, v = _lists(tensors[3 * P :], P)
    saved = arguments.AdamStepSaved(g, m, v, *rule)
    return flat(reference_backend.adam_step_backward(tensors[: 3 * P], saved, needs), needs)


class AdamStep(Operator):
    """(P, backend, rule, overwrite, *z, *g, *m, *v) -> z⁺, m⁺, v⁺."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        P, backend, rule, overwrite, *tensors = args
        directly = {"overwrite": True} if overwrite else {}
        return tuple(call(_forward, *_lists(tensors, P), *rule, backend, **directly))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.P, ctx.backend, ctx.rule, _, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.P :])

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        needs = tuple(any(group) for group in _lists(ctx.needs_input_grad[4:], ctx.P))
        args = ctx.P, ctx.backend, ctx.rule, needs, *d_out, *ctx.saved_tensors
        grads = apply_backward(AdamStepBackward, *args)
        return *(None,) * 4, *chain.from_iterable(split(grads, (ctx.P,) * 4, needs))


class AdamStepBackward(Operator):
    """(P, backend, rule, needs, *z̄⁺, *m̄⁺, *v̄⁺, *g, *m, *v) -> the gradients that are needed.

    Its own derivatives are those of the formula in plain PyTorch.
    """

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        P, backend, rule, needs, *tensors = args
        d_out, saved = tensors[: 3 * P], _lists(tensors[3 * P :], P)
        return tuple(call(_backward, d_out, *saved, *rule, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *ctx.constants, ctx.needs = inputs[:4]
        ctx.save_for_backward(*inputs[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(_backward_formula(*ctx.constants, ctx.needs, *tensors))

        # not autograd.grad, which would follow the tensors' own graphs to each other
        outputs, pullback = torch.func.vjp(formula, *tensors)  # type: ignore[misc]  # no aux
        return *(None,) * 4, *pullback(tuple(filled(u, outputs)))
