"""The CPU kernels against the reference: every operator, dtype and instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from support.native_cases import (
    CASES,
    DTYPE_IDS,
    DTYPES,
    Case,
    Expected,
    check_values,
    expected_of,
    merge_lora,
    needs_cpu_kernels,
    vector_dtype,
)
from torch import Tensor

from mima import ops, reference
from mima.ops.backends import cpu, extension
from mima.ops.backends import reference as reference_backend
from mima.ops.backends.arguments import AdamStep, GroupNorm, ProjectedMerge, WeightedMerge

pytestmark = needs_cpu_kernels
LEVELS = ["generic", "avx2", "avx512"]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    order = LEVELS.index(request.param)
    if order > LEVELS.index(extension.loaded("cpu").best_cpu_level()):
        pytest.skip(f"this processor does not run {request.param}")
    monkeypatch.setenv("MIMA_CPU_LEVEL", request.param)
    assert cpu.cpu_level() == request.param
    return request.param


@functools.lru_cache(maxsize=1)
def made(name: str, dtype: torch.dtype) -> tuple[Case, Expected]:
    """A case and what is expected of it, kept for the levels, which follow each other."""
    case = CASES[name](dtype)
    return case, expected_of(case)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, level):
    check_values(*made(name, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_conversions_round_like_torch(dtype, level):
    # every 16-bit pattern, through a merge that only converts there and back
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (same,) = cpu.weighted_merge_forward(WeightedMerge([patterns], [], torch.empty(0)))
    finite = torch.isfinite(patterns)
    assert torch.equal(same[finite], patterns[finite])
    # infinities minus infinities aside, NaN stays NaN and infinity infinity
    assert torch.equal(same.isnan(), patterns.isnan())
    assert torch.equal(same[patterns.isinf()], patterns[patterns.isinf()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_results_round_to_nearest_even(dtype, level):
    # products of a 16-bit number and a float32 weight fall anywhere between two numbers,
    # subnormal and overflowing ones included
    theta = (torch.randn(1 << 14) * torch.logspace(-7, 5, 1 << 14)).to(dtype)
    zero = torch.zeros_like(theta)
    weight = torch.tensor([1.2345678])
    (actual,) = cpu.weighted_merge_forward(WeightedMerge([zero], [theta], weight))
    expected = (theta.float() * weight).to(dtype)
    assert torch.equal(actual, expected)


def test_views_are_read_where_they_lie(level):
    wide = torch.randn(40, 130)
    W0, W = wide[::2, 1:65], wide[1::2, 30:94].clone().T.contiguous().T
    C, M = torch.randn(64, 3).T, torch.randn(6, 64)[::2]
    (actual,) = cpu.projected_merge_forward(ProjectedMerge([W0], [W], [C], [M]))
    (expected,) = reference.projected_merge([W0], [[W]], [C], [M])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    # an expanded weight has a leading dimension of zero
    row = torch.randn(1, 64).expand(20, 64)
    (actual,) = cpu.projected_merge_forward(ProjectedMerge([row], [W], [C], [M]))
    (expected,) = reference.projected_merge([row], [[W]], [C], [M])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_permuted_tensors_are_merged_by_position(level):
    base = torch.randn(3, 5, 7).permute(2, 0, 1)
    theta = torch.randn(7, 3, 5)
    (actual,) = cpu.weighted_merge_forward(WeightedMerge([base], [theta], torch.tensor([0.25])))
    torch.testing.assert_close(actual, base + 0.25 * (theta - base))


def test_gradients_that_are_not_needed_are_not_made(level):
    base, theta, w = torch.randn(5), torch.randn(5), torch.tensor([0.5])
    d_base, d_thetas, d_w = cpu.weighted_merge_backward(
        [torch.ones(5)], WeightedMerge([base], [theta], w), [False, False, True]
    )
    assert d_base == []
    assert d_thetas == []
    torch.testing.assert_close(d_w, (theta - base).sum()[None])
    W = [torch.randn(4, 8) for _ in range(2)]
    C = [torch.randn(2, 8)]
    d_W0, d_W, d_C, d_M = cpu.projected_merge_backward(
        W[:1], ProjectedMerge(W[:1], W[1:], C, C), [False, False, True, False]
    )
    assert (d_W0, d_W, d_M) == ([], [], [])
    torch.testing.assert_close(d_C[0], (W[0] @ C[0].mT).mT @ (W[1] - W[0]))


@pytest.fixture(scope="module", params=DTYPES, ids=DTYPE_IDS)
def dtype_of_large(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=[0, 1], ids=["aligned", "unaligned"])
def large(request, dtype_of_large) -> tuple[list[Tensor], list[Tensor]]:
    """Base, θ and an upstream gradient larger than the caches; their merge and its gradients."""
    dtype, offset, draws = dtype_of_large, request.param, torch.Generator().manual_seed(0)
    size = (17 << 20) // torch.empty(0, dtype=dtype).element_size() + 5
    base, theta, d_out = (
        torch.randn(size + 1, generator=draws).to(dtype)[offset : size + offset] for _ in range(3)
    )
    w = torch.tensor([0.25], dtype=vector_dtype(dtype))
    (out,) = reference.weighted_merge([base], [[theta]], w)
    d_base, d_theta = ((share * d_out.double()).to(dtype) for share in (0.75, 0.25))
    d_w = (d_out.double() * (theta.double() - base.double())).sum()[None]
    return [base, theta, w, d_out], [out, d_base, d_theta, d_w]


def test_results_larger_than_the_caches(large, level):
    # written past the caches, where the addresses allow it
    (base, theta, w, d_out), (expected, d_base, d_theta, d_w) = large
    merge = WeightedMerge([base], [theta], w)
    (out,) = cpu.weighted_merge_forward(merge)
    torch.testing.assert_close(out, expected)
    found = cpu.weighted_merge_backward([d_out], merge, [True] * 3)
    torch.testing.assert_close(found[0], [d_base])
    torch.testing.assert_close(found[1], [d_theta])
    torch.testing.assert_close(found[2].double(), d_w, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_a_large_step_in_place_and_beside_has_the_same_bits(offset, level):
    size = (6 << 20) // 4 + 5
    z, g, m, v = ([torch.rand(size + 1)[offset : size + offset]] for _ in range(4))
    step = AdamStep(z, g, m, v, 1e-3, 0.9, 0.999, 1e-8, 0.0, 4)
    beside = cpu.adam_step_forward(step)
    torch.testing.assert_close(
        beside, [x for xs in reference.adam_step(z, g, m, v, lr=1e-3, step=4) for x in xs]
    )
    in_place = cpu.adam_step_forward(step, overwrite=True)
    for x, y in zip(in_place, beside, strict=True):
        assert torch.equal(x, y)
    assert in_place[1] is m[0]
    assert in_place[2] is v[0]
    assert in_place[0] is not z[0]


def test_adapters_narrower_than_a_vector_side_by_side(level):
    # their padding overlaps the next adapter, and at R = 16 the next row
    check_values(merge_lora(9, 20, [13, 3], torch.float32))
    check_values(merge_lora(9, 20, [1, 13, 2], torch.float32))


def test_a_group_that_is_not_finite_leaves_the_next_ones_sums_alone(level):
    # groups of less than a vector
    x, (d_out, u_x), (w, b, u_w, u_b) = (
        torch.randn(4, 10),
        torch.randn(2, 4, 10),
        torch.randn(4, 10),
    )
    x[0, 0] = torch.nan
    norm, directions = GroupNorm(x, w, b, 2, 1e-5, True), (u_x, u_w, u_b)
    for function, *args in (
        ("group_norm_backward", d_out, norm, [True] * 3),
        ("group_norm_double_backward", d_out, directions, norm, [True] * 4),
    ):
        found, expected = (
            [grad[5:] for grad in getattr(module, function)(*args)[-2:]]
            for module in (cpu, reference_backend)
        )
        assert all(grad.isfinite().all() for grad in found)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strides", [(8, 1, 1), (8, 40, 1), (8, 7, 1), (0, 8, 1)])
def test_the_stride_of_a_dimension_of_size_one_is_anything(strides):
    x = torch.randn(64).as_strided((5, 1, 8), strides)
    weight, A, B = torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    index = torch.tensor([0, -1, 0, 0, -1])
    upstream = torch.randn(48).as_strided((5, 1, 6), (6, *strides[1:]))
    results = []
    for op in (ops.batched_lora, reference.batched_lora):
        leaves = [t.detach().requires_grad_() for t in (x, weight, A, B)]
        y = op(leaves[0], leaves[1], leaves[2:3], leaves[3:], torch.ones(1), index)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_more_than_2_31_elements():
    # 2^31 + 5 bfloat16 elements: 4 GiB a tensor
    size = 2**31 + 5
    base = torch.zeros(size, dtype=torch.bfloat16)
    theta = torch.ones(size, dtype=torch.bfloat16)
    theta[-1] = 3
    (out,) = cpu.weighted_merge_forward(WeightedMerge([base], [theta], torch.tensor([0.5])))
    assert out[-1] == 1.5
    assert out[2**31] == 0.5
    assert out[0] == 0.5
