"""What attacks show on an original model is kept for other evaluations of it, and nothing else."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
from support import tiny

from mima.errors import MimaError
from mima.evaluation import EvaluationFolder, attack_original, evaluate
from mima.evaluation.identity import weights_hash
from mima.evaluation.originals import Originals
from mima.evaluation.processes import beside
from mima.evaluation.worker import Worker

GRID = {
    "methods": {"lora": {"learning_rate": 1e-2, "batch_size": 2, "steps": 2}},
    "preparations": ["fp16"],
    "tune": {"trials": 2, "steps": 1, "optimizers": ["adamw"]},
    "lr_factors": [1.0],
    "seeds": [0],
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 0,
    "repair_steps": 1,
    "sampler": {"steps": 1, "guidance": 1.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("original", "one", "two")):
        tiny.save_tiny_stable_diffusion(root / name, seed=seed, blocks=1)
    tiny.save_tiny_clip(root / "clip")
    return root


def test_a_model_is_known_by_its_schedule_whatever_order_its_defaults_have(pipeline):
    """diffusers lists the settings that were left at their defaults in no order."""
    pipeline.scheduler.register_to_config(_use_default_values=["a", "b"])
    known = weights_hash(pipeline)
    pipeline.scheduler.register_to_config(_use_default_values=["b", "a"])
    assert weights_hash(pipeline) == known
    pipeline.scheduler.register_to_config(beta_end=0.5)
    assert weights_hash(pipeline) != known


def run(folders, immunized, output, originals=None, similarities=None, others=None, **changes):
    evaluate(
        folders / "original",
        folders / immunized,
        [tiny.concept("red", "round")],
        others=others or [tiny.concept("blue", "square")],
        output=output,
        settings=GRID | changes,
        similarities=similarities or [folders / "clip"],
        processes=1,
        originals=originals,
    )
    folder = EvaluationFolder(output)
    return [row.model_copy(update={"seconds": 0}) for row in folder.attacks()], folder.curves()


@pytest.fixture
def trained(monkeypatch):
    """Side and preparation of each training since."""
    noted = []
    train = Worker._train

    def recorded(self, attack, concept, side, *args, **options):
        noted.append((side, attack.preparation))
        return train(self, attack, concept, side, *args, **options)

    monkeypatch.setattr(Worker, "_train", recorded)
    return noted


def test_the_original_is_attacked_once_for_all(folders, tmp_path, trained):
    shared = tmp_path / "originals"
    run(folders, "one", tmp_path / "first", shared)
    alone = run(folders, "two", tmp_path / "alone")
    trained.clear()
    assert run(folders, "two", tmp_path / "second", shared) == alone
    originals = [preparation for side, preparation in trained if side == "original"]
    # two trials and the attack with a preparation are done again
    assert set(originals) == {"fp16"}
    assert ("immunized", "none") in trained
    # other settings are other entries
    trained.clear()
    run(folders, "two", tmp_path / "third", shared, repair_steps=0, tune={"trials": 0})
    assert ("original", "none") in trained
    # another judge chooses among trials of its own
    trained.clear()
    tiny.save_tiny_clip(tmp_path / "clip", seed=1)
    run(folders, "two", tmp_path / "judged", shared, similarities=[tmp_path / "clip"])
    tried = [preparation for side, preparation in trained if side == "original"]
    assert tried.count("none") >= 2
    # what repairs is read with its captions
    trained.clear()
    blue = tiny.concept("blue", "square")
    said = [replace(picture, prompt="another caption") for picture in blue.images]
    run(folders, "two", tmp_path / "said", shared, others=[replace(blue, images=said)])
    assert trained.count(("original", "none")) >= 2
    for entry in shared.iterdir():
        (entry / "entry.json").write_text("{")
    with pytest.raises(MimaError, match="is damaged"):
        run(folders, "two", tmp_path / "fourth", shared)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "\xff"])
def test_a_damaged_entry_is_named(tmp_path, content):
    entry = Originals(tmp_path, "model", "cpu").entry("an attack")
    assert entry.read(dict, {}) is None
    entry.write({"losses": [1.0]}, {})
    assert entry.read(dict, {}) == {"losses": [1.0]}
    (folder,) = tmp_path.iterdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    # no more its maker's alone than other folders
    assert folder.stat().st_mode == plain.stat().st_mode
    (file,) = tmp_path.glob("*/entry.json")
    file.write_text(content, encoding="latin-1")
    with pytest.raises(MimaError, match=r"is damaged.*remove it"):
        entry.read(dict, {})


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
@pytest.mark.parametrize("diverged", [None, "after step 2"], ids=["whole", "diverged"])
def test_an_entry_that_lost_a_picture_is_refused(tmp_path, older, diverged):
    """Those behind it would take its place, and be compared with other pictures' references."""
    names = [f"{step:05d}-{index}.png" for step in (0, 2, 4) for index in (0, 1)]
    kept = names if diverged is None else names[:4]
    for name in kept:
        (tmp_path / name).write_text(name)
    originals = Originals(tmp_path / "originals", "model", "cpu")
    wanted = {name: tmp_path / "out" / name for name in names}
    for lost in (None, *kept):
        entry = originals.entry(lost)
        entry.write({"diverged": diverged}, {name: tmp_path / name for name in kept})
        (content,) = (tmp_path / "originals").glob("*/entry.json")
        if older:
            content.write_text(json.dumps({"diverged": diverged}))
        if lost is None:
            assert entry.read(dict, wanted) == {"diverged": diverged}
            assert sorted(file.name for file in (tmp_path / "out").iterdir()) == kept
        else:
            (content.parent / lost).unlink()
            with pytest.raises(MimaError, match=rf"is damaged: {lost} is missing; remove it"):
                entry.read(dict, wanted)
        shutil.rmtree(content.parent)


