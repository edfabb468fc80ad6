"""What a page concludes from an evaluation: its headline, and what it warns of."""

from __future__ import annotations

import re
from html import unescape

import pytest
from support.evaluations import write_evaluation
from support.pages import SMALL, Page, told

from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report import write_report
from mima.report.runs import load_runs
from mima.report.wording import share


def test_the_headline_says_how_far_the_furthest_attack_got(small, tmp_path):
    source = EvaluationFolder(small)
    titles = []
    for rise, gap in ((1.2, 0.2), (0.3, -0.1), (0.6, 0.2), (0.2, 0.2)):
        rows = [
            row.model_copy(update={"rise_left_best": rise, "sgr_mean": gap})
            for row in source.attacks()
        ]
        titles.append(told(source, tmp_path / f"{rise}{gap}", rows)[0])
    assert titles == [
        "At least one attack got through",
        "At least one attack got through",
        "At least one attack regained most of what it adds",
        "No attack regained more than 20\u00a0% of what it adds",
    ]


def test_where_nothing_was_taught_the_headline_claims_nothing(small, tmp_path):
    source = EvaluationFolder(small)
    nothing = {"learned": False, "learned_immunized": False, "rise_left_best": None}
    rows = [row.model_copy(update=nothing | {"sgr_mean": -0.2}) for row in source.attacks()]
    title, text = told(source, tmp_path / "nothing", rows)
    assert title == "No attack taught either model anything: nothing was measured"
    assert "got through" not in text
    # the immunized model alone: the worst that can be
    alone = {"learned": False, "learned_immunized": True, "rise_left_best": 3.0}
    rows = [row.model_copy(update=alone) for row in source.attacks()]
    title, text = told(source, tmp_path / "alone", rows)
    assert title == "At least one attack got through"
    assert "1 of 1 taught the immunized model a concept and the original none" in text


def test_an_attack_that_only_took_away_regained_nothing(small, tmp_path):
    source = EvaluationFolder(small)
    for rise, title, adds in (
        (-0.02, "No attack regained anything: after each of them the", "takes away 2 %"),
        (-0.001, "No attack regained anything: after each of them the", "takes away 0 %"),
        (0.02, "No attack regained more than 2\u00a0% of what it adds", "adds 2 %"),
    ):
        changes = {"rise_left_best": rise, "sgr_mean": 0.9}
        rows = [row.model_copy(update=changes) for row in source.attacks()]
        found, text = told(source, tmp_path / f"{rise}", rows)
        assert found.startswith(title)
        assert f"{adds} of the similarity that it adds on the original model" in text
    assert share(-0.001) == "0\u00a0%"


def test_no_immunity_is_claimed_without_the_parts_that_an_attacker_may_replace(tmp_path):
    def sides(part, other):
        return {"original": {part: "a"}, "immunized": {part: other}}

    other = "parts that are not the original's (vae, unet settings)"
    paths = {}
    for name, weights, encoder, settings, words in (
        ("alike", "b", "a", "a", ""),
        ("parts", "b", "b", "b", f", with {other}"),
        ("same", "a", "b", "b", f", with the original's denoiser and {other}"),
    ):
        config = {
            "weights": {"original": "a", "immunized": weights},
            "encoders": sides("vae", encoder),
            "configurations": sides("unet", settings),
        }
        held = {"rise_left_best": 0.1, "sgr_mean": 0.9}
        path = write_evaluation(tmp_path / name, name=name, **SMALL, config=config, recorded=held)
        (told_,) = re.findall("<h1>(.*?)</h1>", write_report([path]).read_text())
        assert unescape(told_) == f"No attack regained more than 10\u00a0% of what it adds{words}"
        text = Page(path / "report.html").text
        assert ("Parts. These parts of the immunized model are not the" in text) == bool(words)
        assert ("put the original's in their place" in text) == bool(words)
        assert ("The denoisers of both models have the same weights" in text) == (name == "same")
        paths[name] = path
    page = write_report([paths["parts"], paths["parts"]], tmp_path / "page.html").read_text()
    (told_,) = re.findall("<h1>(.*?)</h1>", page)
    assert unescape(told_).endswith(f"withstands the attack that gets furthest best, with {other}")
    assert "Parts of parts." in Page(tmp_path / "page.html").text


