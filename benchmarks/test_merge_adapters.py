"""Merging three LoRA into Stable Diffusion 1.x: every attention projection, rank 16.

From adapters in memory to new weights; the model stays as it is. peft's combinations and what
diffusers' ``fuse_lora`` adds up are the weighted merge. The projected merge computes something
else; its residual (how far the merged model misses what each adapter made of its prompt) stands
beside that of the weighted one in ``extra_info``. Its plan is made anew in each call, from ready
embeddings, and its residual measured.

What it is the like of is the composition of Custom Diffusion (Kumari et al., CVPR 2023, section
3.2), which concerns keys and values of cross-attention alone. The second group computes that with
the constraint hard: layer by layer, as their formula reads, and by mima.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import CLIPTextModel

from benchmarks.harness import Comparison, Machine, replay
from mima.adapters.adapter import Adapter, LowRank
from mima.adapters.merge import _Merge
from mima.families.loading import load_embedded
from mima.families.pipelines import shared_copy, with_modules
from mima.merging import MergePlan

N, RANK, ALPHA = 3, 16, 8.0
WEIGHTS = [0.5, 0.3, 0.2]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TOKENS, CAPTIONS, D = 9, 2000, 768


def stable_diffusion(device: torch.device) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.x; only what is adapted has values."""
    with torch.device("meta"):
        # eight latent channels, as the embedded autoencoder has; no adapted layer differs
        unet = UNet2DConditionModel(cross_attention_dim=D, in_channels=8, out_channels=8)
    unet = unet.to_empty(device=device).requires_grad_(False)
    for name, weight in unet.named_parameters():
        if any(f".{target}.weight" in name for target in TARGETS):
            weight.normal_(std=weight.shape[1] ** -0.5)
    return unet


