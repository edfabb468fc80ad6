"""Models from folders and single files, in every dtype and variant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file
from support import builders, ldm, tiny
from support.families import UNET

from mima.errors import MimaError
from mima.families import ModelSource, family_of, load_pipeline
from mima.families.flux import Flux
from mima.families.pipelines import networks
from mima.families.sd3 import StableDiffusion3


@pytest.fixture(scope="module")
def saved_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save(builders.sdxl, tmp_path_factory.mktemp("saved") / "xl")


def floats(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every floating point parameter and buffer, by component."""
    return {
        name: {
            key: value
            for key, value in (*module.named_parameters(), *module.named_buffers())
            if value.is_floating_point()
        }
        for name, module in networks(pipeline).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_is_opened_in_one_dtype(saved, dtype):
    pipeline = load_pipeline(saved, dtype=dtype)
    reference = floats(load_pipeline(saved))
    for name, values in floats(pipeline).items():
        assert values
        for key, value in values.items():
            assert value.dtype == dtype
            assert torch.equal(value, reference[name][key].to(dtype))
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_keeps_what_overflows_in_float32(tmp_path, dtype):
    """transformers declares `wo` so, for float16 alone; nothing else differs."""
    folder = builders.save(builders.pixart, tmp_path / "model")
    for name, values in floats(load_pipeline(folder, dtype=dtype)).items():
        for key, value in values.items():
            kept = name == "text_encoder" and "wo" in key.split(".") and dtype == torch.float16
            assert value.dtype == (torch.float32 if kept else dtype), (name, key)


def test_weights_stored_in_half_precision_open_in_float32(folder):
    stored = {name: value.half() for name, value in load_file(folder / UNET).items()}
    save_file(stored, folder / UNET, metadata={"format": "pt"})
    for name, value in load_pipeline(folder).unet.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())


def test_a_pipeline_in_memory_is_cast_in_place(saved):
    pipeline = load_pipeline(saved, dtype=torch.bfloat16)
    assert load_pipeline(pipeline) is pipeline
    assert {v.dtype for values in floats(pipeline).values() for v in values.values()} == {
        torch.float32
    }


def test_a_variant_is_opened(folder):
    pipeline = load_pipeline(folder)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.fill_(2.0)
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16")
    assert load_pipeline(folder, variant="fp16").unet.conv_in.weight.eq(2).all()
    assert not load_pipeline(folder).unet.conv_in.weight.eq(2).any()


def test_an_absent_variant_is_named(folder):
    with pytest.raises(MimaError, match=r"variant: .* holds no 'ema' weights, only text_encoder/"):
        load_pipeline(folder, variant="ema")


@pytest.mark.parametrize("shard", ["1GB", "200KB"])
def test_weights_in_a_variant_alone_are_named(tmp_path, shard):
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    pipeline.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=shard)
    with pytest.raises(MimaError, match="as variant fp16 alone; say so"):
        load_pipeline(tmp_path / "model")
    opened = load_pipeline(tmp_path / "model", variant="fp16")
    assert torch.equal(opened.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_what_is_open_has_no_revision(folder):
    for model in (load_pipeline(folder), ModelSource(folder)):
        with pytest.raises(ValueError, match="revision, variant and config say more of a folder"):
            load_pipeline(model, variant="fp16")
    with pytest.raises(MimaError, match="variant: the embedded model has none"):
        load_pipeline("embedded", variant="fp16")


def test_only_the_hub_has_revisions(folder):
    with pytest.raises(MimaError, match="revision: only models of the hub"):
        load_pipeline(folder, revision="main")


@pytest.mark.parametrize("kind", ["saved", "saved_xl"])
def test_a_single_file_is_the_same_model(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    pipeline = load_pipeline(folder)
    file = ldm.save_single_file(pipeline, tmp_path / "model.safetensors")
    opened = load_pipeline(file, config=folder)
    assert type(opened) is type(pipeline)
    expected = floats(pipeline)
    for name, values in floats(opened).items():
        assert values.keys() == expected[name].keys()
        for key, value in values.items():
            assert torch.equal(value, expected[name][key]), (name, key)
    half = load_pipeline(file, config=folder, dtype=torch.float16)
    assert {v.dtype for values in floats(half).values() for v in values.values()} == {torch.float16}


def test_a_single_file_needs_a_configuration_where_the_hub_cannot_be_reached(saved, tmp_path):
    file = ldm.save_single_file(load_pipeline(saved), tmp_path / "model.safetensors")
    with pytest.raises(MimaError, match="offline, pass config"):
        load_pipeline(file)


def test_an_incomplete_single_file_is_refused(saved, tmp_path):
    file = ldm.save_single_file(load_pipeline(saved), tmp_path / "model.safetensors")
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, file)
    with pytest.raises(MimaError, match=r"model\.safetensors"):
        load_pipeline(file, config=saved)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unet.lora_A.weight", "LoRA files and single components are not models"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner is not supported"),
        ("model.diffusion_model.joint_blocks.0.weight", "for its transformer alone; for the other"),
        ("double_blocks.0.img_attn.weight", "for its transformer alone; for the other parts pass"),
        ("joint_blocks.0.x_block.attn.qkv.scale_weight", r"holds joint_blocks\.0.* to be scaled"),
        ("model.diffusion_model.input_blocks.0.scaled_fp8", "8 bits are not read"),
    ],
)
def test_single_files_of_other_kinds_are_refused(tmp_path, key, message):
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MimaError, match=message):
        load_pipeline(tmp_path / "model.safetensors")


