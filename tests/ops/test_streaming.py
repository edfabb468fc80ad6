"""The merge in place, one concept at a time: values, aliasing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.operator_cases import DTYPES, assert_no_worse, skip_unless_available
from torch import Tensor

from mima import ops, reference

BACKENDS = ("reference", "native", "triton")
ROWS, WIDTHS, TOKENS = ([63, 1, 0, 40], [33]), (63, 128), (1, 9, 77)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spaced(x: Tensor) -> Tensor:
    """The same values in a matrix whose rows lie apart."""
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("rows", "d"), zip(ROWS, WIDTHS, strict=True), ids=["awkward", "whole-blocks"]
)
def test_what_tokens_become(rows, d, tokens, backend, dtype, device):
    skip_unless_available(backend, "token_outputs", DTYPES[dtype], device)

    def given(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        X = [randn(o, d, seed=o).to(device, DTYPES["bf16"]).to(dtype) for o in rows]
        C = (randn(tokens, d, seed=1) / d**0.5).to(device, DTYPES["bf16"]).to(dtype)
        return X, C, randn(sum(rows), tokens, seed=2).to(device, DTYPES["bf16"]).to(dtype)

    def defined(X: list[Tensor], C: Tensor, A: Tensor) -> list[Tensor]:
        added = reference.add_token_outputs(X, A, C)
        return [reference.token_outputs(X, C), reference.token_sums(X, A), *added]

    X, C, A = given(DTYPES[dtype])
    actual = [
        ops.token_outputs([spaced(x) for x in X], spaced(C), backend=backend),
        ops.token_sums(X, A, backend=backend),
    ]
    same, truth = defined(X, C, A), defined(*given(torch.float64))
    ops.add_token_outputs_(X, spaced(A), C, backend=backend)
    assert_no_worse([*actual, *X], same, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_add(backend, device):
    skip_unless_available(backend, "token_outputs", torch.float32, device)
    X = [torch.ones(3, 4, device=device)]
    none, no_rows = X[0].new_empty(0, 4), X[0].new_empty(3, 0)
    assert ops.token_outputs(X, none, backend=backend).shape == (3, 0)
    assert ops.token_sums(X, no_rows, backend=backend).shape == (0, 4)
    ops.add_token_outputs_(X, no_rows, none, backend=backend)
    assert torch.equal(X[0], torch.ones_like(X[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_are_the_projected_merge(backend, device):
    skip_unless_available(backend, "token_outputs", torch.float32, device)
    W0, W1, W2 = ([randn(o, 20, seed=o + i).float().to(device) for o in (7, 40)] for i in range(3))
    C, M = ([randn(s, 20, seed=s + i).float().to(device) / 5 for s in (2, 3)] for i in (50, 60))
    expected = ops.projected_merge(W0, [W1, W2], C, M, backend=backend)
    A = [
        ops.token_outputs([x - y for x, y in zip(W, W0, strict=True)], C_n, backend=backend)
        for W, C_n in zip((W1, W2), C, strict=True)
    ]
    ops.add_token_outputs_(W0, torch.cat(A, dim=1), torch.cat(M), backend=backend)
    torch.testing.assert_close(W0, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_combinations_may_overwrite_what_they_read(backend, device):
    skip_unless_available(backend, "combine", torch.float32, device)
    # several blocks and pieces, and more than is stored past the caches
    shapes = [(5,), (3, 70_000), (5_000_000,)] if backend == "native" else [(5,), (3, 700)]
    x, y = ([randn(*s, seed=i).float().to(device) for s in shapes] for i in (1, 2))
    factors = [[1, -0.5], [0, 0.9]]
    first, second = reference.combine([x, y], factors)
    addresses, versions = [v.data_ptr() for v in y], [v._version for v in y]
    fresh, same = ops.combine([x, y], factors, into=[None, y], backend=backend)
    torch.testing.assert_close(fresh, first)
    torch.testing.assert_close(same, second)
    assert [v.data_ptr() for v in same] == addresses
    # autograd sees the change
    assert all(v._version > before for v, before in zip(y, versions, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_zero_leaves_its_list_out(backend, device):
    skip_unless_available(backend, "combine", torch.float32, device)
    x, y = torch.ones(40, device=device), torch.full((40,), torch.inf, device=device)
    ((out,),) = ops.combine([[x], [y]], [[2, 0]], backend=backend)
    assert torch.equal(out, 2 * x)


def test_lists_that_are_not_contiguous_are_combined_by_their_places(device):
    x = randn(4, 6).float().to(device).T
    ((out,), (kept,)) = ops.combine(
        [[x]],
        [[2], [3]],
        into=[None, [torch.empty_like(x).T.T.clone(memory_format=torch.contiguous_format)]],
    )
    assert torch.equal(out, 2 * x)
    assert torch.equal(kept, 3 * x)


X, C, A = [torch.ones(3, 4), torch.ones(2, 4)], torch.ones(2, 4), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ops.combine([], []), ValueError, "length 1 to 3, got 0 and 0"),
        (lambda: ops.combine([X], [[1, 2]]), ValueError, "factors.0. must have length 1, one per"),
        (lambda: ops.combine([X, X[:1]], [[1, 2]]), ValueError, "x.1. must have length 2"),
        (lambda: ops.combine([X], [[1]], into=[]), ValueError, "into must have length 1"),
        (
            lambda: ops.combine([[C]], [[1]], into=[[torch.ones(4, 2).T]]),
            ValueError,
            "into.0..0. must be contiguous",
        ),
        (
            lambda: ops.combine([[C]], [[1]], into=[[C.clone().requires_grad_()]]),
            ValueError,
            "into must be None where a gradient is asked for",
        ),
        (lambda: ops.token_outputs([], C), ValueError, "X must have a layer, got none"),
        (lambda: ops.token_outputs(X, C[:, :3]), ValueError, r"C must be \[s, 4\]"),
        (lambda: ops.token_outputs(X, C.double()), TypeError, "C must be torch.float32"),
        (
            lambda: ops.token_outputs(X, C.clone().requires_grad_()),
            ValueError,
            "or use projected_merge, where a gradient is asked for",
        ),
        (lambda: ops.token_sums(X, A[:4]), ValueError, r"A must be \[5, s\]"),
        (lambda: ops.add_token_outputs_(X, A, C[:1]), ValueError, r"A must be \[5, 1\]"),
        (
            lambda: ops.add_token_outputs_([torch.ones(4, 3).T], A[:3], C),
            ValueError,
            "X.0. must be contiguous",
        ),
    ],
)
def test_refuses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