@pytest.mark.parametrize("names", [5, None, [None]])
def test_an_entry_that_does_not_say_what_it_holds_is_damaged(tmp_path, names):
    entry = Originals(tmp_path, "model", "cpu").entry("an attack")
    entry.write({}, {})
    (file,) = tmp_path.glob("*/entry.json")
    file.write_text(json.dumps({"files": names}))
    with pytest.raises(MimaError, match="is damaged: its files are no names"):
        entry.read(dict, {})


@pytest.mark.parametrize("content", [{}, {"diverged": 3}])
def test_an_entry_that_does_not_say_what_is_asked_is_damaged(folders, tmp_path, content):
    shared = tmp_path / "originals"
    run(folders, "one", tmp_path / "first", shared)
    for entry in shared.glob("*/entry.json"):
        entry.write_text(json.dumps(content | {"files": []}))
    with pytest.raises(MimaError, match=r"is damaged: \d+ validation error.*; remove it"):
        run(folders, "two", tmp_path / "second", shared)


def ahead(folders, originals, settings):
    return {
        "original": folders / "original",
        "concepts": [tiny.concept("red", "round")],
        "others": [tiny.concept("blue", "square")],
        "originals": originals,
        "settings": settings,
        "similarities": [folders / "clip"],
    }


def test_the_original_is_attacked_ahead_of_its_immunization(folders, tmp_path, trained):
    alone = run(folders, "one", tmp_path / "alone")
    trained.clear()
    shared = tmp_path / "originals"
    attack_original(**ahead(folders, shared, GRID))
    # each concept's two trials and attack, and nothing that would not be kept
    assert trained == [("original", "none")] * 6
    trained.clear()
    assert run(folders, "one", tmp_path / "after", shared) == alone
    # of the original only what was prepared, with its trials
    assert [preparation for side, preparation in trained if side == "original"] == ["fp16"] * 3
    # a second time there is nothing left
    trained.clear()
    attack_original(**ahead(folders, shared, GRID))
    assert trained == []


def test_a_process_beside_the_main_one(folders, tmp_path):
    shared = tmp_path / "originals"
    with beside(attack_original, **ahead(folders, shared, GRID)):
        pass
    # of each concept two trials and an attack
    assert len(list(shared.iterdir())) == 6
    with (
        pytest.raises(MimaError, match="no concepts given"),
        beside(attack_original, **ahead(folders, shared, GRID) | {"concepts": []}),
    ):
        pass
    # a block that raises does not wait
    with pytest.raises(KeyError), beside(signal.pause):
        raise KeyError
    with pytest.raises(MimaError, match="status -9"), beside(signal.raise_signal, signal.SIGKILL):
        pass


@pytest.mark.parametrize("inside", [False, True], ids=["file", "below-a-file"])
def test_a_file_in_the_folders_place_is_refused_before_any_work(
    folders, tmp_path, monkeypatch, inside
):
    monkeypatch.setattr("mima.evaluation.worker.load_pipeline", None)
    (tmp_path / "file").write_text("")
    originals = tmp_path / "file" / "x" if inside else tmp_path / "file"
    with pytest.raises(MimaError, match=r"originals .*: .*file is no folder"):
        run(folders, "one", tmp_path / "out", originals)
    with pytest.raises(MimaError, match=r"originals .*: .*file is no folder"):
        attack_original(folders / "original", [tiny.concept("red", "round")], originals=originals)
    assert not (tmp_path / "out").exists()
