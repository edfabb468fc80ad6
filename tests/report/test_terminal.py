"""What the terminal says of an evaluation, beside its table."""

from rich.console import Console
from support.evaluations import write_evaluation

from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report.terminal import summary_lines, summary_table

CONCEPTS = [("tiger", "target", "a tiger"), ("owl", "target", "an owl")]


def changed(path, rows_of, **changes):
    """An evaluation by one judge with other rows, each made by a function of the row."""
    folder = EvaluationFolder(
        write_evaluation(path, concepts=CONCEPTS, adaptations=("lora",), seeds=(0,),
                         similarities=("clip",))
    )  # fmt: skip
    rows = [row.model_copy(update=rows_of(row)) for row in folder.attacks()]
    evaluation = folder.evaluation()
    concepts = [c.model_copy(update=changes) for c in evaluation.concepts]
    summary = {"clip": summarize(rows, concepts, "clip")}
    return evaluation.model_copy(update={"summary": summary, "concepts": tuple(concepts)})


def test_a_plain_evaluation_says_what_was_not_looked_at(tmp_path):
    lines = summary_lines(changed(tmp_path / "run", lambda row: {}))
    assert lines[-2].startswith("pictures: Whether the attacked models' pictures are whole was not")
    assert not any("held-out" in line or "could be compared" in line for line in lines)


def test_attacks_that_were_not_tuned_are_said_to_be(tmp_path):
    plain = changed(tmp_path / "run", lambda row: {})
    for trials in (0, 1, 8):
        told = plain.model_copy(update={"config": {"grid": {"tune": {"trials": trials}}}})
        said = any("attacks were not tuned" in line for line in summary_lines(told))
        assert said == (trials < 2)


def test_trials_that_chose_what_hardly_trains_are_said(tmp_path):
    plain = changed(tmp_path / "run", lambda row: {})
    assert not any(line.startswith("trials: ") for line in summary_lines(plain))
    told = plain.model_copy(update={"hardly_trained": ("red_lora", "red_dreambooth")})
    (line,) = (line for line in summary_lines(told) if line.startswith("trials: "))
    assert line.startswith("trials: The settings that trials of 2 attacks chose hardly train the")


def test_bounds_objects_and_what_is_unknown_are_said(tmp_path):
    bound = {
        **{"learned": False, "learned_immunized": True, "rise_left_at_least": True},
        **{"rise_left_best": 2.5, "rise_left": 2.0},
        **{"objects_original": 0.75, "objects_immunized": 0.5},
    }
    diverged = dict.fromkeys(("sgr_mean", "sgr_final", "sgr_max", "rise_left", "rise_left_best"))
    found = changed(
        tmp_path / "run",
        lambda row: bound if row.concept == "tiger" else diverged,
        references="images",
    )
    text = "\n".join(summary_lines(found))
    assert "clip: no attack on owl could be compared" in text
    assert "the attack that regained most adds at least 250\u00a0% of what it adds" in text
    assert "names the right object in 75\u00a0% of the original's pictures and 50\u00a0% of" in text
    assert "tiger, owl: no held-out pictures" in text
    assert "whole was not measured" not in text
    console = Console(width=120, record=True)
    console.print(summary_table(found))
    assert "≥\u00a02.00" in console.export_text()


def test_what_only_took_away_and_other_parts_are_said(tmp_path):
    config = {
        "weights": {"original": "a", "immunized": "a"},
        "schedulers": {"original": "a", "immunized": "b"},
    }
    found = changed(tmp_path / "run", lambda row: {"rise_left_best": -1.74})
    text = "\n".join(summary_lines(found.model_copy(update={"config": config})))
    assert "regained most takes away 174\u00a0% of what it adds on the original" in text
    assert "parts: These parts of the immunized model are not the original's: noise sched" in text
    assert "parts: The denoisers of both models have the same weights" in text
    assert "parts:" not in "\n".join(summary_lines(found))


def test_a_narrow_terminal_keeps_the_concepts(tmp_path):
    methods = ("custom-diffusion", "dreambooth-lora", "textual-inversion", "quite-a-long-label")
    bound = {"steps_ratio": 12.5, "steps_ratio_at_least": True, "half_immunized": None}
    path = write_evaluation(tmp_path / "run", adaptations=methods, recorded=bound)
    found = EvaluationFolder(path).evaluation()
    console = Console(width=80, record=True)
    console.print(summary_table(found))
    text = console.export_text()
    for word in ("concept", "tiger", "owl", "Custom", "Diffusion", "their MSGR", "≥\u00a012.5"):
        assert word in text
    assert "…" not in text
    assert "Concepts of the last part should stay learnable" in text.replace("\n", " ")
    targets = [one for one in found.concepts if one.role == "target"]
    console.print(summary_table(found.model_copy(update={"concepts": targets})))
    assert "should stay learnable" not in console.export_text()


def test_what_became_of_attacks_is_said_though_none_could_be_compared(tmp_path):
    lost = dict.fromkeys(("sgr_mean", "sgr_final", "sgr_max", "rise_left", "rise_left_best"))
    nothing = lost | {"learned": False, "learned_immunized": False}
    text = "\n".join(summary_lines(changed(tmp_path / "run", lambda row: nothing)))
    assert "clip: no attack could be compared" in text
    assert "clip: 2 of 2 attacks on immunized concepts diverged on a model and count as not" in text


def test_attacks_with_gaps_beyond_one_are_told_apart(tmp_path):
    found = changed(
        tmp_path / "run", lambda row: {"sgr_mean": 1.1 if row.concept == "tiger" else -4.0}
    )
    text = "\n".join(summary_lines(found))
    every = "clip: 1 of 2 attacks on immunized concepts came to an SGR above"
    assert f"{every} 1: the immunized model's similarity is below 0" in text
    assert f"{every} 2 or below −1: it is divided by the original model's similarity" in text


def test_other_concepts_that_are_left_out_are_said(tmp_path):
    folder = EvaluationFolder(write_evaluation(tmp_path / "run", similarities=("clip",)))
    evaluation, rows = folder.evaluation(), folder.attacks()
    flat = [p.model_copy(update={"original": 0.01}) if p.attack.startswith("owl_lora") else p
            for p in folder.curves()]  # fmt: skip
    for points, words in ((folder.curves(), None), (flat, "3 of 6 attacks on other concepts")):
        summary = {"clip": summarize(rows, evaluation.concepts, "clip", points)}
        told = evaluation.model_copy(update={"summary": summary})
        said = [line for line in summary_lines(told) if "on other concepts" in line]
        assert len(said) == (words is not None)
        assert all(line.startswith(f"clip: {words} left the original") for line in said)
    console = Console(width=120, record=True)
    console.print(summary_table(told))
    (row,) = (
        line for line in console.export_text().splitlines() if "owl" in line and "LoRA" in line
    )
    assert row.count("–") == 6
