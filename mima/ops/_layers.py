"""Layers of a network as operators whose second derivative is an operator, too.

Forward, backward and double backward recompute what they need from the layer's inputs, which are
all that a graph keeps. Beside the two functions of every operator, a backend serves
``<name>_double_backward(d_out, directions, inputs, needs)``, a direction for each tensor of the
inputs or None. Derivatives of higher order are those of the reference's backward, in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from mima.ops._autograd import (
    Operator,
    apply,
    apply_backward,
    call,
    filled,
    flat,
    is_in_legacy_vmap,
    is_watched,
    no_autocast,
    raw_operator,
    raw_operators,
    without_autocast,
)
from mima.ops.backends import choice
from mima.ops.backends import reference as reference_backend
from mima.ops.backends.arguments import schema

_INPUTS: dict[str, type[Any]] = {}
"""A tuple of `mima.ops.backends.arguments` by name."""
_RAW: dict[str, tuple[CustomOpDef, CustomOpDef, CustomOpDef]] = {}
"""Forward, backward and double backward by name."""


def define(name: str, inputs: type[Any], *, fake: Callable[[Any], Tensor]) -> None:
    """Register a layer's three operators with torch.library.

    Args:
        name: one of `choice.OPERATORS`.
        inputs: its arguments, tensors before numbers; the first is there.
        fake: the output for the inputs, without data.
    """
    fields = schema(inputs)
    tensors = [field.split()[1] for field in fields if field.startswith("Tensor")]
    count = len(tensors)
    forward, backward = raw_operators(
        name, inputs, "Tensor", fake=fake, like=lambda d_out, given: given[:count]
    )

    def double_backward(d_out: Tensor, *args: Any) -> list[Tensor]:
        *given, needs, backend = args
        directions, given = given[:count], inputs(*given[count:])
        module = choice.resolve(name, d_out, backend, getattr(given, "width", None))
        grads = getattr(module, f"{name}_double_backward")(d_out, directions, given, needs)
        return [x.contiguous() for x in flat(grads, needs)]

    def fake_double_backward(d_out: Tensor, *args: Any) -> list[Tensor]:
        *given, needs, _ = args
        like = d_out, *given[count : 2 * count]
        return [x.new_empty(x.shape) for x in flat(like, needs)]

    given = ", ".join([*(f"Tensor? u_{tensor}" for tensor in tensors), *fields])
    _INPUTS[name] = inputs
    _RAW[name] = (
        *(forward, backward),
        raw_operator(
            f"{name}_double_backward",
            f"(Tensor d_out, {given}, bool[] needs, str backend) -> Tensor[]",
            double_backward,
            fake=fake_double_backward,
        ),
    )


def layer(
    name: str, backend: str | None, numbers: tuple[Any, ...], *tensors: Tensor | None
) -> Tensor:
    """Apply a layer to checked arguments."""
    out: Tensor
    # kernels read what is contiguous: copied here, tensors are copied once, not by each derivative
    tensors = tuple(None if x is None else x.contiguous() for x in tensors)
    assert tensors[0] is not None
    if tensors[0].is_meta or is_watched(tensors, Tensor.is_neg):
        (out,) = apply(Layer, name, backend or "", numbers, *tensors)
        return out
    given = _INPUTS[name](*tensors, *numbers)
    module = choice.resolve(name, tensors[0], backend or "", getattr(given, "width", None))
    kernels = _kernels(module, name)
    if torch.is_grad_enabled():
        out = DirectLayer.apply(kernels, (name, backend or "", numbers), *tensors)
        return out
    out = kernels.forward(given)
    return out


class Kernels(NamedTuple):
    """A backend's functions of a layer, and the tuple of its arguments that they take."""

    inputs: type[Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    double_backward: Callable[..., Any]


@functools.cache
def _kernels(module: ModuleType, name: str) -> Kernels:
    functions = (
        without_autocast(getattr(module, f"{name}_{which}"))
        for which in ("forward", "backward", "double_backward")
    )
    return Kernels(_INPUTS[name], *functions)


class DirectLayer(torch.autograd.Function):
    """`Layer` where nothing of PyTorch's watches: its kernels, (name, backend, numbers), tensors.

    A network calls dozens of layers, and each of its steps three functions of each. Without the
    dispatcher, and without a context of its own, which PyTorch makes by binding signatures, that
    takes a third of the time.
    """

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, constants: Any, *tensors: Tensor | None) -> Tensor:
        ctx.kernels, ctx.constants = kernels, constants
        ctx.save_for_backward(*tensors)
        out: Tensor = kernels.forward(kernels.inputs(*tensors, *constants[2]))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        needs, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors
        if is_watched((d_out, *tensors), Tensor.is_neg):
            grads = apply_backward(LayerBackward, *ctx.constants, needs, d_out, *tensors)
            return None, None, *_spread(grads, needs)
        if torch.is_grad_enabled():
            grads = DirectBackward.apply(ctx.kernels, ctx.constants, needs, d_out, *tensors)
            return None, None, *_spread(grads, needs)
        given = ctx.kernels.inputs(*tensors, *ctx.constants[2])
        return None, None, *ctx.kernels.backward(d_out, given, needs)


