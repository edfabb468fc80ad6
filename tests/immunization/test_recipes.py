"""Recipes: what each sets, and how it gives way to what is said."""

from __future__ import annotations

import pytest

from mima.errors import MimaError
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.recipes import RECIPES, TASKS, beneath, default, paper, unnamed


@pytest.mark.parametrize(("task", "lr"), [("relearn", 3e-5), ("personalize", 2e-5)])
def test_a_tasks_recipe_gives_way_to_what_is_said(task, lr):
    config = unnamed(task)
    assert config.upper.lr == lr
    assert (config.erase_first, config.new_words) == (task == "relearn", task == "personalize")
    for upper in ({"batch_size": 3}, UpperConfig(batch_size=3)):
        other = unnamed(task, steps=5, upper=upper)
        assert other.steps == 5
        assert other.upper == config.upper.model_copy(update={"batch_size": 3})
    assert unnamed(task, upper={"lr": 1.0}).upper.lr == 1.0
    with pytest.raises(MimaError, match=f"did you mean '{task}'"):
        unnamed(task + "x")


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


def test_several_attackers_are_laid_over_a_recipes_one():
    own = RECIPES["apdm"]().lower
    one, other = RECIPES["apdm"](lower=[{"prior_weight": 2.0}, LowerConfig(lr=1e-3)]).lower
    assert one == own.model_copy(update={"prior_weight": 2.0})
    assert other == own.model_copy(update={"lr": 1e-3})
