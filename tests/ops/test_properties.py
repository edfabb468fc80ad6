"""Any shapes, strides and dtypes: the operator that serves agrees with its definition."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_cases import (
    Case,
    adam,
    assert_no_worse,
    lora,
    merged_lora,
    projected,
    values_and_gradients,
    weighted,
)
from torch import Tensor

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65])
SMALL_SIZES = st.sampled_from([0, 1, 2, 3, 5, 9])


@st.composite
def _weighted(draw: st.DrawFn) -> Case:
    shapes = draw(st.lists(st.lists(SIZES, max_size=3).map(_not_too_large), min_size=1, max_size=4))
    return weighted("any", draw(st.integers(0, 5)), shapes)


@st.composite
def _projected(draw: st.DrawFn) -> Case:
    rows = draw(st.lists(SIZES, min_size=1, max_size=3))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 9, 17]), max_size=4))
    return projected("any", rows, draw(SIZES), lengths)


@st.composite
def _batched_lora(draw: st.DrawFn) -> Case:
    b, t, d, o = (draw(size) for size in (SMALL_SIZES, SMALL_SIZES, SIZES, SIZES))
    ranks = draw(st.lists(st.sampled_from([0, 1, 3, 4, 16, 17]), max_size=4))
    choices = st.lists(st.integers(-1, len(ranks) - 1), min_size=b, max_size=b)
    return lora("any", (b, t, d, o), ranks, draw(choices), bias=draw(st.booleans()))


@st.composite
def _merge_lora(draw: st.DrawFn) -> Case:
    ranks = draw(st.lists(st.sampled_from([0, 1, 3, 4, 16, 17]), max_size=4))
    return merged_lora("any", draw(SIZES), draw(SIZES), ranks)


@st.composite
def _adam(draw: st.DrawFn) -> Case:
    shapes = st.lists(SIZES, max_size=3).map(_not_too_large)
    return adam("any", draw(st.lists(shapes, min_size=1, max_size=4)))


def _not_too_large(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, 9) for size in shape) if len(shape) > 2 else tuple(shape)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """Return x's values in another layout."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other":
        wide = x.new_full((*x.shape, 2), float("nan"))
        wide[..., 0] = x
        return wide[..., 0]
    if layout == "offset":
        return x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape).copy_(x)
    return x


LAYOUTS = st.sampled_from(["plain", "transposed", "every other", "offset"])


@pytest.mark.parametrize(
    "cases",
    [_weighted(), _projected(), _batched_lora(), _merge_lora(), _adam()],
    ids=["weighted_merge", "projected_merge", "batched_lora", "merge_lora", "adam_step"],
)
def test_agrees_with_the_definition(cases: st.SearchStrategy[Case]) -> None:
    @settings(max_examples=60)
    @given(case=cases, dtype=DTYPES, layout=LAYOUTS, seed=st.integers(0, 9))
    def check(case: Case, dtype: torch.dtype, layout: str, seed: int) -> None:
        plain = case.tensors(dtype, seed=seed)
        exact = values_and_gradients(case, [x.double() for x in plain], "definition")
        same = values_and_gradients(case, plain, "definition")
        actual = values_and_gradients(case, [_laid_out(x, layout) for x in plain], None)
        for part in (0, 1):
            assert_no_worse(actual[part], same[part], exact[part])

    check()


@given(
    w=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5),
    shift=st.floats(-3, 3, width=32),
)
def test_merging_is_affine(w: list[float], shift: float) -> None:
    from mima import ops

    base = torch.linspace(-1, 1, 7, dtype=torch.float64)
    thetas = [base * n for n in range(len(w))]
    merged = ops.weighted_merge(base, thetas, w)
    moved = ops.weighted_merge(base + shift, [theta + shift for theta in thetas], w)
    torch.testing.assert_close(moved, merged + shift)