def test_lower_bounds_are_said_to_be_bounds(small, tmp_path):
    source = EvaluationFolder(small)
    (mine, other) = source.attacks()
    alone = {"learned": False, "learned_immunized": True, "rise_left_at_least": True}
    rows = [mine.model_copy(update=alone | {"rise_left_best": 3.0, "rise_left": 2.0}), other]
    flat = [
        point.model_copy(update={"original": 0.3}) if point.attack == mine.attack else point
        for point in source.curves()
    ]
    changed = EvaluationFolder(tmp_path / "source")
    changed.write_evaluation(source.evaluation())
    changed.write_rows(rows, flat)
    _, text = told(changed, tmp_path / "bound", rows)
    page = Page(tmp_path / "bound" / "report.html")
    assert "adds at least 300 % of the similarity that it adds on the original model" in text
    assert "attacks end at at least 200 % of what" not in text
    assert "attacks end at no less than 200 % of what they add on the original model" in text
    big = re.findall(r'<p class="big">(.*?)</p>', page.source)
    assert big[:2] == ["≥\u00a0300\u00a0%", "≥\u00a0200\u00a0%"]
    (cells,) = (row for row in page.rows if row[0] == "tiger immunized only")
    assert "≥\u00a0200\u00a0%" in cells


def test_every_judge_has_its_say(folder, tmp_path, page):
    dino = EvaluationFolder(folder).evaluation().summary["dino"]
    assert (
        f"So far by clip. By dino the attack that got furthest adds "
        f"{100 * dino.worst_rise.rise_left:.0f} % of what it adds on the original model"
    ) in page.text
    assert "By clip, the first of the judges" in page.text
    source = EvaluationFolder(folder)
    path = write_evaluation(tmp_path / "run", **SMALL | {"similarities": ("clip", "dino")})
    other = EvaluationFolder(path)
    evaluation, rows = other.evaluation(), other.attacks()
    nothing = {"learned": False, "learned_immunized": False, "rise_left_best": None}
    rows = [row.model_copy(update=nothing) if row.similarity == "dino" else row for row in rows]
    summary = {name: summarize(rows, evaluation.concepts, name) for name in ("clip", "dino")}
    other.write_evaluation(evaluation.model_copy(update={"summary": summary}))
    other.write_rows(rows, other.curves())
    text = Page(write_report([path])).text
    assert "By dino no attack taught either model anything." in text
    # runs that one judge puts first and another last
    two = tmp_path / "two"
    for name, best in (("a", "clip"), ("b", "dino")):
        made = write_evaluation(two / name, name=name, **SMALL | {"similarities": ("clip", "dino")})
        done = EvaluationFolder(made)
        rises = [row.model_copy(update={"rise_left_best": 0.2 if row.similarity == best else 0.6})
                 for row in done.attacks()]  # fmt: skip
        done.write_rows(rises, done.curves())
    text = Page(write_report([two / "a", two / "b"], tmp_path / "page.html")).text
    assert "a holds most by clip" in text
    assert "By dino b holds most: there it adds 20 %." in text
    assert source.evaluation().similarities == ("clip", "dino")


def test_a_concept_of_which_nothing_is_known_is_named(tmp_path):
    concepts = [(name, "target", f"a {name}") for name in ("tiger", "owl", "fox", "elk")]
    source = EvaluationFolder(write_evaluation(tmp_path / "run", concepts=concepts, **SMALL))
    nothing = {"learned": False, "learned_immunized": False, "rise_left_best": None}
    diverged = nothing | dict.fromkeys(("sgr_mean", "sgr_final", "sgr_max", "rise_left"))
    changes = {"tiger": {}, "owl": diverged, "fox": nothing}
    rows = [
        row.model_copy(update=changes[row.concept])
        for row in source.attacks()
        if row.concept in changes
    ]
    _, text = told(source, tmp_path / "changed", rows)
    assert "Of owl nothing is known: every attack on it diverged." in text
    assert "Of fox nothing is known: no attack on it taught either model anything." in text
    assert "Of elk nothing is known: it was not attacked." in text
    assert "Of tiger nothing" not in text


