"""Runs that are described in a file: recipes, paths, and files that are none."""

from __future__ import annotations

import json

import pytest
import yaml
from support import tiny
from support.immunizing import FULL

from mima.errors import MimaError
from mima.immunization.config import ImmunizeConfig
from mima.immunization.from_file import ImmunizeRun, concepts_of, load_config, read_run
from mima.immunization.recipes import RECIPES, default
from mima.settings import parse_config


def test_a_file_in_the_home_folder_finds_its_concepts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a" / "dog"
    folder.mkdir(parents=True)
    tiny.picture("red", "round").save(folder / "1.png")
    (folder / "1.txt").write_text("a photo of a dog")
    (tmp_path / "run.yaml").write_text("model: embedded\nconcepts: [a/dog]\noutput: out")
    found, _ = concepts_of(read_run("~/run.yaml"), "~/run.yaml")
    assert [concept.name for concept in found] == ["dog"]


def test_every_path_of_a_file_may_start_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "model").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(
        "model: ~/model\nconcepts: [unseen-fox]\noutput: ~/out\nerased: ~/erased\n"
        "immunize: {captions: ~/captions.txt}\n"
    )
    run = read_run(tmp_path / "run.yaml")
    home = tmp_path / "home"
    assert run.model == str(home / "model")
    assert (run.output, run.erased) == (home / "out", home / "erased")
    assert run.immunize.captions == home / "captions.txt"


@pytest.mark.parametrize(
    ("told", "rate"),
    [({}, 5e-6), ({"model": "embedded"}, 1e-4), ({"model": "embedded", "rate": "1e-5"}, 1e-5)],
    ids=["any model", "the embedded one", "told"],
)
def test_a_file_has_the_unit_of_rates_of_its_model(tmp_path, told, rate):
    run = {
        "model": "some/model",
        "concepts": ["tiger"],
        "output": "out",
        "recipe": "default",
    } | told
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    assert read_run(path).immunize == default(rate=rate)
    assert read_run(path, settings={"rate": 2e-5}).immunize == default(rate=2e-5)
    with pytest.raises(MimaError, match="rate: the recipe default alone reads it"):
        read_run(path, settings={"rate": 2e-5}, recipe="tar")
    read_run(path, settings={"rate": None}, recipe="tar")
    with pytest.raises(MimaError, match="rate: Input should be greater than 0"):
        read_run(path, settings={"rate": -1})


def test_the_recommended_recipe_keeps_benign_concepts_of_a_file_learnable(tmp_path):
    text = {"model": "embedded", "concepts": ["tiger"], "recipe": "default", "output": "out"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(text))
    assert not read_run(path).immunize.reads_benign
    path.write_text(yaml.safe_dump(text | {"benign": ["hamburger"]}))
    assert read_run(path).immunize.upper.benign.lower.steps == 12
    said = {"upper": {"benign": {"every": 2}}}
    path.write_text(yaml.safe_dump(text | {"benign": ["hamburger"], "immunize": said}))
    benign = read_run(path).immunize.upper.benign
    assert benign.every == 2
    assert benign.lower.steps == 12


def test_a_run_names_its_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    text = {"model": "embedded", "concepts": ["cat"], "recipe": "tar", "output": "out"}
    path.write_text(yaml.safe_dump(text | {"immunize": {"upper": {"lr": 1.0}}}))
    run = load_config(path)
    assert run.recipe == "tar"
    assert run.immunize == RECIPES["tar"](upper={"lr": 1.0})
    assert read_run(path).immunize == run.immunize
    said = read_run(path, recipe="apdm", task="relearn", settings={"upper.batch_size": 2})
    assert said.recipe == "apdm"
    assert said.immunize == RECIPES["apdm"]("relearn", upper={"lr": 1.0, "batch_size": 2})
    # what the file says holds only above its recipe
    path.write_text(yaml.safe_dump(text | {"immunize": {"upper": {"path_weights": "uniform"}}}))
    assert read_run(path).immunize.upper.path_every == 4
    path.write_text(yaml.safe_dump(text | {"recipe": "tra"}))
    with pytest.raises(MimaError, match=r"recipe: .*'sophon' or 'tar'"):
        load_config(path)
    with pytest.raises(MimaError, match="recipe 'tra' is unknown; did you mean 'tar'"):
        read_run(path, recipe="tra")


def test_a_run_is_read_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    # no model that is called so
    (tmp_path / "embedded").mkdir()
    text = {"model": "embedded", "concepts": ["cat"], "immunize": FULL, "output": "out"}
    path.write_text(yaml.safe_dump(text))
    run = load_config(path)
    assert (run.model, run.concepts, run.output) == ("embedded", ["cat"], tmp_path / "out")
    located = FULL | {"captions": tmp_path / FULL["captions"]}
    assert run.immunize == ImmunizeConfig.model_validate(located)
    assert load_config(str(path)) == run
    path.write_text(json.dumps(text))
    assert load_config(path) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML: line 1, column 5: "),
        ("a: b\n\tc: d", r"is not valid YAML: line 2, column 1: found character '\\t' .*token$"),
        ("a: \0", "is not valid YAML: unacceptable character"),
        (b"\xff\xfe\xff", "is not valid YAML: byte 0 is no UTF-8 text"),
        ("- 1", "must be a mapping of settings, got list"),
        ("", "is empty, expected a mapping of settings"),
        ("model: embedded", "concepts: Field required"),
        ("{model: embedded, concepts: [cat], immunise: {}}", "did you mean 'immunize'"),
        ("{model: embedded, concepts: [cat], immunize: {upper: 3}}", r"immunize\.upper: .*got 3"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MimaError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(MimaError, match=r"cannot read .*absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_a_run_needs_a_concept():
    with pytest.raises(MimaError, match=r"concepts: .*at least 1"):
        parse_config(ImmunizeRun, {"model": "embedded", "concepts": []}, source="run.yaml")


def test_paths_in_a_file_start_from_its_folder(tmp_path):
    path = tmp_path / "run.yaml"
    text = {"model": "embedded", "concepts": ["cat"], "output": "out"}
    text |= {"immunize": {"captions": "caps.txt"}}
    path.write_text(yaml.safe_dump(text))
    run = load_config(path)
    assert (run.output, run.immunize.captions) == (tmp_path / "out", tmp_path / "caps.txt")
