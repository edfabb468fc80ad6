"""Settings: what is read, what is refused, and that the message says which one and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import yaml
from pydantic import ValidationError
from support import tiny

from mima.errors import MimaError, ProblemList
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.from_file import ImmunizeRun, concepts_of, load_config, read_run
from mima.immunization.recipes import RECIPES, TASKS, beneath, default, paper
from mima.settings import checked, parse_config

FULL = {
    "method": "compose",
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
            "lower.rank, lower.alpha: they are LoRA's",
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


@pytest.mark.parametrize(("task", "lr"), [("relearn", 3e-5), ("personalize", 2e-5)])
def test_a_tasks_recipe_gives_way_to_what_is_said(task, lr):
    config = ImmunizeConfig.for_task(task)
    assert config.upper.lr == lr
    assert (config.erase_first, config.new_words) == (task == "relearn", task == "personalize")
    for upper in ({"batch_size": 3}, UpperConfig(batch_size=3)):
        other = ImmunizeConfig.for_task(task, steps=5, upper=upper)
        assert other.steps == 5
        assert other.upper == config.upper.model_copy(update={"batch_size": 3})
    assert ImmunizeConfig.for_task(task, upper={"lr": 1.0}).upper.lr == 1.0
    with pytest.raises(MimaError, match=f"did you mean '{task}'"):
        ImmunizeConfig.for_task(task + "x")


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("task", [None, "relearn", "personalize"])
def test_every_recipe_is_a_configuration_that_gives_way(name, task):
    config = RECIPES[name](task)
    new_words = task == "personalize" and name != "paper"
    assert (config.erase_first, config.new_words) == (task == "relearn", new_words)
    more = RECIPES[name](task, steps=3, upper={"weight_decay": 0.3})
    assert more.steps == 3
    assert more.upper == config.upper.model_copy(update={"weight_decay": 0.3})
    assert ImmunizeConfig.model_validate(beneath({}, name, task)) == config
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("task", [None, "relearn", "personalize"])
def test_a_run_that_names_no_recipe_has_the_defaults_and_what_its_task_sets(task):
    config = ImmunizeConfig.model_validate(beneath({}, None, task))
    own = {"upper": {"lr": 2e-5}} if task == "personalize" else {}
    assert config == ImmunizeConfig(**TASKS.get(task, {}), **own)
    assert (config.method, config.lower.lr, config.num_class_images) == ("mima", 5e-6, 64)


def test_the_papers_recipe_is_what_the_released_scripts_pass():
    # the arguments of scripts/relearn_train.sh and personalize_train.sh, and train.py's defaults
    both = {"method": "alternating", "resolution": 512, "steps": 1000, "num_captions": 200}
    for task, class_images, upper_lr in (("relearn", 200, 3e-5), ("personalize", 2, 2e-5)):
        config = paper(task)
        assert {name: getattr(config, name) for name in both} == both
        assert (config.num_class_images, config.token_steps) == (class_images, 0)
        lower, upper = config.lower, config.upper
        # --learning_rate_inner 5e-6, doubled by --scale_lr with --with_prior_preservation
        assert (lower.lr, lower.parameters, lower.steps) == (2 * 5e-6, "denoiser", 1)
        assert (upper.lr, upper.parameters) == (upper_lr, "cross_attention")
        assert (lower.prior_weight, upper.prior_weight) == (1.0, 1.0)
        assert (lower.batch_size, upper.batch_size) == (1, 1)
        assert (upper.weight_decay, upper.max_grad_norm) == (1e-2, 1.0)
        assert (upper.objective, upper.lr_schedule) == ("neg", "constant")
    assert paper().num_class_images == 200
    assert not paper().erase_first


def test_rivals_take_the_steps_that_their_sources_take():
    apdm, sophon, tar = (RECIPES[name]() for name in ("apdm", "sophon", "tar"))
    for config in (apdm, sophon, tar):
        assert (config.method, config.hypergradient) == ("joint", "first_order")
        assert config.upper.parameters == "denoiser"
        assert {attacker.parameters for attacker in config.attackers} == {"denoiser"}
    steps = [(config.steps, config.attackers[0].steps) for config in (apdm, sophon, tar)]
    assert steps == [(800, 20), (1000, 50), (750, 64)]
    assert [c.upper.objective for c in (apdm, sophon, tar)] == ["pair", "neg", "entropy"]
    assert [attacker.lr for attacker in tar.attackers] == [2e-6, 2e-5, 4e-5]


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


def test_the_recommended_recipe_bounds_what_long_runs_raise():
    def bound(config):
        return config.upper.objective, config.upper.margin

    short, long = ("log", 0.0), ("hinge", 4.0)
    assert bound(default()) == bound(default(steps=300)) == short
    assert bound(default(steps=400)) == bound(default("personalize", steps=800)) == long
    for steps, expected in ((300, short), (800, long)):
        laid = ImmunizeConfig.model_validate(beneath({"steps": steps}, "default"))
        assert bound(laid) == expected
        assert laid == default(steps=steps)
    # as text and as a number of another kind, too; a wrong one is reported with all settings
    assert bound(ImmunizeConfig.model_validate(beneath({"steps": "800"}, "default"))) == long
    for wrong in (-5, "many", 10**12, None):
        with pytest.raises(ValueError, match="steps"):
            ImmunizeConfig.model_validate(beneath({"steps": wrong}, "default"))
    # what somebody says of the objective wins, and of the margin
    assert bound(default(steps=800, upper={"objective": "log"})) == short
    plain = beneath({"steps": 800, "upper": {"objective": "neg"}}, "default")
    assert bound(ImmunizeConfig.model_validate(plain)) == ("neg", 0.0)
    plain = beneath({"steps": 800, "upper": UpperConfig(margin=3.0)}, "default")
    assert bound(ImmunizeConfig.model_validate(plain)) == ("hinge", 3.0)


def test_a_setting_of_one_attacker_is_laid_over_each_of_a_recipes():
    plain = beneath({"lower": {"steps": 8}}, "tar")
    config, tar = ImmunizeConfig.model_validate(plain), RECIPES["tar"]()
    assert [attacker.steps for attacker in config.attackers] == [8, 8, 8]
    assert [a.lr for a in config.attackers] == [a.lr for a in tar.attackers]
    assert {attacker.parameters for attacker in config.attackers} == {"denoiser"}


def test_the_recommended_recipe_takes_the_models_usual_rate_for_its_unit():
    here, there = default(rate=1e-4), default("relearn", steps=7, upper={"batch_size": 1})
    assert here.attackers[0].lr == pytest.approx((5e-5, 2e-4))
    assert here.upper.lr == pytest.approx(5e-4)
    assert (there.steps, there.erase_first, there.upper.batch_size) == (7, True, 1)
    assert there.upper.objective == "log"
    assert there.attackers[0].lr == pytest.approx((2.5e-6, 1e-5))
    assert here.upper.benign is None
    adaptation = default(rate=1e-4, benign=True).upper.benign.lower
    assert adaptation.lr == pytest.approx((3e-5, 3e-4))
    assert adaptation.parameters == "denoiser"


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


def test_several_attackers_are_laid_over_a_recipes_one():
    own = RECIPES["apdm"]().lower
    one, other = RECIPES["apdm"](lower=[{"prior_weight": 2.0}, LowerConfig(lr=1e-3)]).lower
    assert one == own.model_copy(update={"prior_weight": 2.0})
    assert other == own.model_copy(update={"lr": 1e-3})


def test_paths_in_a_file_start_from_its_folder(tmp_path):
    path = tmp_path / "run.yaml"
    text = {"model": "embedded", "concepts": ["cat"], "output": "out"}
    text |= {"immunize": {"captions": "caps.txt"}}
    path.write_text(yaml.safe_dump(text))
    run = load_config(path)
    assert (run.output, run.immunize.captions) == (tmp_path / "out", tmp_path / "caps.txt")


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
