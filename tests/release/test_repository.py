"""Publishing to a hub and opening models from one, as a person does; only HTTP is faked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants, utils
from PIL import Image
from safetensors.torch import load, save_file
from support import hub
from support.commands import in_a_process
from support.immunizing import assert_same

import mima
from mima.errors import MimaError
from mima.families.hub import TRANSPORT_ERRORS
from mima.release.repository import Repository
from mima.storage.names import DELTA_FILE


@pytest.fixture
def served() -> Iterator[hub.Hub]:
    with hub.serve() as served:
        yield served


@pytest.fixture
def online(monkeypatch, served):
    """This process may use the network, where it finds the hub of the test."""
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if hasattr(utils, "reset_sessions"):
        # huggingface_hub 0 keeps what offline sessions were told
        utils.reset_sessions()


def test_push_then_open_a_revision_and_a_variant(served, small_model, tmp_path):
    served.token = "hf_me"
    other = StableDiffusionPipeline.from_pretrained(small_model).to(torch.float16)
    other.unet.conv_out.bias.data.fill_(0.5)
    other.save_pretrained(tmp_path / "other", variant="fp16")
    served.add("me/model", "v1", tmp_path / "other")
    result = tmp_path / "result"
    shutil.copytree(small_model, result)
    record = {"saw": {"lower": {"pictures": ["digest"], "signatures": ["thumbnail"]}}}
    (result / "mima.json").write_text(json.dumps(record))
    (result / "immunized").mkdir()
    (result / "immunized" / "mima.json").write_text(json.dumps(record))
    pushing, drawing = ["push", result, "me/model"], ["sample", "a cat", "--steps", 2, "--model"]
    chosen = {
        "main": ["me/model"],
        "v1": ["me/model", "--revision", "v1", "--variant", "fp16"],
        "local": [tmp_path / "other", "--variant", "fp16"],
    }
    pushed, *drawn, absent, refused = in_a_process(
        ([*pushing, "--private"], {}),
        *(([*drawing, *words, "-o", f"{name}.png"], {}) for name, words in chosen.items()),
        ([*drawing, "me/model", "--revision", "v9"], {}),
        (pushing, {"HF_TOKEN": "hf_stranger"}),
        cwd=tmp_path,
        **served.environment(tmp_path / "cache"),
    )
    assert pushed == (0, f"published {result}: {served.address}/me/model/commit/{hub.COMMIT}")
    created = next(body for _, path, body in served.requests if path.endswith("repos/create"))
    assert (created["organization"], created["name"]) == ("me", "model")
    # huggingface_hub has said it in two ways
    assert created.get("visibility") == "private" or created.get("private") is True
    files = {path for path in result.rglob("*") if path.is_file()}
    published = dict(served.files["me/model", "main"])
    # nobody is shown the pictures that a run saw, not even small
    records = {name for name in published if name.endswith("mima.json")}
    assert records == {"mima.json", "immunized/mima.json"}
    for name in records:
        public = json.loads(published.pop(name))
        assert public == {"saw": {"lower": {"pictures": ["digest"]}}}
    assert published == {
        str(path.relative_to(result)): path.read_bytes()
        for path in files
        if path.name != "mima.json"
    }

    assert drawn == [(0, f"{name}.png") for name in chosen]
    pictures = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in chosen}
    assert pictures["v1"] == pictures["local"] != pictures["main"]

    assert absent == (2, "error: model: me/model has no revision 'v9'")
    code, said = refused
    assert code == 2
    assert said.startswith("error: hub: cannot publish 'me/model': ")
    assert "401" in said
    assert "\n" not in said


@pytest.mark.usefixtures("online")
def test_a_pull_request_is_asked_for(served, small_model, tmp_path):
    result = tmp_path / "result"
    shutil.copytree(small_model, result)
    (result / "mima.json").write_text("{}")
    repository = Repository("me/model", token="hf_me")
    address = repository.upload(result, create_pr=True, commit_message="better")
    assert address == f"{served.address}/me/model/discussions/1"
    created = next(body for _, path, body in served.requests if path.endswith("repos/create"))
    # as the owner has set for what is new
    assert {"private", "visibility"}.isdisjoint(created)
    asked = [path for _, path, _ in served.requests]
    assert any("/commit/main" in path and "create_pr=1" in path for path in asked)
    assert not any("/branch/" in path for path in asked)


def test_a_hub_that_cannot_be_reached_is_one_error_at_once(model, tmp_path):
    """huggingface_hub alone tries for a minute, and says so each time, a line each."""
    with hub.serve() as gone:
        environment = gone.environment(tmp_path / "cache")
    absent = ["sample", "x", "--model", "me/absent"]
    ((code, said),) = in_a_process((absent, {}), cwd=tmp_path, **environment)
    assert code == 2
    assert said.startswith("error: model: there is no folder 'me/absent'")
    assert "the hub cannot be reached: 127.0.0.1: " in said
    assert "\n" not in said


@pytest.mark.usefixtures("online")
def test_a_result_is_published_as_it_is_saved(served, model, tmp_path):
    save_file({"<new1>": torch.ones(32)}, tmp_path / "word.safetensors")
    result = mima.merge_adapters(model, [tmp_path / "word.safetensors"], method="weighted")
    result.save_pretrained(tmp_path / "saved", delta=True)
    address = result.push_to_hub("me/delta", revision="dev", delta=True, token="hf_me")
    assert address == f"{served.address}/me/delta/commit/{hub.COMMIT}"
    published = served.files["me/delta", "dev"]
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert published.keys() == saved.keys()
    # safetensors writes its metadata in any order
    tensors = load(published.pop(DELTA_FILE)), load(saved.pop(DELTA_FILE))
    assert_same(*tensors)
    assert published == saved


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("repo", ["me/model", "not a name", "a/b/c"])
def test_what_cannot_be_published_is_said(served, repo):
    served.token = "hf_owner"
    with pytest.raises(MimaError, match=f"cannot publish '{repo}'") as caught:
        Repository(repo, token="hf_stranger")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("online")
def test_what_links_lead_to_is_published_without_thumbnails(served, tmp_path):
    record = {"saw": {"lower": {"pictures": ["digest"], "signatures": ["thumbnail"]}}}
    folder, other = tmp_path / "result", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    (folder / "weights").write_text("a")
    (other / "weights").write_text("b")
    (other / "mima.json").write_text(json.dumps(record))
    (folder / "base").symlink_to(other)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    repository = Repository("me/model")
    repository.upload(folder)
    published = dict(served.files["me/model", "main"])
    assert json.loads(published.pop("base/mima.json")) == {
        "saw": {"lower": {"pictures": ["digest"]}}
    }
    assert published == {"weights": b"a", "base/weights": b"b"}
    (other / "back").symlink_to(folder)
    with pytest.raises(MimaError, match=r"base/back is a link that leads in a circle"):
        repository.upload(folder)


@pytest.mark.usefixtures("online")
def test_a_line_that_breaks_is_one_error(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise TRANSPORT_ERRORS[-1]("server disconnected")

    repository = Repository("me/model")
    monkeypatch.setattr(repository._api, "upload_folder", broken)
    with pytest.raises(MimaError, match="cannot publish 'me/model': server disconnected"):
        repository.upload(tmp_path)


def test_offline_nothing_is_published():
    with pytest.raises(MimaError, match="cannot publish 'me/model': offline mode is on"):
        Repository("me/model")


@pytest.mark.usefixtures("online")
def test_an_endpoint_that_is_no_address(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "nowhere")
    with pytest.raises(MimaError, match="'nowhere' is no address"):
        Repository("me/model")
