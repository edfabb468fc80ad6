"""The operators' cases for the native kernels, and the tolerance that they are held to.

A case runs the raw operators of the native backend on one list of inputs, and the reference on the
same inputs twice: as they are, and in float64, which is the truth.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mima import reference
from mima.ops.backends import arguments, cpu, cuda, extension

_MISSING = extension.unsupported_reasons("weighted_merge", torch.empty(0))
needs_cpu_kernels = pytest.mark.skipif(
    bool(_MISSING) and os.environ.get("MIMA_STRICT") != "1", reason=", ".join(_MISSING) or "never"
)
"""Left out where mima was installed without a compiler; where tests are strict, a failure."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPE_IDS = ["f32", "f64", "bf16", "f16"]

# unit roundoff: half of what separates 1 from the next number
ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}


@dataclass(frozen=True)
class Case:
    """An operator on inputs: flat lists in, flat lists out."""

    inputs: list[Tensor]
    """Every differentiable input, in the order of the gradients."""
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    """The raw forward."""
    reference: Callable[[Sequence[Tensor]], list[Tensor]]
    backward: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    """The raw backward: (d_outputs, inputs) -> one gradient per input."""
    length: int
    """Terms of the longest sum."""


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and scales."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(actual: Tensor, same_dtype: Tensor, truth: Tensor, length: int) -> None:
    """Hold a result to at most twice the error of PyTorch in the same dtype.

    The floor is for results that PyTorch happens to hit: one rounding of the stored value, and the
    roundings of a sum of `length` terms in the accumulator, which grow with its square root.
    """
    assert actual.shape == truth.shape
    assert actual.dtype == same_dtype.dtype
    if not actual.numel():
        return
    assert torch.isfinite(actual).all()
    error = (actual.double() - truth).abs().max()
    base = (same_dtype.double() - truth).abs().max()
    accumulator = ROUNDOFF[torch.float64 if actual.dtype == torch.float64 else torch.float32]
    largest = truth.abs().max() + 1
    floor = largest * (ROUNDOFF[actual.dtype] + 8 * accumulator * max(length, 1) ** 0.5)
    assert error <= 2 * base + floor, f"{error:.2e} > 2 * {base:.2e} + {floor:.2e}"


class Expected(NamedTuple):
    """What an operator and its gradients should give."""

    upstream: list[Tensor]
    """Gradients of the outputs."""
    same: list[Tensor]
    """Outputs, then gradients, by autograd through the reference in the inputs' dtype."""
    truth: list[Tensor]
    """The same in float64."""


