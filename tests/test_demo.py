"""The demonstration from end to end, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mima.report.wording import number


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One quick run, in a process and a folder of its own, or the one that was made already."""
    if made := os.environ.get("MIMA_TEST_DEMO"):
        return Path(made), Path(f"{made}.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "mima", "demo", "--quick", "--output", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_results_hold_what_is_promised(demo):
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for key in ("msgr", "worst_sgr", "benign_rsgr", "prompt_alignment", "versions", "config"):
        assert key in results
    for key in ("before", "rise_left", "steps_ratio"):
        assert key in results
        for concept in results["concepts"].values():
            assert key in concept
            assert {key in by_method for by_method in concept["methods"].values()} == {True}
    assert set(results["concepts"][results["untouched"]]["methods"]) == {"lora", "dreambooth"}
    assert results["seed"] == 0
    assert len(results["targets"]) == 2
    means = [results["concepts"][name]["mean"] for name in results["targets"]]
    assert results["msgr"] == pytest.approx(sum(means) / 2)
    assert results["worst_sgr"] == pytest.approx(min(means))
    for name in (*results["targets"], results["untouched"]):
        assert set(results["sgr"][name]) == {"12", "24"}


def test_even_the_short_run_has_an_effect_where_it_should(demo):
    """Weaker than the full run's; the bounds leave room for another machine's rounding."""
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["msgr"] > 0.05
    assert results["benign_sgr"] < 0.1
    assert results["prompt_alignment"]["loss"] < 0.05


def test_the_table_shows_every_concept(demo):
    folder, output = demo
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name in (*results["targets"], results["untouched"]):
        assert name in output
    assert number(results["msgr"]) in output
    assert "DreamBooth" in output


def test_the_page_about_it_is_beside_it(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "demonstration" in page
    assert (folder / "evaluation" / "evaluation.json").is_file()


def test_figures_are_pictures_of_a_useful_size(demo):
    folder, _ = demo
    for name in ("curves.png", "grid.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("L").resize((64, 64)).getcolors()) > 20


def test_the_log_tells_each_step(demo):
    folder, _ = demo
    log = (folder / "log").read_text(encoding="utf-8")
    steps = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]["immunize"]
    assert log.count("StepReport") == steps["steps"]


def test_the_immunized_model_opens_without_mima(demo):
    folder, _ = demo
    script = """
import sys
sys.modules["mima"] = None  # importing it would fail
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("a cat emoji in noto style", num_inference_steps=2).images[0]
assert image.size == (64, 64)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "immunized")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_does_not_overwrite(demo):
    folder, _ = demo
    command = [sys.executable, "-m", "mima", "demo", "--quick", "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert "Traceback" not in done.stderr
