"""convolution: PyTorch's own, whose second derivative computes nothing for a frozen kernel."""

# numbers = stride, padding, dilation, groups of the layer

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mima.ops._autograd import Operator, apply, apply_backward

_OP = "convolution"
Numbers = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve pictures with a kernel that is not trained: a linear function of the pictures.

    As `torch.nn.functional.conv2d`, by the same kernels. PyTorch's double backward computes the
    gradient at the kernel, as many products again in a shape that its libraries are slow in,
    whether anybody asks for that or not, and its graph keeps `x`; this one's derivatives are the
    layer's own convolution and its adjoint alone. Differentiable any number of times in `x`.

    Args:
        x: [B, C, H, W].
        weight: [O, C / groups, h, w].
        bias: [O], or None.
        stride: of height and width.
        padding: zeros on each side, likewise.
        dilation: likewise.
        groups: how many.

    Raises:
        ValueError: the kernel or the bias wants a gradient.
    """
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{_OP}: {name} must not require a gradient")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # as autocast does for the function that this stands for
        dtype = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    (out,) = apply(_Convolution, x, weight, bias, (stride, padding, dilation, groups))
    return cast(Tensor, out)


def _forward_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Numbers
) -> tuple[Tensor]:
    return (F.conv2d(x, weight, bias, *numbers),)


def _adjoint_formula(
    d_y: Tensor, weight: Tensor, size: Sequence[int], numbers: Numbers
) -> tuple[Tensor]:
    *places, groups = numbers
    # of x, the shape is read alone
    like = d_y.new_empty(size)
    d_x: Tensor = torch.ops.aten.convolution_backward(
        *(d_y, like, weight, None, *places, False, [0, 0], groups), [True, False, False]
    )[0]
    return (d_x,)


class _Convolution(Operator):
    """(x, weight, bias, numbers) -> (y,)."""

    formula = staticmethod(_forward_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor]:
        return _forward_formula(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.numbers = inputs
        ctx.size = x.shape
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        (d_x,) = apply_backward(_Adjoint, *d_out, weight, ctx.size, ctx.numbers)
        return d_x, None, None, None


class _Adjoint(Operator):
    """(d_y, weight, size of x, numbers) -> (d_x,)."""

    formula = staticmethod(_adjoint_formula)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor]:
        return _adjoint_formula(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weight, _, ctx.numbers = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        (d_y,) = apply_backward(_Convolution, *u, weight, None, ctx.numbers)
        return d_y, None, None, None