def expected_of(case: Case) -> Expected:
    """Run the reference and its gradients, in both dtypes."""

    def outputs_of(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        return leaves, case.reference(leaves)

    def with_gradients(
        leaves: list[Tensor], outputs: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        gradients = torch.autograd.grad(
            outputs, leaves, upstream, materialize_grads=True, allow_unused=True
        )
        return [*(x.detach() for x in outputs), *gradients]

    leaves, outputs = outputs_of(case.inputs)
    upstream = [torch.randn(x.shape).to(x.dtype) for x in outputs]
    exact = outputs_of([x.double() for x in case.inputs])
    return Expected(
        upstream,
        with_gradients(leaves, outputs, upstream),
        with_gradients(*exact, [x.double() for x in upstream]),
    )


def check_values(case: Case, expected: Expected | None = None) -> None:
    """Compare every output and every gradient with the reference."""
    upstream, same, truth = expected or expected_of(case)
    outputs = case.run(case.inputs)
    actual = [*outputs, *case.backward(upstream, case.inputs)]
    assert len(actual) == len(truth)
    for a, s, t in zip(actual, same, truth, strict=True):
        check(a, s, t, case.length)


def _half(tensors: Sequence[Tensor], native: ModuleType | None) -> ModuleType:
    """The module for the tensors' device, unless one is named."""
    return native or (cuda if tensors[0].is_cuda else cpu)


def weighted_merge(
    shapes: Sequence[tuple[int, ...]], N: int, dtype: torch.dtype, native: ModuleType | None = None
) -> Case:
    """Tensors of these shapes, N concepts."""
    P = len(shapes)
    tensors = [torch.randn(shape).to(dtype) for _ in range(N + 1) for shape in shapes]
    weights = torch.rand(N, dtype=vector_dtype(dtype))

    def split(xs: Sequence[Tensor]) -> arguments.WeightedMerge:
        return arguments.WeightedMerge(list(xs[:P]), list(xs[P:-1]), xs[-1])

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        return _half(xs, native).weighted_merge_forward(split(xs))

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        base, thetas, w = split(xs)
        return reference.weighted_merge(base, [thetas[n * P : n * P + P] for n in range(N)], w)

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        d_base, d_thetas, d_w = _half(xs, native).weighted_merge_backward(
            d_out, split(xs), [True] * 3
        )
        assert d_w is not None
        return [*d_base, *d_thetas, d_w]

    length = sum(x.numel() for x in tensors[:P])
    return Case([*tensors, weights], run, through_reference, backward, length)


def projected_merge(
    rows: Sequence[int],
    tokens: Sequence[int],
    d: int,
    dtype: torch.dtype,
    native: ModuleType | None = None,
) -> Case:
    """Layers of these numbers of rows, concepts of these numbers of tokens."""
    L, N = len(rows), len(tokens)
    weights = [torch.randn(o, d).to(dtype) for _ in range(N + 1) for o in rows]
    C = [torch.randn(s, d).to(dtype) for s in tokens]
    # a plan undoes the length of C: outputs stay of the size of the weights
    M = [(torch.randn(s, d) / max(d, 1)).to(dtype) for s in tokens]

    def split(xs: Sequence[Tensor]) -> arguments.ProjectedMerge:
        ends = [0, L, L * (N + 1), L * (N + 1) + N, len(xs)]
        return arguments.ProjectedMerge(*(list(xs[a:b]) for a, b in pairwise(ends)))

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        return _half(xs, native).projected_merge_forward(split(xs))

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        W0, W, C, M = split(xs)
        return reference.projected_merge(W0, [W[n * L : n * L + L] for n in range(N)], C, M)

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        parts = _half(xs, native).projected_merge_backward(d_out, split(xs), [True] * 4)
        return [x for part in parts for x in part]

    return Case([*weights, *C, *M], run, through_reference, backward, sum(rows) * max(d, 1))


def batched_lora(
    b: int, t: int, d: int, o: int, ranks: Sequence[int], dtype: torch.dtype, bias: bool = True
) -> Case:
    """A batch in which every adapter, and no adapter, is used."""
    N = len(ranks)
    x = torch.randn(b, t, d).to(dtype)
    weight = (torch.randn(o, d) / max(d, 1) ** 0.5).to(dtype)
    A = [(torch.randn(r, d) / max(d, 1) ** 0.5).to(dtype) for r in ranks]
    B = [torch.randn(o, r).to(dtype) for r in ranks]
    scale = torch.rand(N, dtype=vector_dtype(dtype)) + 0.5
    biases = [torch.randn(o).to(dtype)] if bias else []
    index = (torch.arange(b) % (N + 1)) - 1
    kept: list[Tensor] = []

    def split(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
        A, B = list(xs[2 : 2 + N]), list(xs[2 + N : 2 + 2 * N])
        return A, B, xs[2 + 2 * N], xs[-1] if bias else None

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        A, B, scale, bias_o = split(xs)
        kept.clear()
        given = arguments.BatchedLora(*xs[:2], A, B, scale, index, bias_o)
        return [cpu.batched_lora_forward(given, kept)]

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        A, B, scale, bias_o = split(xs)
        return [reference.batched_lora(xs[0], xs[1], A, B, scale, index, bias_o)]

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        A, B, scale, _ = split(xs)
        needs = (True, True, True, True, True, bias)
        projection = kept[0] if kept else None
        saved = arguments.BatchedLoraSaved(*xs[:2], A, B, scale, index, projection)
        d_x, d_weight, d_A, d_B, d_scale, d_bias = cpu.batched_lora_backward(d_out[0], saved, needs)
        singles = [d_x, d_weight, *d_A, *d_B, d_scale, *([d_bias] if bias else [])]
        return [x for x in singles if x is not None]

    inputs = [x, weight, *A, *B, scale, *biases]
    return Case(inputs, run, through_reference, backward, b * t * max(d, o))


def merge_lora(o: int, d: int, ranks: Sequence[int], dtype: torch.dtype) -> Case:
    """One weight and adapters of these ranks."""
    N = len(ranks)
    weight = torch.randn(o, d).to(dtype)
    A = [torch.randn(r, d).to(dtype) for r in ranks]
    B = [torch.randn(o, r).to(dtype) for r in ranks]
    vectors = [torch.rand(N, dtype=vector_dtype(dtype)) for _ in range(2)]

    def split(xs: Sequence[Tensor]) -> arguments.MergeLora:
        A, B = list(xs[1 : 1 + N]), list(xs[1 + N : 1 + 2 * N])
        return arguments.MergeLora(xs[0], A, B, xs[-2], xs[-1])

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        return [cpu.merge_lora_forward(split(xs))]

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        return [reference.merge_lora(*split(xs))]

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        needs = (True, True, True, True, True)
        d_weight, d_A, d_B, d_scale, d_weights = cpu.merge_lora_backward(d_out[0], split(xs), needs)
        assert d_weight is not None
        assert d_scale is not None
        assert d_weights is not None
        return [d_weight, *d_A, *d_B, d_scale, d_weights]

    inputs = [weight, *A, *B, *vectors]
    return Case(inputs, run, through_reference, backward, o * d * (sum(ranks) + 1))


def adam_step(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, native: ModuleType | None = None
) -> Case:
    """Tensors of these shapes; of each, the first tenth has never seen a gradient."""
    P = len(shapes)
    lists = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(4)]
    lists[3] = [x.square() + 0.1 for x in lists[3]]
    for x in (x for values in lists[1:] for x in values if x.ndim):
        x[: len(x) // 10] = 0
    rule = {"lr": 0.5, "betas": (0.75, 0.9), "eps": 0.1, "weight_decay": 0.25, "step": 2}
    numbers = 0.5, 0.75, 0.9, 0.1, 0.25, 2

    def split(xs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return [xs[i * P : i * P + P] for i in range(4)]

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        return [x for values in reference.adam_step(*split(xs), **rule) for x in values]

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        saved = arguments.AdamStepSaved(*split(xs)[1:], *numbers)
        grads = _half(xs, native).adam_step_backward(d_out, saved, [True] * 4)
        return [x for values in grads for x in values]

    return Case(
        [x for values in lists for x in values],
        lambda xs: _half(xs, native).adam_step_forward(arguments.AdamStep(*split(xs), *numbers)),
        through_reference,
        backward,
        4,
    )


def combine(
    shapes: Sequence[tuple[int, ...]],
    factors: Sequence[Sequence[float]],
    dtype: torch.dtype,
    native: ModuleType | None = None,
) -> Case:
    """Lists of tensors of these shapes."""
    P, J = len(shapes), len(factors[0])

    def run(xs: Sequence[Tensor], rows: Sequence[Sequence[float]] = factors) -> list[Tensor]:
        like = [x for _ in rows for x in xs[:P]]
        out = [torch.empty_like(x) for x in like]
        _half(xs, native).combine_into(out, xs, rows)
        return out

    def through_reference(xs: Sequence[Tensor]) -> list[Tensor]:
        lists = [xs[j * P : (j + 1) * P] for j in range(J)]
        return [x for values in reference.combine(lists, factors) for x in values]

    def backward(d_out: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        return run(d_out, [list(column) for column in zip(*factors, strict=True)])

    inputs = [torch.randn(shape).to(dtype) for _ in range(J) for shape in shapes]
    return Case(inputs, run, through_reference, backward, J)


def layer(
    name: str,
    tuple_of: Callable[..., Any],
    inputs: list[Tensor],
    numbers: tuple[float, ...],
    through_reference: Callable[[Sequence[Tensor]], Tensor],
    length: int,
    *,
    second: bool = False,
) -> Case:
    """A layer and its backward; or, `second`, its backward and the backward of this."""
    forward, backward, double_backward = (
        getattr(cpu, f"{name}_{which}") for which in ("forward", "backward", "double_backward")
    )
    needs = [True] * len(inputs)

    def given(xs: Sequence[Tensor]) -> tuple[Any, ...]:
        return tuple_of(*xs, *numbers)

    if not second:
        return Case(
            inputs,
            lambda xs: [forward(given(xs))],
            lambda xs: [through_reference(xs)],
            lambda d_out, xs: list(backward(*d_out, given(xs), needs)),
            length,
        )

    def gradients(xs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x if x.requires_grad else x.clone().requires_grad_() for x in xs]
        d_out, *tensors = leaves
        out = through_reference(tensors)
        return list(torch.autograd.grad(out, tensors, d_out, create_graph=True))

    return Case(
        [torch.randn(through_reference(inputs).shape).to(inputs[0].dtype), *inputs],
        lambda xs: list(backward(xs[0], given(xs[1:]), needs)),
        gradients,
        lambda u, xs: list(double_backward(xs[0], u, given(xs[1:]), [True, *needs])),
        length,
    )


def group_norm(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool = True, second: bool = False
) -> Case:
    """A normalisation with weights."""
    inputs = [torch.randn(s).to(dtype) for s in (shape, shape[1:2], shape[1:2])]
    numbers = groups, 0.1, silu
    length = 8 * inputs[0].numel()
    return layer(
        "group_norm",
        arguments.GroupNorm,
        inputs,
        numbers,
        lambda xs: reference.group_norm(*xs, *numbers),
        length,
        second=second,
    )


def geglu(shape: tuple[int, ...], dtype: torch.dtype, second: bool = False) -> Case:
    """A gated activation, of values in both tails, too."""
    x = (3 * torch.randn(shape)).to(dtype)
    return layer(
        "geglu", arguments.Geglu, [x], (), lambda xs: reference.geglu(xs[0]), 16, second=second
    )


def attention(
    n: int, T: int, S: int, d: int, e: int, dtype: torch.dtype, second: bool = False
) -> Case:
    """Heads whose scores are of order one."""
    inputs = [torch.randn(s).to(dtype) for s in ((n, T, d), (n, S, d), (n, S, e))]
    scale = d**-0.5
    return layer(
        "attention",
        arguments.Attention,
        inputs,
        (scale,),
        lambda xs: reference.attention(*xs, scale),
        T * S,
        second=second,
    )


LAYERS: dict[str, Callable[..., Case]] = {
    "group_norm-runs": functools.partial(group_norm, (3, 12, 5, 7), 4),
    "group_norm-long-runs": functools.partial(group_norm, (1, 6, 300), 2, silu=False),
    "group_norm-one-channel": functools.partial(group_norm, (2, 5, 33), 5),
    "group_norm-pairs": functools.partial(group_norm, (3, 8, 2), 2),
    "group_norm-rows": functools.partial(group_norm, (70, 1023), 1, silu=False),
    "group_norm-short-rows": functools.partial(group_norm, (9, 20), 4),
    "group_norm-none": functools.partial(group_norm, (0, 4, 3), 2),
    "geglu-63": functools.partial(geglu, (5, 126)),
    "geglu-whole-vectors": functools.partial(geglu, (3, 7, 256)),
    "geglu-none": functools.partial(geglu, (0, 6)),
    "attention-cross": functools.partial(attention, 3, 65, 77, 40, 40),
    "attention-strips": functools.partial(attention, 1, 203, 301, 33, 17),
    "attention-one": functools.partial(attention, 2, 1, 1, 1, 1),
    "attention-one-query": functools.partial(attention, 2, 1, 63, 5, 160),
    "attention-one-key": functools.partial(attention, 2, 9, 1, 8, 8),
    "attention-none": functools.partial(attention, 0, 3, 4, 2, 2),
}
"""Channels of one element and of many, whole vectors and not, one strip and several."""

# Sizes around every vector width and unrolling; zero rows, tokens, elements and concepts.
CASES = {
    "weighted_merge-awkward": lambda dtype: weighted_merge(
        [(0,), (), (1,), (63,), (1023,), (17, 33), (3, 0), (257, 300)], 3, dtype
    ),
    "weighted_merge-one": lambda dtype: weighted_merge([(1023,)], 1, dtype),
    "weighted_merge-none": lambda dtype: weighted_merge([(63,), (5, 7)], 0, dtype),
    "combine-awkward": lambda dtype: combine(
        [(0,), (), (1,), (63,), (1023,), (17, 33), (3, 0), (257, 300)],
        [[1.0, -0.5, -0.25], [0.0, 1.0, 0.5]],
        dtype,
    ),
    "combine-one": lambda dtype: combine([(1023,), (5,)], [[-0.5], [2.0], [0.25]], dtype),
    "combine-add": lambda dtype: combine([(1025,), (5,)], [[1.0, 0.3]], dtype),
    "projected_merge-768": lambda dtype: projected_merge([320, 0, 63], [9, 1, 4], 768, dtype),
    "projected_merge-1023": lambda dtype: projected_merge([1, 17], [3, 0], 1023, dtype),
    "projected_merge-63": lambda dtype: projected_merge([63, 5], [7], 63, dtype),
    "projected_merge-1": lambda dtype: projected_merge([2, 1], [1, 2], 1, dtype),
    "projected_merge-none": lambda dtype: projected_merge([63, 1], [], 64, dtype),
    "projected_merge-no-rows": lambda dtype: projected_merge([0, 0], [3], 64, dtype),
    "projected_merge-wide": lambda dtype: projected_merge([9], [5], 5000, dtype),
    "batched_lora-whole-vectors": lambda dtype: batched_lora(5, 33, 64, 48, [4, 16, 64], dtype),
    "batched_lora-63-1023": lambda dtype: batched_lora(3, 17, 63, 1023, [1, 5], dtype),
    "batched_lora-1023-63": lambda dtype: batched_lora(3, 18, 1023, 63, [2], dtype, bias=False),
    # tokens enough for the adapters to be merged into the weight
    "batched_lora-merged": lambda dtype: batched_lora(9, 110, 64, 48, [4, 16, 64, 70], dtype),
    "batched_lora-merged-63-33": lambda dtype: batched_lora(4, 90, 63, 33, [3, 130], dtype),
    "batched_lora-ones": lambda dtype: batched_lora(2, 1, 1, 1, [1], dtype),
    "batched_lora-one-token": lambda dtype: batched_lora(5, 1, 24, 40, [2, 7], dtype),
    "batched_lora-none": lambda dtype: batched_lora(2, 3, 5, 7, [], dtype),
    "batched_lora-empty-batch": lambda dtype: batched_lora(0, 3, 5, 7, [2], dtype),
    "batched_lora-no-tokens": lambda dtype: batched_lora(2, 0, 5, 7, [2], dtype),
    "merge_lora-mixed": lambda dtype: merge_lora(63, 1023, [1, 4, 64], dtype),
    "merge_lora-square": lambda dtype: merge_lora(64, 64, [16], dtype),
    "merge_lora-none": lambda dtype: merge_lora(5, 7, [], dtype),
    "merge_lora-empty": lambda dtype: merge_lora(0, 7, [2], dtype),
    "adam_step-awkward": lambda dtype: adam_step(
        [(0,), (), (1,), (63,), (1023,), (17, 33), (3, 0), (257, 300)], dtype
    ),
    "merge_lora-narrow": lambda dtype: merge_lora(7, 1, [3], dtype),
    **{name: lambda dtype, case=case: case(dtype=dtype) for name, case in LAYERS.items()},
    **{
        f"{name}-second": lambda dtype, case=case: case(dtype=dtype, second=True)
        for name, case in LAYERS.items()
    },
}
