"""Settings: what is read, what is refused, and that the message says which one and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import yaml
from pydantic import ValidationError

from mima.errors import MimaError, ProblemList
from mima.immunization.config import (
    RECIPES,
    ImmunizeConfig,
    ImmunizeRun,
    LowerConfig,
    UpperConfig,
    load_config,
)
from mima.settings import checked, parse_config

FULL = {
    "method": "joint",
    "merge": "average",
    "hypergradient": "first_order",
    "resolution": 64,
    "steps": 7,
    "seed": 3,
    "lower": {
        "steps": 2,
        "optimizer": "sgd",
        "lr": 1e-2,
        "batch_size": 3,
        "parameters": "lora",
        "train_token": True,
        "token_lr": 0.1,
        "rank": 2,
        "alpha": 4.0,
        "prior_weight": 0.5,
    },
    "upper": {
        "lr": 1e-4,
        "weight_decay": 0.0,
        "batch_size": 2,
        "parameters": r"\.attn2\.to_q\.",
        "prior_weight": 2.0,
        "prior_batch_size": 5,
        "max_grad_norm": None,
        "loss_cap": 3.0,
    },
    "lam": 0.5,
    "captions": "captions.txt",
    "num_captions": 9,
    "num_class_images": 4,
    "new_words": True,
    "token_steps": 6,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "offload_optimizer": True,
    "checkpoint_every": None,
    "max_skipped": 0,
    "divergence": None,
    "trackers": ["tensorboard"],
}


@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "all"])
def test_settings_survive_json_and_yaml(settings):
    config = ImmunizeConfig.model_validate(settings)
    plain = config.model_dump(mode="json")
    for text in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
        assert ImmunizeConfig.model_validate(text) == config
    for name, value in settings.items():
        if isinstance(value, dict):
            assert plain[name].items() >= value.items()
        else:
            assert plain[name] == value


def test_settings_cannot_be_changed_by_accident():
    config = ImmunizeConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.lower.lr = 3.0


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("steps", 0, "greater than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("resolution", 0, "greater than or equal to 1"),
        ("lam", -1e-3, "greater than or equal to 0"),
        ("num_captions", 0, "greater than or equal to 1"),
        ("num_class_images", 0, "greater than or equal to 1"),
        ("token_steps", -1, "greater than or equal to 0"),
        ("checkpoint_every", 0, "greater than or equal to 1"),
        ("max_skipped", -1, "greater than or equal to 0"),
        ("divergence", 1, "greater than 1"),
        ("method", "mimi", "'joint', 'compose', 'mima' or 'alternating'"),
        ("merge", "mean", "'projected', 'average' or 'sum'"),
        ("hypergradient", "implicit", "'exact', 'finite_difference' or 'first_order'"),
        ("precision", "int8", "'float32', 'float16' or 'bfloat16'"),
        ("trackers", "wandb", "valid tuple"),
        ("lower.steps", 0, "greater than or equal to 1"),
        ("lower.optimizer", "lion", "'sgd' or 'adam'"),
        ("lower.lr", 0, "must be > 0"),
        ("lower.token_lr", 0, "greater than 0"),
        ("lower.batch_size", 0, "greater than or equal to 1"),
        ("lower.rank", 0, "greater than or equal to 1"),
        ("lower.alpha", 0, "greater than 0"),
        ("lower.prior_weight", -1, "greater than or equal to 0"),
        ("upper.lr", "fast", "valid number"),
        ("upper.weight_decay", -1, "greater than or equal to 0"),
        ("upper.batch_size", 0, "greater than or equal to 1"),
        ("upper.prior_weight", -1, "greater than or equal to 0"),
        ("upper.prior_batch_size", 0, "greater than or equal to 1"),
        ("upper.concepts_per_forward", 0, "greater than or equal to 1"),
        ("upper.max_grad_norm", 0, "greater than 0"),
        ("upper.loss_cap", 0, "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_named(name, value, reason):
    raw = value
    for part in reversed(name.split(".")):
        raw = {part: raw}
    with pytest.raises(MimaError) as caught:
        parse_config(ImmunizeConfig, raw, source="run.yaml")
    message = str(caught.value)
    assert "run.yaml has 1 problem" in message
    assert f"- {name}: " in message
    assert reason in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "prior_weight", "max_grad_norm"])
def test_numbers_are_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        UpperConfig(**{name: value})


@pytest.mark.parametrize(
    ("raw", "name", "hint"),
    [
        ({"stpes": 3}, "stpes", "did you mean 'steps'"),
        ({"lower": {"optimiser": "sgd"}}, "lower.optimiser", "did you mean 'optimizer'"),
        ({"upper": {"qqq": 1}}, "upper.qqq", "Known: ascent_ratio, batch_size"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(raw, name, hint):
    with pytest.raises(MimaError, match=rf"{re.escape(name)}: unknown setting; .*{hint}"):
        parse_config(ImmunizeConfig, raw, source="run.yaml")


def test_every_problem_is_told_at_once():
    raw = {"stpes": 3, "seed": -1, "lower": {"lr": 0, "what": 1}}
    with pytest.raises(ProblemList) as caught:
        parse_config(ImmunizeConfig, raw, source="run.yaml")
    assert "4 problem(s)" in str(caught.value)
    named = sorted(problem.split(":")[0] for problem in caught.value.problems)
    assert named == ["lower.lr", "lower.what", "seed", "stpes"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"upper": {"parameters": "lora"}}, "upper.parameters: 'lora' is an adapter"),
        ({"lower": {"train_token": True}}, "lower.train_token: there are no new words"),
        ({"lower": {"parameters": None}}, "parameters: null leaves nothing to train"),
        (
            {"lower": {"parameters": "cross_attention_kv+token"}},
            "lower.parameters: Value error, new words are trained by train_token: true, with "
            "parameters: 'cross_attention_kv'",
        ),
        ({"lower": {"parameters": "token"}}, "train_token: true, with parameters: null"),
        ({"merge": "none"}, "merge: Value error, to merge nothing is a method of its own"),
        ({"hypergradient": "alternating"}, "write method: alternating"),
        ({"token_steps": 3}, "token_steps: there are no new words"),
        ({"lower": {"token_lr": 1.0}}, "token_lr: without train_token"),
        (
            {"method": "alternating", "new_words": True, "lower": {"train_token": True}},
            "method: 'alternating' is the published MIMA update: one lower step",
        ),
        ({"method": "alternating", "merge": "average"}, "not for merge 'average'"),
        ({"method": "alternating", "lower": {"steps": 2}}, "lower.steps 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, reason):
    with pytest.raises(MimaError, match=re.escape(reason)):
        parse_config(ImmunizeConfig, settings, source="run.yaml")


@pytest.mark.parametrize("parameters", [r"\.(to_k|to_v)+\.weight", "mytoken", "+tokens", None])
def test_a_pattern_that_looks_like_a_former_spelling_is_none(parameters):
    assert LowerConfig(parameters=parameters, train_token=True).parameters == parameters


@pytest.mark.parametrize("task", list(RECIPES))
def test_a_tasks_recipe_gives_way_to_what_is_said(task):
    config = ImmunizeConfig.for_task(task)
    assert config.upper.lr == RECIPES[task]["upper"]["lr"]
    assert (config.erase_first, config.new_words) == (task == "relearn", task == "personalize")
    for upper in ({"batch_size": 3}, UpperConfig(batch_size=3)):
        other = ImmunizeConfig.for_task(task, steps=5, upper=upper)
        assert other.steps == 5
        assert other.upper == config.upper.model_copy(update={"batch_size": 3})
    assert ImmunizeConfig.for_task(task, upper={"lr": 1.0}).upper.lr == 1.0
    with pytest.raises(MimaError, match=f"did you mean '{task}'"):
        ImmunizeConfig.for_task(task + "x")


def test_a_run_is_read_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    text = {"model": "embedded", "concepts": ["cat"], "immunize": FULL, "output": "out"}
    path.write_text(yaml.safe_dump(text))
    run = load_config(path)
    assert (run.model, run.concepts, str(run.output)) == ("embedded", ["cat"], "out")
    assert run.immunize == ImmunizeConfig.model_validate(FULL)
    assert load_config(str(path)) == run
    path.write_text(json.dumps(text))
    assert load_config(path) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        (b"\xff\xfe\xff", "is not valid YAML"),
        ("- 1", "must be a mapping of settings, got list"),
        ("", "must be a mapping of settings, got NoneType"),
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


@dataclass(frozen=True)
class Attack:
    steps: int = 3
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Attack: steps must be at least 1, got {self.steps}")


def test_dataclasses_of_settings_are_checked_alike():
    assert checked(Attack, "lora", {"steps": "4"}) == Attack(steps=4)
    with pytest.raises(MimaError, match="lora has no setting stpes; did you mean 'steps'"):
        checked(Attack, "lora", {"stpes": 4})
    with pytest.raises(ProblemList) as caught:
        checked(Attack, "lora", {"steps": "many", "lr": "fast"})
    assert [problem.split()[0] for problem in caught.value.problems] == ["steps", "lr"]
    with pytest.raises(MimaError, match="steps must be at least 1, got 0"):
        checked(Attack, "lora", {"steps": 0})
