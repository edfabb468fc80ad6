"""Adapters of every kind and whoever wrote them are read, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import builders, ldm
from support.loras import KV, assert_same_weights, lora_config, peft_folder, save_lora

import mima
import mima.adaptation
from mima.adapters.files import AdapterReader
from mima.errors import MimaError
from mima.families import load_pipeline


def test_a_peft_folder_is_read(base, folder, tmp_path):
    config = lora_config(4, 2.0, KV, use_rslora=True)
    model = get_peft_model(copy.deepcopy(base.unet), config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "peft")
    merged = mima.merge_adapters(base, [tmp_path / "peft"], method="weighted")
    assert_same_weights(merged.pipeline.unet.state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "config",
    [
        # which some versions of peft apply when they merge in training
        LoKrConfig(r=2, alpha=4, target_modules=KV, decompose_both=True, rank_dropout=0.5),
        LoHaConfig(r=2, alpha=4, target_modules=KV, rank_dropout=0.5),
        LoraConfig(r=2, target_modules=KV, use_dora=True),
    ],
    ids=["lokr", "loha", "dora"],
)
def test_peft_folders_of_other_kinds_are_read(base, tmp_path, config):
    model = get_peft_model(copy.deepcopy(base.unet), config)
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data.normal_(0.5, 0.3, generator=generator)
    model.eval()
    model.save_pretrained(tmp_path / "peft")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merged = mima.merge_adapters(base, [tmp_path / "peft"], method="weighted")
    assert_same_weights(merged.pipeline.unet.state_dict(), model.merge_and_unload().state_dict())
    assert_same_weights(base.unet.state_dict(), before)
    assert AdapterReader(base).read(tmp_path / "peft").values


def test_a_dora_file_is_read(base, tmp_path):
    config = lora_config(2, 2.0, KV, use_dora=True)
    save_lora(base, tmp_path / "dora", config, seed=0)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merged = mima.merge_adapters(base, [tmp_path / "dora"], method="weighted")
    adapted = copy.deepcopy(base)
    adapted.load_lora_weights(tmp_path / "dora", weight_name=LORA_WEIGHT_NAME_SAFE)
    adapted.fuse_lora()
    adapted.unload_lora_weights()
    assert_same_weights(merged.pipeline.unet.state_dict(), adapted.unet.state_dict())
    assert_same_weights(base.unet.state_dict(), before)
    changed = AdapterReader(base).read(tmp_path / "dora").values
    assert changed
    assert all(name.endswith((".to_k.weight", ".to_v.weight")) for name in changed)


@pytest.mark.parametrize(("key", "kind"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa")])
def test_files_of_lycoris_are_refused_by_name(base, tmp_path, key, kind):
    file = tmp_path / "adapter.safetensors"
    save_file({f"lora_unet_down_blocks_0_attentions_0_proj_in.{key}": torch.ones(2, 2)}, file)
    with pytest.raises(MimaError, match=f"is a {kind}; of these, peft's folders"):
        AdapterReader(base).read(file)


def kohya(base, path, **further):
    """A LoRA of one projection as kohya's scripts name it, with alpha 1 at rank 2."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    rows, columns = base.unet.get_submodule(name).weight.shape
    prefix = "lora_unet_" + name.replace(".", "_")
    given = {"lora_down.weight": torch.ones(2, columns), "lora_up.weight": torch.ones(rows, 2)}
    given |= {"alpha": torch.tensor(1.0), **further}
    state = {f"{prefix}.{key}": value for key, value in given.items() if value is not None}
    save_file(state, path)
    return f"unet.{name}.weight"


