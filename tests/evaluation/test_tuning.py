"""What an attacker tries before an attack, and what comes of it."""

import csv
import dataclasses
import itertools

import pytest
from support import tiny

from mima.adaptation import Diverged, LoRA, TextualInversion
from mima.errors import MimaError
from mima.evaluation import EvaluationFolder, evaluate
from mima.evaluation.grid import attack_grid, grid_config
from mima.evaluation.metrics import sgr
from mima.evaluation.plan import AttackPlan
from mima.evaluation.records import SIDES
from mima.evaluation.trajectory import trajectory
from mima.evaluation.tuning import (
    SGD_RATE,
    Choice,
    TrialRow,
    Tuning,
    TuningLog,
    choices,
    hardly_trained,
    ranked,
)
from mima.evaluation.worker import Worker
from mima.report import write_report
from mima.report.wording import count_sentences

GRID = {
    "methods": {"lora": {"learning_rate": 1e-2, "batch_size": 2, "steps": 4}},
    "lr_factors": [1],
    "sampler": {"steps": 1, "batch_size": 8},
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 1,
    "seeds": [0, 1],
}


def row(trial, **changes):
    plain = {
        "attack": "red", "side": "original", "trial": trial, "lr": 1.0, "schedule": "constant",
        "batch_size": 1, "optimizer": "adamw", "similarity": 0.5, "loss": 0.5, "diverged": False,
    }  # fmt: skip
    return TrialRow(**(plain | changes))


def test_choices_begin_with_the_attack_itself_and_try_every_rate_alone_from_the_nearest():
    tuning = Tuning(trials=30)
    found = choices(tuning)
    assert found == choices(tuning)
    assert found[0] == Choice()
    # the rate alone in every other trial, until there is no other rate
    alone = [choice.lr_factor for choice in found[1:12:2]]
    assert alone == [3.0, 0.3, 10.0, 0.1, 30.0, 0.03]
    assert found[1:12:2] == [Choice(lr_factor=factor) for factor in alone]
    drawn = [*found[2:12:2], *found[12:]]
    assert all(choice.schedule and choice.optimizer for choice in drawn)
    for first in (0, 7, 14):
        rates = [choice.lr_factor for choice in drawn[first : first + 7]]
        assert sorted(rates) == sorted(tuning.lr_factors)
    assert choices(Tuning(trials=8)) == found[:8]
    assert choices(Tuning()) == []
    assert choices(Tuning(trials=3, lr_factors=(1.0,)))[1].schedule is not None


def test_a_choice_changes_rate_schedule_batch_and_optimiser():
    settings = LoRA(learning_rate=1e-3, batch_size=4)
    assert Choice().apply(settings) == settings
    choice = Choice(lr_factor=3, schedule="cosine", batch_factor=0.5, optimizer="sgd")
    found = choice.apply(settings)
    assert found.learning_rate == pytest.approx(3e-3 * SGD_RATE)
    expected = LoRA(batch_size=2, schedule="cosine", optimizer="sgd")
    assert dataclasses.replace(found, learning_rate=expected.learning_rate) == expected
    # what an attack is about is not tuned away
    muon = dataclasses.replace(settings, optimizer="muon")
    assert choice.apply(muon).optimizer == "muon"
    assert choice.apply(muon).learning_rate == pytest.approx(3e-3)
    # nor is Muon tried where there is no matrix
    tried = Choice(lr_factor=3, optimizer="muon")
    assert tried.apply(settings).optimizer == "muon"
    assert tried.apply(TextualInversion()) == TextualInversion(learning_rate=3 * 5e-4)


def test_settings_that_hardly_train_are_told():
    """Of a model that breaks under whatever trains it, pictures that are left alone win."""
    sides = {"side": "immunized", "loss": 0.2}
    idle = {"side": "immunized", "loss": 0.5, "similarity": 0.6, "chosen": True}
    rows = [
        row(0, attack="red", **sides),
        row(1, attack="red", **idle),
        # less than twice the loss as configured
        row(0, attack="blue", **sides),
        row(1, attack="blue", **(idle | {"loss": 0.35})),
        # on the original, and not chosen
        row(0, attack="green", loss=0.2),
        row(1, attack="green", **(idle | {"side": "original"})),
        row(0, attack="grey", **sides, chosen=True),
        row(1, attack="grey", **(idle | {"chosen": False})),
        # as configured it diverged
        row(0, attack="black", side="immunized", loss=None, similarity=None, diverged=True),
        row(1, attack="black", **idle),
    ]
    assert hardly_trained(rows) == ("red",)


def test_the_best_trial_is_no_diverged_one():
    rows = [
        row(0, similarity=0.4, loss=0.2),
        row(1, similarity=None, loss=None, diverged=True),
        row(2, similarity=0.6, loss=0.3),
        row(3, similarity=0.6, loss=0.2),
    ]
    assert [found.trial for found in ranked(rows, "similarity")] == [2, 3, 0]
    assert [found.trial for found in ranked(rows, "loss")] == [0, 3, 2]
    assert ranked(rows[1:2], "similarity") == []