def test_a_single_file_says_what_it_predicts(tmp_path, monkeypatch):
    folder = builders.save(builders.sdxl, tmp_path / "xl")
    file = ldm.save_single_file(load_pipeline(folder), tmp_path / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pipeline(file, config="~/xl").scheduler.config["prediction_type"] == "epsilon"
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    save_file(load_file(file) | marks, file)
    opened = load_pipeline(file, config=folder)
    assert opened.scheduler.config["prediction_type"] == "v_prediction"
    assert family_of(opened).schedule.alphas_cumprod[-1] < 1e-6
    # which PNDM, as of Stable Diffusion 1.x, would ignore
    pipeline = load_pipeline(folder)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "pndm")
    opened = load_pipeline(file, config=tmp_path / "pndm")
    assert opened.scheduler.config["prediction_type"] == "v_prediction"
    assert family_of(opened).schedule.alphas_cumprod[-1] < 1e-6


def test_a_transformer_of_sd3_is_opened_with_the_parts_of_a_folder(tmp_path, caplog):
    folder = builders.save(builders.sd3, tmp_path / "sd3")
    whole, other = load_pipeline(folder), load_pipeline(folder)
    for parameter in whole.transformer.parameters():
        parameter.data += 0.01
    file = ldm.save_sd3_transformer(whole.transformer, tmp_path / "sd3.safetensors")
    opened = load_pipeline(file, config=folder)
    for name, value in opened.transformer.state_dict().items():
        assert torch.equal(value, whole.transformer.state_dict()[name]), name
    for name, value in opened.text_encoder_3.state_dict().items():
        assert torch.equal(value, other.text_encoder_3.state_dict()[name])
    assert isinstance(family_of(opened), StableDiffusion3)
    assert not [record for record in caplog.records if record.name.startswith("mima")]
    flux = builders.save(builders.flux, tmp_path / "flux")
    with pytest.raises(MimaError, match=r"cannot open|holds the transformer of a Stable"):
        load_pipeline(file, config=flux)
    tensors = load_file(file)
    # the other parts are looked at as those of any folder
    encoder = folder / "text_encoder_3" / "model.safetensors"
    weights = load_file(encoder)
    weights.pop(next(name for name in weights if "SelfAttention.q" in name))
    shutil.copy(encoder, tmp_path / "whole.safetensors")
    save_file(weights, encoder, {"format": "pt"})
    with pytest.raises(MimaError, match="text_encoder_3 are incomplete"):
        load_pipeline(file, config=folder)
    shutil.copy(tmp_path / "whole.safetensors", encoder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    load_pipeline(file, config=folder)
    tensors["first_stage_model.encoder.weight"] = torch.zeros(1)
    save_file(tensors, file)
    load_pipeline(file, config=folder)
    assert "of first_stage_model, which the file holds too" in caplog.text
    del tensors["model.diffusion_model.final_layer.linear.weight"]
    save_file(tensors, file)
    with pytest.raises(MimaError, match=r"cannot open|is incomplete"):
        load_pipeline(file, config=folder)


def test_a_transformer_of_flux_is_opened_with_the_parts_of_a_folder(tmp_path, monkeypatch):
    """diffusers' converter is for Flux's own width alone; here names need only a prefix."""
    folder = builders.save(builders.flux, tmp_path / "flux")
    whole = load_pipeline(folder)
    state = {f"double_blocks.{n}": v.clone() for n, v in whole.transformer.state_dict().items()}
    save_file(state, tmp_path / "flux.safetensors")

    def convert(checkpoint: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name.removeprefix("double_blocks."): v for name, v in checkpoint.items()}

    kinds = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    monkeypatch.setitem(kinds["FluxTransformer2DModel"], "checkpoint_mapping_fn", convert)
    opened = load_pipeline(tmp_path / "flux.safetensors", config=folder)
    assert isinstance(family_of(opened), Flux)
    for name, value in opened.transformer.state_dict().items():
        assert torch.equal(value, whole.transformer.state_dict()[name]), name


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path):
    for name, message in (
        ("model.ckpt", r"only \.safetensors"),
        ("model.safetensors", "is damaged or no safetensors file"),
    ):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(MimaError, match=message):
            load_pipeline(tmp_path / name)
