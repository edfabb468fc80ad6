"""On a GPU: `pytest -m cuda`. The values of every kernel, large tensors, streams, compilation.

`MIMA_TEST_DEVICES=cuda pytest tests/ops` runs the other tests there too.
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
from mima.ops.backends import choice

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients(case: Case, backend: str, dtype: str) -> None:
    skip_unless_available(backend, case.op, DTYPES[dtype], "cuda")
    tensors = case.tensors(DTYPES[dtype], "cuda")
    exact = values_and_gradients(case, [x.double() for x in tensors], "definition")
    plain = values_and_gradients(case, tensors, "definition")
    actual = values_and_gradients(case, tensors, backend)
    for part in (0, 1):
        assert_no_worse(actual[part], plain[part], exact[part])


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_second_gradients(case: Case) -> None:
    tensors = case.tensors(torch.float32, "cuda")
    exact = second_gradients(case, [x.double() for x in tensors], "definition")
    for x, truth in zip(second_gradients(case, tensors, None), exact, strict=True):
        scale = 1 + (truth.abs().amax().item() if truth.numel() else 0)
        torch.testing.assert_close(x.double(), truth, rtol=0, atol=1e-5 * scale)


def test_triton_serves_cuda() -> None:
    chosen = {row.operator: row.backend for row in choice.report("cuda") if row.chosen}
    assert chosen == dict.fromkeys(choice.OPERATORS, "triton")


def test_work_is_queued_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    base, late = torch.full((1 << 20,), 1.0, device="cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()

    def late_sum() -> torch.Tensor:
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        late.fill_(1.0)
        # reads nothing back, and so waits for nothing
        return ops.combine([[base], [late]], [[1, 1]])[0][0]

    with torch.cuda.stream(stream):
        # compiles, loads and copies what is there from then on: any of it may wait
        late_sum()
        stream.synchronize()
        late.zero_()
        total = late_sum()
        assert not stream.query(), "the call waited for the stream: this shows nothing"
    stream.synchronize()
    assert torch.equal(total, torch.full_like(base, 2.0))


def test_compiles_without_a_graph_break() -> None:
    base = torch.randn(1000, device="cuda", requires_grad=True)

    @torch.compile(fullgraph=True)
    def f(base: torch.Tensor) -> torch.Tensor:
        return ops.weighted_merge(base, [base * 2], [0.5]).sum()

    (gradient,) = torch.autograd.grad(f(base), base)
    torch.testing.assert_close(gradient, torch.full_like(base, 1.5))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    base = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    theta = torch.zeros_like(base)
    theta[-1], theta[2**31], theta[7] = 3.0, 5.0, 7.0
    for backend in ("triton", "native"):
        merged = ops.weighted_merge(base, [theta], [1.0], backend=backend)
        assert merged[-1] == 3
        assert merged[2**31] == 5
        assert merged[7] == 7
        assert torch.count_nonzero(merged) == 3
