"""Write a diffusers pipeline as the single file that its authors' own code would have written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
}


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(rf"(?<![\w.]){re.escape(old)}(?=\.)|(?<=\.){re.escape(old)}(?=\.)", new, name)
    return name


def unet(model: Any) -> Tensors:
    per_block = model.config.layers_per_block + 1
    out = {}
    for name, value in model.state_dict().items():
        key = _renamed(name, UNET)
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        if match:
            side, block, kind, index = match[1], int(match[2]), match[3], int(match[4])
            rest, first = match[5], per_block * block + (side == "down")
            stem = "input_blocks" if side == "down" else "output_blocks"
            if kind == "downsamplers":
                key = f"{stem}.{first + per_block - 1}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                place = 2 if hasattr(model.up_blocks[block], "attentions") else 1
                key = f"{stem}.{first + per_block - 1}.{place}.{rest}"
            else:
                key = f"{stem}.{first + index}.{int(kind == 'attentions')}.{rest}"
        if "resnets" in name:
            key = _renamed(key, RESNET)
        out[f"model.diffusion_model.{key}"] = value
    return out


def vae(model: Any) -> Tensors:
    last = len(model.config.up_block_types) - 1
    out = {}
    for name, value in model.state_dict().items():
        key = _renamed(name, VAE)
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key
        )
        if "mid.attn_1" in key and key.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        out[f"first_stage_model.{key}"] = value
    return out


def clip(model: Any, prefix: str) -> Tensors:
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value
        for name, value in model.state_dict().items()
    }


def open_clip(model: Any, prefix: str) -> Tensors:
    state = model.state_dict()
    out = {}
    for name, value in state.items():
        key = _renamed(name, OPEN_CLIP)
        if name == "text_projection.weight":
            key, value = "text_projection", value.T
        elif name == "text_model.embeddings.position_embedding.weight":
            key = "positional_embedding"
        elif match := re.match(r"(.*self_attn)\.q_proj\.(weight|bias)", name):
            parts = [state[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
            key, value = _renamed(f"{match[1]}.in_proj_{match[2]}", OPEN_CLIP), torch.cat(parts)
        elif re.search(r"\.[kv]_proj\.", name) or name.endswith("position_ids"):
            continue
        out[prefix + key] = value
    return out


def save_single_file(pipeline: Any, file: Path) -> Path:
    """Stable Diffusion 1.x, or SDXL where there is a second text encoder."""
    tensors = unet(pipeline.unet) | vae(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file)
    return file


SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_PARTS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{
        f"time_text_embed.{ours}.linear_{n}": f"{theirs}.mlp.{2 * n - 2}"
        for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder"))
        for n in (1, 2)
    },
}
SD3_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def save_sd3_transformer(transformer: Any, file: Path) -> Path:
    """The transformer of SD3 as its authors' code names the weights."""
    state = transformer.state_dict()
    last = transformer.config.num_layers - 1
    tensors = {"pos_embed": state["pos_embed.pos_embed"]}
    # scale and shift stand the other way round
    swapped = {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"}

    def take(ours: str, theirs: str) -> None:
        for leaf in ("weight", "bias"):
            value = state.get(f"{ours}.{leaf}")
            if value is not None:
                value = torch.cat(value.chunk(2)[::-1]) if ours in swapped else value
                tensors[f"{theirs}.{leaf}"] = value

    for ours, theirs in SD3_PARTS.items():
        take(ours, theirs)
    for i in range(last + 1):
        for ours, theirs in SD3_BLOCK.items():
            take(f"transformer_blocks.{i}.{ours}", f"joint_blocks.{i}.{theirs}")
        for theirs, three in SD3_QKV.items():
            for leaf in ("weight", "bias"):
                parts = [state.get(f"transformer_blocks.{i}.{ours}.{leaf}") for ours in three]
                if parts[0] is not None:
                    tensors[f"joint_blocks.{i}.{theirs}.{leaf}"] = torch.cat(parts)
    named = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    save_file({name: value.clone().contiguous() for name, value in named.items()}, file)
    return file
