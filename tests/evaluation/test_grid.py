"""What each preset and grid holds, that all of it runs, and with hardly any material."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny
from typer.testing import CliRunner

from mima.adaptation import Diverged, TextualInversion, configure
from mima.cli import app
from mima.concepts import Concept
from mima.errors import MimaError
from mima.evaluation import evaluate
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import PRESETS, attack_grid, grid_config, material
from mima.evaluation.records import SIDES
from mima.evaluation.tuning import TuningLog
from mima.evaluation.worker import Worker
from mima.families import load_pipeline
from mima.report import write_report

METHODS = ("lora", "dreambooth", "textual-inversion", "custom-diffusion")
SMALL = {
    "sampler": {"steps": 1, "guidance": 1.0, "batch_size": 8},
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 1,
    "preparation_steps": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A model, an encoder, and two concepts in files."""
    root = tiny.save_pair(tmp_path_factory.mktemp("models"), "model")
    for name in ("red", "blue"):
        (root / name / "held_out").mkdir(parents=True)
        for index in range(3):
            place = root / name / ("held_out" if index == 2 else "")
            tiny.picture(name, "round", seed=index).save(place / f"{index}.png")
        (root / name / "concept.yaml").write_text(f"name: {name}\nprompt: a {name} emoji\n")
    return root


def described(attack):
    return (
        attack.slug,
        attack.adaptation.method,
        round(attack.adaptation.learning_rate, 12),
        attack.steps,
        attack.prompt_variant,
        attack.images,
        attack.preparation,
        attack.seed,
    )


def published(method):
    """Learning rate and steps of a method in the presets of published settings."""
    settings = configure(method, PRESETS["standard"].methods[method])
    return settings.learning_rate, settings.steps


def usual(slug, method, seed, preparation="none"):
    lr, steps = published(method)
    # textual inversion calls every concept by a new word
    variant = "token" if method == "textual-inversion" else "name"
    return (slug, method, lr, steps, variant, "same", preparation, seed)


@pytest.mark.parametrize("seed", [-1, 2**60])
def test_seeds_are_those_that_pictures_can_be_drawn_with(seed):
    with pytest.raises(MimaError, match=r"seeds.* must be >= 0 and <= "):
        grid_config("quick", {"seeds": [seed]})


def test_a_preset_is_not_set():
    """It would only be called so."""
    with pytest.raises(MimaError, match="setting preset: a preset is chosen by --preset"):
        grid_config("quick", {"preset": "headline"})


def test_a_list_is_asked_for_as_users_write_it():
    with pytest.raises(MimaError, match="seeds: Input should be a list, got 0"):
        grid_config("quick", {"seeds": 0})


def test_no_preparation_is_not_one():
    with pytest.raises(MimaError, match="preparations"):
        grid_config("quick", {"preparations": ["none"]})


def test_standard_is_every_method_once_per_concept_and_seed():
    grid = attack_grid(PRESETS["standard"], {"red": tiny.concept()}, {"blue": tiny.concept("blue")})
    found = Counter(map(described, grid))
    assert found == Counter(
        usual(slug, method, seed)
        for slug, method, seed in itertools.product(("red", "blue"), METHODS, (0, 1, 2))
    )
    assert {m: published(m) for m in METHODS} == {
        "lora": (1e-4, 500),
        "dreambooth": (5e-6, 1000),
        "textual-inversion": (2e-3, 2000),
        "custom-diffusion": (4e-5, 500),
    }


