"""Models from folders, single files and the hub; damaged, incomplete and foreign ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.loaders import single_file_model
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import builders, ldm, tiny

from mima.errors import MimaError
from mima.families import ModelSource, family_of, load_pipeline, origin_of
from mima.families.flux import Flux
from mima.families.model_files import library_of
from mima.families.sd3 import StableDiffusion3
from mima.families.skeleton import open_skeleton

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def saved_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save(builders.sdxl, tmp_path_factory.mktemp("saved") / "xl")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def floats(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every floating point parameter and buffer, by component."""
    return {
        name: {
            key: value
            for key, value in (*module.named_parameters(), *module.named_buffers())
            if value.is_floating_point()
        }
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
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


# --- damaged folders: what was done to one, and what the error must say


def _edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return spoil


def _drop_tensor(file: str, tensor: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        (name,) = [key for key in tensors if key.endswith(tensor)]
        del tensors[name]
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return spoil


def _pipe(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return spoil


def _truncate(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-64])


def _shard(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "part-1.safetensors")
    # the last is a name that no file can have
    names = ("part-1.safetensors", "part-2.safetensors", "x" * 300)
    index = {"weight_map": dict(zip("abc", names, strict=True))}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / "unet" / name).write_text(json.dumps(index))


def _empty_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()


def _wrong_pickle(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a model")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, r"diffusion_pytorch_model\.safetensors is damaged"),
    "not-safetensors": (lambda f: (f / UNET).write_bytes(b"no"), r"safetensors is damaged"),
    "no-weights": (lambda f: (f / UNET).unlink(), r"unet holds no weights .*UNet2DConditionModel"),
    "no-shard": (_shard, r"unet lacks part-2\.safetensors, x+…, named in"),
    "bad-pickle": (_wrong_pickle, r"unet/diffusion_pytorch_model\.bin"),
    "bad-config": (lambda f: (f / "unet/config.json").write_text("{"), r"unet/config\.json"),
    "bad-index": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json"),
    "foreign-index": (lambda f: (f / "model_index.json").write_text("[]"), "names no diffusers"),
    "no-index": (lambda f: (f / "model_index.json").unlink(), "not a diffusers folder"),
    "no-tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer is missing.*Tokenizer"),
    "empty-tokenizer": (_empty_tokenizer, r"tokenizer holds no vocabulary"),
    "no-scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        r"scheduler_config\.json",
    ),
    "wrong-shape": (_edit("unet/config.json", cross_attention_dim=48), r"attn2\.to_k\.weight"),
    "wrong-block": (_edit("unet/config.json", down_block_types=["A", "B"]), "A does not exist"),
    "wrong-class": (_edit("model_index.json", unet=["diffusers", "Nothing"]), "Nothing"),
    "denoiser-tensor": (
        _drop_tensor(UNET, "conv_out.weight"),
        r"unet are incomplete: 1 tensors are missing, such as conv_out\.weight",
    ),
    "vae-tensor": (
        _drop_tensor("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"),
        r"vae are incomplete: .*encoder\.conv_in\.bias",
    ),
    "text-tensor": (
        _drop_tensor("text_encoder/model.safetensors", "final_layer_norm.weight"),
        r"text_encoder are incomplete: .*final_layer_norm\.weight",
    ),
    "inpainting": (
        _edit("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        r"is a StableDiffusionInpaintPipeline, which is not supported; supported pipelines are "
        r"StableDiffusionPipeline, StableDiffusionXLPipeline, PixArtAlphaPipeline, ",
    ),
    "pipe": (_pipe("unet/config.json"), r"unet/config\.json is no ordinary file"),
    "pipe-of-weights": (_pipe(UNET), r"safetensors is no ordinary file"),
    "video": (_edit("model_index.json", _class_name="WanPipeline"), "WanPipeline.*FluxPipeline"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_folder_is_named(folder, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(MimaError, match=message) as raised:
        load_pipeline(folder)
    assert "\n" not in str(raised.value)


def test_a_missing_tensor_of_an_optional_encoder_is_named(tmp_path):
    folder = builders.save(builders.sd3, tmp_path / "model")
    _drop_tensor("text_encoder_3/model.safetensors", "block.1.layer.0.layer_norm.weight")(folder)
    with pytest.raises(MimaError, match="text_encoder_3 are incomplete"):
        load_pipeline(folder)


Q = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("part", "tensor"), [("text_encoder", Q), ("unet", "conv_in.weight")])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_whole_file_of_another_precision_completes_nothing(folder, part, tensor, variant):
    getattr(load_pipeline(folder), part).save_pretrained(folder / part, variant="fp16")
    kinds = {"fp16" in file.name: file for file in (folder / part).glob("*.safetensors")}
    _drop_tensor(str(kinds[variant == "fp16"].relative_to(folder)), tensor)(folder)
    with pytest.raises(MimaError, match=f"{part} are incomplete: 1 tensors .*{tensor}"):
        load_pipeline(folder, variant=variant)
    load_pipeline(folder, variant=None if variant else "fp16")


@pytest.mark.parametrize("archive", [True, False])
def test_pickles_hold_all_weights_or_are_refused(folder, archive):
    file = folder / "text_encoder/model.safetensors"
    tensors, pickled = load_file(file), file.with_name("pytorch_model.bin")
    file.unlink()
    # what a training script leaves beside it is none of the model's
    torch.save({"state": [1]}, file.with_name("optimizer.bin"))
    torch.save(tensors, pickled, _use_new_zipfile_serialization=archive)
    load_pipeline(folder)
    del tensors[next(name for name in tensors if name.endswith(Q))]
    torch.save(tensors, pickled, _use_new_zipfile_serialization=archive)
    with pytest.raises(MimaError, match=f"text_encoder are incomplete: 1 tensors .*{Q}"):
        load_pipeline(folder)


def test_a_text_encoder_without_the_prefix_is_read_or_refused(folder):
    """transformers 5 writes it so and reads it; version 4 would draw all weights at random."""
    file = folder / "text_encoder/model.safetensors"
    expected = {n: v.clone() for n, v in load_pipeline(folder).text_encoder.state_dict().items()}
    for prefix in ("text_model.", ""):
        tensors = {prefix + n.removeprefix("text_model."): v for n, v in load_file(file).items()}
        save_file({n: v.clone() for n, v in tensors.items()}, file, metadata={"format": "pt"})
        if not prefix and any(name.startswith("text_model.") for name in expected):
            with pytest.raises(MimaError, match=r"incomplete: .* as transformers 5 writes it"):
                load_pipeline(folder)
            continue
        for name, value in load_pipeline(folder).text_encoder.state_dict().items():
            assert torch.equal(value, expected[name])


def test_a_vae_with_attention_of_older_names_is_complete(folder):
    """Stable Diffusion 1.5 as published: `query` for `to_q` and so on."""
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name.replace(".to_out.0.", ".proj_attn.")] = value
    assert any(".proj_attn." in name for name in tensors)
    # not the file itself, mapped to memory, which changes beneath
    expected = {n: value.clone() for n, value in load_pipeline(folder).vae.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name, value in load_pipeline(folder).vae.state_dict().items():
        assert torch.equal(value, expected[name])


def test_hidden_files_of_macos_are_passed_over(folder):
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7\xff")
    # a precision that the model does not come in
    (folder / UNET).with_name("._diffusion_pytorch_model.fp16.safetensors").write_bytes(b"\0")
    load_pipeline(folder)
    with pytest.raises(MimaError, match="holds no 'fp16' weights, only text_encoder/model"):
        load_pipeline(folder, variant="fp16")


# --- the hub


def test_a_name_that_no_hub_has_is_one_error():
    with pytest.raises(
        MimaError, match=r"'a b/c' is neither .* nor a hub id of the form owner/name"
    ):
        load_pipeline("a b/c")


def test_a_model_that_was_saved_with_an_adapter_is_named(tmp_path):
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(MimaError, match="saved with an adapter in it: fuse or unload"):
        load_pipeline(tmp_path / "model")


@pytest.mark.parametrize("model", ["nothing", "/nowhere/at/all", "a/b/c", "./a", "~/a"])
def test_what_is_neither_here_nor_on_the_hub_is_named(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MimaError, match=r"is neither a folder, a \.safetensors file"):
        load_pipeline(model)


@pytest.mark.parametrize("model", ["./embedded", Path("embedded"), Path("./embedded")], ids=repr)
def test_a_path_is_no_name(model, folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)
    channels = load_pipeline(tmp_path / "embedded").unet.config.block_out_channels
    assert channels != load_pipeline("embedded").unet.config.block_out_channels
    assert load_pipeline(model).unet.config.block_out_channels == channels
    assert open_skeleton(ModelSource(model)).unet.config.block_out_channels == channels


def test_the_hub_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(MimaError, match="the hub cannot be reached") as raised:
        load_pipeline("owner/absent", revision="v9")
    assert "'owner/absent'" in str(raised.value)
    assert "'v9'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (EntryNotFoundError("no such file"), "owner/name has no model_index.json"),
        (
            ConnectionError("line broken\nmore"),
            "cannot get 'owner/name' from the hub: line broken$",
        ),
    ],
)
def test_hub_errors_are_explained(monkeypatch, error, message):
    monkeypatch.setattr("mima.families.loading.unreachable", lambda: None)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("mima.families.loading.hf_hub_download", fail)
    with pytest.raises(MimaError, match=message):
        load_pipeline("owner/name")


