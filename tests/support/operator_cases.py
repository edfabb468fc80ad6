"""Small inputs for every operator, in one form: a list of floating-point tensors and a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mima import ops, reference
from mima.ops.backends import choice

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}

Call = Callable[[Sequence[Tensor], "str | None"], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operator on tensors of some shapes."""

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Call
    """(tensors, backend) -> outputs; backend "definition" is mima.reference itself."""
    vectors: tuple[int, ...] = ()
    """Which tensors are weights or scales: float32, whatever the dtype of the others."""
    small: bool = False
    """Small enough for finite differences and Triton's interpreter."""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes]
        # Of a size that keeps products of order one, whatever the reduction.
        scaled = [x / max(x.shape[-1], 1) ** 0.5 if x.ndim > 1 else x for x in values]
        out = []
        for i, x in enumerate(scaled):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            out.append(x.to(device, wide if i in self.vectors else dtype))
        return out


def _function(op: str, backend: str | None) -> Callable[..., Any]:
    if backend == "definition":
        return getattr(reference, op)
    return lambda *args, **kwargs: getattr(ops, op)(*args, backend=backend, **kwargs)


def weighted(name: str, N: int, shapes: Sequence[tuple[int, ...]], *, small: bool = False) -> Case:
    P = len(shapes)

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        weights, base, flat = tensors[0], tensors[1 : 1 + P], tensors[1 + P :]
        rows = [flat[n * P : (n + 1) * P] for n in range(N)]
        return _function("weighted_merge", backend)(base, rows, weights)

    every = ((N,), *shapes, *(list(shapes) * N))
    return Case("weighted_merge", name, every, call, vectors=(0,), small=small)


def projected(
    name: str, rows: Sequence[int], d: int, lengths: Sequence[int], *, small: bool = False
) -> Case:
    L, N = len(rows), len(lengths)

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        W0, flat = tensors[:L], tensors[L : L + N * L]
        W = [flat[n * L : (n + 1) * L] for n in range(N)]
        C, M = tensors[L + N * L : L + N * L + N], tensors[L + N * L + N :]
        return _function("projected_merge", backend)(W0, W, C, M)

    weights = [(o, d) for o in rows]
    text = [(s, d) for s in lengths]
    every = (*weights, *(weights * N), *text, *text)
    return Case("projected_merge", name, every, call, small=small)


def lora(
    name: str,
    btdo: tuple[int, int, int, int],
    ranks: Sequence[int],
    index: Sequence[int],
    *,
    bias: bool = True,
    small: bool = False,
) -> Case:
    b, t, d, o = btdo
    N = len(ranks)

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        x, weight, scale, *rest = tensors
        chosen = torch.tensor(index, dtype=torch.int64, device=x.device)
        added, factors = (rest[0], rest[1:]) if bias else (None, rest)
        A, B = factors[:N], factors[N:]
        f = _function("batched_lora", backend)
        return [f(x, weight, A, B, scale, chosen, bias=added)]

    factors = (*((r, d) for r in ranks), *((o, r) for r in ranks))
    every = ((b, t, d), (o, d), (N,), *([(o,)] if bias else []), *factors)
    return Case("batched_lora", name, every, call, vectors=(2,), small=small)


def merged_lora(name: str, o: int, d: int, ranks: Sequence[int], *, small: bool = False) -> Case:
    N = len(ranks)

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        weight, scale, weights, *rest = tensors
        return [_function("merge_lora", backend)(weight, rest[:N], rest[N:], scale, weights)]

    every = ((o, d), (N,), (N,), *((r, d) for r in ranks), *((o, r) for r in ranks))
    return Case("merge_lora", name, every, call, vectors=(1, 2), small=small)


def adam(name: str, shapes: Sequence[tuple[int, ...]], *, small: bool = False) -> Case:
    P = len(shapes)
    rule = {"lr": 0.5, "betas": (0.75, 0.9), "eps": 0.1, "weight_decay": 0.25, "step": 2}

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        z, g, m, roots = (tensors[i * P : (i + 1) * P] for i in range(4))
        # second moments are positive; away from zero, where the root is steep
        v = [x * x + 0.1 for x in roots]
        stepped = _function("adam_step", backend)(z, g, m, v, **rule)
        return [x for values in stepped for x in values]

    return Case("adam_step", name, (*shapes,) * 4, call, small=small)


def combined(
    name: str,
    factors: Sequence[Sequence[float]],
    shapes: Sequence[tuple[int, ...]],
    *,
    small: bool = False,
) -> Case:
    P, J = len(shapes), len(factors[0])

    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        lists = [tensors[j * P : (j + 1) * P] for j in range(J)]
        return [x for values in _function("combine", backend)(lists, factors) for x in values]

    return Case("combine", name, (*shapes,) * J, call, small=small)


