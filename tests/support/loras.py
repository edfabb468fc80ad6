"""LoRAs with weights of their own, in the files that diffusers and peft write."""

from __future__ import annotations

import copy
import json

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

KV = ["attn2.to_k", "attn2.to_v"]
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


def lora_config(rank=3, alpha=6.0, targets=ATTENTION, **options):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options)


def add_lora(unet, config, seed, name="default"):
    inject_adapter_in_model(config, unet, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            for part in (layer.lora_A, layer.lora_B):
                part[name].weight.data.normal_(0, 0.3, generator=generator)


def save_lora(base, folder, config, seed):
    """A LoRA file as diffusers writes it."""
    unet = copy.deepcopy(base.unet)
    add_lora(unet, config, seed)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    base.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    return folder


def peft_folder(base, folder, **told):
    unet = copy.deepcopy(base.unet)
    add_lora(unet, lora_config(2, 2.0, KV), 0)
    folder.mkdir(exist_ok=True)
    state = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2.0, "target_modules": KV} | told
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def assert_same_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if tolerance:
            torch.testing.assert_close(value, expected[name], **tolerance)
        else:
            assert torch.equal(value, expected[name]), name
