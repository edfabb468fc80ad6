from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import run, write_config

from mima.immunization.progress import ProgressBar
from mima.immunization.recipes import RECIPES


@pytest.fixture
def config(workdir, model) -> Path:
    (workdir / "model").symlink_to(model)
    return write_config(workdir / "run.yaml")


def test_immunize(config, model):
    output = run("immunize", config, "--output", "out", "--set", "steps=1")
    assert "immunized against cat, dog: out" in output
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert any(not before[name].equal(after[name]) for name in before)
    run("sample", "a cat", "--model", "out", "--steps", 2)
    assert "not empty" in run("immunize", config, "--output", "out", code=2)
    refused = run("immunize", config, "--output", "out", "--resume", code=2)
    assert "out holds a finished run, there is nothing to resume" in refused
    run("immunize", config, "--output", "out", "--overwrite", "--set", "lower.lr=1e-4")


def test_immunize_writes_a_delta(config, model):
    run("immunize", config, "-o", "whole", "--set", "steps=1", "--set", "erase_first=true")
    options = ["--set", "steps=1", "--set", "erase_first=true", "--delta"]
    run("immunize", config, "-o", "delta", *options)
    assert {path.name for path in Path("delta").iterdir()} == {
        *("README.md", "metrics.jsonl", "mima.json", "model_delta.safetensors")
    }
    run("apply", "delta", "--model", model, "-o", "applied")
    file = "unet/diffusion_pytorch_model.safetensors"
    whole, applied = load_file(f"whole/{file}"), load_file(f"applied/{file}")
    assert all(whole[name].equal(applied[name]) for name in whole)


def test_immunize_tasks(config, model):
    run("immunize", config, "-o", "relearned", "--task", "relearn", "--set", "steps=1")
    written = json.loads(Path("relearned/mima.json").read_text())["config"]
    assert (written["erase_first"], written["upper"]["lr"]) == (True, 3e-5)
    words = [
        {
            "name": n,
            "prompt": f"a {t}",
            "token": t,
            "initializer": n,
            "images": n,
            "class_prompt": "a",
        }
        for n, t in (("cat", "<new1>"), ("dog", "<new2>"))
    ]
    for word in words:
        (Path(word["name"]) / "concept.yaml").unlink()
    write_config(config, concepts=words)
    options = ["--task", "personalize", "--set", "steps=1", "--set", "token_steps=2"]
    run("immunize", config, "-o", "personal", *options)
    written = json.loads(Path("personal/mima.json").read_text())["config"]
    assert (written["new_words"], written["upper"]["lr"]) == (True, 2e-5)
    assert (written["token_steps"], written["erase_first"]) == (2, False)
    # the vocabulary is as it was: anyone may add the word again
    before, after = (
        {name.removeprefix("text_model."): value.shape for name, value in load_file(file).items()}
        for file in (f"{folder}/text_encoder/model.safetensors" for folder in (model, "personal"))
    )
    assert before == after
    adapted = ["--method", "textual-inversion", "--token", "<new1>", "--initializer", "cat"]
    run("adapt", "cat", *adapted, "--prompt", "a <new1>", "--model", "personal", "--steps", 1)
    assert "relearn" in run("immunize", config, "-o", "x", "--task", "relarn", code=2)
    assert "no new words" in run("immunize", config, "-o", "x", "--set", "token_steps=1", code=2)