def test_what_was_not_held_out_or_looked_at_is_said(small, tmp_path, page):
    concepts = EvaluationFolder(small).evaluation().concepts
    learned = [c.model_dump() | {"references": "images"} for c in concepts[:1]]
    told_ = [*learned, *(c.model_dump() for c in concepts[1:])]
    run = write_evaluation(tmp_path / "run", **SMALL)
    source = EvaluationFolder(run)
    changed = source.evaluation().model_dump() | {"concepts": told_}
    source.write_evaluation(type(source.evaluation()).model_validate(changed))
    text = Page(write_report([run])).text
    assert "No held-out pictures. run compares what models draw of tiger with the pictures" in text
    assert "No held-out pictures." not in page.text
    assert "Whether the attacked models' pictures are whole was not measured" in text
    assert "no calibration is on record" in text


def test_what_flatters_is_said(small, tmp_path):
    source = EvaluationFolder(small)
    (mine, other) = source.attacks()
    assert mine.role == "target"
    nearer = {"before_original": 0.2, "before_immunized": 0.6, "rise_left_best": 0.0}
    rows = [mine.model_copy(update=nearer), other]
    title, text = told(source, tmp_path / "known", rows)
    assert title == "The immunized model shows tiger before any attack"
    assert "a low rise is no immunity" in text
    erased = mine.model_copy(update={"before_original": 0.6, "before_immunized": 0.2})
    _, text = told(source, tmp_path / "erased", [erased, other])
    assert "The original model's pictures are nearer to tiger before any attack than" in text
    assert "Of concepts that were erased before, the original is the erased model." in text
    away = mine.model_copy(update={"rise_left": -1.5, "sgr_mean": 3.0})
    lost = mine.model_copy(update={"attack": "x", "sgr_mean": None, "learned": False,
                                   "learned_immunized": False, "rise_left_best": None})  # fmt: skip
    _, text = told(source, tmp_path / "away", [away, lost, other])
    assert "1 of 2 attacks on immunized concepts led the immunized model's pictures away" in text
    assert "1 of 2 attacks on immunized concepts came to an SGR above 2 or below −1" in text
    assert "similarity is below 0" not in text
    assert "1 of 2 attacks on immunized concepts diverged on a model and count as not" in text
    assert "taught neither model anything" not in text
    # an SGR of nothing says nothing, what was added does
    for rise, said in ((0.1, "No attack regained more than 10\u00a0%"), (1.2, "got through")):
        nothing = mine.model_copy(update={"sgr_mean": 0.0, "rise_left_best": rise})
        title, _ = told(source, tmp_path / f"nothing{rise}", [nothing, other])
        assert said in title


def test_a_gap_above_one_is_no_division_by_little(small, tmp_path):
    source = EvaluationFolder(small)
    mine, other = source.attacks()
    below = mine.model_copy(update={"sgr_mean": 1.1})
    _, text = told(source, tmp_path / "below", [below, other])
    said = "1 of 1 attack on immunized concepts came to an SGR above 1: the immunized model's"
    assert said in text
    assert "is small there" not in text
    # what was there before is no part of the gap after
    before = mine.model_copy(update={"sgr_before": 0.79})
    _, text = told(source, tmp_path / "before", [before, other])
    assert "Before any attack it is already 0.79." in text
    assert "of it was there" not in text


def test_other_concepts_that_are_left_out_are_said(small, tmp_path):
    source = EvaluationFolder(small)
    rows, concepts = source.attacks(), source.evaluation().concepts
    flat = [p.model_copy(update={"original": 0.01}) if p.attack.startswith("owl") else p
            for p in source.curves()]  # fmt: skip
    summary = summarize(rows, concepts, "clip", flat)
    paths = []
    for name in "ab":
        changed = EvaluationFolder(tmp_path / name)
        evaluation = source.evaluation().model_copy(update={"summary": {"clip": summary}})
        changed.write_evaluation(evaluation.model_copy(update={"name": name}))
        changed.write_rows(rows, flat)
        paths.append(changed.path)
    said = "1 of 1 attack on other concepts left the original model's pictures below a similarity"
    text = Page(write_report(paths[:1])).text
    assert "No attack on another concept says anything." in text
    assert text.count(said) == 2
    text = Page(write_report(paths, tmp_path / "page.html")).text
    assert f"b: {said}" in text
    assert said not in Page(write_report([small], tmp_path / "small.html")).text


