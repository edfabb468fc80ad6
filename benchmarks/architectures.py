"""The published denoisers that benchmarks are of, built without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from benchmarks.outer_step import SD1

Inputs = Callable[[int, torch.dtype], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published denoiser and what it is called with."""

    build: Callable[..., torch.nn.Module]
    """Numbers of layers -> the denoiser."""
    inputs: Inputs
    """(batch, dtype) -> arguments of a forward."""
    trained: str
    """Pattern of the names that both levels train: the attention that reads text."""
    layers: tuple[int, ...] = ()
    """How many there are of each kind of layer whose like follow each other: a few are counted."""


def _sdxl(layers: int) -> torch.nn.Module:
    """SDXL's UNet with so many transformer layers in its lowest blocks."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, layers),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _unet_inputs(side: int, tokens: int, width: int, *, is_xl: bool = False) -> Inputs:
    def inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        call: dict[str, Any] = {
            "sample": torch.empty(batch, 4, side, side, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(batch, tokens, width, dtype=dtype),
        }
        if is_xl:
            call["added_cond_kwargs"] = {
                "text_embeds": torch.empty(batch, 1280, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            }
        return call

    return inputs


def _sd3_inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    # 77 tokens of CLIP and 256 of T5
    return {
        "hidden_states": torch.empty(batch, 16, 128, 128, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, 333, 4096, dtype=dtype),
        "pooled_projections": torch.empty(batch, 2048, dtype=dtype),
    }


def _flux_inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(batch, 4096, 64, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "guidance": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, 512, 4096, dtype=dtype),
        "pooled_projections": torch.empty(batch, 768, dtype=dtype),
        "img_ids": torch.empty(4096, 3, dtype=dtype),
        "txt_ids": torch.empty(512, 3, dtype=dtype),
    }


ARCHITECTURES = {
    # 860 M parameters, 512 pixels
    "sd14": Architecture(
        build=partial(UNet2DConditionModel, **SD1["sd1"]["unet"]),
        inputs=_unet_inputs(64, 77, 768),
        trained=r"\.attn2\.",
    ),
    # 2.6 G parameters, 1024 pixels
    "sdxl": Architecture(
        build=_sdxl,
        layers=(10,),
        inputs=_unet_inputs(128, 77, 2048, is_xl=True),
        trained=r"\.attn2\.",
    ),
    # medium: 2.0 G parameters, 1024 pixels
    "sd3": Architecture(
        build=lambda layers: SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        layers=(24,),
        inputs=_sd3_inputs,
        trained=r"\.attn\.add_[kv]_proj\.",
    ),
    # dev: 11.9 G parameters, 1024 pixels
    "flux": Architecture(
        build=lambda both, single: FluxTransformer2DModel(
            num_layers=both, num_single_layers=single, guidance_embeds=True
        ),
        layers=(19, 38),
        inputs=_flux_inputs,
        trained=r"\.attn\.add_[kv]_proj\.",
    ),
    # for tests: the same blocks in small
    "tiny": Architecture(
        build=lambda layers: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=layers,
            attention_head_dim=4,
            norm_num_groups=8,
            cross_attention_dim=32,
        ),
        layers=(1,),
        inputs=_unet_inputs(16, 7, 32),
        trained=r"\.attn2\.",
    ),
}