def test_kohyas_files_are_read_and_their_dora_is_refused(base, tmp_path):
    file = tmp_path / "lora.safetensors"
    name = kohya(base, file)
    (factor,) = AdapterReader(base).read(file).factors.items()
    assert factor[0] == name
    assert torch.equal(factor[1].delta(), torch.ones_like(factor[1].delta()))
    # without alpha, the update is B A itself
    kohya(base, file, alpha=None)
    assert AdapterReader(base).read(file).factors[name].delta().eq(2).all()
    for problem, message in (
        ({"dora_scale": torch.ones(4, 1)}, "is a DoRA; this is not supported"),
        ({"lora_up.weight": None}, r"it lacks '.*lora_up\.weight'"),
        ({"lora_up.weight": torch.full((16, 2), torch.nan)}, "to_k.weight holds numbers that are"),
    ):
        kohya(base, file, **problem)
        with pytest.raises(MimaError, match=message):
            AdapterReader(base).read(file)


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt"])
def test_a_pickled_lora_is_read_by_itself_or_as_a_trainer_wraps_it(base, tmp_path, name):
    layer = kohya(base, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    for held in (state, {"state_dict": state, "epoch": 3}):
        torch.save(held, tmp_path / name)
        (factor,) = AdapterReader(base).read(tmp_path / name).factors.items()
        assert factor[0] == layer
        assert torch.equal(factor[1].delta(), torch.ones_like(factor[1].delta()))


def test_a_checkpoint_of_a_training_script_is_read(base, loras, tmp_path):
    folder = shutil.copytree(loras[0], tmp_path / "checkpoint-500")
    for name in ("optimizer.bin", "optimizer_1.bin", "scheduler.bin", "sampler.bin", "scaler.pt"):
        torch.save({"state": {0: {"step": torch.tensor(5.0)}}, "last_epoch": 5}, folder / name)
    (folder / "random_states_0.pkl").write_bytes(b"")
    expected = AdapterReader(base).read(loras[0]).factors
    found = AdapterReader(base).read(folder).factors
    assert found.keys() == expected.keys()
    for name, factor in found.items():
        assert torch.equal(factor.delta(), expected[name].delta())


@pytest.mark.parametrize("beside", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}])
def test_what_peft_keeps_beside_low_rank_matrices_is_refused(base, tmp_path, beside):
    """It would go into the weights that the reader shares with the caller's model."""
    model = get_peft_model(copy.deepcopy(base.unet), LoraConfig(target_modules=["to_k"], **beside))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with pytest.raises(MimaError, match="beside the low-rank matrices"):
        AdapterReader(base).read(tmp_path)
    assert_same_weights(base.unet.state_dict(), before)


def test_a_file_of_weights_may_hold_the_tables_that_a_model_is_made_with(base, tmp_path):
    changed = copy.deepcopy(base.unet)
    changed.register_buffer("table", torch.arange(3.0))
    name = next(name for name, _ in changed.named_parameters())
    changed.state_dict()[name].add_(1.0)
    save_file(changed.state_dict(), tmp_path / "unet.safetensors")
    holding = copy.copy(base)
    reader = AdapterReader(base)
    with pytest.raises(MimaError, match="the unet has no table"):
        reader.read(tmp_path / "unet.safetensors")
    holding = copy.deepcopy(base)
    holding.unet.register_buffer("table", torch.arange(3.0))
    found = AdapterReader(holding).read(tmp_path / "unet.safetensors")
    assert f"unet.{name}" in found.values
    assert "unet.table" not in found.values
    holding.unet.table += 1
    with pytest.raises(MimaError, match="the unet has no table"):
        AdapterReader(holding).read(tmp_path / "unet.safetensors")