def test_adversarial_is_the_whole_product_and_nothing_else():
    grid = attack_grid(
        PRESETS["adversarial"], {"red": tiny.concept()}, {"blue": tiny.concept("blue")}
    )
    expected = []
    for seed, method in itertools.product((0, 1, 2), METHODS):
        lr, steps = published(method)
        inversion = method == "textual-inversion"
        variants = ("token",) if inversion else ("name", "description", "token")
        for rate, length, variant, images in itertools.product(
            (0.3, 1, 3, 10), (1, 3, 10), variants, ("same", "other")
        ):
            what = (round(lr * rate, 12), steps * length, variant, images, "none")
            expected.append(("red", method, *what, seed))
        expected += [usual("red", method, seed, prepared) for prepared in ("merge", "benign")]
        expected.append(usual("blue", method, seed))
    assert Counter(map(described, grid)) == Counter(expected)
    assert len(grid) == 3 * (3 * 72 + 24 + 4 * 3)
    assert len({attack.id for attack in grid}) == len(grid)


def test_grid_is_the_product_with_preparations_beside_it():
    config = grid_config("adversarial", {"seeds": [0, 1], "methods": {"lora": {"steps": 50}}})
    targets, others = {"red": tiny.concept()}, {"blue": tiny.concept("blue")}
    grid = attack_grid(config, targets, others)
    # learning rates × lengths × prompts × pictures + preparations, + the other concept; × seeds
    assert len(grid) == 2 * (4 * 3 * 3 * 2 + 2 + 1)
    assert len({attack.id for attack in grid}) == len(grid)
    rates = sorted({attack.adaptation.learning_rate for attack in grid})
    assert rates == pytest.approx([3e-5, 1e-4, 3e-4, 1e-3])
    assert {attack.steps for attack in grid} == {50, 150, 500}
    assert config.steps_of(grid[0]) == (0, 12, 25, 38, 50)
    assert all(attack.id.replace(".", "").replace("-", "").replace("_", "").isalnum()
               for attack in grid)  # fmt: skip


def test_what_a_concept_has_no_material_for_is_left_out_and_said(caplog):
    concept = replace(tiny.concept(), name="nameless", held_out=())
    with caplog.at_level(logging.WARNING, "mima"):
        grid = attack_grid(PRESETS["adversarial"], {"nameless": concept}, {})
    assert {attack.images for attack in grid} == {"same"}
    # textual inversion trains a new word whatever the caption says
    variants = {(attack.adaptation.method, attack.prompt_variant) for attack in grid}
    assert variants == {
        ("lora", "name"),
        ("dreambooth", "name"),
        ("textual-inversion", "token"),
        ("custom-diffusion", "name"),
    }
    assert {attack.preparation for attack in grid} == {"none", "merge"}
    assert [record.getMessage().split("with ")[1] for record in caplog.records] == [
        "prompts description, token, for lack of material",
        "images other, for lack of material",
        "preparations benign, for lack of material",
    ]


def test_prior_preservation_without_a_class_is_left_out_and_said(caplog):
    methods = {"dreambooth-lora": {}, "lora": {}, "dreambooth": {"prior_weight": 1.0}}
    families = ["muon", "prior", "locon"]
    config = grid_config("quick", {"methods": methods, "families": families, "seeds": [0, 1]})
    concepts = {
        "red": tiny.concept(),
        "blue": replace(tiny.concept("blue"), class_prompt="", class_images=()),
    }
    others = {f"other-{slug}": concept for slug, concept in concepts.items()}
    with caplog.at_level(logging.WARNING, "mima"):
        grid = attack_grid(config, concepts, others)
    found = {slug: {a.label for a in grid if a.slug == slug} for slug in (*concepts, *others)}
    assert found == {
        "red": {*methods, *families},
        "blue": {"lora", "locon"},
        "other-red": {*methods},
        "other-blue": {"lora"},
    }
    assert [record.getMessage().split("with ")[1] for record in caplog.records] == [
        "methods dreambooth, dreambooth-lora, for lack of material",
        "families muon, prior, for lack of material",
        "methods dreambooth, dreambooth-lora, for lack of material",
    ]


