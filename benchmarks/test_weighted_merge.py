"""weighted_merge: 40 M parameters in 600 tensors, three concepts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Machine, compiled, replay, rotating, serves
from mima import ops, reference

P, N, PARAMETERS = 600, 3, 40_000_000
OP = "weighted_merge"


def eager(base: Sequence[Tensor], thetas: Sequence[Sequence[Tensor]], w: Tensor) -> list[Tensor]:
    """The formula."""
    return [
        b + sum(w_n * (theta[p] - b) for w_n, theta in zip(w, thetas, strict=True))
        for p, b in enumerate(base)
    ]


def foreach(base: Sequence[Tensor], thetas: Sequence[Sequence[Tensor]], w: Tensor) -> list[Tensor]:
    """The fewest multi-tensor calls: (1 - sum w) base + sum w_n theta_n, in place."""
    out = torch._foreach_mul(base, 1 - w.sum().item())
    for w_n, theta in zip(w.tolist(), thetas, strict=True):
        torch._foreach_add_(out, theta, alpha=w_n)
    return list(out)


def one_tensor(b: Tensor, thetas: Sequence[Tensor], w: Tensor) -> Tensor:
    """The formula for one tensor."""
    return b + sum(w_n * (theta - b) for w_n, theta in zip(w, thetas, strict=True))


@functools.cache
def compiled_one() -> Callable[..., Tensor] | None:
    # one graph for all sizes: 600 tensors in one graph take minutes to compile
    return compiled(one_tensor, dynamic=True)


def inputs(device: torch.device) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Tensors of 0.2 to 1.8 times the mean size."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.2 + 1.6 * torch.rand(P, generator=generator)
    sizes = (sizes * PARAMETERS / sizes.sum()).int().tolist()
    torch.manual_seed(0)
    base = [torch.randn(size, device=device) for size in sizes]
    thetas = [[b + 0.01 * torch.randn_like(b) for b in base] for _ in range(N)]
    return base, thetas, torch.tensor([0.5, 0.3, 0.1], device=device)


def forward(device: torch.device) -> Comparison:
    base, thetas, w = inputs(device)
    rows = list(zip(*thetas, strict=True))
    variants = {
        "eager": lambda: eager(base, thetas, w),
        "foreach": lambda: foreach(base, thetas, w),
        "reference": lambda: reference.weighted_merge(base, thetas, w),
    }
    if (one := compiled_one()) is not None:
        variants["compile"] = lambda: [one(b, row, w) for b, row in zip(base, rows, strict=True)]
    for backend in ("native", "triton"):
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: ops.weighted_merge(base, thetas, w, backend=b)
    return Comparison(
        group=f"weighted_merge forward N={N}",
        variants=variants,
        baseline="eager",
        # base and N thetas read, the result written
        num_bytes=4 * PARAMETERS * (N + 2),
        # a subtraction, a multiplication and an addition per concept, and an addition
        flops=PARAMETERS * (3 * N + 1),
        # the heap takes rounds to settle: results then lie where results lay before
        rounds=21,
    )


def forward_backward(device: torch.device) -> Comparison:
    base, thetas, w = inputs(device)
    base = [b.detach().clone().requires_grad_() for b in base]
    thetas = [[t.detach().clone().requires_grad_() for t in row] for row in thetas]
    w = w.detach().clone().requires_grad_()
    leaves = [*base, *(t for row in thetas for t in row), w]
    upstream = [torch.randn_like(b) for b in base]

    def gradients(out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, upstream)

    variants = {"eager": lambda: gradients(eager(base, thetas, w))}
    if (one := compiled_one()) is not None:
        rows = list(zip(*thetas, strict=True))
        variants["compile"] = lambda: gradients(
            [one(b, row, w) for b, row in zip(base, rows, strict=True)]
        )
    for backend in ("native", "triton"):
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: gradients(
                ops.weighted_merge(base, thetas, w, backend=b)
            )
    return Comparison(
        group=f"weighted_merge forward+backward N={N}",
        variants=variants,
        baseline="eager",
        # forward as above; backward reads d_out, base and N thetas, writes N + 1 gradients
        num_bytes=4 * PARAMETERS * ((N + 2) + (N + 2) + (N + 1)),
        flops=PARAMETERS * (3 * N + 1 + 4 * N + 1),
        rounds=5,
        # each gradient of w is a sum of 4e7 products
        tolerance=1e-3,
    )


CASES = {"forward": forward, "forward_backward": forward_backward}


@functools.lru_cache(maxsize=1)
def comparison(case: str, device: torch.device) -> Comparison:
    return rotating(functools.partial(CASES[case], device), device)


@pytest.mark.parametrize(
    ("case", "variant"),
    [("forward", v) for v in ("eager", "foreach", "reference", "compile", "native", "triton")]
    + [("forward_backward", v) for v in ("eager", "compile", "native", "triton")],
)
def test_weighted_merge(benchmark, case: str, variant: str, machine: Machine):
    replay(benchmark, comparison(case, machine.device), variant, machine)