def test_immunize_what_others_erased(config, model, workdir):
    """From the option and from the file; the recipe then erases nothing."""
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    names = [name for name in weights if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    torch.save({name: weights[name] / 2 for name in names}, "esd.pt")
    options = ["--task", "relearn", "--set", "steps=1"]
    run("immunize", config, "-o", "option", *options, "--erased", "esd.pt")
    write_config(config, erased="esd.pt")
    run("immunize", config, "-o", "file", *options)
    file = "unet/diffusion_pytorch_model.safetensors"
    option, written = load_file(f"option/{file}"), load_file(f"file/{file}")
    assert all(option[name].equal(written[name]) for name in option)
    # one step moves a weight by its learning rate
    assert all((option[name] - weights[name] / 2).abs().max() < 1e-4 for name in names)
    told = json.loads(Path("option/mima.json").read_text())
    assert (told["erased"], told["config"]["erase_first"]) == ("esd.pt", False)


def test_immunize_reads_paths_from_the_configs_folder(config, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_config(config, output="results")
    run("immunize", config)
    assert (tmp_path / "results" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concpets": ["cat"]}, "did you mean 'concepts'"),
        ({"immunize": {"stpes": 3}}, "did you mean 'steps'"),
        ({"immunize": {"lower": {"optimiser": "sgd"}}}, "did you mean 'optimizer'"),
        ({"immunize": {"steps": -3}}, "immunize.steps"),
        ({"immunize": {"steps": "many"}}, "immunize.steps"),
        ({"immunize": {"method": "mimi"}}, "immunize.method"),
        ({"immunize": [1]}, "immunize"),
        ({"model": "absent"}, "absent"),
        ({"model": 3}, "model"),
        ({"concepts": []}, "concepts"),
        ({"concepts": ["cat", "cow"]}, "cow is neither a folder"),
        ({"concepts": None}, "concepts"),
        ({"concepts": [{"prompt": "x", "imagse": "cat"}]}, "did you mean 'images'"),
        ({"immunize": {"steps": 1, "captions": "absent.txt"}}, "absent.txt"),
        ({"immunize": {"method": "imma", "steps": 1}}, "imma"),
        ({"immunize": {"resolution": 30}}, "30 pixels do not fit the vae"),
        ({"erased": "absent.pt"}, "absent.pt does not exist"),
        ({"erased": "model", "immunize": {"erase_first": True}}, "erased in"),
    ],
)
def test_bad_configs(config, changes, message):
    write_config(config, **changes)
    assert message in run("immunize", config, "--output", "out", code=2)
    assert not Path("out").exists()
    assert not list(Path.cwd().glob(".out*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("stpes=3", "did you mean"),
        ("lower.stpes=3", "did you mean 'steps'"),
        ("steps=[", "is not a value"),
        ("steps=-1", "steps"),
        ("steps.more=1", "has no settings of its own|steps"),
    ],
)
def test_bad_settings(config, setting, message):
    output = run("immunize", config, "--output", "out", "--set", setting, code=2)
    assert re.search(message, output)


def test_a_config_that_is_none(config, workdir):
    assert "absent.yaml" in run("immunize", "absent.yaml", "-o", "out", code=2)
    assert "nowhere to write" in run("immunize", config, code=2)
    (workdir / "list.yaml").write_text("- 1")
    assert "must be a mapping" in run("immunize", "list.yaml", "-o", "out", code=2)
    (workdir / "twice.yaml").write_text("model: a\nconcepts: [cat]\nmodel: b\n")
    assert "'model' stands twice" in run("immunize", "twice.yaml", "-o", "out", code=2)


def test_an_empty_concept_folder(config, workdir):
    (workdir / "empty").mkdir()
    write_config(config, concepts=["empty"])
    assert "holds no pictures" in run("immunize", config, "-o", "out", code=2)


def test_an_interrupted_run_leaves_what_was_there(config, workdir):
    old = workdir / "out"
    old.mkdir()
    (old / "model_index.json").write_text("old")
    (old / "mima.json").write_text("{}")
    command = [sys.executable, "-m", "mima", "immunize", str(config), "-o", "out", "--overwrite"]
    process = subprocess.Popen(
        [*command, "--set", "steps=100000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 600
    try:
        while not list(workdir.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # it is taking steps
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output.decode()
    assert b"Traceback" not in output
    assert (old / "model_index.json").read_text() == "old"
    assert not list(workdir.glob(".out*"))


def test_an_interrupted_run_goes_on(config, workdir, monkeypatch):
    plain = ["--set", "steps=3", "--set", "checkpoint_every=1"]
    run("immunize", config, "-o", "whole", *plain)

    def interrupt(self, report):
        if report.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "__call__", interrupt)
        assert "--resume" in run("immunize", config, "-o", "out", *plain, code=130)
    assert "holds an unfinished run" in run("immunize", config, "-o", "out", *plain, code=2)
    run("immunize", config, "-o", "out", *plain, "--resume")
    file = "unet/diffusion_pytorch_model.safetensors"
    whole, resumed = load_file(f"whole/{file}"), load_file(f"out/{file}")
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_recipe_lies_beneath_the_file_and_what_is_set(config):
    said = {"steps": 1, "seed": 7, "num_class_images": 1}
    write_config(config, recipe="paper", immunize={"seed": 7, "steps": 9, "num_class_images": 1})
    run("immunize", config, "-o", "out", "--recipe", "sophon", "--set", "steps=1")
    told = json.loads(Path("out/mima.json").read_text())["config"]
    assert told == json.loads(RECIPES["sophon"](**said).model_dump_json(exclude_unset=False))


def test_a_dry_run_says_what_would_happen(config):
    output = run("immunize", config, "-o", "out", "--dry-run", "--device", "h100")
    assert "memory on h100" in output
    assert "7 × attn2.to_k.weight" in output
    assert "time: 2 outer steps of " in output
    refused = run("immunize", config, "-o", "out", "--dry-run", "--device", "10mib", code=2)
    assert "memory: the run needs" in refused
    assert not Path("out").exists()