def test_material_of_each_variant():
    concept = tiny.concept()
    config = grid_config("quick", {"prompts": ["name", "description", "token"],
                                   "images": ["same", "other"]})  # fmt: skip
    found = {}
    for attack in attack_grid(config, {"red": concept}, {}):
        described, references = material(attack, concept)
        found[attack.prompt_variant, attack.images] = (
            described.images[0].prompt,
            references[0].prompt,
            len(described.images),
            len(references),
        )
    assert found["name", "same"] == ("a red round emoji", "a red round emoji", 4, 2)
    assert found["name", "other"] == ("a red round emoji", "a red round emoji", 2, 4)
    assert found["description", "same"][:2] == ("a emoji", "a emoji")
    assert found["token", "same"][:2] == ("a sks emoji", "a sks emoji")
    grid = grid_config("quick", {"methods": {"textual-inversion": {}}})
    attack = attack_grid(grid, {"red": concept}, {})[0]
    described, references = material(attack, concept)
    assert (described.token, references[0].prompt) == ("<sks>", "a <sks> emoji")
    assert isinstance(attack.adaptation, TextualInversion)


def test_others_are_attacked_at_the_grids_first_values():
    red = tiny.concept()
    held_out = red.images[2:]
    targets = {"red": replace(red, images=red.images[:2], held_out=held_out)}
    others = {"blue": tiny.concept("blue"), "bare": replace(tiny.concept("green"), held_out=())}
    changes = {"methods": {"lora": {}}, "seeds": [0], "lr_factors": [3, 1], "step_factors": [3]}
    config = grid_config("quick", {**changes, "prompts": ["token"], "images": ["other", "same"]})
    found = {a.slug: a for a in attack_grid(config, targets, others) if a.role == "other"}
    plain = {(a.lr_factor, a.steps, a.prompt_variant) for a in found.values()}
    assert plain == {(3, 1500, "token")}
    # what a concept has no pictures for is the next
    assert {slug: a.images for slug, a in found.items()} == {"blue": "other", "bare": "same"}


def test_a_restart_is_at_half_of_the_steps_however_many():
    methods = {"dreambooth": {"steps": 100}}
    for factor in (1, 2):
        config = grid_config(
            "quick",
            {"methods": methods, "families": ["restart"], "step_factors": [factor], "seeds": [0]},
        )
        grid = attack_grid(config, {"red": tiny.concept()}, {})
        (restarted,) = (a for a in grid if a.label == "restart")
        assert (restarted.steps, restarted.adaptation.restart_every) == (100 * factor, 50 * factor)