@pytest.fixture
def cached(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/name in two revisions; returns the newer one's folder."""
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(saved, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / ("a" * 40)


def test_models_and_revisions_of_the_hub_are_opened(cached):
    tensors = load_file(cached / UNET)
    tensors["conv_in.bias"].fill_(3.0)
    save_file(tensors, cached / UNET, metadata={"format": "pt"})
    assert load_pipeline("owner/name").unet.conv_in.bias.eq(3).all()
    assert not load_pipeline("owner/name", revision="v1").unet.conv_in.bias.eq(3).any()
    with pytest.raises(MimaError, match="at revision 'v2'"):
        load_pipeline("owner/name", revision="v2")
    opened = load_pipeline(ModelSource("owner/name", revision="v1"))
    assert not opened.unet.conv_in.bias.eq(3).any()
    # not the cache's folder
    assert origin_of(opened) == "owner/name"


def test_a_foreign_pipeline_of_the_hub_is_refused_before_it_is_fetched(cached, monkeypatch):
    _edit("model_index.json", _class_name="WanPipeline")(cached)
    monkeypatch.setattr("mima.families.loading.DiffusionPipeline.download", None)
    with pytest.raises(MimaError, match="owner/name is a WanPipeline, which is not supported"):
        load_pipeline("owner/name")


HOSTILE_SETTINGS = {
    "index-list": ("model_index.json", "[]"),
    "index-deep": ("model_index.json", "[" * 5000),
    "index-two-letters": (
        "model_index.json",
        '{"_class_name": "StableDiffusionPipeline", "unet": "{}"}',
    ),
    "index-two-names": (
        "model_index.json",
        '{"_class_name": "StableDiffusionPipeline", "unet": {"antigravity": 1, "b": 2}}',
    ),
    "index-number": ("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": 7}'),
    "unet-list": ("unet/config.json", "[1]"),
    "unet-text": (
        "unet/config.json",
        '{"_class_name": "UNet2DConditionModel", "in_channels": "x"}',
    ),
    "unet-null": (
        "unet/config.json",
        '{"_class_name": "UNet2DConditionModel", "down_block_types": 0}',
    ),
    "scheduler-text": ("scheduler/scheduler_config.json", '{"num_train_timesteps": "many"}'),
    "scheduler-list": (
        "scheduler/scheduler_config.json",
        '{"beta_start": [], "beta_schedule": {}}',
    ),
    "shards-list": ("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": [1]}'),
    "shards-none": ("unet/diffusion_pytorch_model.safetensors.index.json", "[]"),
}


MARK = "import pathlib\npathlib.Path('ran').touch()\nclass Part: pass\n"
CODE = {
    "a module on the path": ("evil", "Part", "evil.py"),
    "a file in the folder of the part": ("evil", "Part", "model/unet/evil.py"),
    "a file that hides diffusers": ("diffusers", "UNet2DConditionModel", "model/unet/diffusers.py"),
    "a module of Python": ("antigravity", "Part", None),
    "a module within diffusers": ("diffusers.utils", "logging", None),
    "no class": ("diffusers", "a b", None),
    "nothing": ("", "", None),
}


@pytest.mark.parametrize("open_", [load_pipeline, lambda at: open_skeleton(ModelSource(at))])
@pytest.mark.parametrize("case", CODE)
def test_no_code_of_a_model_is_run(tmp_path, monkeypatch, case, open_):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    library, name, file = CODE[case]
    if file is not None:
        (tmp_path / file).write_text(MARK)
    index = folder / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "unet": [library, name]}))
    with pytest.raises(MimaError, match=r"unet: \[") as caught:
        open_(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_pipeline_within_a_model_is_not_opened(tmp_path):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    index = folder / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "unet": ["diffusers", "DiffusionPipeline"]}))
    (folder / "unet" / "model_index.json").write_text(json.dumps(told))
    with pytest.raises(MimaError, match="code of its own"):
        load_pipeline(folder)


