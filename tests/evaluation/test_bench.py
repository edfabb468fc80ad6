"""What is drawn and told apart for each attack, and how much work that is."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from support import tiny

from mima.adaptation import METHODS
from mima.concepts import Concept, Picture, embedded_concept
from mima.evaluation.bench import Bench
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import TRAINS_A_TOKEN, attack_grid, grid_config
from mima.evaluation.plan import AttackPlan
from mima.evaluation.records import SIDES, Pictures, PromptVariant
from mima.evaluation.tuning import TuningLog
from mima.sampling import Sampler


def bench(config, concepts, targets, folder, prompts=()):
    return Bench(
        models=dict.fromkeys(SIDES, "embedded"),
        concepts=concepts,
        roles={name: "target" if name in targets else "other" for name in concepts},
        config=config,
        sampler=Sampler(**config.sampler),
        similarities={},
        protocol="standard",
        folder=EvaluationFolder(folder),
        device="cpu",
        prompts=prompts,
    )


def captioned(name, kind, images, held_out):
    pictures = {
        where: [Picture(tiny.picture("red", "round", seed=len(c)), c) for c in captions]
        for where, captions in (("images", images), ("held_out", held_out))
    }
    return Concept(name, f"a {name}", kind=kind, **pictures)


def test_objects_are_told_from_what_else_was_asked_for(tmp_path):
    style = captioned("mono", "style", ["a cup in mono", "a fox in mono"], ["a bus in mono"])
    cat = captioned("cat", "object", ["a cat"], ["a cat in snow", "two cats"])
    config = grid_config("quick", {"images": ["same", "other"], "seeds": [0], "lr_factors": [1]})

    def told(concepts, prompts=()):
        made = bench(config, concepts, concepts, tmp_path, prompts)
        for attack in attack_grid(config, concepts, {}):
            shown = made.objects(attack)
            yield (attack.slug, attack.images), shown, made.all_objects(shown.values())

    found = {key: (shown, every) for key, shown, every in told({"mono": style, "cat": cat})}
    asked = ["a bus", "a cat in snow", "two cats"]
    assert found["mono", "same"] == ({"a bus in mono": {"a bus"}}, asked)
    # compared with the pictures that immunization saw, whose objects are others
    shown, every = found["mono", "other"]
    assert shown == {"a cup in mono": {"a cup"}, "a fox in mono": {"a fox"}}
    assert every == [*asked, "a cup", "a fox"]
    # whatever caption of the cat is picked, the cat was recognised
    shown, every = found["cat", "same"]
    assert set(shown.values()) == {frozenset({"a cat", "a cat in snow", "two cats"})}
    assert every == [*asked, "a cat"]
    # one object alone is told from what ordinary prompts ask for
    for _, shown, every in told({"cat": cat}, ["a dog", "a house"]):
        assert {"a dog", "a house"} == set(every) - next(iter(shown.values()))


@pytest.mark.parametrize(
    ("count", "trained", "judges"), [(1, 1, 1), (3, 3, 3), (4, 3, 1), (9, 7, 2)]
)
def test_a_trial_holds_back_every_fourth_picture_where_there_are_four(
    count, trained, judges, tmp_path
):
    concept = tiny.concept(images=count)
    config = grid_config("headline", {"seeds": [0]})
    made = bench(config, {"red": concept}, {"red"}, tmp_path)
    attack = attack_grid(config, {"red": concept}, {})[0]
    shown, jobs, files = made.trial_material(attack)
    places = [int(file.stem) for group in files for file in group]
    assert (len(shown.images), len(places)) == (trained, judges)
    assert len(jobs) == 2 * len(files) == 2
    kept = [concept.images[place].image for place in places]
    assert count < 4 or not any(picture.image in kept for picture in shown.images)


@pytest.mark.parametrize("token", [None, "<new1>"])
def test_every_method_has_material_of_all_pictures_and_prompts(tmp_path, token):
    name = token or "red"
    own = [picture.captioned(f"a {name} emoji") for picture in tiny.concept().images]
    concept = Concept(
        "red", f"a {name} emoji", own, held_out=own[:2], token=token, class_prompt="an emoji"
    )
    settings = {
        "methods": {method: {} for method in METHODS},
        "images": get_args(Pictures),
        "prompts": get_args(PromptVariant),
        "seeds": [0],
        "lr_factors": [1],
    }
    concepts = {"red": concept, "blue": tiny.concept("blue")}
    made = bench(grid_config("quick", settings), concepts, {"red"}, tmp_path)
    attacks = attack_grid(made.config, made.with_role("target"), made.with_role("other"))
    targets = [attack for attack in attacks if attack.role == "target"]
    for attack in targets:
        trained, _ = made.material(attack)
        shorter, *_ = made.trial_material(attack)
        for described in (trained, shorter):
            strangers = [p for p in described.images if p.prompt == "a blue round emoji"]
            assert bool(strangers) == (attack.images == "mixed")
            if attack.adaptation.method in TRAINS_A_TOKEN:
                assert described.token in described.prompt
                own = [p for p in described.images if described.token in p.prompt]
                assert len(own) + len(strangers) == len(described.images)
    # a word that is trained has one name, or the concept's own besides
    words = {
        method: len({a.prompt_variant for a in targets if a.adaptation.method == method})
        for method in METHODS
    }
    few = 1 if token is None else 2
    assert words == {method: few if method in TRAINS_A_TOKEN else 3 for method in METHODS}
    assert len(targets) == 5 * sum(words.values())


@pytest.mark.parametrize(
    ("preset", "trials", "attacks", "steps", "pictures"),
    [("quick", 0, 15, 1_500, 604), ("headline", 96, 18, 16_800, 1_752)],
)
def test_presets_are_as_much_work_as_is_said(preset, trials, attacks, steps, pictures, tmp_path):
    """Two styles and an other on the embedded model: the counts beside the presets."""
    config = grid_config(preset)
    concepts = {
        name: embedded_concept(name)
        for name in ("style-mono", "style-fluent", "benign-style-twemoji")
    }
    targets = dict(itertools.islice(concepts.items(), 2))
    others = {name: concepts[name] for name in concepts if name not in targets}
    made = bench(config, concepts, targets, tmp_path, ["an emoji"] * config.benign_prompts)
    plan = AttackPlan(TuningLog(tmp_path, config.tune), attack_grid(config, targets, others))
    tasks = [*plan.first(), *plan.waiting]
    assert len(tasks) == trials + attacks
    assert sum(map(made.steps, tasks)) == steps
    assert sum(map(made.drawn, [*tasks, *SIDES])) == pictures
