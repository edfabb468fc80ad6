from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import run

from mima.adaptation import LoRA
from mima.concepts import load_concepts
from mima.families import load_pipeline
from mima.families.pipelines import scheduler_settings, tensors
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import describe_run


def test_adapt_and_sample_with_what_was_learned(workdir, model):
    options = ["--model", model, "--steps", 2, "--lr", 0.01, "--rank", 2]
    output = run("adapt", "cat", *options)
    assert "learned cat by lora in 2 steps: cat-lora" in output
    assert load_file("cat-lora/pytorch_lora_weights.safetensors")
    run("sample", "a cat", "--model", model, "--steps", 2, "-o", "plain.png")
    run("sample", "a cat", "--model", model, "--steps", 2, "--lora", "cat-lora", "-o", "cat.png")
    assert Path("plain.png").read_bytes() != Path("cat.png").read_bytes()
    # of several files one must be named
    Path("two").mkdir()
    for name in ("a", "b"):
        shutil.copy("cat-lora/pytorch_lora_weights.safetensors", f"two/{name}.safetensors")
    drawing = ["--model", model, "--steps", 2]
    output = run("sample", "a cat", *drawing, "--lora", "two", code=2)
    assert "adapter two: several files hold unet." in output
    run("sample", "a cat", *drawing, "--lora", "two/b.safetensors", "-o", "b.png")
    assert Path("b.png").read_bytes() == Path("cat.png").read_bytes()
    before = Path("cat-lora/pytorch_lora_weights.safetensors").read_bytes()
    assert "not empty" in run("adapt", "cat", *options, code=2)
    assert "cat-lora holds a finished run" in run("adapt", "cat", *options, "--resume", code=2)
    run("adapt", "cat", *options, "--seed", 1, "--overwrite")
    assert Path("cat-lora/pytorch_lora_weights.safetensors").read_bytes() != before
    assert not list(workdir.glob(".cat-lora*"))


