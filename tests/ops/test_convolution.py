"""A convolution whose kernel is frozen: PyTorch's values, and fewer products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.convolutions import Convolutions
from support.operator_cases import assert_no_worse
from torch.autograd import gradcheck, gradgradcheck

from mima.ops.convolution import convolution

# kernel, stride, padding, dilation, groups; height and width of the pictures
CASES = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 5)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 4)),
    "halves": ((3, 3), (2, 2), (1, 1), (1, 1), 1, (8, 7)),
    # the last column is read by no place of the kernel
    "leaves-some": ((2, 2), (3, 2), (0, 0), (1, 1), 1, (7, 7)),
    "dilated": ((3, 2), (1, 1), (2, 1), (2, 1), 1, (6, 6)),
    "grouped": ((3, 3), (1, 1), (1, 1), (1, 1), 2, (5, 5)),
    "depthwise": ((3, 3), (1, 1), (1, 1), (1, 1), 4, (5, 5)),
}


def make(case, dtype=torch.float64, device="cpu"):
    kernel, *places, groups, size = CASES[case]
    draw = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)

    x, weight = randn(2, 4, *size), randn(8, 4 // groups, *kernel)
    return x.requires_grad_(), weight, randn(8), [*places, groups]


def derivatives(function, x, *args):
    """The values, a gradient of a function of them, and the product of its Hessian with that."""
    y = function(x, *args)
    (d_x,) = torch.autograd.grad(y.square().sum() + y.sin().sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(d_x, x, d_x.detach())
    return y, d_x, product


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_pytorchs(case, dtype, device):
    x, weight, bias, numbers = make(case, dtype, device)
    for given in (bias, None):
        tensors = x, weight, given
        # on a GPU each may be computed by an algorithm of its own
        actual, plain = (derivatives(f, *tensors, *numbers) for f in (convolution, F.conv2d))
        wide = [None if t is None else t.double() for t in tensors]
        assert_no_worse(actual, plain, derivatives(F.conv2d, *wide, *numbers))


@pytest.mark.parametrize("case", CASES)
def test_is_linear_to_any_order(case):
    x, weight, bias, numbers = make(case)

    def squared(x):
        # linear itself: what is differentiated thrice is not
        return convolution(x, weight, bias, *numbers) ** 3

    def gradient(x):
        return torch.autograd.grad(squared(x).sum(), x, create_graph=True)

    assert gradcheck(squared, [x])
    assert gradgradcheck(squared, [x], fast_mode=True)
    assert gradgradcheck(gradient, [x], fast_mode=True)


@pytest.mark.parametrize("case", ["3x3", "leaves-some", "grouped"])
def test_transforms_of_torch_func(case):
    x, weight, bias, numbers = make(case)
    x = x.detach()
    found = []
    for function in (convolution, F.conv2d):

        def loss(x, function=function):
            return (function(x[None], weight, bias, *numbers) ** 3).sum()

        def norm(x, loss=loss):
            return torch.func.grad(loss)(x).square().sum()

        gradients = torch.vmap(torch.func.grad(loss))(x)
        through = torch.func.grad(lambda x, loss=loss: torch.vmap(loss)(x).sum())(x)
        twice = torch.vmap(torch.func.grad(norm))(x)
        rows = torch.func.jacrev(torch.func.grad(loss))(x[0])
        found.append([gradients, through, twice, rows])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_computes_and_keeps_nothing_for_the_kernel():
    x, weight, bias, numbers = make("3x3")
    counts = []
    for function in (F.conv2d, convolution):
        with Convolutions() as counted:
            derivatives(function, x, weight, bias, *numbers)
        counts.append(counted.count)
    # there, back, and twice back again; PyTorch's has the kernel's gradient besides
    assert counts == [5, 4]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        convolution(x, weight, bias, *numbers)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_autocast_computes_as_pytorch_does():
    x, weight, bias, numbers = make("3x3", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (f(x, weight, bias, *numbers) for f in (convolution, F.conv2d))
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_refuses_a_trained_kernel():
    x, weight, bias, numbers = make("3x3")
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        convolution(x, weight.requires_grad_(), bias, *numbers)
    with pytest.raises(ValueError, match="bias must not require a gradient"):
        convolution(x, weight.detach(), bias.requires_grad_(), *numbers)
