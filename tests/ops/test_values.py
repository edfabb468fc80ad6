"""Each backend against float64, forward and backward, no further off than plain PyTorch is.

Run with TRITON_INTERPRET=1, the Triton kernels take part on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from support.operator_cases import (
    CASES,
    DTYPES,
    Case,
    assert_no_worse,
    second_gradients,
    skip_unless_available,
    values_and_gradients,
)

from mima import ops

pytestmark = pytest.mark.usefixtures("_full_float32")
BACKENDS = ("reference", "native", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients(case: Case, backend: str, dtype: str, device: torch.device) -> None:
    skip_unless_available(backend, case.op, DTYPES[dtype], device)
    tensors = case.tensors(DTYPES[dtype], device)
    exact = values_and_gradients(case, [x.double() for x in tensors], "definition")
    plain = values_and_gradients(case, tensors, "definition")
    actual = values_and_gradients(case, tensors, backend)
    for part in (0, 1):
        assert_no_worse(actual[part], plain[part], exact[part])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_second_gradients(case: Case, backend: str, device: torch.device) -> None:
    skip_unless_available(backend, case.op, torch.float32, device)
    tensors = case.tensors(torch.float32, device)
    exact = second_gradients(case, [x.double() for x in tensors], "definition")
    actual = second_gradients(case, tensors, backend)
    assert len(actual) == len(exact)
    for x, truth in zip(actual, exact, strict=True):
        # Three products of order one, each the sum of at most 1023 rounded terms.
        tolerance = 1e-5 * (1 + truth.abs().amax().item() if truth.numel() else 1)
        torch.testing.assert_close(x.double(), truth, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset", "negated"])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("small", "aligned", "one-concept")],
    ids=lambda case: case.id,
)
def test_views_are_read_as_they_are(
    case: Case, layout: str, backend: str, device: torch.device
) -> None:
    skip_unless_available(backend, case.op, torch.float32, device)
    tensors = [_view(x, layout) for x in case.tensors(torch.float32, device)]
    exact = values_and_gradients(case, [x.double().contiguous() for x in tensors], "definition")
    plain = values_and_gradients(case, [x.contiguous() for x in tensors], "definition")
    actual = values_and_gradients(case, tensors, backend)
    for part in (0, 1):
        assert_no_worse(actual[part], plain[part], exact[part])


def _view(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return a tensor of the same shape that is not laid out plainly."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    if layout == "strided":
        wide = x.new_full((*x.shape, 3), float("nan"))
        wide[..., 1] = x
        return wide[..., 1]
    if layout == "expanded":
        return x[:1].expand_as(x) if x.ndim and len(x) else x
    if layout == "negated":  # what .imag of a conjugate is
        return torch._neg_view(-x)
    # One element past a 16-byte boundary: no wide loads.
    shifted = x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape)
    return shifted.copy_(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values_do_not_overflow_on_the_way(backend: str, device: torch.device) -> None:
    skip_unless_available(backend, "weighted_merge", torch.float16, device)
    base = torch.full((5,), 60000.0, dtype=torch.float16, device=device)
    merged = ops.weighted_merge(base, [-base, base], [0.5, 0.5], backend=backend)
    torch.testing.assert_close(merged, torch.zeros_like(base))
