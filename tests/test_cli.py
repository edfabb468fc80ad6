"""The commands as a person types them: results, messages, exit codes, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import mima
from mima.cli import app
from mima.saving import Delta


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A working directory with two folders of pictures, `cat` and `dog`."""
    for index, name in enumerate(("cat", "dog")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            color = (40 * number, 200 * index, 90)
            Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        described = {"name": name, "prompt": f"a photo of a {name}", "class_prompt": "a photo"}
        (folder / "concept.yaml").write_text(yaml.safe_dump(described))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, code: int = 0) -> str:
    """Run a command, check its exit code, and give back what it printed, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    # usage errors come in a box
    return " ".join(result.output.replace("│", " ").split())


def write_config(path: Path, **changes: object) -> Path:
    settings = {
        "steps": 2,
        "num_captions": 8,
        "num_class_images": 2,
        "hypergradient": "first_order",
        "lower": {"steps": 1},
    }
    config = {"model": "model", "concepts": ["cat", "dog"], "immunize": settings, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path


def test_version():
    assert run("--version") == f"mima {mima.__version__}"


@pytest.mark.parametrize(
    "command",
    [
        *([], ["demo"], ["immunize"], ["adapt"], ["erase"], ["merge"], ["apply"], ["evaluate"]),
        *(["sample"], ["push"], ["doctor"]),
    ],
)
def test_help_for_everything(command):
    assert "Usage" in run(*command, "--help")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, mima.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy', 'pydantic', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_runs_too():
    done = subprocess.run(
        [sys.executable, "-m", "mima", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mima {mima.__version__}\n"


def test_a_reader_that_has_read_enough():
    command = [sys.executable, "-m", "mima", "immunize", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_unknown_command_or_option():
    assert "No such command 'samlpe'" in run("samlpe", code=2)
    assert "No such option" in run("sample", "x", "--sedd", "3", code=2)


# sample


def test_sample(workdir, model):
    output = run("sample", "A cat, red!", "--model", model, "--steps", 2)
    assert output.endswith("a-cat-red.png")
    assert Image.open("a-cat-red.png").size == (32, 32)
    first = Path("a-cat-red.png").read_bytes()
    run("sample", "A cat, red!", "--model", model, "--steps", 2, "--overwrite")
    assert Path("a-cat-red.png").read_bytes() == first
    run("sample", "A cat, red!", "--model", model, "--steps", 2, "--seed", 1, "-o", "other.png")
    assert Path("other.png").read_bytes() != first


def test_sample_several(workdir, model):
    run("sample", "a cat", "--model", model, "--steps", 2, "--num", 3, "-o", "x.png", "--seed", 4)
    names = ["x-1.png", "x-2.png", "x-3.png"]
    assert sorted(path.name for path in workdir.glob("x*.png")) == names
    run("sample", "a cat", "--model", model, "--steps", 2, "--seed", 5, "-o", "y.png")
    assert Path("x-2.png").read_bytes() == Path("y.png").read_bytes()


def test_a_model_that_does_not_say_its_size(workdir, model):
    """Adapting at a resolution draws at it, too, when the steps are done."""
    shutil.copytree(model, "sizeless")
    config = json.loads(Path("sizeless/unet/config.json").read_text())
    Path("sizeless/unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    options = ["--model", "sizeless", "--resolution", 40]
    run("adapt", "cat", *options, "--steps", 1, "-o", "out")
    assert Image.open("out/samples/00001/0.png").size == (40, 40)
    run("sample", "a cat", *options, "--steps", 1, "-o", "cat.png", "--lora", "out")
    assert Image.open("cat.png").size == (40, 40)
    assert "must be said" in run("sample", "a cat", *options[:2], "-o", "no.png", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "30"], "30 pixels do not fit the vae"),
        (["--steps", "-3"], "'--steps'"),
        (["--steps", "two"], "'--steps'"),
        (["--guidance", "-1"], "'--guidance'"),
        (["--num", "0"], "'--num'"),
        (["--seed", "-1"], "'--seed'"),
        (["--output", "x.txt"], "expected a file ending in .png"),
        (["--output", "cat"], "expected a file ending in .png"),
        (["--output", "absent/x.png"], "there is no folder"),
        (["--output", "cat/0.png"], "exists; choose another, or use --overwrite"),
        (["--model", "absent"], "absent"),
        (["--model", "cat"], "not a diffusers folder"),
        (["--model", "cat/0.png"], "only .safetensors files"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--adapter", "absent"], "no such adapter: absent"),
        (["--lora", "cat"], "adapter cat holds no adapter"),
    ],
)
def test_bad_samples(workdir, model, options, message):
    before = sorted(workdir.rglob("*"))
    defaults = [] if "--model" in options else ["--model", model]
    assert message in run("sample", "a cat", *defaults, *options, code=2)
    assert sorted(workdir.rglob("*")) == before


def test_an_empty_prompt(workdir, model):
    assert "the prompt is empty" in run("sample", " ", "--model", model, code=2)


def test_a_damaged_model(workdir, model, tmp_path):
    shutil.copytree(model, "damaged")
    weights = next(Path("damaged/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in run("sample", "a cat", "--model", "damaged", code=2)
    assert not list(workdir.glob("*.png"))


# adapt


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


def test_adapt_with_little_memory(workdir, model):
    options = ["--gradient-checkpointing", "--offload-encoders", "--fp16-vae"]
    options += ["--gradient-accumulation-steps", 2]
    run("adapt", "cat", *options, "--model", model, "--steps", 1, "-o", "out")
    settings = json.loads(Path("out/mima.json").read_text())["settings"]
    assert settings["gradient_accumulation_steps"] == 2
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
        (["cat", "--lr", "inf"], "learning_rate must be above 0 and finite, got inf"),
        (["cat", "--class-images", "gone"], "gone is neither a folder nor a picture"),
        (["cat", "--rank", "0"], "rank must be at least 1"),
        (["cat", "--method", "lroa"], "method 'lroa' is unknown; did you mean 'lora'"),
        (["cat", "--set", "rnak=3"], "method lora has no setting rnak; did you mean 'rank'"),
        (["cat", "--set", "rank=big"], "rank Input should be a valid integer"),
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


# erase


def test_erase(workdir, model):
    assert "erased cat: erased" in run("erase", "cat", "--model", model, "-o", "erased")
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file("erased/unet/diffusion_pytorch_model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in changed)


def test_erase_by_fine_tuning(workdir, model):
    options = ["--method", "esd-u", "--steps", 2, "--lr", 0.01, "--set", "sampling_steps=3"]
    run("erase", "cat", *options, "--model", model, "-o", "erased")
    before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file("erased/unet/diffusion_pytorch_model.safetensors")
    assert {name for name in before if before[name].equal(after[name])} == {
        name for name in before if ".attn2." in name
    }
    written = json.loads(Path("erased/mima.json").read_text())
    assert (written["method"], written["settings"]["sampling_steps"]) == ("esd-u", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "uce", "--steps", "3"], "method uce has no setting steps"),
        (["--method", "esd-x", "--steps", "0"], "steps must be at least 1"),
        (["--method", "esd-x", "--set", "lr=1"], "method esd-x has no setting lr"),
        (["--method", "esd-x", "--preserve", "a dog"], "are for method uce"),
        (["--method", "esd-x", "--technique", "tensor"], "are for method uce"),
    ],
)
def test_bad_erasure_settings(workdir, model, options, message):
    assert message in run("erase", "cat", *options, "--model", model, "-o", "x", code=2)
    assert not Path("x").exists()


def test_erase_what_a_plain_folder_shows(workdir, model):
    (workdir / "cat" / "concept.yaml").unlink()
    assert "give one prompt for all" in run("erase", "cat", "--model", model, "-o", "x", code=2)
    run("erase", "cat", "--prompt", "a big cat", "--model", model, "-o", "x")
    assert json.loads(Path("x/mima.json").read_text())["prompts"] == ["a big cat"]


@pytest.mark.parametrize("options", [[], ["--method", "esd-x", "--steps", 1]], ids=["uce", "esd"])
def test_erase_by_words_alone(workdir, model, options):
    given = ["--words", "a red round", "--words", "cat"]
    assert "erased a red round, cat: x" in run(
        "erase", *given, *options, "--model", model, "-o", "x"
    )
    written = json.loads(Path("x/mima.json").read_text())
    assert written["concepts"] == written["prompts"] == ["a red round", "cat"]
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (model, Path("x"))
    )
    assert any(not before[name].equal(after[name]) for name in before)


def test_bad_erasures(workdir, model):
    assert "give concepts, or --words" in run("erase", "-o", "x", "--model", model, code=2)
    said = ["--words", "cat", "--prompt", "a cat"]
    assert "are their own prompt" in run("erase", *said, "-o", "x", "--model", model, code=2)
    assert "Missing option" in run("erase", "cat", "--model", model, code=2)
    output = run("erase", "cat", "-o", "dog", "--model", model, code=2)
    assert "not empty" in output
    output = run("erase", "cat", "-o", "x", "--technique", "tonsor", "--model", model, code=2)
    assert "tonsor" in output
    assert not Path("x").exists()


# merge and apply


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> Path:
    """A folder with LoRA of two concepts, as `mima adapt` writes them."""
    folder = tmp_path_factory.mktemp("adapters")
    for index, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        Image.new("RGB", (32, 32), (200 * index, 40, 90)).save(folder / name / "0.png")
    options = ["--model", model, "--steps", 1, "--lr", 0.01, "--rank", 2, "--prompt"]
    for name in ("cat", "dog"):
        run("adapt", folder / name, *options, f"a {name}", "-o", folder / f"{name}-lora")
    return folder


def test_merge_and_apply(workdir, model, adapters):
    loras = [adapters / "cat-lora", adapters / "dog-lora"]
    # the prompts are those that adapt wrote down
    output = run("merge", *loras, "--model", model, "-o", "both", "--weights", "0.75,0.25")
    assert "merged cat-lora, dog-lora: both" in output
    assert "residual" in output
    merged = mima.merge_adapters(model, loras, weights=[0.75, 0.25], prompts=["a cat", "a dog"])
    after = load_file("both/unet/diffusion_pytorch_model.safetensors")
    assert after.keys() == merged.pipeline.unet.state_dict().keys()
    assert all(after[k].equal(v) for k, v in merged.pipeline.unet.state_dict().items())
    run("sample", "a cat", "--model", "both", "--steps", 2)

    options = ["--delta", "--weights", "0.75 0.25"]
    run("merge", *loras, "--model", model, "-o", "delta", *options)
    assert set(load_file("delta/model_delta.safetensors")) == set(merged.changed)
    assert not Path("delta/unet").exists()
    assert "applied delta" in run("apply", "delta", "--model", model, "-o", "whole")
    again = load_file("whole/unet/diffusion_pytorch_model.safetensors")
    assert all(again[name].equal(after[name]) for name in after)
    # mima's own, so that they may be replaced
    run("merge", loras[0], "--model", model, "-o", "both", "--method", "weighted", "--overwrite")
    run("apply", "delta", "--model", model, "-o", "whole", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ADAPTER", "absent", "gone"], "no such adapter: absent, gone"),
        (["ADAPTER", "--weights", "a,b"], "expected numbers, as in 0.5,0.25,0.25"),
        (["ADAPTER", "--weights", "1,2"], "one finite number per adapter (1)"),
        (["ADAPTER", "--prompt", "a", "--prompt", "b"], "1 adapters need as many prompts, got 2"),
        (["cat"], "cat holds no adapter"),
        (["ADAPTER", "--captions", "absent.txt"], "cannot read absent.txt"),
        (["ADAPTER", "--lam", "-1"], "'--lam'"),
        (["ADAPTER", "--method", "sum"], "'sum'"),
        (["ADAPTER", "--model", "absent"], "absent"),
        (["ADAPTER", "--output", "dog"], "not empty"),
    ],
)
def test_bad_merges(workdir, model, adapters, arguments, message):
    before = sorted(workdir.rglob("*"))
    options = [] if "--model" in arguments else ["--model", model]
    options += [] if "--output" in arguments else ["--output", "out"]
    arguments = [adapters / "cat-lora" if item == "ADAPTER" else item for item in arguments]
    assert message in run("merge", *arguments, *options, code=2)
    assert sorted(workdir.rglob("*")) == before


def test_bad_deltas(workdir, model):
    assert "delta absent does not exist" in run("apply", "absent", "-o", "out", code=2)
    assert "delta cat/" in run("apply", "cat", "-o", "out", code=2)
    assert "not empty" in run("apply", "cat", "-o", "dog", code=2)
    assert not Path("out").exists()


# models


@pytest.mark.parametrize(
    "command",
    [
        "adapt cat --model MODEL",
        "erase cat -o out --model MODEL",
        "merge LORA -o out --model MODEL",
        "apply DELTA -o out --model MODEL",
        "sample x --model MODEL",
        "immunize run.yaml -o out",
        "evaluate MODEL MODEL --concepts cat -o out",
    ],
)
def test_every_command_opens_revisions_variants_and_single_files(workdir, model, adapters, command):
    """What is said of the model reaches the place that opens it, which refuses all of it here."""
    write_config(workdir / "run.yaml", model=str(model))
    Delta({"unet.conv_in.bias": torch.zeros(16)}).save(workdir / "delta")
    places = {"MODEL": model, "LORA": adapters / "cat-lora", "DELTA": workdir / "delta"}
    words = [places.get(word, word) for word in command.split()]
    for option, message in (
        ("--revision", "revision: only models of the hub have revisions"),
        ("--variant", "holds no 'nope' weights"),
        ("--single-file-config", "config: only a single file needs one"),
    ):
        assert message in run(*words, option, "nope", code=2)
    if command.startswith("evaluate"):
        for option in ("--revision", "--variant"):
            output = run(*words, f"--immunized{option.removeprefix('-')}", "nope", code=2)
            assert option.removeprefix("--") in output
    if command.startswith("immunize"):
        for name, message in (("revision", "models of the hub"), ("variant", "no 'nope' weights")):
            write_config(workdir / "run.yaml", model=str(model), **{name: "nope"})
            assert message in run(*words, code=2)


def test_half_precision(workdir, model, adapters):
    """Of the computation, and of what is written."""
    run("erase", "cat", "--model", model, "-o", "erased", "--dtype", "bfloat16")
    lora = adapters / "cat-lora"
    run("merge", lora, "--model", model, "-o", "merged", "--dtype", "float16", "--weights", 1)
    for folder, dtype in (("erased", torch.bfloat16), ("merged", torch.float16)):
        weights = load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}
    run("sample", "a cat", "--model", model, "--steps", 2, "-o", "full.png")
    run("sample", "a cat", "--model", model, "--steps", 2, "-o", "b.png", "--dtype", "bfloat16")
    full, half = (np.asarray(Image.open(f"{name}.png"), dtype=int) for name in ("full", "b"))
    assert 0 < np.abs(full - half).mean() < 5


def test_bad_pushes(workdir, model):
    assert "absent is not a folder" in run("push", "absent", "me/model", code=2)
    assert "cat holds nothing that mima wrote" in run("push", "cat", "me/model", code=2)
    assert "offline mode is on" in run("push", model, "me/model", code=2)


# immunize


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
    import re

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


# demo


def test_bad_demos(workdir):
    assert "dog" in run("demo", "--output", "dog", code=2)
    assert "dog" in run("demo", "--output", "dog", "--overwrite", code=2)
    assert sorted(path.name for path in Path("dog").glob("*.png"))[0] == "0.png"
    assert "'--seed'" in run("demo", "--seed", "-1", code=2)
    assert "cat/0.png" in run("demo", "--output", "cat/0.png", code=2)


# failures


def failing(monkeypatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mima.doctor.show", fail)


def test_an_accident_is_short_unless_debug_is_asked_for(monkeypatch, capfd):
    failing(monkeypatch, RuntimeError("no [such] thing"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "RuntimeError: no [such] thing" in result.output
    assert "--debug shows where" in result.output
    assert "Traceback" not in result.output
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.output
        assert "in fail" in result.output


def test_another_librarys_value_error_is_an_accident(monkeypatch):
    def fail() -> None:
        json.loads("{")

    monkeypatch.setattr("mima.doctor.show", fail)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "--debug" in result.output


def test_an_interrupt(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_an_interrupted_run_leaves_what_was_there(config, workdir):
    old = workdir / "out"
    old.mkdir()
    (old / "model_index.json").write_text("old")
    command = [sys.executable, "-m", "mima", "immunize", str(config), "-o", "out", "--overwrite"]
    process = subprocess.Popen(
        [*command, "--set", "steps=100000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 600
    while not list(workdir.glob("**/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(workdir.glob("**/metrics.jsonl"))  # it is taking steps
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output.decode()
    assert b"Traceback" not in output
    assert (old / "model_index.json").read_text() == "old"
    assert not list(workdir.glob(".out*"))


def test_evaluate_attacks_writes_and_goes_on(model, workdir):
    tiny.save_tiny_clip(workdir / "clip")
    grid = "{lora: {steps: 2, learning_rate: 1e-2}}"
    command = [
        *("evaluate", model, model, "--concepts", "cat", "--others", "dog", "-o", "results"),
        *("--similarity", workdir / "clip", "--processes", 1, "--set", f"methods={grid}"),
        *("--set", "seeds=[0]", "--set", "benign_prompts=2", "--set", "sampler={steps: 2}"),
        *("--set", "lr_factors=[1]", "--name", "same"),
    ]
    # a model and itself, on training pictures since there are no others
    assert "clip: worst attack SGR +0.000" in run(*command)
    written = json.loads((workdir / "results" / "evaluation.json").read_text())
    assert (written["name"], written["method"], written["complete"]) == ("same", None, True)
    assert written["concepts"][0]["references"] == "images"
    attacks = (workdir / "results" / "attacks.csv").read_text()
    assert len(attacks.splitlines()) == 1 + 2
    run(*command)
    assert (workdir / "results" / "attacks.csv").read_text() == attacks
    assert "other seeds, grid" in run(*command, "--set", "seeds=[1]", code=2)
    assert "preset 'slow' is unknown" in run(*command[:3], *command[3:], "--preset", "slow", code=2)