def test_attacks_wait_for_their_own_trials_only(tmp_path):
    config = grid_config("quick", GRID | {"tune.trials": 2})
    grid = attack_grid(config, {"red": tiny.concept()}, {"blue": tiny.concept("blue")})
    plan = AttackPlan(TuningLog(tmp_path, config.tune), grid)
    first = plan.first()
    # two concepts, two models, two trials; the seeds share them
    assert len(first) == 8
    assert {trial.attack.seed for trial in first} == {0}
    assert len(plan.waiting) == 4
    freed = []
    for trial in first:
        if trial.attack.slug == "red":
            settings = trial.adaptation
            score = {"original": 0.1, "immunized": 0.9}[trial.side] * (1 - 2 * trial.number)
            freed += plan.tried(
                row(
                    trial.number,
                    attack=trial.attack.key,
                    side=trial.side,
                    lr=settings.learning_rate,
                    schedule=settings.schedule,
                    optimizer=settings.optimizer,
                    batch_size=settings.batch_size,
                    similarity=score,
                    diverged=trial.side == "immunized" and trial.number == 0,
                )
            )
    assert [attack.seed for attack in freed] == [0, 1]
    assert {attack.slug for attack in plan.waiting} == {"blue"}
    second = choices(config.tune)[1].apply(freed[0].adaptation)
    # each model is attacked with what was best on it, and the first trial diverged on one
    assert freed[0].on("original") == (freed[0].adaptation, second)
    assert freed[0].on("immunized") == (second,)
    # another call goes on from the file
    again = AttackPlan(TuningLog(tmp_path, config.tune), grid).first()
    assert [task.slug for task in again if hasattr(task, "slug")] == ["red", "red"]
    assert sum(not hasattr(task, "slug") for task in again) == 4
    with (tmp_path / "tuning.csv").open(newline="") as file:
        chosen = [(r["side"], r["trial"]) for r in csv.DictReader(file) if r["chosen"] == "True"]
    assert sorted(chosen) == [("immunized", "1"), ("original", "0")]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"side,trial\noriginal,many\n", b"a\n\0\n"])
def test_a_damaged_log_of_trials_is_one_line(tmp_path, content):
    (tmp_path / "tuning.csv").write_bytes(content)
    with pytest.raises(MimaError, match=r"cannot read .*tuning\.csv") as caught:
        TuningLog(tmp_path, Tuning(trials=2))
    assert "\n" not in str(caught.value)


def test_a_trial_without_what_it_is_judged_by_is_damage(tmp_path):
    TuningLog(tmp_path, Tuning(trials=2)).add(row(0, similarity=None, diverged=True))
    text = (tmp_path / "tuning.csv").read_text()
    (tmp_path / "tuning.csv").write_text(text.replace("True", "False"))
    with pytest.raises(MimaError, match="a trial that did not diverge has no similarity"):
        TuningLog(tmp_path, Tuning(trials=2))


def test_a_trial_is_written_down_without_a_look_at_those_of_other_attacks(tmp_path, monkeypatch):
    """A grid has thousands of them."""
    log = TuningLog(tmp_path, Tuning(trials=3))
    for attack, side in itertools.product(("red", "blue", "green"), SIDES):
        for trial in (2, 0):
            log.add(row(trial, attack=attack, side=side, similarity=0.1 * (1 + trial)))
    looked_at = []

    def noted(rows, by):
        rows = list(rows)
        looked_at.append({(one.attack, one.side) for one in rows})
        return ranked(rows, by)

    monkeypatch.setattr("mima.evaluation.tuning.ranked", noted)
    log.add(row(1, attack="blue", similarity=0.9))
    assert looked_at == [{("blue", "original")}]
    assert log.missing("blue", "original") == []
    assert log.missing("blue", "immunized") == [1]
    assert [one.trial for one in log.of("blue", "original")] == [0, 1, 2]
    again = TuningLog(tmp_path, Tuning(trials=3)).rows
    assert again == log.rows
    places = [(one.attack, one.side, one.trial) for one in again]
    assert places == sorted(places)
    assert len(places) == 3 * 2 * 2 + 1
    chosen = {(one.attack, one.side): one.trial for one in again if one.chosen}
    best = dict.fromkeys(itertools.product(("red", "blue", "green"), SIDES), 2)
    assert chosen == best | {("blue", "original"): 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("models"), "model")


