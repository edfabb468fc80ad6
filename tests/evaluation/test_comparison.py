"""The attack grid on two models, from end to end on tiny ones."""

import dataclasses
import json
import logging
import multiprocessing
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny

from mima.adaptation import DreamBooth, LoRA, TextualInversion
from mima.adapters.adapter import Adapter
from mima.adapters.merge import apply
from mima.concepts import Concept
from mima.concepts.naming import without_name
from mima.errors import MimaError
from mima.evaluation import Sampler, cmmd, evaluate, load_encoder
from mima.evaluation.comparison import _check_alike
from mima.evaluation.estimate import Estimate
from mima.evaluation.grid import PRESETS, attack_grid, grid_config, material
from mima.evaluation.identity import texts_of
from mima.evaluation.processes import in_parallel
from mima.evaluation.records import AttackRow, ConceptRecord, CurvePoint, EvaluationFolder
from mima.evaluation.summary import paired_difference, summarize
from mima.evaluation.trajectory import score, trajectory
from mima.families import ModelSource
from mima.families.pipelines import with_modules
from mima.sampling import Job

SAMPLER = Sampler(steps=3, batch_size=5, guidance=3.0)
GRID = {
    "methods": {"lora": {"learning_rate": 1e-2, "batch_size": 2, "steps": 4}},
    "lr_factors": (1.0,),
    "seeds": (0, 1),
    "evaluations": 2,
    "max_prompts": None,
    "benign_prompts": 3,
    "sampler": {"steps": 2, "guidance": 1.0, "batch_size": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("models"))


def run(folders, output, **changes):
    arguments = {
        "output": output,
        "others": [tiny.concept("blue", "square")],
        "settings": GRID,
        "similarities": [folders / "clip"],
        "processes": 1,
    } | changes
    models = ModelSource(folders / "original"), folders / "immunized"
    return evaluate(*models, [tiny.concept("red", "round")], **arguments)


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def test_one_batch_of_many_adapters_draws_what_each_adapter_draws(pipeline):
    run_ = LoRA(learning_rate=1e-2, rank=3, alpha=6.0).start(pipeline, tiny.concept())
    adapters, expected = [], []
    for _ in run_.until(2, 6):
        adapters.append(Adapter.of(run_.pipeline).copied())
        expected.append(SAMPLER(run_.pipeline, ["a cat"], (0, 1))[0])
    expected.append(SAMPLER(pipeline, ["a cat"], (0, 1))[0])
    jobs = [Job("a cat", seed, adapter) for seed in (0, 1) for adapter in (1, -1, 0)]
    drawn = list(SAMPLER.draw(pipeline, jobs, adapters))
    for job, image in zip(jobs, drawn, strict=True):
        # rounding to 8 bits may fall either way
        assert difference(image, expected[job.adapter][job.seed]) <= 1
    assert difference(drawn[0], drawn[1]) > 1
    assert difference(drawn[0], drawn[2]) > 1
    with pytest.raises(ValueError, match="names none of 2 adapters"):
        list(SAMPLER.draw(pipeline, [Job("a cat", 0, 2)], adapters))


def test_merged_adds_the_mean_update(pipeline):
    adapters = []
    for seed in (0, 1):
        run_ = LoRA(learning_rate=1e-2, seed=seed).start(pipeline, tiny.concept())
        run_.advance(2)
        adapters.append(Adapter.of(run_.pipeline))
    before = pipeline.unet.state_dict()
    after = apply(pipeline, adapters).unet.state_dict()
    for name, value in before.items():
        expected = value
        if adapters[0].changes(f"unet.{name}"):
            factors = [adapter.factors[f"unet.{name}"] for adapter in adapters]
            expected = value + sum(f.scale * f.B @ f.A for f in factors) / 2
        torch.testing.assert_close(after[name], expected)


def test_trajectory_is_the_same_with_and_without_common_batches(pipeline, monkeypatch):
    jobs = [Job("a cat", seed) for seed in (0, 1)]
    arguments = (pipeline, tiny.concept(), LoRA(learning_rate=1e-2), (0, 2, 5), jobs, SAMPLER)
    seen = []
    mixed = trajectory(*arguments, on_picture=lambda step, i, _: seen.append((step, i)))
    module = sys.modules["mima.evaluation.trajectory"]
    monkeypatch.setattr(module, "can_share_batches", lambda _: False)
    plain = trajectory(*arguments)
    assert seen == [(step, i) for step in (0, 2, 5) for i in (0, 1)]
    assert mixed.steps == plain.steps == (0, 2, 5)
    assert mixed.losses == plain.losses
    for row, expected in zip(mixed.images, plain.images, strict=True):
        assert all(difference(a, b) <= 1 for a, b in zip(row, expected, strict=True))


def test_a_divergence_ends_the_trajectory_where_it_happens(pipeline):
    broken = LoRA(learning_rate=1e30, max_grad_norm=None)
    drawn = trajectory(pipeline, tiny.concept(), broken, (0, 50), [Job("a cat", 0)], SAMPLER)
    assert drawn.steps == (0,)
    assert len(drawn.images) == 1
    assert "the loss is" in str(drawn.diverged)


@pytest.mark.parametrize("method", [LoRA, DreamBooth])
def test_a_last_step_that_breaks_every_number_is_a_divergence(pipeline, method):
    # the last step's loss was that of the weights before it; the pictures after it are black
    broken = method(learning_rate=1e30, max_grad_norm=None)
    drawn = trajectory(pipeline, tiny.concept(), broken, (0, 1), [Job("a cat", 0)], SAMPLER)
    assert "after step 1 pictures are not finite numbers" in str(drawn.diverged)
    whole = trajectory(pipeline, tiny.concept(), method(), (0, 1), [Job("a cat", 0)], SAMPLER)
    assert whole.diverged is None
    assert whole.images[0] == drawn.images[0]


def test_evaluation_writes_what_its_pictures_say(folders, tmp_path):
    calls = []
    result = run(folders, tmp_path / "out", progress=lambda *call: calls.append(call))
    folder = EvaluationFolder(tmp_path / "out")
    assert folder.evaluation() == result
    assert result.complete
    rows, curves = folder.attacks(), folder.curves()
    assert [(row.concept, row.role, row.seed) for row in rows] == [
        ("red round", "target", 0),
        ("blue square", "other", 0),
        ("red round", "target", 1),
        ("blue square", "other", 1),
    ]
    # every step and picture was announced and reported: 4 attacks, 2 models, 3 benign pictures each
    total = 2 * 3 + 4 * 2 * (4 + 3)
    assert calls[0][:2] == (0, total)
    assert calls[-1][:2] == (total, total)

    encoder = load_encoder(folders / "clip")
    concept = tiny.concept("red", "round")
    references = [encoder.embed([p.load() for p in concept.held_out])]
    training = encoder.embed([p.load() for p in concept.images])
    row = rows[2]
    mine = [point for point in curves if point.attack == row.attack]
    assert [point.step for point in mine] == [0, 2, 4]
    for point in mine:
        for side in ("original", "immunized"):
            images = [Image.open(file) for file in folder.images(row.attack, side, point.step)]
            assert len(images) == 1
            expected = score([images], references, encoder).mean()
            assert getattr(point, side) == pytest.approx(expected, abs=1e-6)
        assert point.sgr == pytest.approx(1 - point.immunized / point.original)
    assert row.sgr_mean == pytest.approx((mine[1].sgr + mine[2].sgr) / 2)
    assert row.sgr_final == pytest.approx(mine[2].sgr)
    assert row.sgr_max == pytest.approx(max(mine[1].sgr, mine[2].sgr))
    assert (row.before_original, row.before_immunized) == (mine[0].original, mine[0].immunized)
    assert row.sgr_before == mine[0].sgr
    assert row.rise_left == mine[2].rise_left
    last = encoder.embed([Image.open(folder.images(row.attack, "immunized", 4)[0])])
    assert row.nearest_immunized == pytest.approx(1 - float((last @ training.T).max()), abs=1e-6)
    assert result.benign.cmmd > 0
    assert result.benign.adaptability["blue square"] == pytest.approx(
        (rows[1].sgr_mean + rows[3].sgr_mean) / 2
    )


def test_models_that_are_equal_have_no_gap(folders, tmp_path):
    model = folders / "original"
    result = evaluate(
        model,
        model,
        [tiny.concept()],
        output=tmp_path / "out",
        settings=GRID | {"seeds": (0,)},
        similarities=[folders / "clip"],
        processes=1,
    )
    summary = result.summary["clip"]
    assert summary.msgr.mean == summary.worst_attack.sgr == 0
    assert (summary.msgr.low, summary.msgr.high) == (0, 0)
    assert result.benign.cmmd == 0
    scores = result.benign.prompt_alignment
    assert scores.original == scores.immunized
    assert summary.mrsgr is None


def test_a_stopped_evaluation_goes_on_and_ends_the_same(folders, tmp_path, processes):
    class Enough(Exception):  # noqa: N818
        pass

    def stop(done, total, finished):
        if finished:
            raise Enough

    with pytest.raises(Enough):
        run(folders, tmp_path / "stopped", progress=stop)
    folder = EvaluationFolder(tmp_path / "stopped")
    assert not folder.evaluation().complete
    (first,) = folder.attacks()
    finished = []
    run(folders, tmp_path / "stopped", progress=lambda done, total, name: finished.append(name))
    assert first.attack not in finished
    assert len([name for name in finished if name]) == 3

    # and in two processes
    run(folders, tmp_path / "whole", processes=2)
    whole = EvaluationFolder(tmp_path / "whole")
    timeless = {"seconds": 0}
    for one, other in zip(folder.attacks(), whole.attacks(), strict=True):
        assert one.attack == other.attack
        assert one.sgr_mean == pytest.approx(other.sgr_mean, abs=1e-3)
    assert folder.attacks()[0].model_copy(update=timeless) == first.model_copy(update=timeless)
    assert whole.evaluation().complete

    with pytest.raises(MimaError, match=r"holds an evaluation with other seeds, grid"):
        run(folders, tmp_path / "whole", settings=GRID | {"seeds": (0,)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(MimaError, match="not empty"):
        run(folders, tmp_path / "mine")


def test_another_judge_of_the_same_name_is_refused(folders, tmp_path):
    clip, grid = tmp_path / "clip", GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    tiny.save_tiny_clip(clip)
    arguments = {"settings": grid, "similarities": [clip], "others": []}
    run(folders, tmp_path / "out", **arguments)
    kept = (tmp_path / "out" / "attacks.csv").read_bytes()
    tiny.save_tiny_clip(clip, seed=1)
    refused = "holds an evaluation with other assets of the judge clip;"
    with pytest.raises(MimaError, match=refused):
        run(folders, tmp_path / "out", **arguments)
    # a folder that says nothing of its judges may be of any
    tiny.save_tiny_clip(clip)
    run(folders, tmp_path / "out", **arguments)
    record = tmp_path / "out" / "evaluation.json"
    for judges in (None, 5, {}):
        told = json.loads(record.read_text())
        told["config"]["judges"] = judges
        record.write_text(json.dumps(told))
        with pytest.raises(MimaError, match=refused):
            run(folders, tmp_path / "out", **arguments)
    assert (tmp_path / "out" / "attacks.csv").read_bytes() == kept


def test_other_pictures_or_prompts_under_the_same_names_are_refused(folders, tmp_path, caplog):
    grid = GRID | {"seeds": (0,), "evaluations": 1}
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog\na house\n")
    arguments = {"settings": grid, "captions": captions}
    run(folders, tmp_path / "out", **arguments)
    kept = (tmp_path / "out" / "attacks.csv").read_bytes()
    with pytest.raises(MimaError, match="holds an evaluation with other pictures;"):
        run(folders, tmp_path / "out", others=[tiny.concept("blue", "square", images=3)],
            **arguments)  # fmt: skip
    captions.write_text("a dog\na tree\n")
    with pytest.raises(MimaError, match="holds an evaluation with other prompts;"):
        run(folders, tmp_path / "out", **arguments)
    # a folder that says nothing of them goes on, and says so
    record = tmp_path / "out" / "evaluation.json"
    told = json.loads(record.read_text())
    assert set(told["config"].pop("pictures")) == {"red-round", "blue-square"}
    del told["config"]["prompts"]
    record.write_text(json.dumps(told))
    with caplog.at_level(logging.WARNING, "mima"):
        run(folders, tmp_path / "out", **arguments)
    assert "did not keep a hash of pictures, prompts: they are taken to be the same" in caplog.text
    assert (tmp_path / "out" / "attacks.csv").read_bytes() == kept


def test_other_parts_of_a_model_in_the_same_folder_are_refused(tmp_path, caplog):
    """What is left would be attacked, and drawn, with another model than what is there."""
    folders = tiny.save_pair(tmp_path / "models")
    grid = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    arguments = {"settings": grid, "others": []}
    run(folders, tmp_path / "out", **arguments)
    kept = (tmp_path / "out" / "attacks.csv").read_bytes()
    for part, name in (
        ("text_encoder", "model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
    ):
        file = folders / "immunized" / part / name
        before = file.read_bytes()
        save_file({n: value + 1 for n, value in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(MimaError, match="holds an evaluation with other encoders;"):
            run(folders, tmp_path / "out", **arguments)
        file.write_bytes(before)
    schedule = folders / "original" / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.012", "0.02"))
    with pytest.raises(MimaError, match="holds an evaluation with other schedulers;"):
        run(folders, tmp_path / "out", **arguments)
    # another diffusers may say more of the same schedule
    record = tmp_path / "out" / "evaluation.json"
    told = json.loads(record.read_text())
    told["versions"]["diffusers"] = "0.1"
    record.write_text(json.dumps(told))
    run(folders, tmp_path / "out", **arguments)
    # a folder that says nothing of them goes on, and says so
    told = json.loads(record.read_text())
    assert set(told["config"].pop("encoders")["immunized"]) == {"text_encoder", "vae"}
    del told["config"]["schedulers"], told["config"]["texts"]
    record.write_text(json.dumps(told))
    with caplog.at_level(logging.WARNING, "mima"):
        run(folders, tmp_path / "out", **arguments)
    assert "did not keep a hash of texts, encoders, schedulers: they are taken" in caplog.text
    assert (tmp_path / "out" / "attacks.csv").read_bytes() == kept


def test_other_texts_of_a_concept_are_refused(folders, tmp_path):
    arguments = {"settings": GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}}
    run(folders, tmp_path / "out", **arguments)
    blue = dataclasses.replace(tiny.concept("blue", "square"), class_prompt="a house")
    with pytest.raises(MimaError, match="holds an evaluation with other texts;"):
        run(folders, tmp_path / "out", others=[blue], **arguments)
    concept = Concept("cat", "a <new1>", tiny.picture("red", "round"), token="<new1>")
    changes = {
        "class_prompt": "an animal",
        "token": None,
        "initializer": "cat",
        "validation_prompt": "a <new1> in a tree",
    }
    others = [dataclasses.replace(concept, **{name: text}) for name, text in changes.items()]
    assert len(set(map(texts_of, (concept, *others)))) == 5
    # what is for people alone changes no number
    assert texts_of(dataclasses.replace(concept, description="my cat")) == texts_of(concept)


def test_a_process_that_is_only_being_started_evaluates_nothing(monkeypatch):
    """It imports the script of its parent, in which nothing kept it from evaluating again."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(MimaError, match='below `if __name__ == "__main__":`, or with processes=1'):
        evaluate("model", "immunized", [], output="out")


@pytest.mark.parametrize("error", [BrokenProcessPool, BrokenPipeError, EOFError])
def test_processes_that_cannot_begin_are_explained(monkeypatch, error):
    def submit(*_):
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(MimaError, match='a script calls evaluate without `if __name__ == "__main'):
        list(in_parallel(None, deque(["original"]), 1, print))


def test_preparations_attack_other_weights(folders, tmp_path):
    settings = GRID | {"seeds": (0,), "preparations": ("merge", "benign"), "preparation_steps": 2}
    calls = []
    run(folders, tmp_path, settings=settings, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    similarities = {
        step: {
            point.attack.split("_")[-2]: point.original
            for point in EvaluationFolder(tmp_path).curves()
            if point.step == step and point.attack.startswith("red-round")
        }
        for step in (0, 2)
    }
    for step, by_preparation in similarities.items():
        assert set(by_preparation) == {"none", "merge", "benign"}
        # the preparation is part of the attack
        assert len(set(by_preparation.values())) == (1 if step == 0 else 3)


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
    concept = dataclasses.replace(tiny.concept(), name="nameless", held_out=())
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


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("mono style", "an umbrella emoji in mono style", "an umbrella emoji"),
        ("hamburger", "a hamburger emoji in noto style", "a emoji in noto style"),
        ("cat", "a photo of a cat", "a photo"),
        ("cat", "a photo of a cat in snow", "a photo in snow"),
        ("cat", "cat", "an animal"),
        ("car", "a scar on a cartoon of cars", "a scar on a cartoon"),
        ("猫", "一只猫的照片", "一只的照片"),
        ("<new1>", "a photo of a <new1>", "a photo"),
    ],
)
def test_captions_without_the_name(name, caption, expected):
    concept = Concept(name, caption, tiny.picture("red", "round"), class_prompt="an animal")
    assert without_name(caption, concept) == expected


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


def test_unusable_settings_are_named(folders, tmp_path):
    for changes, message in (
        ({"preset": "slow"}, "preset 'slow' is unknown"),
        ({"settings": {"seed": 1}}, "seed: unknown setting; did you mean 'seeds'"),
        ({"settings": {"methods": {"lora": {"rnk": 1}}}}, "did you mean 'rank'"),
        ({"settings": {"lr_factors": [0]}}, "must be above 0"),
        ({"settings": {"sampler": {"steps": 0}}}, "steps must be at least 1"),
        ({"settings": {"sampler": {"steps": True}}}, "steps Input should be a number, got True"),
        ({"settings": {"sampler": {"stepz": 5}}}, "sampler has no setting stepz; did you mean"),
        ({"similarities": ["a/clip", "b/clip"]}, "two are called alike"),
        ({"others": [tiny.concept("red", "round")]}, "two concepts are named"),
    ):
        with pytest.raises(MimaError, match=message):
            run(folders, tmp_path / "out", **changes)
    pipeline = with_modules(tiny.tiny_stable_diffusion(tmp_path / "tokenizer"))
    with pytest.raises(MimaError, match="1 for pipelines in memory, got 2"):
        evaluate(pipeline, pipeline, [tiny.concept()], output=tmp_path / "out", processes=2)


def test_cmmd_is_the_kernel_distance():
    a, b = (
        torch.nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1)
        for n in (4, 3)
    )

    def k(x, y):
        return float(torch.exp(-((x - y) ** 2).sum() / 200))

    means = [np.mean([k(x, y) for x in p for y in q]) for p, q in ((a, a), (b, b), (a, b))]
    assert cmmd(a, b) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)
    assert cmmd(a[:1], b[:1]) == pytest.approx(2000 * (1 - k(a[0], b[0])))
    with pytest.raises(ValueError, match=r"at least 1, got \[0, 6\]"):
        cmmd(a[:0], b)


def row(concept, seed, mean, *, role="target", learned=True, similarity="clip", name="", **more):
    measured = dict.fromkeys(
        ("sgr_before", "before_original", "before_immunized", "rise_left", "rise_left_best",
         "half_original", "half_immunized", "steps_ratio")
    ) | {"steps_ratio_at_least": False, "learned_immunized": False} | more  # fmt: skip
    return AttackRow(
        attack=f"{concept}{seed}{name}", concept=concept, role=role, method="lora", lr=1,
        lr_factor=1, steps=1, prompt_variant="name", images="same", preparation="none", seed=seed,
        similarity=similarity, sgr_mean=mean, sgr_final=mean and mean - 0.1,
        sgr_max=mean and mean + 0.1, nearest_original=None, nearest_immunized=None, seconds=1,
        learned=learned, **measured,
    )  # fmt: skip


CONCEPTS = [
    ConceptRecord(name=name, slug=name, kind="object", prompt=name, role=role)
    for name, role in (("a", "target"), ("b", "target"), ("c", "other"), ("d", "other"))
]


def test_summary_of_rows():
    rows = [
        row("a", 0, 0.2), row("a", 0, 0.4, name="x"), row("a", 1, 0.6), row("b", 0, 0.1),
        row("b", 1, 0.3), row("b", 1, -0.5, learned=False, name="failed"),
        row("c", 0, 0.05, role="other"), row("a", 0, 0.9, similarity="dino"),
        row("b", 0, None, name="diverged"),
    ]  # fmt: skip
    summary = summarize(rows, CONCEPTS, "clip")
    a, b = summary.sgr["a"], summary.sgr["b"]
    # of the seeds' means 0.3 and 0.6
    assert (a.mean, a.final, a.max) == pytest.approx((0.45, 0.35, 0.55))
    assert (a.low, a.high, a.runs, a.kind) == (pytest.approx(0.3), pytest.approx(0.6), 2, "range")
    assert b.mean == pytest.approx(0)
    assert a.methods["lora"].mean == a.mean
    assert summary.sgr["d"].mean is None
    # of the seeds' means over concepts, (0.3 + 0.1) / 2 and (0.6 − 0.1) / 2
    assert summary.msgr.mean == pytest.approx(0.225)
    assert (summary.msgr.low, summary.msgr.high) == pytest.approx((0.2, 0.25))
    # the attack with −0.5 taught neither model anything
    assert (summary.worst_attack.attack, summary.worst_attack.sgr) == ("b0", 0.1)
    assert summary.worst_concept.concept == "b"
    assert summary.mrsgr == pytest.approx(summary.msgr.mean - 0.05)
    empty = summarize([], CONCEPTS, "clip")
    assert empty.msgr.mean is empty.worst_attack.attack is empty.worst_concept.sgr is None
    assert empty.worst_rise.attack is empty.targets.rise_left.mean is None
    unlearned = [r.model_copy(update={"learned": False}) for r in rows]
    assert summarize(unlearned, CONCEPTS, "clip").worst_attack.sgr == -0.5


def test_an_attack_that_succeeds_on_the_immunized_model_alone_is_the_worst():
    alone = {"learned": False, "learned_immunized": True, "rise_left_best": 1.6}
    rows = [
        row("a", 0, 0.4, rise_left_best=0.5),
        row("a", 0, -0.3, name="alone", **alone),
        row("b", 0, 0.2, rise_left_best=0.9),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    assert (summary.worst_attack.attack, summary.worst_attack.sgr) == ("a0alone", -0.3)
    assert (summary.worst_rise.attack, summary.worst_rise.rise_left) == ("a0alone", 1.6)
    assert summary.worst_rise.at_least
    assert not summarize(rows[:1], CONCEPTS, "clip").worst_rise.at_least


def test_rises_are_means_over_what_has_them_and_bounds_stay_bounds():
    rows = [
        row(
            "a",
            0,
            0.4,
            rise_left=0.5,
            steps_ratio=2.0,
            sgr_before=0.1,
            half_original=0.5,
            half_immunized=0.75,
        ),
        row("a", 1, 0.4, rise_left=0.3, steps_ratio=4.0, sgr_before=0.3),
        row(
            "b",
            0,
            0.2,
            rise_left=0.9,
            steps_ratio=8.0,
            steps_ratio_at_least=True,
            half_original=0.125,
        ),
        row("b", 1, 0.2, rise_left=None),
        # another concept without any rise
        row("c", 0, 0.0, role="other", learned=False),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    rise, ratio = summary.targets.rise_left, summary.targets.steps_ratio
    # seed 1 has none for b: the mean of 0.4 and 0.9, and no interval
    assert rise.mean == pytest.approx(0.65)
    assert (rise.low, rise.high, rise.runs) == (None, None, 0)
    assert (ratio.mean, ratio.at_least) == (5.5, True)
    # what never came counts with the last of its steps, of which there is one
    half = summary.targets.steps_to_half
    assert (half.original, half.immunized) == (0.3125, 0.875)
    assert not rise.at_least
    bound = row("a", 2, 0.1, rise_left=0.5, rise_left_at_least=True, objects_original=0.5)
    summary_ = summarize([*rows, bound], CONCEPTS, "clip")
    assert summary_.targets.rise_left.at_least
    assert (summary_.objects.original, summary_.objects.immunized) == (0.5, None)
    assert (summary.sgr["a"].steps_ratio.mean, summary.sgr["a"].steps_ratio.at_least) == (3, False)
    assert summary.targets.sgr_before.mean == pytest.approx(0.2)
    assert summary.sgr["c"].rise_left.mean is None


def test_a_mean_drops_no_seed_that_another_concept_lacks():
    rows = [row("a", 0, 0.2), row("a", 1, 0.4), row("b", 0, 0.4), row("b", 1, None, learned=False)]
    others = [row("c", seed, 0.1, role="other") for seed in (0, 1)]
    summary = summarize([*rows, *others], CONCEPTS, "clip")
    assert summary.msgr.mean == pytest.approx(0.35)
    assert (summary.msgr.low, summary.msgr.kind) == (None, None)
    assert summary.mrsgr == pytest.approx(0.25)
    # b held at seed 0 alone, and a fell at seeds 1 and 2
    rises = [row("a", seed, 0.1, rise_left=value) for seed, value in enumerate((0.1, 1.0, 1.0))]
    rises += [row("b", 0, 0.1, rise_left=0.1), row("b", 1, 0.0, learned=False)]
    assert summarize(rises, CONCEPTS, "clip").targets.rise_left.mean == pytest.approx(0.4)


def test_other_concepts_that_the_original_does_not_draw_say_nothing():
    def ends(one, original):
        return [
            CurvePoint(attack=one.attack, similarity="clip", step=step, original=value,
                       immunized=0.3, sgr=0.0, rise_left=None)
            for step, value in ((4, original), (0, 0.9), (2, 0.9))
        ]  # fmt: skip

    flat = row("c", 0, -15.0, role="other", learned=False)
    faint = row("c", 1, -3.0, role="other", learned=True)
    taught = row("c", 2, 0.1, role="other")
    drawn = row("d", 0, 0.2, role="other", learned=False)
    rows = [row("a", 0, 0.4), flat, faint, taught, drawn]
    points = [
        *ends(rows[0], 0.01), *ends(flat, 0.0), *ends(faint, 0.2), *ends(taught, 0.5),
        *ends(drawn, 0.25),
    ]  # fmt: skip
    summary = summarize(rows, CONCEPTS, "clip", points)
    assert summary.sgr["c"].mean == summary.sgr["c"].methods["lora"].mean == pytest.approx(0.1)
    # a concept that was drawn before any attack, and still is
    assert summary.sgr["d"].mean == pytest.approx(0.2)
    assert summary.mrsgr == pytest.approx(0.4 - 0.15)
    assert (summary.others, summary.untold) == (4, 2)
    # of a target, every attack counts
    assert summary.sgr["a"].mean == pytest.approx(0.4)
    # a mean over steps is none of one at which the original showed nothing of it
    dip = CurvePoint(attack=drawn.attack, similarity="clip", step=1, original=0.1,
                     immunized=0.3, sgr=-2.0, rise_left=None)  # fmt: skip
    assert summarize(rows, CONCEPTS, "clip", [*points, dip]).sgr["d"].mean is None
    none = summarize([rows[0], flat], CONCEPTS, "clip", points)
    assert none.mrsgr is none.sgr["c"].mean is none.sgr["c"].methods["lora"].mean is None


def test_attacks_are_counted_by_what_became_of_them():
    nearer = {"before_original": 0.2, "before_immunized": 0.4}
    rows = [
        # the immunized model's pictures broke, which is no more immune than learning nothing
        row("a", 0, 0.9, name="away", rise_left=-2.0, **nearer),
        row("a", 0, 0.1, rise_left=1.0, **nearer),
        row("b", 0, None, name="diverged", learned=False),
        row("b", 0, 7.0, learned=False, before_original=0.2, before_immunized=0.25),
        row("c", 0, None, role="other", learned=False),
    ]
    summary = summarize(rows, CONCEPTS, "clip")
    assert summary.targets.rise_left.mean == pytest.approx(0.5)
    counts = summary.tally
    assert (counts.attacks, counts.diverged, counts.taught) == (4, 1, 2)
    assert (counts.led_away, counts.beyond, counts.known_before) == (1, 1, ("a",))
    # a similarity near 0 moves SGR either way
    below = [row("b", 0, -3.0, learned=False, before_original=0.01, before_immunized=0.04)]
    assert summarize(below, CONCEPTS, "clip").tally.beyond == 1
    # that of the immunized model alone is another thing
    assert counts.below_zero == 0
    gone = [row("b", 0, value) for value in (1.0, 1.1, 2.0)]
    gone_ = summarize(gone, CONCEPTS, "clip").tally
    assert (gone_.beyond, gone_.below_zero) == (0, 2)
    assert counts.known_to_original == ()
    erased = [row("b", 0, 0.7, before_original=0.6, before_immunized=0.2)]
    assert summarize(erased, CONCEPTS, "clip").tally.known_to_original == ("b",)
    # noise of pictures is neither
    still = [row("a", 0, 0.2, rise_left=-0.05, before_original=0.2, before_immunized=0.22)]
    assert summarize(still, CONCEPTS, "clip").tally.led_away == 0
    assert summarize(still, CONCEPTS, "clip").tally.known_before == ()


@pytest.mark.parametrize("count", [1, 10])
def test_a_summary_of_few_and_of_many_concepts(count):
    concepts = [
        ConceptRecord(name=f"n{n}", slug=f"n{n}", kind="object", prompt="", role="target")
        for n in range(count)
    ]
    rows = [row(c.name, seed, n / 10) for n, c in enumerate(concepts) for seed in (0, 1)]
    summary = summarize(rows, concepts, "clip")
    assert summary.msgr.mean == pytest.approx((count - 1) / 20)
    assert summary.worst_concept.concept == "n0"
    assert (summary.mrsgr, len(summary.sgr)) == (None, count)


def test_equal_seeds_are_refused_for_they_are_one_run():
    with pytest.raises(MimaError, match="must differ, for equal seeds are one run"):
        grid_config("quick", {"seeds": [0, 0, 0]})


def test_an_attack_that_lacks_a_judge_is_done_again(folders, tmp_path):
    grid = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    tiny.save_tiny_clip(tmp_path / "second", seed=3)
    judges = [folders / "clip", tmp_path / "second"]
    arguments = {"settings": grid, "similarities": judges, "others": []}
    run(folders, tmp_path / "out", **arguments)
    table = tmp_path / "out" / "attacks.csv"
    whole = table.read_text().splitlines(keepends=True)
    assert len(whole) == 3
    table.write_text("".join(whole[:2]))
    finished = []
    run(folders, tmp_path / "out", progress=lambda *call: finished.append(call[2]), **arguments)
    assert len([name for name in finished if name]) == 1
    again = EvaluationFolder(tmp_path / "out").attacks()
    assert [one.similarity for one in again] == ["clip", "second"]
    table.write_text("".join([*whole, whole[1]]))
    with pytest.raises(MimaError, match=r"is damaged: it holds .* by clip 2 times"):
        run(folders, tmp_path / "out", **arguments)


def test_a_judge_that_is_missing_is_said_before_a_model_is_opened(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("mima.evaluation.worker.load_pipeline", None)
    with pytest.raises(MimaError, match=r"pip install 'mima\[lpips\]'"):
        run(folders, tmp_path / "out", similarities=["lpips"])
    assert not (tmp_path / "out").exists()


def test_models_differ_in_the_number_of_words_at_most(pipeline, tmp_path):
    other = tiny.tiny_stable_diffusion(tmp_path)
    other.text_encoder.resize_token_embeddings(len(other.tokenizer) + 1)
    _check_alike(pipeline, other)
    other.unet.conv_in = torch.nn.Conv2d(4, 16, 1)
    with pytest.raises(MimaError) as refused:
        _check_alike(pipeline, other)
    said = "unet.conv_in.weight is [16, 4, 3, 3] in the original and [16, 4, 1, 1] in the immunized"
    assert said in str(refused.value)


def test_one_of_anything_is_said_as_one():
    one = Estimate(attacks=1, trials=1, steps=1, pictures=1, seconds=1.2)
    assert str(one) == "1 attack and 1 trial: 1 training step and 1 picture, about 1 second"
    many = Estimate(attacks=2, trials=0, steps=20, pictures=8, seconds=130)
    assert str(many) == "2 attacks: 20 training steps and 8 pictures, about 2 minutes"


def test_differences_are_paired_attack_by_attack():
    # attacks differ much, methods little: the same little at every attack
    hard = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    base = [row("a", seed, value) for seed, value in enumerate(hard)]
    better = [row("a", seed, value + 0.05) for seed, value in enumerate(hard)]
    better.append(row("a", 9, 0.9))
    difference = paired_difference(better, base)
    assert (difference.mean, difference.runs, difference.kind) == (pytest.approx(0.05), 6, "t")
    assert difference.low == pytest.approx(difference.high) == pytest.approx(0.05)
    assert paired_difference(better, []).mean is None


def test_a_grid_without_any_attack_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("mima.evaluation.worker.load_pipeline", None)
    settings = GRID | {"images": ("other",)}
    red = dataclasses.replace(tiny.concept("red", "round"), held_out=())
    with pytest.raises(MimaError, match="no attack on a target is left for lack of material"):
        evaluate(
            ModelSource(folders / "original"), folders / "immunized",
            [red], output=tmp_path / "out", others=[tiny.concept("blue", "square")],
            settings=settings, similarities=[folders / "clip"], processes=1,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