def norm(
    name: str, shape: tuple[int, ...], groups: int, *, affine: bool = True, silu: bool = False,
    small: bool = False,
) -> Case:  # fmt: skip
    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        x, *rest = tensors
        weight, bias = rest or (None, None)
        return [_function("group_norm", backend)(x, weight, bias, groups, 1e-3, silu=silu)]

    every = (shape, *([shape[1:2]] * 2 if affine else []))
    return Case("group_norm", name, every, call, small=small)


def rows_norm(name: str, shape: tuple[int, ...], *, small: bool = False) -> Case:
    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        return [_function("layer_norm", backend)(*tensors, 1e-3)]

    return Case("group_norm", f"layer-{name}", (shape, shape[-1:], shape[-1:]), call, small=small)


def gated(name: str, shape: tuple[int, ...], *, small: bool = False) -> Case:
    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        return [_function("geglu", backend)(tensors[0])]

    return Case("geglu", name, (shape,), call, small=small)


def attend(
    name: str, heads: tuple[int, ...], T: int, S: int, d: int, e: int, *, small: bool = False
) -> Case:
    def call(tensors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
        # scores of order one, whatever the width
        return [_function("attention", backend)(*tensors, 2.0 * d**0.5)]

    every = (*heads, T, d), (*heads, S, d), (*heads, S, e)
    return Case("attention", name, every, call, small=small)


# Sizes 0, 1, 63 and 1023 appear as elements, rows, columns, tokens, ranks and samples; the full
# product of them would test no more paths.
CASES = (
    weighted("small", 2, [(3, 2), (4,)], small=True),
    weighted("sizes", 3, [(0,), (), (1,), (63,), (1023,), (3, 1023)]),
    weighted("one-concept", 1, [(63, 5)], small=True),
    weighted("no-concept", 0, [(3, 5), (2,)], small=True),
    weighted("nine-concepts", 9, [(1023,), (2, 2)]),
    weighted("only-empty", 2, [(0, 3)], small=True),
    weighted("long", 3, [(5000,), (2048,), (2049,)]),
    projected("small", [3, 2], 4, [2, 1], small=True),
    projected("sizes", [63, 1, 0, 40], 63, [1, 9, 0]),
    projected("aligned", [64, 33], 128, [9, 9]),
    projected("many-tokens", [5], 63, [77, 3]),
    projected("one-column", [5], 1, [1]),
    projected("no-concept", [3, 2], 4, [], small=True),
    projected("no-tokens", [3], 4, [0, 0], small=True),
    projected("no-columns", [3], 0, [2]),
    lora("small", (3, 2, 4, 3), [1, 2], [1, -1, 0], small=True),
    lora("sizes", (4, 63, 63, 33), [1, 4, 16, 0], [2, 0, 3, 1]),
    lora("aligned", (3, 77, 64, 128), [16, 4], [0, 1, 0], bias=False),
    lora("high-rank", (2, 5, 63, 40), [70, 129], [1, 0]),
    lora("odd-ranks", (3, 300, 16, 24), [24, 12], [1, 0, 1]),
    lora("shared", (5, 3, 8, 8), [4], [0, 0, 0, -1, 0]),
    lora("no-adapter", (2, 3, 4, 5), [], [-1, -1], small=True),
    lora("unused", (2, 3, 4, 5), [2, 3], [-1, -1], small=True),
    lora("no-samples", (0, 3, 4, 5), [2], []),
    lora("no-tokens", (2, 0, 4, 5), [2], [0, 0]),
    lora("no-outputs", (2, 3, 4, 0), [2], [0, -1]),
    lora("no-inputs", (2, 3, 0, 4), [2], [0, -1]),
    merged_lora("small", 3, 4, [1, 2], small=True),
    merged_lora("sizes", 63, 70, [1, 16, 0]),
    merged_lora("aligned", 128, 64, [4, 4, 4]),
    merged_lora("high-rank", 33, 63, [63, 129]),
    merged_lora("no-adapter", 3, 4, [], small=True),
    merged_lora("rank-zero", 3, 4, [0], small=True),
    merged_lora("no-rows", 0, 4, [2]),
    merged_lora("no-columns", 3, 0, [2]),
    adam("small", [(3, 2), (4,)], small=True),
    adam("sizes", [(0,), (), (1,), (63,), (1023,), (3, 1023)]),
    adam("only-empty", [(0, 3)], small=True),
    adam("long", [(5000,), (2048,), (2049,)]),
    combined("small", [[1, -0.5, -0.25], [0, 1, 0.5]], [(3, 2), (4,)], small=True),
    combined("sizes", [[1, 0.75]], [(0,), (), (1,), (63,), (1023,), (3, 1023)]),
    combined("one", [[-0.5]], [(63, 5)], small=True),
    combined("all", [[1, 0, 2], [-0.3, 1, 0.1], [0, 0, 0.7]], [(1023,), (2, 2)]),
    combined("only-empty", [[1, 1], [2, 3]], [(0, 3)], small=True),
    combined("long", [[0.5, 0.25], [0, -1], [3, 0]], [(5000,), (2048,), (2049,)]),
    norm("small", (2, 4, 3), 2, silu=True, small=True),
    norm("plain", (2, 6, 2, 2), 2, small=True),
    norm("no-affine", (2, 4, 3), 2, affine=False, small=True),
    norm("sizes", (3, 63, 7, 5), 9, silu=True),
    norm("one-channel-groups", (2, 5, 33), 5, silu=True),
    norm("one-element", (2, 3), 3),
    norm("aligned", (1, 64, 16, 16), 8, silu=True),
    norm("long", (2, 4, 63, 65), 2),
    # a step of Triton's kernels is half a channel, or a whole one
    norm("channels-of-whole-steps", (1, 2, 64, 64), 1, silu=True),
    norm("no-samples", (0, 4, 3), 2),
    rows_norm("small", (3, 5), small=True),
    rows_norm("sizes", (7, 1, 1023)),
    rows_norm("aligned", (3, 20, 128)),
    rows_norm("one-column", (3, 1)),
    gated("small", (3, 4), small=True),
    gated("sizes", (5, 2, 126)),
    gated("aligned", (9, 1024)),
    gated("empty", (0, 4)),
    gated("no-columns", (3, 0)),
    attend("small", (2,), 3, 4, 2, 3, small=True),
    attend("sizes", (1, 2), 63, 77, 40, 33),
    attend("one", (2,), 1, 1, 1, 1),
    attend("one-query", (3,), 1, 63, 5, 7),
    attend("aligned", (2,), 64, 128, 64, 64),
    attend("long", (1,), 70, 90, 80, 80),
    attend("wide", (1,), 33, 65, 160, 160),
    attend("no-heads", (0,), 3, 4, 2, 3),
)
BY_ID = {case.id: case for case in CASES}
SMALL = tuple(case for case in CASES if case.small)


def skip_unless_available(
    backend: str, op: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Skip a test, with the reasons, where a backend cannot serve."""
    for row in choice.report(device, dtype):
        if row.operator == op and row.backend == backend and not row.available:
            pytest.skip(f"{backend}: {'; '.join(row.reasons)}")


def chosen_backend(op: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> str:
    """Return what serves an operator; plain PyTorch where no kernel does, also under MIMA_STRICT.

    No kernel of `group_norm`, say, serves float64 on a GPU.
    """
    rows = (row for row in choice.report(device, dtype) if row.operator == op and row.chosen)
    return next((row.backend for row in rows), "reference")


def values_and_gradients(
    case: Case, tensors: Sequence[Tensor], backend: str | None, *, seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradient of ⟨outputs, random⟩ in every tensor."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = case.call(leaves, backend)
    cotangents = _randn_like(outputs, seed)
    grads = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    return [y.detach() for y in outputs], list(grads)


def second_gradients(
    case: Case, tensors: Sequence[Tensor], backend: str | None, *, seed: int = 1
) -> list[Tensor]:
    """Gradient, in tensors and cotangents, of ⟨gradients, random⟩."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = case.call(leaves, backend)
    cotangents = [x.requires_grad_() for x in _randn_like(outputs, seed)]
    grads = torch.autograd.grad(
        outputs, leaves, cotangents, create_graph=True, materialize_grads=True
    )
    directions = _randn_like(grads, seed + 1)
    differentiable = [(g, u) for g, u in zip(grads, directions, strict=True) if g.requires_grad]
    if not differentiable:
        return []
    first, second = zip(*differentiable, strict=True)
    return list(torch.autograd.grad(first, [*leaves, *cotangents], second, materialize_grads=True))


def _randn_like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        for x in tensors
    ]


def assert_no_worse(
    actual: Sequence[Tensor], same_dtype: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """Hold each tensor to twice the error that the definition makes in the same dtype.

    The floor is a few roundings of terms of order one, as all inputs are: a sum in another order
    may be off by that where the definition happens to be exact. In float64 the definition is the
    truth, and the floor the roundings of sums of a thousand terms.
    """
    assert len(actual) == len(same_dtype) == len(truth)
    for i, (x, plain, exact) in enumerate(zip(actual, same_dtype, truth, strict=True)):
        assert x.shape == exact.shape
        assert x.dtype == plain.dtype
        assert torch.isfinite(x).all(), f"tensor {i}"
        if x.numel() == 0:
            continue
        err, base = ((y.double() - exact).abs().max().item() for y in (x, plain))
        roundings = 64 if x.dtype == torch.float64 else 4
        floor = roundings * torch.finfo(x.dtype).eps * max(1.0, exact.abs().max().item())
        assert err <= 2 * base + floor, f"tensor {i}: {err:.2e} > 2 * {base:.2e} + {floor:.0e}"
