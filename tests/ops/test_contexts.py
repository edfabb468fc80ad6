"""The operators under PyTorch's modes: autocast, inference, tensors without data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.operator_cases import (
    BY_ID,
    CASES,
    SMALL,
    Case,
    skip_unless_available,
    values_and_gradients,
)

from mima import ops
from mima.ops.attention import FusedAttention
from mima.ops.convolution import convolution

TINY = [case for case in SMALL if case.name in ("small", "no-adapter")]


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        with FusedAttention():
            attended = F.scaled_dot_product_attention(q, q, q)
        convolved = convolution(q, kernel, None, (1, 1), (1, 1), (1, 1), 1)
    assert attended.dtype == convolved.dtype == torch.float64
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, q, q))
    torch.testing.assert_close(convolved, F.conv2d(q, kernel, padding=1))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_autocast_changes_nothing(case: Case, backend: str, device: torch.device) -> None:
    skip_unless_available(backend, case.op, torch.float32, device)
    tensors = case.tensors(torch.float32, device)
    expected = values_and_gradients(case, tensors, backend)
    with torch.autocast(device.type, torch.bfloat16):
        actual = values_and_gradients(case, tensors, backend)
    for xs, ys in zip(actual, expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_autocast_changes_no_second_derivative(
    case: Case, backend: str, create_graph: bool, device: torch.device
) -> None:
    skip_unless_available(backend, case.op, torch.float32, device)

    def derivatives() -> tuple[torch.Tensor, ...]:
        leaves = [x.requires_grad_() for x in case.tensors(torch.float32, device)]
        loss = sum((y**3).sum() for y in case.call(leaves, backend))
        first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(
            [x.square().sum() for x in first if x.requires_grad],
            leaves,
            create_graph=create_graph,
            materialize_grads=True,
        )

    expected = derivatives()
    with torch.autocast(device.type, torch.bfloat16):
        actual = derivatives()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_autocast_changes_nothing_under_vmap(case: Case, device: torch.device) -> None:
    tensors = [x[None] for x in case.tensors(torch.float32, device)]
    batched = torch.vmap(lambda *tensors: tuple(case.call(tensors, None)))
    expected = batched(*tensors)
    with torch.autocast(device.type, torch.bfloat16):
        actual = batched(*tensors)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_tensors_of_inference_mode(case: Case, device: torch.device) -> None:
    expected = case.call(case.tensors(torch.float32, device), None)
    with torch.inference_mode():
        actual = case.call(case.tensors(torch.float32, device), None)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_bad_value_is_found_in_inference_mode() -> None:
    case = BY_ID["weighted_merge-small"]
    with torch.inference_mode():
        weights, *rest = case.tensors(torch.float32)
        case.call([weights, *rest], None)
        weights[0] = float("nan")
        with pytest.raises(ValueError, match="weights must be finite"):
            case.call([weights, *rest], None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tensors_without_data_give_shapes(case: Case) -> None:
    expected = values_and_gradients(case, case.tensors(torch.bfloat16), "definition")
    leaves = [x.requires_grad_() for x in case.tensors(torch.bfloat16, "meta")]
    outputs = case.call(leaves, None)
    grads = torch.autograd.grad(
        outputs, leaves, [torch.empty_like(y) for y in outputs], materialize_grads=True
    )
    for xs, ys in zip((outputs, grads), expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


def test_second_derivatives_of_nothing_in_memory_know_no_autocast() -> None:
    x = torch.randn(2, 4, device="meta", requires_grad=True)
    weight, bias = (torch.randn(4, device="meta", requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.group_norm(x, weight, bias, 2)
        (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (d_weight,) = torch.autograd.grad(d_x.square().sum(), weight)
    assert (d_weight.shape, d_weight.dtype) == (weight.shape, torch.float32)