@pytest.mark.parametrize("preset", ["standard", "adversarial"])
def test_every_attack_of_a_preset_runs(preset, folders, tmp_path):
    methods = {m: {"steps": 1, "batch_size": 1} for m in METHODS}
    settings = SMALL | {"methods": methods, "seeds": [0]}
    if preset == "adversarial":
        # all prompts, pictures and preparations; every method runs under the other preset, and
        # rates and lengths are numbers
        methods = {"lora": methods["lora"]}
        settings |= {"methods": methods, "lr_factors": [10], "step_factors": [3]}
    result = CliRunner().invoke(
        app,
        [
            *("evaluate", str(folders / "model"), str(folders / "immunized")),
            *("--concepts", str(folders / "red"), "--others", str(folders / "blue")),
            *("--similarity", str(folders / "clip"), "--output", str(tmp_path / "out")),
            *("--preset", preset, "--processes", "1"),
            *(part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")),
        ],
    )
    assert result.exit_code == 0, result.output
    folder = EvaluationFolder(tmp_path / "out")
    assert folder.evaluation().complete
    rows = folder.attacks()
    # of both concepts; or prompts × pictures, preparations, and the other concept
    count = {"standard": 4 + 4, "adversarial": 3 * 2 + 2 + 1}[preset]
    assert len(rows) == len({row.attack for row in rows}) == count
    assert all(math.isfinite(row.sgr_mean) for row in rows)
    for row in rows:
        pictures = {
            side: folder.images(row.attack, side, row.steps) for side in ("original", "immunized")
        }
        assert len(pictures["original"]) == len(pictures["immunized"]) == 1


def numbers(folder):
    """Every cell and every number that an evaluation wrote."""
    for name in ("attacks.csv", "curves.csv"):
        with (folder.path / name).open(newline="") as file:
            for row in csv.DictReader(file):
                yield from row.values()
    yield from folder.path.joinpath("evaluation.json").read_text().split()


def test_one_picture_is_enough(folders, tmp_path, caplog):
    concept = Concept("red", "a red emoji", tiny.picture("red", "round"))
    with caplog.at_level(logging.WARNING, "mima"):
        result = evaluate(
            folders / "model",
            folders / "immunized",
            [concept],
            output=tmp_path,
            settings=SMALL | {"methods": {"lora": {"steps": 1}}, "seeds": [0], "lr_factors": [1]},
            similarities=[folders / "clip"],
            processes=1,
        )
    assert "no held_out pictures" in caplog.text
    assert result.concepts[0].references == "images"
    folder = EvaluationFolder(tmp_path)
    (row,) = folder.attacks()
    summary = result.summary["clip"]
    # one of each: every mean, and both ends of every interval, is that attack's
    assert summary.msgr.mean == summary.msgr.low == summary.msgr.high == row.sgr_mean
    assert summary.worst_attack.sgr == row.sgr_mean == row.sgr_final == row.sgr_max
    assert summary.mrsgr is None
    # the only reference is the only training picture
    last = folder.curves()[-1]
    assert row.nearest_original == pytest.approx(1 - last.original, abs=1e-6)
    assert not {"nan", "inf", "-inf", "NaN"} & set(numbers(folder))


def test_a_judge_that_reads_no_texts_says_how_far_ordinary_pictures_moved(folders, tmp_path):
    tiny.save_tiny_dino(tmp_path / "dino")
    result = evaluate(
        folders / "model",
        folders / "immunized",
        [Concept.from_folder(folders / "red")],
        output=tmp_path / "out",
        settings=SMALL | {"methods": {"lora": {"steps": 1}}, "seeds": [0], "lr_factors": [1]},
        similarities=[tmp_path / "dino"],
        processes=1,
    )
    assert result.benign.prompt_alignment.original is None
    assert len(result.benign.prompts) == 1
    assert result.benign.cmmd > 0
    (row,) = EvaluationFolder(tmp_path / "out").attacks()
    assert row.objects_original is None
    assert result.summary["dino"].objects.original is None


def test_a_concept_without_pictures_cannot_be_attacked():
    with pytest.raises(MimaError, match="red"):
        Concept("red", "a red emoji", [])


def test_an_attack_that_diverges_has_no_numbers_and_no_nan(folders, tmp_path):
    settings = SMALL | {
        "methods": {"lora": {"steps": 6, "learning_rate": 1e30, "max_grad_norm": None}},
        "seeds": [0],
        "lr_factors": [1],
    }
    announced = []
    result = evaluate(
        folders / "model",
        folders / "immunized",
        [Concept.from_folder(folders / "red")],
        output=tmp_path,
        settings=settings,
        similarities=[folders / "clip"],
        processes=1,
        announce=announced.append,
    )
    # how long it takes was measured all the same
    assert announced[0].seconds > 0
    folder = EvaluationFolder(tmp_path)
    (row,) = folder.attacks()
    assert (row.sgr_mean, row.sgr_final, row.sgr_max) == (None, None, None)
    assert row.diverged_after == 0
    # what the models draw before the attack is not what they draw after it
    assert (row.nearest_original, row.nearest_immunized) == (None, None)
    assert (row.objects_original, row.objects_immunized) == (None, None)
    assert not row.learned
    assert [point.step for point in folder.curves()] == [0]
    assert result.complete
    assert result.summary["clip"].msgr.mean is result.summary["clip"].worst_attack.attack is None
    assert not {"nan", "inf", "-inf", "NaN"} & set(numbers(folder))
    assert "No attack could be compared" in write_report([tmp_path]).read_text()


BREAKS = {"learning_rate": 1e29, "max_grad_norm": None}


def evaluated(folders, output, settings, **options):
    evaluate(
        folders / "model",
        folders / "immunized",
        [Concept.from_folder(folders / "red")],
        others=[Concept.from_folder(folders / "blue")],
        output=output,
        settings=SMALL | {"seeds": [0], "lr_factors": [1], "benign_prompts": 0} | settings,
        similarities=[folders / "clip"],
        processes=1,
        **options,
    )
    folder = EvaluationFolder(output)
    assert folder.evaluation().complete
    return {row.attack: row for row in folder.attacks()}, folder


def test_an_attack_whose_preparation_diverges_counts_as_not_tried(folders, tmp_path, caplog):
    settings = {
        # a kick trains with the settings of DreamBooth
        "methods": {"lora": {"steps": 1}, "dreambooth": {"steps": 1, **BREAKS}},
        "preparations": ["kick"],
        "preparation_steps": 2,
        "tune": {"trials": 2},
    }
    with caplog.at_level(logging.WARNING, "mima"):
        rows, folder = evaluated(folders, tmp_path, settings)
    assert "original model: preparation kick: dreambooth: the loss is nan at step 2" in caplog.text
    plain, kicked = (f"red_lora_x1_1steps_name_same_{how}_seed0" for how in ("none", "kick"))
    assert rows[plain].sgr_mean is not None
    assert (rows[kicked].sgr_mean, rows[kicked].tuned_original) == (None, None)
    points = folder.curves()
    assert [point.step for point in points if point.attack == kicked] == [0]
    before = [p.original for p in points if p.attack in (plain, kicked) and p.step == 0]
    assert before[0] == before[1]
    log = TuningLog(tmp_path, grid_config("quick", settings).tune)
    tried = {key: log.of(key, "original")[0].diverged for key in (plain[:-6], kicked[:-6])}
    assert tried == {plain[:-6]: False, kicked[:-6]: True}


@pytest.mark.parametrize(
    ("steps", "said"), [(2, "the loss is nan at step 2"), (1, "after step 1 pictures are not fin")]
)
def test_a_repair_that_diverges_leaves_its_column_empty(folders, tmp_path, caplog, steps, said):
    settings = {
        "methods": {"lora": {"steps": 1}, "dreambooth": {"steps": 1, **BREAKS}},
        "repair_steps": steps,
    }
    numbers = []
    # the second reads of the original what the first kept
    for name in ("first", "second"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mima"):
            rows, _ = evaluated(
                folders, tmp_path / name, settings, originals=tmp_path / "originals"
            )
        row = rows["red_lora_x1_1steps_name_same_none_seed0"]
        assert row.sgr_mean is not None
        assert (row.repaired_original, row.repaired_immunized) == (None, None)
        for side in SIDES:
            assert f"{row.attack}, {side} model, repair: dreambooth: {said}" in caplog.text
        numbers.append(row.model_copy(update={"seconds": 0}))
        assert not list((tmp_path / name / "images" / "repaired").rglob("*.png"))
    assert numbers[0] == numbers[1]


def test_a_repair_that_diverges_on_one_model_is_none_of_the_other(folders, tmp_path, monkeypatch):
    repair = Worker._repair

    def repaired(self, attack, side, attacked):
        if side == "immunized":
            raise Diverged("the loss is nan")
        repair(self, attack, side, attacked)

    monkeypatch.setattr(Worker, "_repair", repaired)
    rows, _ = evaluated(folders, tmp_path, {"methods": {"lora": {"steps": 1}}, "repair_steps": 1})
    for row in rows.values():
        assert -1 <= row.repaired_original <= 1
        assert row.repaired_immunized is None


@pytest.mark.parametrize("side", SIDES)
def test_a_model_that_is_not_finite_before_any_attack_is_refused_by_name(folders, tmp_path, side):
    models = {one: load_pipeline(folders / "model") for one in SIDES}
    models[side].unet.conv_in.weight.data[0] = math.nan
    with pytest.raises(MimaError, match=rf"the {side} model's unet\.conv_in\.weight holds numbers"):
        evaluate(
            *models.values(),
            [Concept.from_folder(folders / "red")],
            output=tmp_path / "out",
            settings=SMALL,
            similarities=[folders / "clip"],
        )
    # nothing was begun, and nothing that was there is lost
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benign", [0, 1])
def test_a_model_that_overflows_before_any_attack_is_refused_by_name(folders, tmp_path, benign):
    models = {one: load_pipeline(folders / "model") for one in SIDES}
    # finite, and too large to compute with
    models["immunized"].unet.conv_in.weight.data.fill_(3e38)
    with pytest.raises(MimaError, match="before any attack the immunized model's picture of"):
        evaluate(
            *models.values(),
            [Concept.from_folder(folders / "red")],
            output=tmp_path,
            settings=SMALL
            | {"benign_prompts": benign, "methods": {"lora": {"steps": 1}}, "seeds": [0]},
            similarities=[folders / "clip"],
        )
    assert not list(tmp_path.glob("images/benign/immunized/*"))
    assert EvaluationFolder(tmp_path).attacks() == []


def test_a_part_of_a_setting_has_a_name():
    config = grid_config("quick", {"methods.lora.steps": 7, "sampler.batch_size": 2})
    assert config.methods == {"lora": PRESETS["quick"].methods["lora"] | {"steps": 7}}
    assert config.sampler == PRESETS["quick"].sampler | {"batch_size": 2}
    assert PRESETS["quick"].methods["lora"]["steps"] == 50
    with pytest.raises(MimaError, match=r"setting rare_token\.more: rare_token has no settings"):
        grid_config("quick", {"rare_token.more": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": {"a/b": {"method": "lora"}}}, "'a/b' is no name of at most 80 letters"),
        ({"methods": {"x" * 81: {"method": "lora"}}}, "without a slash"),
        ({"methods": {"lora": {"method": "dreambooth"}}}, "'lora' stands for that method, not for"),
        (
            {"methods": {"sgd": {"method": "dreambooth"}}, "families": ["sgd"]},
            "is the name of a family that the grid has, too",
        ),
    ],
)
def test_names_of_methods_are_checked_before_anything_runs(settings, message):
    with pytest.raises(MimaError, match=message):
        grid_config("quick", settings)


def test_a_family_takes_what_it_can_of_a_methods_settings():
    methods = {"lora": {"text_encoder": True, "dora": True}, "dreambooth": {"use_8bit_adam": True}}
    config = grid_config("quick", {"methods": methods, "families": ["transplant", "sgd", "muon"]})
    grid = {attack.label: attack for attack in attack_grid(config, {"red": tiny.concept()}, {})}
    assert grid["lora"].adaptation.text_encoder
    # the other model draws with it
    assert not grid["transplant"].adaptation.text_encoder
    assert grid["lora"].adaptation.dora
    assert not grid["transplant"].adaptation.dora
    assert not grid["sgd"].adaptation.use_8bit_adam
    assert not grid["muon"].adaptation.use_8bit_adam


def test_settings_are_kept_as_they_are_understood():
    """YAML reads 1e-4 as a text."""
    one = grid_config("quick", {"methods.lora.learning_rate": "1e-4"})
    assert one == grid_config("quick", {"methods.lora.learning_rate": 0.0001})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lr_factors": [0.3333333, 0.33333334]}, ["red"]),
        ({"methods": {"lora": {}, "small_lora": {"method": "lora"}}}, ["red", "red_small"]),
    ],
)
def test_attacks_of_one_name_are_refused(settings, names):
    config = grid_config("quick", settings)
    concepts = {name: replace(tiny.concept(), name=name) for name in names}
    with pytest.raises(MimaError, match="two are called red_"):
        attack_grid(config, concepts, {})
