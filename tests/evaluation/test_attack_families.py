"""Every family and preparation does to a model what its name says."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from support import tiny

from mima.adaptation import Adaptation, LoRA
from mima.errors import MimaError
from mima.evaluation import EvaluationFolder, Sampler, evaluate, preparations
from mima.evaluation.attack_families import ATTACK_FAMILIES
from mima.evaluation.grid import attack_grid, grid_config, material, places
from mima.evaluation.records import Pictures, Preparation, PromptVariant
from mima.evaluation.trajectory import trajectory
from mima.families.pipelines import with_values
from mima.sampling import Job

GRID = {
    "methods": {
        "lora": {"learning_rate": 1e-2, "batch_size": 2, "steps": 2},
        "dreambooth": {"learning_rate": 1e-3, "batch_size": 2, "steps": 2},
    },
    "lr_factors": [1],
    "sampler": {"steps": 1, "batch_size": 8},
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 1,
    "preparation_steps": 1,
    "seeds": [0],
}
SAMPLER = Sampler(steps=2, batch_size=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, and one that differs from it in some weights."""
    original = tiny.tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer"), blocks=1)
    weights = preparations.denoiser_weights(original)
    generator = torch.Generator().manual_seed(0)
    moved = {
        f"unet.{name}": value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
        if ".attn2." in name or name == "conv_in.weight"
    }
    return original, with_values(original, moved)


def weights(pipeline):
    return preparations.denoiser_weights(pipeline)


def test_undoing_takes_the_strongest_rank_8_of_the_change(pair):
    original, immunized = pair
    before, after = weights(original), weights(immunized)
    undone = weights(preparations.undone(immunized, original))
    for name, value in after.items():
        change = (value - before[name]).reshape(len(value), -1)
        left = torch.linalg.svdvals((undone[name] - before[name]).reshape(len(value), -1))
        kept = torch.linalg.svdvals(change)[8:]
        torch.testing.assert_close(left[: len(kept)], kept, rtol=1e-3, atol=1e-5)
        assert left[len(kept) :].max() < 1e-5 if len(left) > len(kept) else True


def test_interpolation_goes_half_of_the_way(pair):
    original, immunized = map(weights, pair)
    halfway = weights(preparations.interpolated(*reversed(pair)))
    for name, value in halfway.items():
        torch.testing.assert_close(value, (original[name] + immunized[name]) / 2)


