"""Models of the hub, and names that it has not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.families import UNET

from mima.errors import MimaError
from mima.families import ModelSource, load_pipeline, origin_of
from mima.families.skeleton import open_skeleton


def test_a_name_that_no_hub_has_is_one_error():
    with pytest.raises(
        MimaError, match=r"'a b/c' is neither .* nor a hub id of the form owner/name"
    ):
        load_pipeline("a b/c")


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
    index = cached / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "WanPipeline"}))
    monkeypatch.setattr("mima.families.loading.DiffusionPipeline.download", None)
    with pytest.raises(MimaError, match="owner/name is a WanPipeline, which is not supported"):
        load_pipeline("owner/name")
