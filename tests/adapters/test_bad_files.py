"""Damaged, foreign and hostile files of adapters are refused by name."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loras import lora_config, peft_folder, save_lora

from mima.adapters.files import AdapterReader
from mima.errors import MimaError


def _bad_lora(base, path):
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(1, 2)}, path)


def _lora_of_a_wider_model(base, path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {"lora_A": torch.zeros(1, 99), "lora_B": torch.zeros(16, 1)}
    save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, path)


BAD = {
    "absent": (lambda base, path: None, "does not exist"),
    "damaged": (lambda base, path: path.write_bytes(b"no"), "cannot be read"),
    "not-of-this-model": (_bad_lora, r"does not fit the model|cannot be read"),
    "of-a-wider-model": (_lora_of_a_wider_model, r"does not fit the model: size mismatch for mid_"),
    "unknown": (
        lambda base, path: save_file({f"x{n}": torch.zeros(2) for n in range(9)}, path),
        "of no known kind",
    ),
    "other-shape": (
        lambda base, path: save_file({"conv_in.weight": torch.zeros(3)}, path),
        r"unet.conv_in.weight is \[3\], expected \[16, 4, 3, 3\]",
    ),
    "foreign-name": (
        lambda base, path: save_file(
            {"conv_in.bias": torch.zeros(16), "conv_between.bias": torch.zeros(3)}, path
        ),
        "the unet has no conv_between.bias",
    ),
    "wide-word": (lambda base, path: save_file({"<w>": torch.zeros(7)}, path), "has 7 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_an_adapter_is_named(base, tmp_path, case):
    make, message = BAD[case]
    make(base, tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("name", ["word.safetensors", "model_delta.safetensors", "word.bin"])
def test_a_damaged_file_of_a_folder_is_named_and_a_hidden_one_passed_over(base, tmp_path, name):
    save_file({"<w>": torch.zeros(1, 32)}, tmp_path / "other.safetensors")
    (tmp_path / f"._{name}").write_bytes(b"no")
    assert AdapterReader(base).read(tmp_path).words
    (tmp_path / name).write_bytes(b"no")
    with pytest.raises(MimaError, match=rf"{name} cannot be read"):
        AdapterReader(base).read(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(base, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Evil()}, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match="it is damaged, or holds more than tensors"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


HOSTILE_SETTINGS = {
    "an expression that never ends": ({"target_modules": r"(a*)*b"}, "is an expression"),
    "another": ({"exclude_modules": r"(.*.*)*x"}, "is an expression"),
    "a key that is one": ({"rank_pattern": {r"(a|a)*$": 4}}, "is an expression"),
    "a huge rank": ({"r": 10**9}, "rank 1000000000, the largest"),
    "a huge rank of some": ({"rank_pattern": {"to_k": 10**9}}, "rank 1000000000, the largest"),
    "no rank": ({"r": "two"}, "rank 'two'"),
    "no kind": ({"peft_type": 7}, "cannot be read|is a "),
    "no list": ({"target_modules": {"a": 1}}, "cannot be read|is an expression"),
    "a beginning that moves the weights": ({"init_lora_weights": "olora"}, "'olora' has changed"),
    "one that parts them": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed"),
}


@pytest.mark.parametrize("case", HOSTILE_SETTINGS)
def test_hostile_settings_of_an_adapter_are_refused(base, tmp_path, case):
    told, message = HOSTILE_SETTINGS[case]
    good = peft_folder(base, tmp_path / "good", init_lora_weights="gaussian")
    assert AdapterReader(base).read(good).factors
    with pytest.raises(MimaError, match=message) as caught:
        AdapterReader(base).read(peft_folder(base, tmp_path / "bad", **told))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x04K\x01.", b"x" * 99]
)
def test_damaged_pickles_are_refused(base, tmp_path, content):
    (tmp_path / "adapter.pt").write_bytes(content)
    with pytest.raises(MimaError, match=r"adapter\.pt"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


def test_names_of_a_megabyte_are_cut_and_looked_through_once(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    # a line break keeps an expression from reaching the end
    name = ".lora_" * 100_000 + "\n\n"
    save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(MimaError, match="does not fit the model") as caught:
        AdapterReader(base).read(folder)
    assert len(str(caught.value)) < 1000


def test_a_header_of_many_parts_is_looked_through_once(base, tmp_path):
    header = json.dumps({f"part{n}.r": 2 for n in range(60_000)})
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{layer}.lora_A.weight": torch.zeros(2, 99)}
    save_file(state, tmp_path / "adapter.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(MimaError, match=r"adapter\.safetensors"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_product_of_factors_that_is_not_finite_is_refused(base, tmp_path, scale):
    folder = peft_folder(base, tmp_path / "adapter", lora_alpha=scale)
    with pytest.raises(MimaError, match=r"to_k\.weight holds numbers that are not finite"):
        AdapterReader(base).read(folder)


def test_a_folder_without_weights_asks_no_hub(base, tmp_path, monkeypatch):
    # a hub's name of a repository, too
    monkeypatch.chdir(tmp_path)
    folder = peft_folder(base, tmp_path / "owner-name")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MimaError, match=r"holds no adapter_model\.safetensors or adapter_model\.b"):
        AdapterReader(base).read("owner-name")


def test_a_denoiser_that_lacks_weights_is_refused(base, tmp_path):
    base.unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MimaError, match=r"incomplete: 1 tensors are missing, such as conv_in\.w"):
        AdapterReader(base).read(tmp_path)


def test_pipes_are_not_waited_for(base, tmp_path):
    os.mkfifo(tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match="holds no adapter"):
        AdapterReader(base).read(tmp_path)
    with pytest.raises(MimaError, match="is no ordinary file"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


ODD = {
    "sparse": torch.ones(1, 32).to_sparse(),
    "meta": torch.empty(1, 32, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(1, 32), 0.1, 0, torch.qint8),
    "complex": torch.ones(1, 32, dtype=torch.complex64),
    "repeated": torch.zeros(1).expand(10**9, 32),
    "long": torch.zeros(1000, 32),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_pickles_tensors_are_plain_and_as_large_as_they_look(base, tmp_path, kind):
    for state in ({"<w>": ODD[kind]}, {"string_to_param": {"*": ODD[kind]}, "name": "w"}):
        torch.save(state, tmp_path / "adapter.pt")
        with pytest.raises(
            MimaError, match=r"adapter\.pt: .* (plain tensors are read|1000 vectors)"
        ):
            AdapterReader(base).read(tmp_path / "adapter.pt")


def test_a_peft_pickle_of_texts_is_refused(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": "no"}, folder / "adapter_model.bin")
    with pytest.raises(MimaError, match="adapter"):
        AdapterReader(base).read(folder)


@pytest.mark.parametrize("value", [None, "x", *(torch.ones(16).to(t) for t in (torch.int8, bool))])
@pytest.mark.parametrize("name", ["conv_in.bias", "mid.processor.to_k_custom_diffusion.weight"])
def test_weights_of_no_floating_point_are_refused(base, tmp_path, name, value):
    torch.save({name: value}, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match=r"adapter\.pt: unet\..* expected numbers of floating"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


def test_low_rank_matrices_of_whole_numbers_are_refused(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    message = r"weight is of torch\.int8, expected numbers of floating"
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(folder)
    save_lora(base, tmp_path / "lora", lora_config(), 0)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(file)


NOTED = {"mid.processor.to_k_custom_diffusion.weight": torch.zeros(2), "note": "x"}


@pytest.mark.parametrize(
    "state", [{1: torch.zeros(2)}, {"a": [1]}, {"string_to_param": 3}, {}, NOTED]
)
def test_pickles_of_something_else_are_refused(base, tmp_path, state):
    torch.save(state, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match=r"adapter\.pt"):
        AdapterReader(base).read(tmp_path / "adapter.pt")
