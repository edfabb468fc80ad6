"""projected_merge: the 32 key and value projections of Stable Diffusion 1.x, three concepts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Machine, compiled, replay, rotating, serves
from mima import ops, reference
from mima.merging import MergePlan

OP = "projected_merge"
ROWS = [320] * 10 + [640] * 10 + [1280] * 12
D, N, TOKENS = 768, 3, 9
CAPTIONS = 2000
"""Tokens of 200 ordinary captions, ten each."""

Layers = Sequence[Tensor]


def published(W0: Layers, W: Sequence[Layers], C: Layers, C_reg: Tensor) -> list[Tensor]:
    """The hard-constrained merge as it was published, from its formula, layer by layer.

    With G = C_regᵀ C_reg: phi = W0 + (V - W0 Cᵀ) (C G⁻¹ Cᵀ)⁻¹ (G⁻¹ Cᵀ)ᵀ, where V = W_n C_nᵀ stands
    beside each other. G is built and factored for every layer, G⁻¹ Cᵀ solved for one token at a
    time, C G⁻¹ Cᵀ inverted.
    """
    C_all = torch.cat(list(C))
    merged = []
    for layer, W0_l in enumerate(W0):
        factors, pivots = torch.linalg.lu_factor(C_reg.T @ C_reg)
        columns = [torch.linalg.lu_solve(factors, pivots, c[:, None])[:, 0] for c in C_all]
        D_all = torch.stack(columns, dim=1)
        targets = torch.cat([W_n[layer] @ C_n.T for W_n, C_n in zip(W, C, strict=True)], dim=1)
        inverse = torch.linalg.inv(C_all @ D_all)
        merged.append(W0_l + (targets - W0_l @ C_all.T) @ inverse @ D_all.T)
    return merged


def plain(W0: Layers, W: Sequence[Layers], C_all: Tensor, M_all: Tensor) -> list[Tensor]:
    """The best expression of a ready plan in plain PyTorch.

    Two products a concept and layer would read every weight several times: here each is read once
    for its coefficients, those of W0 are shared, and the result is one addmm.
    """
    merged = []
    for layer, W0_l in enumerate(W0):
        parts = [W_n[layer] @ C_n.T for W_n, C_n in zip(W, C_all.split(TOKENS), strict=True)]
        coefficients = torch.cat(parts, dim=1).sub_(W0_l @ C_all.T)
        merged.append(torch.addmm(W0_l, coefficients, M_all))
    return merged


def plain_differences(
    W0: Layers, W: Sequence[Layers], C_all: Tensor, M_all: Tensor
) -> list[Tensor]:
    """The same without the cancellation: differences first."""
    merged = []
    for layer, W0_l in enumerate(W0):
        parts = [
            (W_n[layer] - W0_l) @ C_n.T for W_n, C_n in zip(W, C_all.split(TOKENS), strict=True)
        ]
        merged.append(torch.addmm(W0_l, torch.cat(parts, dim=1), M_all))
    return merged


def inputs(device: torch.device) -> tuple[list[Tensor], list[list[Tensor]], MergePlan, Tensor]:
    """Weights, and a plan from embeddings with decaying singular values, like a text encoder's."""
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -2, D, device=device)
    C_reg = torch.randn(CAPTIONS, D, device=device) * spectrum
    C = [torch.randn(TOKENS, D, device=device) * spectrum for _ in range(N)]
    W0 = [torch.randn(o, D, device=device) / D**0.5 for o in ROWS]
    W = [[x + 0.01 * torch.randn_like(x) for x in W0] for _ in range(N)]
    # the hard constraint, so that the published routine computes the same
    return W0, W, MergePlan.from_embeddings(C, C_reg, lam=0.0), C_reg


# per row, concept and token: a product with C and one with M; a subtraction per weight
FLOPS = sum(ROWS) * D * (4 * N * TOKENS + N)


def forward(device: torch.device) -> Comparison:
    W0, W, plan, C_reg = inputs(device)
    C_all, M_all = torch.cat(plan.C), torch.cat(plan.M)
    variants = {
        "published": lambda: published(W0, W, plan.C, C_reg),
        "reference": lambda: reference.projected_merge(W0, W, plan.C, plan.M),
        "plain": lambda: plain(W0, W, C_all, M_all),
        "plain differences": lambda: plain_differences(W0, W, C_all, M_all),
        "plan": lambda: MergePlan.from_embeddings(plan.C, C_reg, lam=1e-4).M,
    }
    if (fused := compiled(plain_differences)) is not None:
        variants["compile"] = lambda: fused(W0, W, C_all, M_all)
    for backend in ("native", "triton"):
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: ops.projected_merge(
                W0, W, plan.C, plan.M, backend=b
            )
    return Comparison(
        group=f"projected_merge forward N={N}",
        variants=variants,
        baseline="reference",
        # W0 and N weights read, the result written; C and M stay in the caches
        num_bytes=4 * sum(ROWS) * D * (N + 2),
        flops=FLOPS,
        # the published routine's solves in float32 lose digits
        tolerance=1e-3,
        unchecked=("plan",),
        slow=("published",),
    )


def forward_backward(device: torch.device) -> Comparison:
    W0, W, plan, _ = inputs(device)
    W0 = [x.detach().clone().requires_grad_() for x in W0]
    W = [[x.detach().clone().requires_grad_() for x in row] for row in W]
    leaves = [*W0, *(x for row in W for x in row)]
    upstream = [torch.randn_like(x) for x in W0]
    C_all, M_all = torch.cat(plan.C), torch.cat(plan.M)

    def gradients(out: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, upstream)

    variants = {
        "reference": lambda: gradients(reference.projected_merge(W0, W, plan.C, plan.M)),
        "plain differences": lambda: gradients(plain_differences(W0, W, C_all, M_all)),
    }
    for backend in ("native", "triton"):
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: gradients(
                ops.projected_merge(W0, W, plan.C, plan.M, backend=b)
            )
    return Comparison(
        group=f"projected_merge forward+backward N={N}",
        variants=variants,
        baseline="reference",
        # forward as above; backward reads d_out, writes N + 1 gradients
        num_bytes=4 * sum(ROWS) * D * ((N + 2) + (N + 2)),
        flops=2 * FLOPS,
        rounds=7,
    )


CASES = {"forward": forward, "forward_backward": forward_backward}


@functools.lru_cache(maxsize=1)
def comparison(case: str, device: torch.device) -> Comparison:
    return rotating(functools.partial(CASES[case], device), device)


FORWARD = ("published", "reference", "plain", "plain differences", "compile", "plan")


@pytest.mark.parametrize(
    ("case", "variant"),
    [("forward", v) for v in (*FORWARD, "native", "triton")]
    + [("forward_backward", v) for v in ("reference", "plain differences", "native", "triton")],
)
def test_projected_merge(benchmark, case: str, variant: str, machine: Machine):
    replay(benchmark, comparison(case, machine.device), variant, machine)


def test_float32_is_accurate(device):
    """Not a timing: 1e-5 relative to float64, as the target asks."""
    W0, W, plan, _ = inputs(device)
    truth = reference.projected_merge(
        [x.double() for x in W0],
        [[x.double() for x in row] for row in W],
        [x.double() for x in plan.C],
        [x.double() for x in plan.M],
    )
    for actual, expected in zip(ops.projected_merge(W0, W, plan.C, plan.M), truth, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