def test_parts_of_diffusers_pipelines_are_opened():
    assert library_of("stable_diffusion") == "diffusers.pipelines.stable_diffusion"
    assert library_of("evil") is None


@pytest.mark.parametrize("text", ['"a"', "[]", "3", "null"])
@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "unet/config.json"])
def test_a_configuration_that_is_a_name_is_not_fetched(tmp_path, name, text):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    (folder / name).write_text(text)
    with pytest.raises(MimaError, match=rf"{name} is damaged: expected a mapping"):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_configuration_asks_for_no_more_than_its_files_hold(tmp_path, part):
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    # sizes are kept of configurations that were seen, not of folders
    load_pipeline(folder)
    file = folder / part / "config.json"
    told = json.loads(file.read_text())
    # without sizes, those of the published models are meant: gigabytes
    kind = {"_class_name": told["_class_name"]} if part == "unet" else {}
    file.write_text(json.dumps(kind))
    with pytest.raises(MimaError, match=rf"{part}/config\.json asks for [\d,]+ numbers, the files"):
        load_pipeline(folder)


@pytest.mark.parametrize("case", HOSTILE_SETTINGS)
def test_damaged_settings_of_a_model_are_refused(tmp_path, case):
    name, text = HOSTILE_SETTINGS[case]
    folder = tiny.save_tiny_stable_diffusion(tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises(MimaError, match=r"^model: ") as caught:
        load_pipeline(folder)
    assert len(str(caught.value)) < 600
