"""What the terminal says of an evaluation, beside its table."""

from rich.console import Console
from support.evaluations import write_evaluation

from mima.evaluation.records import EvaluationFolder
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
    assert "whether attacked pictures are whole was not measured, for which a judge" in lines[-2]
    assert not any("held-out" in line or "could be compared" in line for line in lines)


def test_attacks_that_were_not_tuned_are_said_to_be(tmp_path):
    plain = changed(tmp_path / "run", lambda row: {})
    for trials in (0, 8):
        told = plain.model_copy(update={"config": {"grid": {"tune": {"trials": trials}}}})
        said = any("attacks were not tuned" in line for line in summary_lines(told))
        assert said == (trials == 0)


def test_trials_that_chose_what_hardly_trains_are_said(tmp_path):
    plain = changed(tmp_path / "run", lambda row: {})
    assert not any(line.startswith("trials of") for line in summary_lines(plain))
    told = plain.model_copy(update={"hardly_trained": ("red_lora", "red_dreambooth")})
    (line,) = (line for line in summary_lines(told) if line.startswith("trials of"))
    assert line.startswith("trials of 2 attacks chose settings that hardly train the immunized")


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
    assert "the attack that regained most adds at least 250 % of what it adds" in text
    assert "names the right object in 75 % of the original's pictures and 50 % of the" in text
    assert "tiger, owl: no held-out pictures" in text
    assert "whole was not measured" not in text
    console = Console(width=120, record=True)
    console.print(summary_table(found))
    assert "≥\u00a02.00" in console.export_text()
