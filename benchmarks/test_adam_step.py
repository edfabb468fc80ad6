"""adam_step: one step of Adam for all tensors of a lower level, and its pullback.

The lower levels are those of the embedded model's whole denoiser, of Stable Diffusion 1.x's
cross-attention (a quarter of it on a CPU) and of LoRA on all of its attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Machine, compiled, replay, rotating, serves
from mima import ops

OP = "adam_step"
RULE = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 2}
BACKENDS = ("reference", "native", "triton")
LEVELS = {
    "denoiser of 7 M": [(512, 512)] * 20 + [(128, 128, 3, 3)] * 12 + [(256,)] * 120,
    "cross-attention": [(320, 320), (320, 768)] * 20 + [(640, 640), (640, 768)] * 4,
    "LoRA r=16": [(16, 320), (320, 16)] * 128,
}


def eager(
    z: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, step=2
) -> tuple[Tensor, ...]:
    """One tensor's step, in operations that autograd differentiates."""
    beta1, beta2 = betas
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    v_hat = v / (1 - beta2 ** (step + 1))
    seen = v_hat > 0
    root = torch.where(seen, torch.where(seen, v_hat, 1.0).sqrt(), 0.0)
    update = m / (1 - beta1 ** (step + 1)) / (root + eps)
    return z - lr * update, m, v


def inputs(level: str, device: torch.device) -> list[list[Tensor]]:
    """z, g, m, v, and gradients at the first and the last two after the step."""
    torch.manual_seed(0)
    shapes = LEVELS[level]
    lists = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(7)]
    lists[3] = [x.square() + 1e-3 for x in lists[3]]
    return lists


def by_tensor(step, lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Results of a step for each tensor, in the order of the operator's."""
    columns = zip(*(step(*one) for one in zip(*lists, strict=True)), strict=True)
    return [x for column in columns for x in column]


def forward(level: str, device: torch.device) -> Comparison:
    z, g, m, v = inputs(level, device)[:4]
    variants = {"eager": lambda: by_tensor(eager, (z, g, m, v))}
    if (one := compiled(eager, dynamic=True)) is not None:
        variants["compile"] = lambda: by_tensor(one, (z, g, m, v))
    fused = [x.clone() for x in z], [x.clone() for x in m], [x.clone() for x in v]
    count = [torch.tensor(float(RULE["step"] + 1), device=device) for _ in z]
    lr, (beta1, beta2), eps = RULE["lr"], RULE["betas"], RULE["eps"]

    def torch_fused() -> list[Tensor]:
        # PyTorch's optimizer, in place and without a derivative
        torch._fused_adamw_(
            fused[0], g, fused[1], fused[2], [], count,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        return fused[0]

    variants["torch fused, in place"] = torch_fused
    for backend in BACKENDS:
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: [
                x for xs in ops.adam_step(z, g, m, v, **RULE, backend=b) for x in xs
            ]
    elements = sum(x.numel() for x in z)
    return Comparison(
        group=f"adam_step forward {level}",
        variants=variants,
        baseline="eager",
        # z, g, m, v read; z, m, v written
        num_bytes=4 * elements * 7,
        flops=15 * elements,
        unchecked=("torch fused, in place",),
        rounds=5,
    )


def pullback(level: str, device: torch.device) -> Comparison:
    z, g, m, v, *bars = inputs(level, device)

    def by_autograd(step) -> list[Tensor]:
        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in tensors[:4]]
            return torch.autograd.grad(step(*leaves), leaves, tensors[4:])

        return by_tensor(one, (z, g, m, v, *bars))

    variants = {"autograd": lambda: by_autograd(eager)}
    if (one := compiled(eager, dynamic=True)) is not None:
        variants["compile"] = lambda: by_autograd(one)
    for backend in BACKENDS:
        if serves(backend, OP, device, torch.float32):
            variants[backend] = lambda b=backend: [
                x for xs in ops.adam_step_pullback(*bars, g, m, v, **RULE, backend=b) for x in xs
            ]
    elements = sum(x.numel() for x in z)
    return Comparison(
        group=f"adam_step pullback {level}",
        variants=variants,
        baseline="autograd",
        # three gradients, g, m, v read, three gradients written; that at z is there already
        num_bytes=4 * elements * 9,
        flops=30 * elements,
        rounds=5,
        # through 1 / v̂, which is large where v is small
        tolerance=1e-3,
    )


CASES = {"forward": forward, "pullback": pullback}


@functools.lru_cache(maxsize=1)
def comparison(case: str, level: str, device: torch.device) -> Comparison:
    return rotating(functools.partial(CASES[case], level, device), device)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("case", "variant"),
    [("forward", v) for v in ("eager", "compile", "torch fused, in place", *BACKENDS)]
    + [("pullback", v) for v in ("autograd", "compile", *BACKENDS)],
)
def test_adam_step(benchmark, level: str, case: str, variant: str, machine: Machine):
    replay(benchmark, comparison(case, level, machine.device), variant, machine)