class DirectBackward(torch.autograd.Function):
    """`LayerBackward` likewise: kernels, constants, needs, d_out, tensors."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, constants: Any, needs: Any, d_out: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.kernels, ctx.constants, ctx.needs = kernels, constants, needs
        ctx.save_for_backward(d_out, *tensors)
        ctx.set_materialize_grads(False)
        given = kernels.inputs(*tensors, *constants[2])
        return tuple(x for x in kernels.backward(d_out, given, needs) if x is not None)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        d_out, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or is_watched((*u, d_out, *tensors), Tensor.is_neg):
            return None, None, None, *_double_backward(ctx, wanted, u, d_out, tensors)
        given = ctx.kernels.inputs(*tensors, *ctx.constants[2])
        directions = _spread(u, ctx.needs)
        grads = ctx.kernels.double_backward(d_out, directions, given, wanted)
        return None, None, None, *grads


def _spread(values: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Put the needed ones in their places, None in the others."""
    rest = iter(values)
    return [next(rest) if need else None for need in needs]


def _forward_formula(
    name: str, backend: str, numbers: tuple[Any, ...], *tensors: Tensor
) -> tuple[Tensor]:
    return (getattr(reference_backend, f"{name}_forward")(_INPUTS[name](*tensors, *numbers)),)


def _backward_formula(
    name: str,
    backend: str,
    numbers: tuple[Any, ...],
    needs: Sequence[bool],
    d_out: Tensor,
    *tensors: Tensor | None,
) -> list[Tensor]:
    formula = getattr(reference_backend, f"{name}_backward")
    return flat(formula(d_out, _INPUTS[name](*tensors, *numbers), needs), needs)


class Layer(Operator):
    """(name, backend, numbers, *tensors) -> the layer's output."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        name, backend, numbers, *tensors = args
        return (call(_RAW[name][0], *tensors, *numbers, backend),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.constants = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        needs = tuple(ctx.needs_input_grad[3:])
        tensors = ctx.saved_tensors
        grads = apply_backward(LayerBackward, *ctx.constants, needs, d_out, *tensors)
        return *(None,) * 3, *_spread(grads, needs)


class LayerBackward(Operator):
    """(name, backend, numbers, needs, d_out, *tensors) -> the gradients that are needed."""

    formula = staticmethod(_backward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        name, backend, numbers, needs, *tensors = args
        return tuple(call(_RAW[name][1], *tensors, *numbers, list(needs), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *ctx.constants, ctx.needs = inputs[:4]
        ctx.save_for_backward(*inputs[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Any, ...]:
        d_out, *tensors = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[4:])
        return *(None,) * 4, *_double_backward(ctx, wanted, u, d_out, tensors)


def _double_backward(
    ctx: Any, wanted: Sequence[bool], u: Sequence[Tensor | None], d_out: Tensor, tensors: Any
) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        # create_graph=True: somebody differentiates a third time
        with no_autocast(d_out):
            return _differentiable(ctx, wanted, u, (d_out, *tensors))
    name, backend, numbers = ctx.constants
    directions = _spread(u, ctx.needs)
    if torch._C._are_functorch_transforms_active() or is_in_legacy_vmap():
        # the kernels have no batch dimension
        formula = without_autocast(getattr(reference_backend, f"{name}_double_backward"))
        grads: Sequence[Tensor | None] = formula(
            d_out, directions, _INPUTS[name](*tensors, *numbers), wanted
        )
        return grads
    given = d_out, *directions, *tensors, *numbers, list(wanted), backend
    return _spread(call(_RAW[name][2], *given), wanted)


def _differentiable(
    ctx: Any, wanted: Sequence[bool], u: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The double backward in plain PyTorch: the gradients of the tensors that want one."""
    leaves = [x for x, want in zip(tensors, wanted, strict=True) if want]

    def formula(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        every = [next(rest) if want else x for x, want in zip(tensors, wanted, strict=True)]
        return tuple(_backward_formula(*ctx.constants, ctx.needs, *every))

    # not autograd.grad, which would follow the tensors' own graphs to each other
    outputs, pullback = torch.func.vjp(formula, *leaves)  # type: ignore[misc]  # no aux
    return _spread(pullback(tuple(filled(u, outputs))), wanted)