def test_a_judge_that_reads_no_texts_leaves_broken_pictures_to_another(tmp_path):
    recorded = {"objects_original": 0.8, "objects_immunized": 0.2}
    path = write_evaluation(tmp_path / "run", **SMALL | {"similarities": ("embedded", "clip")},
                            recorded=recorded)  # fmt: skip
    folder = EvaluationFolder(path)
    rows = [row.model_copy(update={"objects_original": None, "objects_immunized": None})
            if row.similarity == "embedded" else row for row in folder.attacks()]  # fmt: skip
    folder.write_rows(rows, folder.curves())
    assert "pictures are broken, and part of the gap is that" in Page(write_report([path])).text


def test_a_judge_that_cannot_tell_the_concept_is_said(tmp_path):
    known = {"right": 0.5, "others": 0.2, "noise": 0.6, "grey": 0.1}
    path = write_evaluation(tmp_path / "run", **SMALL, calibration={"clip": {"tiger": known}})
    assert "clip sets right pictures of tiger no higher than" in Page(write_report([path])).text
    known = {"right": 0.5, "others": 0.3, "noise": 0.1, "grey": 0.1}
    calibration = {"clip": {"tiger": known | {"right": 0.6}}, "dino": {"tiger": known}}
    path = write_evaluation(tmp_path / "weak", **SMALL, calibration=calibration)
    text = Page(write_report([path])).text
    assert "dino sets right pictures of tiger (0.20) less than 0.25 above other concepts'" in text
    assert "clip sets right" not in text


@pytest.mark.parametrize(
    ("rises", "title"),
    [
        ((0.2, 1.2), "At least one attack got through, by dino"),
        ((0.2, 0.4), "No attack regained more than 40\u00a0% of what it adds, by dino"),
        ((0.4, 0.2), "No attack regained more than 40\u00a0% of what it adds"),
        ((1.2, 1.3), "At least one attack got through"),
        ((0.2, None), "No attack regained more than 20\u00a0% of what it adds"),
    ],
)
def test_the_headline_is_by_the_judge_by_which_attacks_got_furthest(tmp_path, rises, title):
    """Which judge comes first is the author's choice."""
    judges = ("clip", "dino")
    path = write_evaluation(tmp_path / "run", **SMALL | {"similarities": judges})
    folder = EvaluationFolder(path)
    rise = dict(zip(judges, rises, strict=True))
    rows = [
        row.model_copy(update={"rise_left_best": rise[row.similarity], "sgr_mean": 0.2})
        for row in folder.attacks()
    ]
    evaluation = folder.evaluation()
    summary = {name: summarize(rows, evaluation.concepts, name) for name in judges}
    folder.write_rows(rows, folder.curves())
    folder.write_evaluation(evaluation.model_copy(update={"summary": summary}))
    assert f"<h1>{title}</h1>" in Page(write_report([path])).source


def test_a_lower_bound_is_no_upper_one(small, tmp_path):
    source = EvaluationFolder(small)
    alone = {"learned": False, "learned_immunized": True, "rise_left_at_least": True}
    rows = [row.model_copy(update=alone | {"rise_left_best": 0.4}) for row in source.attacks()]
    title, _ = told(source, tmp_path / "bound", rows)
    assert title == "At least one attack taught the immunized model and not the original"


def test_what_diverged_is_in_no_mean_of_the_last_step(tmp_path):
    recorded = {"repaired_original": 0.6, "repaired_immunized": 0.5}
    path = write_evaluation(tmp_path / "run", **SMALL | {"seeds": (0, 1)}, recorded=recorded)
    folder = EvaluationFolder(path)
    (whole,) = load_runs([path])
    chosen = next(s for s, _ in whole.by_setting if s.concept == "tiger")
    rows = folder.attacks()
    lost = next(row.attack for row in rows if (row.concept, row.seed) == ("tiger", 1))
    nothing = {"sgr_mean": None, "repaired_original": None, "repaired_immunized": None}
    folder.write_rows(
        [row.model_copy(update=nothing if row.attack == lost else {}) for row in rows],
        [point for point in folder.curves() if point.attack != lost or point.step == 0],
    )
    (run,) = load_runs([path])
    (curve,) = [c for c in run.curves_of(chosen, "clip") if max(c) > 0]
    assert run.last(chosen, "clip") == curve[max(curve)]
    assert (whole.seeds(chosen, "clip"), run.seeds(chosen, "clip")) == (2, 1)
