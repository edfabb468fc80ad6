"""Folders that are damaged or hostile: what was done to one, and what the error must say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import builders, tiny
from support.families import UNET

from mima.errors import MimaError
from mima.families import ModelSource, load_pipeline
from mima.families.model_files import library_of
from mima.families.skeleton import open_skeleton


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


def test_a_model_that_was_saved_with_an_adapter_is_named(tmp_path):
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(MimaError, match="saved with an adapter in it: fuse or unload"):
        load_pipeline(tmp_path / "model")


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
