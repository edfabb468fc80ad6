from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny
from support.commands import run

from mima.errors import MimaError


def test_evaluate_attacks_writes_and_goes_on(model, workdir):
    tiny.save_tiny_clip(workdir / "clip")
    grid = "{lora: {steps: 2, learning_rate: 1e-2}}"
    command = [
        *("evaluate", model, model, "--concepts", "cat", "--others", "dog", "-o", "results"),
        *("--similarity", workdir / "clip", "--processes", 1, "--set", f"methods={grid}"),
        *("--set", "seeds=[0]", "--set", "benign_prompts=2", "--set", "sampler={steps: 2}"),
        *("--set", "lr_factors=[1]", "--name", "same"),
    ]
    # results may lie elsewhere
    (workdir / "large").mkdir()
    (workdir / "results").symlink_to("large")
    # a model and itself, on training pictures since there are no others
    assert "clip: worst attack SGR 0.00" in run(*command)
    written = json.loads((workdir / "results" / "evaluation.json").read_text())
    assert (written["name"], written["method"], written["complete"]) == ("same", None, True)
    assert written["concepts"][0]["references"] == "images"
    attacks = (workdir / "results" / "attacks.csv").read_text()
    assert len(attacks.splitlines()) == 1 + 2
    run(*command)
    assert (workdir / "results" / "attacks.csv").read_text() == attacks
    assert "other seeds, grid" in run(*command, "--set", "seeds=[1]", code=2)
    assert "preset 'slow' is unknown" in run(*command[:3], *command[3:], "--preset", "slow", code=2)


@pytest.mark.parametrize(
    ("original", "immunized", "expected"),
    [
        ("a.safetensors", "b.safetensors", ("folder", "folder")),
        ("a.safetensors", "MODEL", ("folder", None)),
        ("embedded", "b.safetensors", (None, "folder")),
        # which refuses it
        ("embedded", "MODEL", ("folder", None)),
    ],
)
def test_a_single_files_configuration_reaches_whichever_model_is_one(
    model, workdir, monkeypatch, original, immunized, expected
):
    def evaluate(*sources, **_):
        raise MimaError(f"read with {[source.config for source in sources[:2]]}")

    monkeypatch.setattr("mima.evaluation.evaluate", evaluate)
    for name in ("a.safetensors", "b.safetensors"):
        (workdir / name).touch()
    models = [model if name == "MODEL" else name for name in (original, immunized)]
    options = ["--concepts", "cat", "-o", "results", "--single-file-config", "folder"]
    assert f"read with {list(expected)}" in run("evaluate", *models, *options, code=2)


def test_a_second_concept_without_the_options_name_is_explained():
    output = run("evaluate", "a", "b", "--concepts", "cat", "dog", "-o", "results", code=2)
    assert "(dog); --concepts, --others, --similarity, --set take one value" in output
    assert "--concepts A --concepts B" in output


def test_models_of_different_architectures_are_refused(model, workdir):
    tiny.save_tiny_stable_diffusion(workdir / "other", blocks=1)
    tiny.save_tiny_clip(workdir / "clip")
    options = ["--concepts", "cat", "--processes", 1, "--similarity", workdir / "clip"]
    output = run("evaluate", model, workdir / "other", *options, "-o", "results", code=2)
    assert "the immunized model has another architecture than the original" in output
    assert "in the original and missing in the immunized one" in output
    assert not Path("results").exists()


def test_what_cannot_be_evaluated_costs_no_earlier_results(model, workdir):
    """By default CLIP compares, which is not on this machine."""
    (workdir / "results").mkdir()
    (workdir / "results" / "evaluation.json").write_text("{}")
    options = ["--concepts", "cat", "--processes", 1]
    for folder, more in (("results", ["--overwrite"]), ("other", [])):
        output = run("evaluate", model, model, *options, "-o", folder, *more, code=2)
        assert "(--similarity embedded)" in output
    assert (workdir / "results" / "evaluation.json").read_text() == "{}"
    assert not Path("other").exists()