def test_weights_of_8_bits_are_read(base, tmp_path):
    bias = torch.ones(16).to(torch.float8_e4m3fn)
    save_file({"conv_in.bias": bias}, tmp_path / "adapter.safetensors")
    merged = mima.merge_adapters(base, [tmp_path / "adapter.safetensors"], method="weighted")
    assert torch.equal(merged.pipeline.unet.conv_in.bias, bias.float())
    bias.view(torch.uint8)[0] = 0x7F
    save_file({"conv_in.bias": bias}, tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match=r"conv_in\.bias holds numbers that are not finite"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


@pytest.fixture(scope="module")
def tuned(base):
    """The model with another weight of its denoiser and of its text encoder."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.unet.conv_in.bias.fill_(0.5)
        tuned.text_encoder.get_input_embeddings().weight[3] = 0.25
    return tuned


def assert_tuned(found, tuned, *parts):
    """That an adapter is what a fine-tuned model changed, and nothing else."""
    assert len(found) == len(parts)
    for part in parts:
        (name,) = [name for name in found if name.startswith(f"{part}.")]
        own = getattr(tuned, part).get_parameter(name.removeprefix(f"{part}."))
        assert torch.equal(found[name], own)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_weights_in_one_variant_alone_are_read(base, tuned, tmp_path, shard):
    for part in ("unet", "."):
        saved = tuned.unet if part == "unet" else tuned
        saved.save_pretrained(tmp_path / part, variant="fp16", max_shard_size=shard)
    assert_tuned(AdapterReader(base).read(tmp_path).values, tuned, "unet", "text_encoder")
    assert_tuned(AdapterReader(base).read(tmp_path / "unet").values, tuned, "unet")
    tuned.unet.save_pretrained(tmp_path / "unet", variant="ema")
    with pytest.raises(MimaError, match=r"unet comes as variants ema and fp16; leave one of them"):
        AdapterReader(base).read(tmp_path / "unet")
    # which the other parts have, too
    assert_tuned(AdapterReader(base).read(tmp_path).values, tuned, "unet", "text_encoder")
    base.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(MimaError, match="changes nothing"):
        AdapterReader(base).read(tmp_path / "unet")


def test_single_files_are_read_as_the_model_is_built(base, tuned, tmp_path):
    file = ldm.save_single_file(tuned, tmp_path / "tuned.safetensors")
    assert_tuned(AdapterReader(base).read(file).values, tuned, "unet", "text_encoder")
    other = load_pipeline(builders.save(builders.sdxl, tmp_path / "xl"))
    with pytest.raises(MimaError, match=r"holds a StableDiffusionPipeline, expected a StableDiffu"):
        AdapterReader(other).read(file)


def test_a_single_transformer_is_read_as_the_models_own_is_built(tmp_path):
    pipeline = load_pipeline(builders.save(builders.sd3, tmp_path / "sd3"))
    tuned = copy.deepcopy(pipeline.transformer)
    tuned.proj_out.bias.data += 1
    file = ldm.save_sd3_transformer(tuned, tmp_path / "sd3.safetensors")
    (found,) = AdapterReader(pipeline).read(file).values.items()
    assert found[0] == "transformer.proj_out.bias"
    assert torch.equal(found[1], tuned.proj_out.bias)


def test_a_single_file_in_scaled_8_bits_is_refused(base, tuned, tmp_path):
    file = ldm.save_single_file(tuned, tmp_path / "tuned.safetensors")
    scale = {"model.diffusion_model.time_embed.0.scale_weight": torch.ones(())}
    save_file(load_file(file) | scale, file)
    with pytest.raises(MimaError, match=r"time_embed\.0\.scale_weight, by which its weights"):
        AdapterReader(base).read(file)


def test_all_parts_of_a_folder_are_read(base, tuned, tmp_path):
    """As diffusers' script for DreamBooth writes a checkpoint that trains the text encoder."""
    tuned.unet.save_pretrained(tmp_path / "unet")
    tuned.text_encoder.save_pretrained(tmp_path / "text_encoder")
    torch.save({}, tmp_path / "optimizer.bin")
    row = torch.arange(32.0)[None]
    save_file({"<w>": row}, tmp_path / "learned_embeds.safetensors")
    found = AdapterReader(base).read(tmp_path)
    assert_tuned(found.values, tuned, "unet", "text_encoder")
    assert torch.equal(found.words["<w>"], row)
    save_file({"conv_in.bias": torch.ones(16)}, tmp_path / "weights.safetensors")
    with pytest.raises(MimaError, match=r"several files hold unet\.conv_in\.bias"):
        AdapterReader(base).read(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    tuned.text_encoder.save_pretrained(tmp_path / "text_encoder_2")
    with pytest.raises(MimaError, match="does not fit the model, which has no text_encoder_2"):
        AdapterReader(base).read(tmp_path)


@pytest.mark.parametrize("kind", ["peft", "denoiser"])
def test_a_word_beside_an_adapter_is_read(base, tuned, tmp_path, kind):
    if kind == "peft":
        peft_folder(base, tmp_path)
    else:
        tuned.unet.save_pretrained(tmp_path)
    expected = AdapterReader(base).read(tmp_path)
    save_file({"<w>": torch.ones(1, 32)}, tmp_path / "learned_embeds.safetensors")
    found = AdapterReader(base).read(tmp_path)
    assert found.words.keys() == {"<w>"}
    assert found.factors.keys() == expected.factors.keys()
    assert found.values.keys() == expected.values.keys()


def test_a_model_that_predicts_otherwise_is_refused_another_vae_told_of(
    base, tuned, tmp_path, caplog
):
    whole = copy.deepcopy(tuned)
    for told in ({"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}):
        whole.scheduler = DDIMScheduler.from_config(base.scheduler.config, **told)
        whole.save_pretrained(tmp_path)
        ((setting, value),) = told.items()
        with pytest.raises(MimaError, match=f"was trained with {setting} {value}, the model with"):
            AdapterReader(base).read(tmp_path)
    whole.scheduler = base.scheduler
    # half precision rounds
    whole.vae.half().float()
    whole.save_pretrained(tmp_path)
    assert_tuned(AdapterReader(base).read(tmp_path).values, tuned, "unet", "text_encoder")
    whole.vae.decoder.conv_in.weight.data *= 1.1
    whole.save_pretrained(tmp_path)
    assert not caplog.records
    assert_tuned(AdapterReader(base).read(tmp_path).values, tuned, "unet", "text_encoder")
    (said,) = caplog.messages
    assert "another vae than the model (decoder.conv_in.weight differs)" in said


def test_the_prompt_that_adapt_wrote_down_is_used(base, loras, tmp_path):
    origin = {"command": "adapt", "prompts": ["a red round emoji"]}
    (loras[0] / "mima.json").write_text(json.dumps(origin))
    assert AdapterReader(base).read(loras[0]).prompt == "a red round emoji"
    (loras[0] / "mima.json").unlink()
