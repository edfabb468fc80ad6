"""Settings: what is read, what is refused, and that the message says which one and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import yaml
from pydantic import ValidationError
from support.immunizing import FULL

from mima.errors import MimaError, ProblemList
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.settings import checked, parse_config

SEVERAL = {
    "method": "joint",
    "lower": [
        {"steps": 2, "lr": [1e-4, 1e-3], "age": [5, 50], "share": 3.0},
        {"steps": 2, "parameters": "lora", "rank": [2, 16], "captions": ["as_is", "empty"]},
        {"steps": 2, "optimizer": "momentum", "benign_start": [0, 4]},
    ],
    "upper": {"ascent_ratio": 0.5, "benign": {"every": 2, "lower": {"steps": 4}, "path_every": 2}},
}


@pytest.mark.parametrize("settings", [{}, FULL, SEVERAL], ids=["defaults", "all", "several"])
def test_settings_survive_json_and_yaml(settings):
    config = ImmunizeConfig.model_validate(settings)
    plain = config.model_dump(mode="json")
    for text in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
        assert ImmunizeConfig.model_validate(text) == config
    assert_holds(plain, settings)


def assert_holds(plain, settings):
    for name, value in settings.items():
        if isinstance(value, dict):
            assert_holds(plain[name], value)
        elif isinstance(value, list) and isinstance(value[0], dict):
            for one, told in zip(plain[name], value, strict=True):
                assert_holds(one, told)
        else:
            assert plain[name] == value


def test_one_attacker_or_several():
    one, two = ImmunizeConfig(lower={"lr": 1e-3}), ImmunizeConfig.model_validate(SEVERAL)
    assert one.attackers == (one.lower,)
    assert one.lower.lr == 1e-3
    assert two.attackers == two.lower
    assert [attacker.share for attacker in two.attackers] == [3.0, 1.0, 1.0]
    assert two.highest_lr == 1e-3
    assert "rank" not in two.read()["lower"][0]
    assert two.read()["lower"][1]["rank"] == [2, 16]


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
        # Python's True is a 1
        ("steps", True, "should be a number"),
        ("lower.lr", True, "should be a number"),
        ("lower.age", [False, 2], "should be a number"),
        ("upper.margin", False, "should be a number"),
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
        ("trackers", "wandb", "should be a list"),
        ("lower.steps", 0, "greater than or equal to 1"),
        ("lower.optimizer", "lion", "'sgd', 'momentum' or 'adam'"),
        ("lower.captions", "sks", "'as_is', 'without_name', 'rare_token' or 'empty'"),
        ("lower.share", 0, "greater than 0"),
        ("upper.margin", -1, "greater than or equal to 0"),
        ("upper.benign.weight", 0, "greater than 0"),
        ("upper.benign.every", 0, "greater than or equal to 1"),
        ("upper.benign.target", "keep", "'match' or 'held_out'"),
        ("lower.lr", 0, "must be > 0"),
        ("lower.token_lr", 0, "greater than 0"),
        ("lower.batch_size", 0, "greater than or equal to 1"),
        ("lower.rank", 0, "must be >= 1"),
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
    assert re.search(rf"- {re.escape(name)}(\.0)?: ", message)
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
        ({"lower": [{}, {"optimiser": "sgd"}]}, "lower.1.optimiser", "did you mean 'optimizer'"),
        ({"upper": {"benign": {"lower": {"ranks": 2}}}}, "upper.benign.lower.ranks", "'rank'"),
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


def test_a_list_whose_items_are_all_refused_is_told_once():
    with pytest.raises(ProblemList) as caught:
        parse_config(ImmunizeConfig, {"upper": {"retain_captions": ["onw"]}}, source="run.yaml")
    (problem,) = caught.value.problems
    assert problem.startswith("upper.retain_captions.0: Input should be 'own'")
    with pytest.raises(ProblemList, match="at least 1 item"):
        parse_config(ImmunizeConfig, {"upper": {"retain_captions": []}}, source="run.yaml")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"upper": {"parameters": "lora"}}, "upper.parameters: 'lora' is an adapter"),
        ({"lower": {"train_token": True}}, "lower.train_token: there are no new words"),
        ({"lower": {"parameters": None}}, "parameters: null leaves nothing to train"),
        ({"lower": []}, "lower: no attacker"),
        ({"lower": [{"steps": 2}, {"steps": 3}]}, "take the same number of steps, got 2, 3"),
        ({"lower": [{}, {"parameters": "lora"}]}, "the projected merge asks each attacker"),
        (
            {"lower": [{}, {}], "method": "alternating"},
            "all concepts in each step and one attacker",
        ),
        ({"lower": {"rank": (4, 2)}}, "lower.rank: Value error, must be >= 1"),
        ({"lower": {"captions": []}}, "captions: at least one is needed"),
        (
            {"new_words": True, "lower": {"train_token": True, "captions": "empty"}},
            "captions: with train_token they hold the new word",
        ),
        (
            {"new_words": True, "lower": {"train_token": True, "benign_start": (1, 2)}},
            "benign_start: no benign concept has the new word",
        ),
        ({"lower": {"benign_start": (3, 2)}}, "benign_start: must be two numbers"),
        ({"lower": {"benign_start": (0, 0)}}, "benign_start: [0, 0] steps are none"),
        ({"lower": {"rank": (4, 32)}}, "lower.rank, lower.alpha: they are LoRA's"),
        (
            {"merge": "sum", "lower": [{}, {"parameters": "denoiser", "alpha": 4.0}]},
            "lower.rank, lower.alpha: they are LoRA's",
        ),
        ({"method": "alternating", "lower": {"captions": "empty"}}, "whose attackers draw nothing"),
        ({"upper": {"benign": {}}}, "upper.benign: it is part of what retains"),
        (
            {"upper": {"ascent_ratio": 1, "benign": {"lower": {"age": (2, 3)}}}},
            "a benign adaptation begins from θ, takes its steps once",
        ),
        (
            {"upper": {"ascent_ratio": 1, "benign": {"lower": {"share": 5}}}},
            "no age, captions, benign_start, prior_weight, share, concepts_per_forward",
        ),
        (
            {"upper": {"ascent_ratio": 1, "benign": {"lower": {"alpha": 2.0}}}},
            "upper.benign.lower.rank, upper.benign.lower.alpha: they are LoRA's; "
            "set upper.benign.lower.parameters: lora",
        ),
        (
            {"upper": {"ascent_ratio": 1, "benign": {"target": "held_out", "paths": 9}}},
            "paths: they are of target 'match'",
        ),
        (
            {"method": "joint", "lower": {"parameters": "lora", "concepts_per_forward": 3}},
            "lower.concepts_per_forward: only concepts that are merged",
        ),
        (
            {"upper": {"ascent_ratio": 1, "benign": {"path_every": 1}}},
            "upper.benign.path_every: 1 asks for states on the way of 1 steps",
        ),
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
        (
            {"method": "alternating", "upper": {"lr_schedule": "cosine"}},
            "no ascent_ratio, no lr_schedule",
        ),
        ({"method": "alternating", "merge": "average"}, "not for merge 'average'"),
        *(
            ({"method": method, "merge": "average"}, f"method '{method}' merges nothing; leave it")
            for method in ("none", "imma", "joint")
        ),
        ({"method": "alternating", "lower": {"steps": 2}}, "lower.steps 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, reason):
    with pytest.raises(MimaError, match=re.escape(reason)):
        parse_config(ImmunizeConfig, settings, source="run.yaml")


@pytest.mark.parametrize("parameters", [r"\.(to_k|to_v)+\.weight", "mytoken", "+tokens", None])
def test_a_pattern_that_looks_like_a_former_spelling_is_none(parameters):
    assert LowerConfig(parameters=parameters, train_token=True).parameters == parameters


@dataclass(frozen=True)
class Attack:
    steps: int = 3
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Attack: steps must be at least 1, got {self.steps}")


@dataclass
class Attacks:
    first: Attack = Attack()
    count: int = 1


def test_names_within_settings_are_checked_too():
    assert checked(Attacks, "attacks", {"first": {"steps": 4}}) == Attacks(Attack(steps=4))
    for settings, named in (
        ({"first": {"stpes": 4}}, r"first\.stpes; did you mean 'steps'"),
        ({"first": {1: 4}}, r"first\.1; Known: lr, steps"),
        ({1: 2}, "1; Known: count, first"),
        ({None: 2}, "None; Known: count, first"),
    ):
        with pytest.raises(MimaError, match=f"attacks has no setting {named}"):
            checked(Attacks, "attacks", settings)


def test_dataclasses_of_settings_are_checked_alike():
    assert checked(Attack, "lora", {"steps": "4"}) == Attack(steps=4)
    with pytest.raises(MimaError, match="lora has no setting stpes; did you mean 'steps'"):
        checked(Attack, "lora", {"stpes": 4})
    with pytest.raises(ProblemList) as caught:
        checked(Attack, "lora", {"steps": "many", "lr": "fast"})
    assert [problem.split()[0] for problem in caught.value.problems] == ["steps", "lr"]
    with pytest.raises(MimaError, match="steps must be at least 1, got 0"):
        checked(Attack, "lora", {"steps": 0})


def test_a_card_tells_no_clip_of_what_is_scaled():
    assert "max_grad_norm" in ImmunizeConfig().read()["upper"]
    assert "max_grad_norm" not in ImmunizeConfig(upper={"ascent_ratio": 0.5}).read()["upper"]


@pytest.mark.parametrize("method", ["none", "alternating"])
def test_what_differentiates_nothing_may_compute_in_half_precision(method):
    lower = {"parameters": "cross_attention", "steps": 1}
    settings = {"precision": "bfloat16", "hypergradient": "finite_difference", "lower": lower}
    ImmunizeConfig.model_validate(settings | {"method": method})
    with pytest.raises(ValueError, match="bfloat16 rounds gradients"):
        ImmunizeConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower": {"lr": [1e-4]}}, "lower.lr: Input should be a valid number, got"),
        ({"lower": None}, "lower: Input should be settings by name, got None"),
        ({"captions": 5}, "captions: Input should be a path, got 5"),
    ],
)
def test_errors_speak_of_settings_and_not_of_python(settings, message):
    with pytest.raises(MimaError) as refused:
        parse_config(ImmunizeConfig, settings, source="a file")
    assert message in str(refused.value)
    assert "tuple" not in str(refused.value)