@pytest.mark.parametrize("by", ["similarity", "loss"])
def test_every_attack_is_tuned_on_each_model(by, folders, tmp_path):
    calls = []
    evaluate(
        folders / "model",
        folders / "immunized",
        [tiny.concept()],
        output=tmp_path,
        settings=GRID | {"tune": {"trials": 3, "by": by, "optimizers": ["adamw", "muon"]}},
        similarities=[folders / "clip"],
        processes=1,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1][0] == calls[-1][1]
    log = TuningLog(tmp_path, Tuning(trials=3, by=by))
    assert len(log.rows) == 2 * 3
    rows = EvaluationFolder(tmp_path).attacks()
    assert len(rows) == 2
    for side in ("original", "immunized"):
        tried = log.of(rows[0].attack.removesuffix("_seed0"), side)
        winner = log.ranked(tried[0].attack, side)[0]
        assert [trial.chosen for trial in tried] == [trial == winner for trial in tried]
        value = "loss" if by == "loss" else "similarity"
        scores = [getattr(trial, value) for trial in tried]
        assert getattr(winner, value) == (min if by == "loss" else max)(scores)
        assert len(set(scores)) == 3
        said = {getattr(found, f"tuned_{side}") for found in rows}
        assert said == {
            f"rate {winner.lr:g}, {winner.schedule}, batch {winner.batch_size}, {winner.optimizer}"
        }


@pytest.mark.parametrize("rates", [(1e30, 1e-2), (1e30, 1e29)], ids=["next", "none"])
def test_settings_that_diverge_at_full_length_give_way_to_the_next_trial(
    rates, folders, tmp_path, monkeypatch
):
    def tried(_, trial):
        # as if the first trial, shorter than the attack, had been the best
        likeness = 0.9 - trial.number / 10
        known = {"attack": trial.attack.key, "side": trial.side, "lr": rates[trial.number]}
        return row(trial.number, similarity=likeness, **known)

    monkeypatch.setattr(Worker, "_tried", tried)
    settings = GRID | {
        "tune": {"trials": 2},
        "seeds": [0],
        "methods": {"lora": GRID["methods"]["lora"] | {"max_grad_norm": None}},
    }
    calls = []
    evaluate(
        folders / "model",
        folders / "immunized",
        [tiny.concept()],
        output=tmp_path,
        settings=settings,
        similarities=[folders / "clip"],
        processes=1,
        progress=lambda *call: calls.append(call),
    )
    assert max(done for done, *_ in calls) <= calls[-1][1]
    (found,) = EvaluationFolder(tmp_path).attacks()
    holds = rates[1] < 1
    assert (found.sgr_final is not None) == holds
    expected = f"rate {rates[1]:g}, constant, batch 1, adamw"
    assert (found.tuned_original, found.tuned_immunized) == (expected, expected)


def test_an_attack_that_diverges_late_counts_by_the_settings_that_got_furthest(
    folders, tmp_path, monkeypatch
):
    rates = (1e-2, 3e-2)

    def tried(_, trial):
        known = {"attack": trial.attack.key, "side": trial.side, "lr": rates[trial.number]}
        return row(trial.number, similarity=0.9 - trial.number / 10, batch_size=2, **known)

    def cut(pipeline, concept, adaptation, *args, **options):
        drawn = trajectory(pipeline, concept, adaptation, *args, **options)
        why = Diverged("the loss is nan")
        if adaptation.learning_rate == rates[1]:
            return dataclasses.replace(drawn, diverged=why, broken=(2,))
        return dataclasses.replace(drawn, diverged=why, steps=(0, 1, 2))

    settings = GRID | {"seeds": [0], "evaluations": 4}

    def curve(name, trials):
        result = evaluate(
            folders / "model",
            folders / "immunized",
            [tiny.concept()],
            output=tmp_path / name,
            settings=settings | {"tune": {"trials": trials}},
            similarities=[folders / "clip"],
            processes=1,
        )
        folder = EvaluationFolder(tmp_path / name)
        (found,) = folder.attacks()
        points = [(point.step, point.original, point.immunized) for point in folder.curves()]
        return found, points, result.summary["clip"].tally

    whole, points, counts = curve("whole", 1)
    assert (whole.diverged_after, counts.cut_short) == (None, 0)
    monkeypatch.setattr(Worker, "_tried", tried)
    monkeypatch.setattr("mima.evaluation.worker.trajectory", cut)
    late, known, counts = curve("late", 2)
    assert known == points[:3]
    assert (late.diverged_after, late.sgr_final) == (2, sgr(*known[2][1:]))
    assert late.tuned_original == late.tuned_immunized == "rate 0.01, constant, batch 2, adamw"
    assert (counts.attacks, counts.diverged, counts.cut_short) == (1, 0, 1)
    assert "<small>diverged after 2</small>" in write_report([tmp_path / "late"]).read_text()
    assert "1 of 1 attack on immunized concepts diverged on a model later on" in " ".join(
        count_sentences(counts)
    )


def test_the_headline_preset_is_tuned_and_counted():
    config = grid_config("headline")
    targets = {name: tiny.concept(name) for name in ("red", "blue")}
    grid = attack_grid(config, targets, {"green": tiny.concept("green")})
    # methods × concepts × seeds, on two models
    assert len(grid) == 2 * 3 * 3
    trials = 2 * 3 * 2 * config.tune.trials
    assert 2 * sum(attack.steps for attack in grid) + trials * config.tune.steps == 16_800