def test_a_kick_is_a_tenth_of_each_weights_deviation(pair):
    before, after = weights(pair[0]), weights(preparations.kicked(pair[0], 3))
    name = "mid_block.resnets.0.conv1.weight"
    noise = (after[name] - before[name]) / before[name].std(correction=0)
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    again = weights(preparations.kicked(pair[0], 3))
    assert all(map(torch.equal, after.values(), again.values()))
    other = weights(preparations.kicked(pair[0], 4))
    assert not torch.equal(other[name], after[name])


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_no_further_than_half_a_unit(pair, bits):
    before, after = weights(pair[0]), weights(preparations.rounded(pair[0], bits))
    for name, value in after.items():
        rows, old = value.reshape(len(value), -1), before[name].reshape(len(value), -1)
        if bits == 16:
            assert torch.equal(rows, old.half().float())
        elif value.ndim > 1:
            unit = old.abs().amax(1, keepdim=True) / 127
            assert ((rows - old).abs() <= 0.501 * unit).all()
            assert all(len(row.unique()) <= 255 for row in rows)
    assert any(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_immunization_changed_is_known(pair, dtype):
    """Also of a model that was published in half precision, which rounds all of its weights."""
    published = {f"unet.{name}": value.to(dtype) for name, value in weights(pair[1]).items()}
    changed = preparations.changed_parameters(pair[0], with_values(pair[0], published))
    assert set(changed) == {n for n in weights(pair[0]) if ".attn2." in n or n == "conv_in.weight"}


def test_a_transplant_is_trained_on_one_model_and_drawn_by_another(pair):
    original, immunized = pair
    jobs, lora = [Job("a red round emoji", 0)], LoRA(learning_rate=1e-2, batch_size=2)
    plain, moved, at_home = (
        trajectory(trained, tiny.concept(), lora, (0, 3), jobs, SAMPLER, drawn_by=drawn_by)
        for trained, drawn_by in ((original, None), (original, immunized), (immunized, None))
    )
    # the training is that of the original model, and before it the other model draws by itself
    assert moved.losses == plain.losses != at_home.losses
    assert moved.images[0] == at_home.images[0]
    assert moved.images[1] not in (plain.images[1], at_home.images[1])
    # what is repaired after it is the model that drew, with the same layers as the other's
    for run, base in ((plain, original), (moved, immunized)):
        (again,) = SAMPLER.draw(run.pipeline, jobs)
        assert np.abs(np.asarray(again, int) - np.asarray(run.images[1][0], int)).max() <= 1
        assert torch.equal(run.pipeline.unet.conv_in.weight, base.unet.conv_in.weight)
    kept = (one.pipeline.unet.state_dict() for one in (plain, moved))
    assert [*next(kept)] == [*next(kept)]
    whole = dataclasses.replace(lora, convolutions=True)
    with pytest.raises(MimaError, match="only a LoRA on linear layers"):
        trajectory(original, tiny.concept(), whole, (1,), jobs, SAMPLER, drawn_by=immunized)


def test_pictures_of_an_attack():
    concept = dataclasses.replace(tiny.concept(), held_out=tiny.concept(images=3).images)
    other = tiny.concept("blue").images
    config = grid_config("quick", {"images": ["same", "fewer", "more", "mixed"], "seeds": [0],
                                   "lr_factors": [1]})  # fmt: skip
    attacks = {a.images: a for a in attack_grid(config, {"red": concept}, {"blue": concept})
               if a.role == "target"}  # fmt: skip
    counts = {}
    for name, attack in attacks.items():
        described, references = material(attack, concept, others=other)
        counts[name] = (len(described.images), len(references))
        train, judged = places(name, concept)
        # nothing that is trained on judges
        assert not set(train) & set(judged)
    assert counts == {"same": (4, 3), "fewer": (1, 3), "more": (6, 1), "mixed": (8, 3)}


def test_a_method_may_come_under_names_of_its_own():
    methods = {"lora": {}, "small": {"method": "lora", "rank": 2, "steps": 2}}
    config = grid_config("quick", {"methods": methods, "seeds": [0], "lr_factors": [1]})
    attacks = attack_grid(config, {"red": tiny.concept()}, {})
    assert [(a.label, a.adaptation.rank, a.steps) for a in attacks] == [
        ("lora", LoRA().rank, LoRA().steps),
        ("small", 2, 2),
    ]
    assert attacks[1].id.startswith("red_small_x1_2steps_")


def test_every_family_and_preparation_runs(pair, tmp_path):
    others = [dataclasses.replace(tiny.concept("blue"), kind="benign")]
    settings = GRID | {
        "families": sorted(ATTACK_FAMILIES),
        "preparations": ["kick", "undo", "interpolate", "fp16", "int8"],
        "images": ["same", "mixed"],
        "repair_steps": 1,
    }
    tiny.save_tiny_clip(tmp_path / "clip")
    calls, announced = [], []
    evaluate(
        *pair,
        [tiny.concept()],
        others=others,
        output=tmp_path / "out",
        settings=settings,
        similarities=[tmp_path / "clip"],
        processes=1,
        progress=lambda *call: calls.append(call),
        announce=announced.append,
    )
    assert calls[-1][0] == calls[-1][1]
    rows = EvaluationFolder(tmp_path / "out").attacks()
    assert {*ATTACK_FAMILIES, "lora", "dreambooth"} == {row.method for row in rows}
    assert all(row.sgr_mean is not None for row in rows)
    assert all(0 <= row.objects_original <= 1 for row in rows)
    assert all(-1 <= row.repaired_immunized <= 1 for row in rows)
    (work,) = announced
    # benign pictures are the rest of what is drawn
    assert (work.attacks, work.trials) == (len(rows), 0)
    assert work.steps + work.pictures == calls[-1][1]
    assert work.seconds > 0
    points = EvaluationFolder(tmp_path / "out").curves()
    for step, different in ((0, 1), (2, 4)):
        own = [p for p in points if p.step == step and "red-round_dreambooth_" in p.attack]
        reached = {p.attack.split("_")[-2]: p.immunized for p in own if "_same_" in p.attack}
        names = ("none", "kick", "undo", "interpolate")
        assert len({reached[name] for name in names}) == different


@pytest.mark.parametrize("all_frozen", [False, True])
def test_outside_freezes_what_the_method_does_too(pair, tmp_path, monkeypatch, caplog, all_frozen):
    changed = preparations.changed_parameters(*pair)
    rest = [name for name in weights(pair[0]) if name not in changed]
    frozen = rest if all_frozen else rest[:1]
    trained = []
    start = Adaptation.start

    def noted(adaptation, *args, **options):
        trained.append(set(weights(pair[0])) - set(adaptation.frozen))
        return start(adaptation, *args, **options)

    monkeypatch.setattr(Adaptation, "start", noted)
    tiny.save_tiny_clip(tmp_path / "clip")
    evaluate(
        *pair,
        [tiny.concept()],
        output=tmp_path / "out",
        settings=GRID
        | {"methods": {"dreambooth": {"steps": 1, "frozen": frozen}}, "families": ["outside"]},
        similarities=[tmp_path / "clip"],
        processes=1,
    )
    plain = set(weights(pair[0])) - set(frozen)
    if all_frozen:
        assert trained == [plain] * 2
        assert "families outside: nothing is left to train; left out" in caplog.text
    else:
        assert trained == [plain] * 2 + [set(rest[1:])] * 2


def test_both_models_train_on_the_same_class_pictures(pair, tmp_path, monkeypatch):
    """Those of the original: the other's may be as broken as what immunization wanted broken."""
    started = []
    start = Adaptation.start

    def kept(adaptation, pipeline, concept, **options):
        run = start(adaptation, pipeline, concept, **options)
        started.append(run._class_images)
        return run

    monkeypatch.setattr(Adaptation, "start", kept)
    tiny.save_tiny_clip(tmp_path / "clip")
    evaluate(
        *pair,
        [dataclasses.replace(tiny.concept(), class_images=())],
        output=tmp_path / "out",
        settings=GRID
        | {
            "methods": {"lora": {"steps": 1, "prior_weight": 1.0, "num_class_images": 2}},
            "tune": {"trials": 2},
            "preparations": ["merge", "fp16"],
        },
        similarities=[tmp_path / "clip"],
        processes=1,
    )
    # a LoRA that is merged first preserves nothing
    drawn = [one.pictures.latents for one in started if one is not None]
    # two trials and the training of each attack, and before preparations the first pictures
    assert len(drawn) == 2 * (3 * 3 + 2) < len(started)
    assert all(torch.equal(latents, drawn[0]) for latents in drawn)


def test_the_catalogue_has_every_way_to_attack_with_its_source():
    catalogue = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text()
    sources = {}
    for line in catalogue.splitlines():
        if line.startswith("| `"):
            names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            sources |= dict.fromkeys(re.findall(r"`([^`]+)`", names), cells)
    named = {
        *ATTACK_FAMILIES,
        *get_args(Preparation),
        *get_args(Pictures),
        *get_args(PromptVariant),
    }
    assert named <= sources.keys()
    for name in named:
        what, source, cost = sources[name]
        assert what
        assert source
        assert cost
