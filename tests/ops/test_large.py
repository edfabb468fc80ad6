"""More than 2**31 elements: every offset is 64 bits wide. Needs about 20 GB; `pytest -m slow`."""

from __future__ import annotations

import pytest
import torch
from support.operator_cases import skip_unless_available

from mima import ops

pytestmark = pytest.mark.slow

SIZE = 2**31 + 5


def test_weighted_merge() -> None:
    # Not the reference, whose float32 intermediates would need twice the memory.
    dtype = torch.bfloat16
    skip_unless_available("native", "weighted_merge", dtype)
    base = torch.zeros(SIZE, dtype=dtype)
    theta = torch.zeros(SIZE, dtype=dtype)
    theta[-1], theta[2**31], theta[7] = 3.0, 5.0, 7.0
    merged = ops.weighted_merge(base, [theta], [2.0], backend="native")
    assert merged[-1] == 6
    assert merged[2**31] == 10
    assert merged[7] == 14
    assert torch.count_nonzero(merged) == 3


def test_projected_merge() -> None:
    skip_unless_available("native", "projected_merge", torch.bfloat16)
    # One layer of 2**28 + 1 rows and 8 columns.
    o, d = 2**28 + 1, 8
    W0 = torch.zeros(o, d, dtype=torch.bfloat16)
    W1 = torch.zeros(o, d, dtype=torch.bfloat16)
    W1[-1, 0], W1[3, 0] = 3.0, 5.0
    first = torch.eye(1, d, dtype=torch.bfloat16)
    (merged,) = ops.projected_merge([W0], [[W1]], [first], [first], backend="native")
    assert merged[-1, 0] == 3
    assert merged[3, 0] == 5
    assert torch.count_nonzero(merged) == 2


def test_batched_lora() -> None:
    skip_unless_available("native", "batched_lora", torch.bfloat16)
    # One sample of 2**28 + 1 tokens; only the last one and the fourth are not zero.
    t, d = 2**28 + 1, 8
    x = torch.zeros(1, t, d, dtype=torch.bfloat16)
    x[0, -1, 0], x[0, 3, 0] = 3.0, 5.0
    weight = torch.zeros(d, d, dtype=torch.bfloat16)
    A, B = torch.eye(1, d, dtype=torch.bfloat16), torch.eye(d, 1, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int64)
    y = ops.batched_lora(x, weight, [A], [B], [2.0], index, backend="native")
    assert y[0, -1, 0] == 6
    assert y[0, 3, 0] == 10
    assert torch.count_nonzero(y) == 2


def test_merge_lora() -> None:
    skip_unless_available("native", "merge_lora", torch.bfloat16)
    o, d = 2**28 + 1, 8
    weight = torch.zeros(o, d, dtype=torch.bfloat16)
    A, B = torch.eye(1, d, dtype=torch.bfloat16), torch.zeros(o, 1, dtype=torch.bfloat16)
    B[-1], B[3] = 3.0, 5.0
    merged = ops.merge_lora(weight, [A], [B], [2.0], [0.5], backend="native")
    assert merged[-1, 0] == 3
    assert merged[3, 0] == 5
    assert torch.count_nonzero(merged) == 2
