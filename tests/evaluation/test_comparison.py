"""The attack grid on two models, from end to end on tiny ones."""

import dataclasses
import json
import logging
import multiprocessing
import shutil
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

from mima.adaptation import LoRA
from mima.concepts import Concept
from mima.concepts.pictures import digest
from mima.errors import MimaError
from mima.evaluation import attack_original, cmmd, evaluate, ledger, load_encoder
from mima.evaluation.comparison import _check_alike
from mima.evaluation.estimate import Estimate
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.grid import grid_config
from mima.evaluation.identity import texts_of
from mima.evaluation.processes import in_parallel
from mima.evaluation.trajectory import score
from mima.evaluation.worker import Worker
from mima.families import ModelSource
from mima.families.pipelines import with_modules

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
    assert (result.same_denoiser, result.other_parts) == (True, ())
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

    with pytest.raises(MimaError, match=r"other seeds, grid\.seeds \(\[0, 1\] then, \[0\] now\)"):
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
    for part, key in (("vae", "scaling_factor"), ("unet", "sample_size")):
        settings = folders / "immunized" / part / "config.json"
        before = settings.read_text()
        told = json.loads(before)
        settings.write_text(json.dumps(told | {key: 2 * told[key]}))
        with pytest.raises(MimaError, match="holds an evaluation with other configurations;"):
            run(folders, tmp_path / "out", **arguments)
        settings.write_text(before)
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


def test_an_evaluation_goes_on_wherever_its_models_and_judges_are_now(folders, tmp_path):
    grid = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    run(folders, tmp_path / "out", settings=grid, others=[])
    moved = shutil.copytree(folders, tmp_path / "moved")
    kept = (tmp_path / "out" / "attacks.csv").read_bytes()
    run(moved, tmp_path / "out", settings=grid, others=[], similarities=[f"{moved}/clip/"])
    assert (tmp_path / "out" / "attacks.csv").read_bytes() == kept


def test_an_overwriting_that_was_cut_short_may_be_done_again(folders, tmp_path, monkeypatch):
    folder = EvaluationFolder(tmp_path / "out")
    grid = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    run(folders, folder.path, settings=grid, others=[])

    def killed(path):
        if path.name == "evaluation.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mima.evaluation.ledger.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.claim(folder, overwrite=True)
    ledger.claim(folder, overwrite=True)
    assert list(folder.path.iterdir()) == []


def test_loras_that_are_merged_first_train_on_no_picture_that_judges(folders, tmp_path):
    settings = GRID | {
        "seeds": (0,), "preparations": ("merge",), "images": ("other",), "preparation_steps": 1,
        "benign_prompts": 0, "evaluations": 1,
    }  # fmt: skip
    trained = []
    adapt = LoRA.adapt

    def noted(self, pipeline, concept, **options):
        trained.append({digest(picture) for picture in concept.images})
        return adapt(self, pipeline, concept, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LoRA, "adapt", noted)
        run(folders, tmp_path / "out", settings=settings, others=[])
    red = tiny.concept("red", "round")
    assert trained == [{digest(picture) for picture in red.held_out}] * 2

    # nor on those of an attack before, on a concept that has no others
    green = dataclasses.replace(tiny.concept("green", "round"), held_out=())
    trained.clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LoRA, "adapt", noted)
        evaluate(
            folders / "original", folders / "immunized", [green, red], output=tmp_path / "both",
            settings=settings | {"images": ("other", "same")}, similarities=[folders / "clip"],
            processes=1,
        )  # fmt: skip
    merged = [{digest(p) for p in pictures} for pictures in (green.images, red.images)]
    held_out = [merged[0], {digest(picture) for picture in red.held_out}]
    assert trained == merged * 2 + held_out * 2


def test_both_models_train_on_the_pictures_of_the_beginning(folders, tmp_path, monkeypatch):
    for index, picture in enumerate(tiny.concept("blue", "square").images):
        (tmp_path / "blue").mkdir(exist_ok=True)
        picture.load().save(tmp_path / "blue" / f"{index}.png")
    trained = []
    train = Worker._train

    def changed_after(self, attack, concept, side, *args, **options):
        trained.append([digest(picture) for picture in concept.images])
        found = train(self, attack, concept, side, *args, **options)
        tiny.picture("red", "round", seed=9).save(tmp_path / "blue" / "0.png")
        return found

    monkeypatch.setattr(Worker, "_train", changed_after)
    grid = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0}
    blue = Concept("blue", "a blue square emoji", tmp_path / "blue")
    models = folders / "original", folders / "immunized"
    evaluate(
        *models, [blue], output=tmp_path / "out", settings=grid, similarities=[folders / "clip"],
        processes=1,
    )  # fmt: skip
    original, immunized = trained
    assert original == immunized


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


def test_loras_that_are_merged_first_are_low_rank_updates_of_the_denoiser(folders, tmp_path):
    """Whatever the attack's are."""
    trained = []
    adapt = LoRA.adapt

    def noted(self, *args, **options):
        trained.append(self)
        return adapt(self, *args, **options)

    lora = GRID["methods"]["lora"] | {"dora": True, "text_encoder": True}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LoRA, "adapt", noted)
        run(folders, tmp_path, settings=GRID | {
            "methods": {"lora": lora}, "seeds": (0,), "preparations": ("merge", "benign"),
            "preparation_steps": 1, "benign_prompts": 0, "evaluations": 1,
        })  # fmt: skip
    assert EvaluationFolder(tmp_path).evaluation().complete
    assert [(one.dora, one.text_encoder) for one in trained] == [(False, False)] * 4


def test_repair_without_other_concepts_is_left_out_aloud(folders, tmp_path, caplog):
    settings = GRID | {"seeds": (0,), "evaluations": 1, "benign_prompts": 0, "repair_steps": 1}
    said = "repair_steps: no attacked model is repaired, for lack of other concepts"
    for others in ([tiny.concept("blue", "square")], []):
        caplog.clear()
        run(folders, tmp_path / str(len(others)), settings=settings, others=others)
        assert (said in caplog.text) == (not others)


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


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("textual-inversion", {"initializer": "red blue"}, "initializer 'red blue' must be one"),
        ("custom-diffusion", {"token": "emoji"}, "token 'emoji' is in the model's vocabulary"),
        ("dreambooth", {}, "frozen: the denoiser has no parameter conv_on"),
    ],
)
def test_an_attack_that_cannot_be_made_is_refused_before_any_work(
    method, changes, message, folders, tmp_path
):
    """Also where it is on the last concept: attacks on the others would be done by then."""
    given = {"frozen": ["conv_on"]} if method == "dreambooth" else {}
    settings = GRID | {"methods": {"lora": {"steps": 1}, method: {"steps": 1, **given}}}
    last = dataclasses.replace(tiny.concept("blue", "square"), **changes)
    models = ModelSource(folders / "original"), folders / "immunized"
    common = {"settings": settings, "similarities": [folders / "clip"]}
    with pytest.raises(MimaError, match=message):
        evaluate(*models, [tiny.concept(), last], output=tmp_path / "out", processes=1, **common)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MimaError, match=message):
        attack_original(models[0], [tiny.concept(), last], originals=tmp_path / "kept", **common)
    assert not (tmp_path / "kept").exists()


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