def wide_text_encoder(like: CLIPTextModel) -> CLIPTextModel:
    """One that writes what the UNet reads; nothing is computed with it."""
    config = copy.deepcopy(like.config)
    config.update({"hidden_size": D, "num_attention_heads": D // 64, "num_hidden_layers": 1})
    return CLIPTextModel(config).to(like.device).requires_grad_(False)


def with_peft(unet: UNet2DConditionModel) -> tuple[Any, list[Adapter], list[LoraLayer]]:
    """Random adapters, as peft holds them and as mima does."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    model = peft.get_peft_model(unet, config, adapter_name="0")
    for n in range(1, N):
        model.add_adapter(str(n), config)
    named = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    adapters = []
    for n in range(N):
        factors = {}
        for name, layer in named.items():
            A, B = layer.lora_A[str(n)].weight, layer.lora_B[str(n)].weight
            A.data.normal_(std=A.shape[1] ** -0.5)
            B.data.normal_(std=0.1 * RANK**-0.5)
            factors[f"unet.{name}.weight"] = LowRank(A.detach(), B.detach(), ALPHA / RANK)
        adapters.append(Adapter(str(n), factors=factors))
    return model, adapters, list(named.values())


def embeddings(device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Of prompts and captions, with decaying singular values, like a text encoder's."""
    spectrum = torch.logspace(0, -2, D, device=device)
    C_reg = torch.randn(CAPTIONS, D, device=device) * spectrum
    C = [torch.randn(TOKENS, D, device=device) * spectrum for _ in range(N)]
    return C, C_reg


@functools.lru_cache(maxsize=1)
def comparison(device: torch.device) -> tuple[Comparison, dict[str, Sequence[float]]]:
    torch.manual_seed(0)
    unet = stable_diffusion(device)
    embedded = load_embedded(device=device)
    pipeline = with_modules(
        embedded, unet=shared_copy(unet), text_encoder=wide_text_encoder(embedded.text_encoder)
    )
    model, adapters, layers = with_peft(unet)
    plan = functools.partial(MergePlan.from_embeddings, *embeddings(device), weights=WEIGHTS)
    names = list(adapters[0].factors)

    @torch.no_grad()
    def combined(kind: str, **options: Any) -> list[Tensor]:
        model.add_weighted_adapter(
            [*map(str, range(N))], WEIGHTS, "all", combination_type=kind, **options
        )
        merged = [x.get_base_layer().weight + x.get_delta_weight("all") for x in layers]
        model.delete_adapter("all")
        return merged

    @torch.no_grad()
    def fused() -> list[Tensor]:
        merged = []
        for layer in layers:
            weight = layer.get_base_layer().weight.clone()
            for n, share in enumerate(WEIGHTS):
                weight += share * layer.get_delta_weight(str(n))
            merged.append(weight)
        return merged

    def ours() -> _Merge:
        return _Merge(pipeline, adapters, WEIGHTS, {})

    def weighted() -> list[Tensor]:
        values = ours().weighted(names)
        return [values[name] for name in names]

    def projected() -> list[Tensor]:
        values, _ = ours().projected(plan())
        return [values[name] for name in names]

    made = plan()
    values, report = ours().projected(made)
    here = [name for name in names if ".attn2.to_k." in name or ".attn2.to_v." in name]
    averaged = ours().weighted(here)
    missed = []
    for adapter, C_SD in zip(adapters, made.C, strict=True):
        gap = whole = 0.0
        for name in here:
            asked = adapter.factors[name].delta() @ C_SD.mT
            moved = averaged[name] - pipeline.unet.get_parameter(name.removeprefix("unet."))
            gap += float((moved @ C_SD.mT - asked).square().sum())
            whole += float(asked.square().sum())
        missed.append((gap / whole) ** 0.5)
    residual = {"mima projected": report["residual"], "mima weighted": missed}
    assert max(report["residual"]) < 0.01 < min(missed)
    del values
    weights = sum(x.get_base_layer().weight.numel() for x in layers)
    factors = sum(sum(x.lora_A["0"].weight.shape) + x.lora_B["0"].weight.shape[0] for x in layers)
    variants = {
        "peft cat": lambda: combined("cat"),
        "peft svd": lambda: combined("svd", svd_rank=N * RANK),
        "fuse_lora": fused,
        "mima weighted": weighted,
        "mima projected": projected,
    }
    return (
        Comparison(
            group=f"merge adapters, {len(layers)} layers, N={N} r={RANK}",
            variants=variants,
            baseline="peft cat",
            # weights read and written, factors read
            num_bytes=4 * (2 * weights + N * RANK * factors),
            flops=2 * weights * N * RANK,
            unchecked=("mima projected",),
            slow=("peft svd",),
        ),
        residual,
    )


def composed(W0: Tensor, W: Sequence[Tensor], C: Sequence[Tensor], C_reg: Tensor) -> Tensor:
    """``φ = W0 + vᵀ d`` with ``d = C G⁻¹`` and ``vᵀ = (V − W0 Cᵀ) (d Cᵀ)⁻¹``, for one layer."""
    gram = (C_reg.mT @ C_reg).double()
    C_all = torch.cat([*C]).double()
    d = torch.linalg.solve(gram, C_all.mT).mT
    V = torch.cat([W_n.double() @ C_n.double().mT for W_n, C_n in zip(W, C, strict=True)], dim=1)
    v = torch.linalg.solve(d @ C_all.mT, V - W0.double() @ C_all.mT, left=False)
    return (W0.double() + v @ d).to(W0)


@functools.lru_cache(maxsize=1)
def composition(device: torch.device) -> Comparison:
    torch.manual_seed(0)
    unet = stable_diffusion(device)
    embedded = load_embedded(device=device)
    pipeline = with_modules(
        embedded, unet=shared_copy(unet), text_encoder=wide_text_encoder(embedded.text_encoder)
    )
    _, adapters, _ = with_peft(unet)
    names = [name for name in adapters[0].factors if re.search(r"attn2\.to_[kv]\.", name)]
    adapters = [
        Adapter(one.name, factors={name: one.factors[name] for name in names}) for one in adapters
    ]
    base = [pipeline.unet.get_parameter(name.removeprefix("unet.")) for name in names]
    C, C_reg = embeddings(device)
    shares = [1 / N] * N

    @torch.no_grad()
    def layer_by_layer() -> list[Tensor]:
        merged = []
        for name, W0 in zip(names, base, strict=True):
            W = [W0 + adapter.factors[name].delta() for adapter in adapters]
            merged.append(composed(W0, W, C, C_reg))
        return merged

    def ours() -> list[Tensor]:
        plan = MergePlan.from_embeddings(C, C_reg, lam=0, weights=shares)
        values, _ = _Merge(pipeline, adapters, shares, {}).projected(plan)
        return [values[name] for name in names]

    return Comparison(
        group=f"compose keys and values, {len(names)} layers, N={N} r={RANK}",
        variants={"layer by layer": layer_by_layer, "mima projected": ours},
        baseline="layer by layer",
        # weights read and written
        num_bytes=4 * 2 * sum(weight.numel() for weight in base),
        slow=("layer by layer",),
    )


@pytest.mark.parametrize("variant", ["layer by layer", "mima projected"])
def test_compose_keys_and_values(benchmark, variant, machine: Machine):
    replay(benchmark, composition(machine.device), variant, machine)


@pytest.mark.parametrize(
    "variant", ["peft cat", "peft svd", "fuse_lora", "mima weighted", "mima projected"]
)
def test_merge_adapters(benchmark, variant, machine: Machine):
    compared, residual = comparison(machine.device)
    replay(benchmark, compared, variant, machine)
    if variant in residual:
        benchmark.extra_info["residual"] = [*residual[variant]]
