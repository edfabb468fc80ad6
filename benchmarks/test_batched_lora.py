"""batched_lora: one linear layer, a batch of 8 samples, each with its own adapter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Comparison, Machine, compiled, replay, rotating, serves
from mima import ops, reference

OP = "batched_lora"
N = 8
SHAPES = [(128, 160, 64), (768, 320, 77), (320, 320, 1024), (1280, 1280, 256)]
"""d, o, t."""
RANKS = [4, 16, 64]


@functools.lru_cache(maxsize=1)
def peft_layer(
    shape: tuple[int, int], r: int, adapters: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Let peft build an adapted layer, whose weights are of no consequence."""
    o, d = shape
    host = nn.Sequential(nn.Linear(d, o, bias=False, device=device, dtype=dtype))
    # alpha = r: scale 1
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(host, config, adapter_name="0")
    for n in range(1, adapters):
        model.add_adapter(str(n), config)
    layer: nn.Module = model.base_model.model[0].to(dtype)
    return layer


class PeftMixedBatch(nn.Module):
    """peft's way: one forward with adapter_names=, a pass per adapter over its samples."""

    def __init__(self, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        super().__init__()
        o, d = weight.shape
        built = peft_layer((o, d), A[0].shape[0], len(A), weight.device, weight.dtype)
        # a copy with its parameters, all of which are replaced: peft takes longer for its own
        self.layer = copy.deepcopy(built, {id(p): p for p in built.parameters()})
        base = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.layer.base_layer.weight = base
        for n, (A_n, B_n) in enumerate(zip(A, B, strict=True)):
            self.layer.lora_A[str(n)].weight = nn.Parameter(A_n.detach().clone())
            self.layer.lora_B[str(n)].weight = nn.Parameter(B_n.detach().clone())

    def forward(self, x: Tensor, names: list[str]) -> Tensor:
        return self.layer(x, adapter_names=names)

    def factors(self) -> list[Tensor]:
        layers = self.layer.lora_A, self.layer.lora_B
        return [m[str(n)].weight for m in layers for n in range(len(m))]


def separate(
    x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor
) -> Tensor:
    """N passes, as code without mixed batches does it."""
    passes = []
    for n, x_n in enumerate(x.split(x.shape[0] // len(A))):
        low_rank = F.linear(F.linear(x_n, A[n]), B[n])
        passes.append(F.linear(x_n, weight) + scale[n] * low_rank)
    return torch.cat(passes)


def batched_products(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
) -> Tensor:
    """The best expression with batched products: stack, gather, bmm, baddbmm into the base."""
    A_b = torch.stack(list(A))[index]
    B_b = (torch.stack(list(B)) * scale[:, None, None])[index]
    return torch.baddbmm(F.linear(x, weight), torch.bmm(x, A_b.mT), B_b.mT)


def batched_products_in_place(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Tensor,
    index: Tensor,
) -> Tensor:
    """The same, into the base product where it lies: without a gradient only."""
    A_b = torch.stack(list(A))[index]
    B_b = (torch.stack(list(B)) * scale[:, None, None])[index]
    return F.linear(x, weight).baddbmm_(torch.bmm(x, A_b.mT), B_b.mT)


@functools.cache
def compiled_products():
    return compiled(batched_products, dynamic=True)


Inputs = tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor, Tensor]


def inputs(shape: tuple[int, int, int], r: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    d, o, t = shape
    torch.manual_seed(0)

    def normal(*size: int, fan_in: int) -> Tensor:
        return (torch.randn(*size, device=device) / fan_in**0.5).to(dtype)

    x, weight = normal(N, t, d, fan_in=1), normal(o, d, fan_in=d)
    A = [normal(r, d, fan_in=d) for _ in range(N)]
    B = [normal(o, r, fan_in=r) for _ in range(N)]
    return x, weight, A, B, torch.ones(N, device=device), torch.arange(N, device=device)


def floor(shape: tuple[int, int, int], r: int, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and FLOPs of a forward."""
    d, o, t = shape
    item = torch.empty(0, dtype=dtype).element_size()
    # x, the weight and the factors read, y written
    num_bytes = item * (N * t * (d + o) + o * d + N * r * (d + o))
    # base product, and 2 r (d + o) per token
    return num_bytes, 2 * N * t * (o * d + r * (d + o))


def forward(shape: tuple[int, int, int], r: int, device: torch.device) -> Comparison:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, A, B, scale, index = inputs(shape, r, device, dtype)
    mixed = PeftMixedBatch(weight, A, B)
    names = [str(n) for n in range(N)]
    one = [A[0]], [B[0]], scale[:1], torch.zeros_like(index)
    fused = compiled_products()

    def peft_mixed() -> Tensor:
        with torch.no_grad():
            return mixed(x, names)

    variants = {
        "base layer": lambda: F.linear(x, weight),
        "peft mixed batch": peft_mixed,
        "separate passes": lambda: separate(x, weight, A, B, scale.to(dtype)),
        "bmm": lambda: batched_products(x, weight, A, B, scale.to(dtype), index),
        "bmm in place": lambda: batched_products_in_place(x, weight, A, B, scale.to(dtype), index),
        "reference": lambda: reference.batched_lora(x, weight, A, B, scale, index),
    }
    if fused is not None:
        variants["compile"] = lambda: fused(x, weight, A, B, scale.to(dtype), index)
    for backend in ("native", "triton"):
        if serves(backend, OP, device, dtype):
            variants[backend] = lambda b=backend: ops.batched_lora(
                x, weight, A, B, scale, index, backend=b
            )
            # the same batch, one adapter for all
            variants[f"{backend} N=1"] = lambda b=backend: ops.batched_lora(
                x, weight, *one, backend=b
            )
    num_bytes, flops = floor(shape, r, dtype)
    return Comparison(
        group=f"batched_lora forward d,o,t={shape} r={r}",
        variants=variants,
        baseline="reference",
        num_bytes=num_bytes,
        flops=flops,
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
        unchecked=("base layer", "native N=1", "triton N=1"),
        rounds=15,
    )


def forward_backward(shape: tuple[int, int, int], r: int, device: torch.device) -> Comparison:
    """Gradients of x and of the factors: what training an adapter under a model computes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, A, B, scale, index = inputs(shape, r, device, dtype)
    mixed = PeftMixedBatch(weight, A, B)
    names = [str(n) for n in range(N)]
    x.requires_grad_()
    factors = [p.requires_grad_() for p in (*A, *B)]
    upstream = torch.randn(N, shape[2], shape[1], device=device).to(dtype)

    def gradients(y: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *of], upstream)

    variants = {
        "base layer": lambda: torch.autograd.grad(F.linear(x, weight), x, upstream),
        "peft mixed batch": lambda: gradients(mixed(x, names), mixed.factors()),
        "separate passes": lambda: gradients(separate(x, weight, A, B, scale.to(dtype)), factors),
        "bmm": lambda: gradients(
            batched_products(x, weight, A, B, scale.to(dtype), index), factors
        ),
        "reference": lambda: gradients(
            reference.batched_lora(x, weight, A, B, scale, index), factors
        ),
    }
    for backend in ("native", "triton"):
        if serves(backend, OP, device, dtype):
            variants[backend] = lambda b=backend: gradients(
                ops.batched_lora(x, weight, A, B, scale, index, backend=b), factors
            )
    num_bytes, _flops = floor(shape, r, dtype)
    return Comparison(
        group=f"batched_lora forward+backward d,o,t={shape} r={r}",
        variants=variants,
        baseline="reference",
        num_bytes=3 * num_bytes,
        # the base product twice, the low-rank ones three times
        flops=2 * N * shape[2] * (2 * shape[0] * shape[1] + 3 * r * (shape[0] + shape[1])),
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        unchecked=("base layer",),
        rounds=7,
    )


CASES = {"forward": forward, "forward_backward": forward_backward}
VARIANTS = {
    "forward": (
        *("base layer", "peft mixed batch", "separate passes", "bmm", "bmm in place", "reference"),
        *("compile", "native", "native N=1", "triton", "triton N=1"),
    ),
    "forward_backward": (
        *("base layer", "peft mixed batch", "separate passes", "bmm", "reference"),
        *("native", "triton"),
    ),
}


@functools.lru_cache(maxsize=1)
def comparison(case: str, shape: tuple[int, int, int], r: int, device: torch.device) -> Comparison:
    return rotating(functools.partial(CASES[case], shape, r, device), device)


@pytest.mark.parametrize(
    ("case", "shape", "r", "variant"),
    [
        pytest.param(
            case, shape, r, variant, id=f"{case}-{'x'.join(map(str, shape))}-r{r}-{variant}"
        )
        for case, variants in VARIANTS.items()
        for shape in SHAPES
        for r in RANKS
        for variant in variants
    ],
)
def test_batched_lora(benchmark, case, shape, r, variant, machine: Machine):
    replay(benchmark, comparison(case, shape, r, machine.device), variant, machine)