def test_adapt_several_concepts_at_once(workdir, model):
    options = ["--model", model, "--steps", 2, "--lr", 0.01, "--rank", 2]
    output = run("adapt", "cat", "dog", *options)
    assert "learned cat, dog by lora in 2 steps: cat-dog-lora" in output
    assert "--adapter cat-dog-lora/dog" in output
    run("adapt", "dog", *options, "-o", "alone")
    (alone, shared) = (
        load_file(f"{folder}/pytorch_lora_weights.safetensors")
        for folder in ("alone", "cat-dog-lora/dog")
    )
    assert alone.keys() == shared.keys()
    assert all(torch.allclose(alone[name], shared[name], atol=1e-3) for name in alone)
    run("adapt", "cat", "dog", *options, "--overwrite")
    run("sample", "a dog", "--model", model, "--steps", 2, "--lora", "cat-dog-lora/dog")


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_a_whole_model_can_be_written(workdir, model, method):
    options = ["--model", model, "--method", method, "--steps", 1, "--lr", 0.01]
    output = run("adapt", "cat", *options, "-o", "whole", "--whole")
    assert "--model whole" in output
    assert "--adapter" not in output
    run("adapt", "cat", *options, "-o", "adapter")
    drawing = ["sample", "a cat", "--steps", 2]
    run(*drawing, "--model", "whole", "-o", "whole.png")
    run(*drawing, "--model", model, "--adapter", "adapter", "-o", "adapter.png")
    assert Path("whole.png").read_bytes() == Path("adapter.png").read_bytes()
    assert json.loads(Path("whole/mima.json").read_text())["command"] == "adapt"
    card = Path("whole/README.md").read_text()
    assert "One adapter in its model." in card
    digest = hashlib.sha256(Path("whole/unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert f"{digest.hexdigest()}  unet/diffusion_pytorch_model.safetensors" in card


def test_concepts_that_would_share_a_folder_are_refused(workdir, model):
    for name, said in (("cat", "my cat"), ("dog", "my-cat")):
        (workdir / name / "concept.yaml").write_text(f"{{name: {said}, prompt: a {name}}}")
    output = run("adapt", "cat", "dog", "--model", model, "--steps", 1, "-o", "out", code=2)
    assert "concepts 'my cat', 'my-cat' would be written to one folder" in output
    assert not Path("out").exists()


def test_adapt_with_little_memory(workdir, model):
    options = ["--gradient-checkpointing", "--offload-encoders", "--fp16-vae"]
    options += ["--gradient-accumulation-steps", 2, "--set", "training.snr_gamma=5"]
    run("adapt", "cat", *options, "--model", model, "--steps", 1, "-o", "out")
    settings = json.loads(Path("out/mima.json").read_text())["settings"]
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["training"]["snr_gamma"] == 5
    assert all(settings[name] for name in ("gradient_checkpointing", "offload_encoders"))
    assert (settings["fp16_vae"], settings["use_8bit_adam"]) == (True, False)


def test_adapt_a_plain_folder_with_a_prompt(workdir, model):
    (workdir / "cat" / "concept.yaml").unlink()
    assert "give one prompt for all" in run("adapt", "cat", "--model", model, code=2)
    run("adapt", "cat", "--prompt", "a cat", "--model", model, "--steps", 1, "-o", "out")
    assert Path("out/pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("method", ["dreambooth", "textual-inversion", "custom-diffusion"])
def test_every_method_can_replace_its_own_results(workdir, model, method):
    said = ["--prompt", "a <new1> cat", "--token", "<new1>", "--initializer", "cat"]
    for _ in range(2):
        options = ["--method", method, "--steps", 1, "--lr", 0.01, "--overwrite"]
        output = run("adapt", "cat", *said, "--model", model, *options)
    # as it is told to be looked at
    assert f'"a <new1> cat" --model {model} --adapter cat-{method}' in output.replace("'", '"')
    drawing = ["sample", "a <new1> cat", "--model", model, "--steps", 2]
    run(*drawing, "-o", "before.png")
    run(*drawing, "-o", "after.png", "--adapter", f"cat-{method}")
    assert Path("before.png").read_bytes() != Path("after.png").read_bytes()
    written = json.loads(Path(f"cat-{method}/mima.json").read_text())
    assert (written["method"], written["settings"]["steps"]) == (method, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "neither a folder, nor a file, nor an embedded concept"),
        (
            ["cat", "dog", "--prompt", "x"],
            "--prompt says something about one concept, cat dog describes",
        ),
        (["cat", "dog", "--method", "dreambooth"], "learns one concept at a time, got 2"),
        (["cat", "--gradient-accumulation-steps", "0"], "gradient_accumulation_steps must be at"),
        (["cat", "--steps", "-1"], "steps must be at least 1, got -1"),
        (["cat", "--lr", "0"], "learning_rate must be above 0"),
        (["cat", "--lr", "inf"], "learning_rate must be above 0, at most 1e+30, got inf"),
        (["cat", "--lr", "1e39"], "learning_rate must be above 0, at most 1e+30, got 1e+39"),
        (["cat", "--class-images", "gone"], "gone is neither a folder nor a picture"),
        (["cat", "--rank", "0"], "rank must be at least 1"),
        (["cat", "--rank", "100000000"], "rank must be at most 4096, got 100000000"),
        (["cat", "--set", "batch_size=1000000000"], "batch_size must be at most 4096"),
        (["cat", "--set", f"seed={2**70}"], "seed must be at most 9223372036854775807"),
        (["cat", "--method", "lroa"], "method 'lroa' is unknown; did you mean 'lora'"),
        (["cat", "--set", "rnak=3"], "method lora has no setting rnak; did you mean 'rank'"),
        (["cat", "--set", "training.snr_gama=5"], "has no setting training.snr_gama; did you mean"),
        (["cat", "--rank", "2", "--set", "rank.x=5"], "setting rank.x: rank has no settings"),
        (["cat", "--set", "rank=big"], "rank Input should be a valid integer"),
        (["cat", "--set", "rank=true"], "rank Input should be a number, got True"),
        (["cat", "--set", "training={snr_gamma: no}"], "training.snr_gamma Input should be a num"),
        (["cat", "--set", "rank"], "expected KEY=VALUE"),
        (["cat", "--method", "dreambooth", "--rank", "3"], "method dreambooth has no setting rank"),
        (["cat", "--model", "absent"], "absent"),
        (["cat", "--output", "dog"], "not empty"),
        (["cat", "--output", "dog", "--overwrite"], "files that mima did not write"),
        (["cat", "--output", "dog/0.png"], "is a file, expected a folder"),
        (["cat", "--output", "dog/0.png/x"], "cannot be made: "),
        (["cat", "--resolution", "30"], "30 pixels do not fit the vae"),
        (["cat", "--resolution", "0"], "resolution must be at least 1"),
        (["cat", "--method", "textual-inversion", "--token", "<new1>"], "does not contain the tok"),
    ],
)
def test_bad_adaptations(workdir, model, arguments, message):
    before = sorted(workdir.rglob("*"))
    defaults = [] if "--model" in arguments else ["--model", model]
    assert message in run("adapt", *arguments, *defaults, code=2)
    assert sorted(workdir.rglob("*")) == before


def test_unreadable_pictures_are_all_named(workdir, model):
    (workdir / "cat" / "bad.png").write_text("x")
    (workdir / "cat" / "worse.jpg").write_bytes(b"")
    output = run("adapt", "cat", "--model", model, code=2)
    assert "2 pictures cannot be read" in output
    assert "bad.png: not a picture" in output
    assert "worse.jpg: the file is empty" in output


def test_files_of_others_in_the_checkpoints_place_are_left(workdir, model):
    Path("cat-lora.checkpoint").mkdir()
    kept = Path("cat-lora.checkpoint/thesis.txt")
    kept.write_text("years of work")
    output = run("adapt", "cat", "--model", model, "--steps", 1, code=2)
    assert "cat-lora.checkpoint holds files that no run wrote" in output
    assert kept.read_text() == "years of work"


def test_models_of_others_are_not_replaced(workdir, model):
    for name in ("model_index.json", "results.json", "pytorch_lora_weights.safetensors"):
        theirs = Path("theirs") / name
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("{}")
        output = run("adapt", "cat", "--model", model, "-o", "theirs", "--overwrite", code=2)
        assert "holds files that mima did not write" in output
        assert theirs.read_text() == "{}"


def test_another_scheduler_is_another_run(workdir, model, tmp_path):
    shutil.copytree(model, "own")
    options = ["--model", "own", "--steps", 3, "--set", "batch_size=1"]
    settings = Path("own/scheduler/scheduler_config.json")
    described = {**json.loads(settings.read_text()), "prediction_type": "v_prediction"}
    run("adapt", "cat", *options)
    shutil.rmtree("cat-lora")
    Path("cat-lora.checkpoint").mkdir()
    # what a run that was killed leaves
    pipeline = load_pipeline("own")
    (learned,) = load_concepts("cat")
    config = {"method": "lora", **json.loads(json.dumps(asdict(LoRA(steps=3, batch_size=1))))}
    told = describe_run(
        config, [learned.identity()], tensors(pipeline), scheduler_settings(pipeline)
    )
    CheckpointFolder("cat-lora.checkpoint").write_json("run.json", told)
    settings.write_text(json.dumps(described))
    output = run("adapt", "cat", *options, "--resume", code=2)
    assert "scheduler.prediction_type: epsilon then, v_prediction now" in " ".join(output.split())


def test_a_name_is_no_markup_and_steers_no_terminal(workdir, model, monkeypatch):
    described = Path("cat/concept.yaml")
    described.write_text('name: "cat [/v2]"\nprompt: a cat\n')
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = run("adapt", "cat", "--model", model, "--steps", 1, "-o", "learned")
    assert "learned cat [/v2] by lora" in output
    described.write_text('name: "cat\\e[31m"\nprompt: a cat\n')
    output = run("adapt", "cat", "--model", model, "-o", "other", code=2)
    assert "\x1b[31m" not in output
    assert "its name holds a control character" in output
