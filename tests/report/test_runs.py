"""Pages about several evaluations: what is compared, what is ranked, what is marked."""

from __future__ import annotations

import re

import pytest
from support.evaluations import write_evaluation
from support.pages import SMALL, Page

from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report import write_report
from mima.report.wording import setting_text


def test_what_runs_do_not_have_in_common_is_marked(tmp_path):
    def write(name, **changes):
        config = {
            "grid": {"methods": {"lora": {"rank": 4}}, "evaluations": 4},
            "weights": {"original": "1", "immunized": name},
            "schedulers": {"original": "1", "immunized": "1"},
            "pictures": {"tiger": {"images": "1"}},
        }
        for key, value in changes.items():
            config[key] = config[key] | value
        versions = {"diffusers": "0.42"}
        return write_evaluation(
            tmp_path / name, name=name, **SMALL, config=config, versions=versions
        )

    one = write("one")
    for name, changes, words in (
        ("same", {}, None),
        ("weights", {"weights": {"original": "2"}}, "the original model"),
        (
            "schedule",
            {"schedulers": {"original": "2"}},
            "the original's noise schedule, by diffusers 0.42",
        ),
        ("rank", {"grid": {"methods": {"lora": {"rank": 8}}}}, "the method lora"),
        ("more", {"grid": {"methods": {"lora": {"rank": 4}, "dreambooth": {}}}}, None),
        ("pictures", {"pictures": {"tiger": {"images": "2"}}}, "the pictures of tiger"),
        ("often", {"grid": {"evaluations": 2}}, "how often models are sampled"),
    ):
        text = Page(write_report([one, write(name, **changes)], tmp_path / "page.html")).text
        if words is None:
            assert "Not alike." not in text
        else:
            assert f"Not alike. These runs differ in {words}: attacks of one name" in text
    assert "Not alike." not in Page(write_report([one])).text


def test_pages_of_several_runs_warn_as_pages_of_one_do(tmp_path):
    changes = {
        "away": {"rise_left": -1.5, "objects_original": 0.8, "objects_immunized": 0.2},
        "beyond": {"sgr_mean": -3.0},
        "below": {"sgr_mean": 1.1},
        "alone": {"learned": False, "learned_immunized": True},
    }
    lost = {"sgr_mean": None, "learned": False, "learned_immunized": False, "rise_left_best": None}
    paths = []
    for name, change in changes.items():
        folder = EvaluationFolder(write_evaluation(tmp_path / name, name=name, **SMALL))
        mine, other = folder.attacks()
        rows = [mine.model_copy(update=change), mine.model_copy(update=lost | {"attack": "x"})]
        folder.write_rows([*rows, other], folder.curves())
        paths.append(folder.path)
    text = Page(write_report(paths, tmp_path / "page.html")).text
    for name, words in (
        ("away", "led the immunized model's pictures away from the concept"),
        ("beyond", "came to an SGR above 2 or below −1"),
        ("below", "came to an SGR above 1: the immunized model's similarity is below 0"),
        *((name, "diverged on a model and count as not tried") for name in changes),
    ):
        assert f"{name}: 1 of 2 attacks on immunized concepts {words}" in text
    assert "away: After the attacks an encoder names the right object in 20 % of" in text
    assert "below: Whether the attacked models' pictures are whole was not measured" in text
    assert "alone: 1 of 2 taught the immunized model a concept and the original none." in text


def compared_runs(root, rows_of, judges=("clip",)):
    """Title and text of a page about runs, each with other rows, made by a function of the row."""
    paths = []
    for name, changed in rows_of.items():
        path = write_evaluation(root / name, name=name, **SMALL | {"similarities": judges})
        folder = EvaluationFolder(path)
        rows = [row.model_copy(update=changed(row)) for row in folder.attacks()]
        evaluation = folder.evaluation()
        summary = {judge: summarize(rows, evaluation.concepts, judge) for judge in judges}
        folder.write_evaluation(evaluation.model_copy(update={"summary": summary}))
        folder.write_rows(rows, folder.curves())
        paths.append(path)
    page = Page(write_report(paths, root / "page.html") if len(paths) > 1 else
                write_report(paths))  # fmt: skip
    return re.findall("<h1>(.*?)</h1>", page.source)[0], page.text


KNEW = {"before_original": 0.2, "before_immunized": 0.6, "rise_left_best": 0.1, "sgr_mean": 0.2}


HOLDS = {"rise_left_best": 0.4, "sgr_mean": 0.3}


BEATEN = {"rise_left_best": 0.1, "sgr_mean": -0.2}


def test_a_run_that_was_beaten_or_knew_the_concept_is_not_ranked(tmp_path):
    runs = {"beaten": BEATEN, "holds": HOLDS, "knew": KNEW}
    title, text = compared_runs(
        tmp_path / "all", {name: lambda row, c=changes: c for name, changes in runs.items()}
    )
    assert title == "holds withstands the attack that gets furthest best"
    assert "holds holds most by clip" in text
    left = "beaten (an attack got through), knew (it showed a concept before any attack)"
    assert f"Not ranked by clip: {left}." in text
    for names, said in (
        ("beaten beaten", "At least one attack got through in every run"),
        ("beaten knew", "In every run an attack got through, or the model showed a concept"),
        ("knew knew", "In every run the immunized model shows a concept before any attack"),
    ):
        chosen = {f"run {n}": runs[name] for n, name in enumerate(names.split())}
        title, text = compared_runs(
            tmp_path / names, {name: lambda row, c=changes: c for name, changes in chosen.items()}
        )
        assert title.startswith(said)
        assert "holds most" not in text


def test_a_judge_by_which_every_run_was_beaten_names_none_that_holds_most(tmp_path):
    def rows(rise):
        return lambda row: {"sgr_mean": 0.3, "rise_left_best": 0.95 if row.similarity == "dino"
                            else rise}  # fmt: skip

    title, text = compared_runs(tmp_path, {"a": rows(0.2), "b": rows(0.3)}, ("clip", "dino"))
    assert title == "a withstands the attack that gets furthest best by clip, none by dino"
    assert "By dino" not in text


NOTHING = {"learned": False, "learned_immunized": False, "rise_left_best": None}


@pytest.mark.parametrize("runs", ["a", "ab"])
def test_a_judge_that_saw_nothing_leaves_the_headline_to_the_next(tmp_path, runs):
    def rows(row):
        return NOTHING if row.similarity == "clip" else {"rise_left_best": 1.2, "sgr_mean": 0.2}

    title, text = compared_runs(tmp_path, dict.fromkeys(runs, rows), ("clip", "dino"))
    if len(runs) == 1:
        assert title == "At least one attack got through, by dino"
        assert "So far by dino. By clip no attack taught either model anything." in text
    else:
        assert title == "At least one attack got through in every run, by dino"
        assert "a: furthest attack 120 % of the rise" in text
    title, _ = compared_runs(
        tmp_path / "nothing", dict.fromkeys(runs, lambda row: NOTHING), ("clip", "dino")
    )
    assert title == (
        "No attack taught either model anything: nothing was measured"
        if len(runs) == 1
        else "No attack could be compared"
    )


def test_runs_without_a_common_attack_by_one_judge_are_compared_by_the_next(tmp_path):
    def rows(blind):
        return lambda row: NOTHING if (row.similarity, blind) == ("clip", True) else HOLDS

    title, text = compared_runs(tmp_path, {"a": rows(True), "b": rows(False)}, ("clip", "dino"))
    assert title == "a withstands the attack that gets furthest best by dino"
    assert "no attack in common" not in text


def test_original_models_are_told_apart_by_their_weights(tmp_path):
    def labels(name, *originals):
        paths = [
            write_evaluation(
                tmp_path / name / str(n), name=f"run {n}", **SMALL,
                models={"original": path, "immunized": "x"},
                **({} if weights is None else {"config": {"weights": {"original": weights}}}),
            )
            for n, (path, weights) in enumerate(originals)
        ]  # fmt: skip
        page = Page(write_report(paths, tmp_path / name / "page.html"))
        told = [s.get("aria-label", "") for s in page.all("svg")]
        (curve,) = (label for label in told if "tiger, LoRA" in label)
        pictures = {image["alt"] for image in page.all("img")}
        steps = [alt for alt in pictures if alt.startswith("Original, step 25, picture 1")]
        assert len(steps) == 1
        shown = page.source.count('<img src="data') and page.source.count(
            'alt="Original, step 25, picture 1"'
        )
        return curve.count("original from"), curve.count("original 2 from"), shown

    # two cards, of tiger and of owl, show the original's pictures
    assert labels("same", ("a", "1"), ("b", "1")) == (1, 0, 2)
    assert labels("other", ("a", "1"), ("a", "2")) == (1, 1, 4)
    assert labels("unknown", ("a", None), ("b", None)) == (1, 1, 4)


def test_a_lower_bound_is_one_beside_another_run_too(tmp_path):
    taught_alone = {"learned": False, "rise_left_best": 0.5, "rise_left_at_least": True}
    paths = [
        write_evaluation(tmp_path / name, name=name, recorded=recorded, **SMALL)
        for name, recorded in (("bound", taught_alone), ("other", {"rise_left_best": 0.7}))
    ]
    text = Page(write_report(paths, tmp_path / "page.html")).text
    assert "that attack adds at least 50 % of what it adds" in text
    assert "bound: furthest attack at least 50 % of the rise" in text
    assert "other: furthest attack 70 % of the rise" in text


def test_runs_are_compared_by_the_attacks_that_all_met(tmp_path):
    weak, strong, apart = (
        write_evaluation(tmp_path / name, name=name, strength=strength, **SMALL | changes)
        for name, strength, changes in (
            ("weak", 0.6, {}),
            ("strong", 0.7, {"lr_factors": (1, 100)}),
            ("apart", 0.6, {"lr_factors": (3,)}),
        )
    )
    text = Page(write_report([weak, strong], tmp_path / "page.html")).text
    # the attack that only one of them met got further than any other
    assert "strong withstands the attack that gets furthest best" in text
    assert "Attacks that count: weak 1, strong 2; only those in common are compared" in text
    text = Page(write_report([weak, apart], tmp_path / "page.html")).text
    assert "These runs met no attack in common" in text


def test_a_comparison_praises_nobody_where_every_run_was_beaten(tmp_path):
    for name, rise in (("one", 1.1), ("two", 0.95)):
        folder = EvaluationFolder(write_evaluation(tmp_path / name, name=name, **SMALL))
        rows = [
            row.model_copy(update={"rise_left_best": rise} | (
                {"before_original": 0.1, "before_immunized": 0.5} if name == "two" else {}))
            for row in folder.attacks()
        ]  # fmt: skip
        folder.write_rows(rows, folder.curves())
    page = Page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html"))
    assert "<h1>At least one attack got through in every run</h1>" in page.source
    assert "two: The immunized model's pictures are nearer to tiger before any attack" in page.text
    assert "one: The immunized" not in page.text


def test_runs_of_different_judges_are_marked(tmp_path):
    def write(name, judges):
        config = {} if judges is None else {"judges": judges}
        return write_evaluation(tmp_path / name, name=name, **SMALL, config=config)

    new, old, unknown = write("new", {"clip": "1"}), write("old", {"clip": "2"}), write("a", None)
    for folders, marked in (([new, old], True), ([new, unknown], True), ([new, new], False)):
        text = Page(write_report(folders, tmp_path / "page.html")).text
        assert ("What the runs call clip is not known to be the same judge" in text) == marked


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Page:
    root = tmp_path_factory.mktemp("several")
    folders = [
        write_evaluation(
            root / name, name=name, method=name, strength=strength, **(SMALL | changes)
        )
        for name, strength, changes in (
            ("none", 0.0, {"adaptations": ("lora", "textual-inversion")}),
            ("joint", 0.3, {"adaptations": ("lora",)}),
            ("mima", 0.6, {"adaptations": ("lora",)}),
        )
    ]
    return Page(write_report(folders, root / "all.html"))


def test_several_runs_are_beside_each_other(compared):
    assert "mima withstands the attack that gets furthest best" in compared.text
    assert re.search(r"mima minus none, attack by attack: SGR \d", compared.text)
    rows = [row for row in compared.rows if row[1:2] == ["clip"] and len(row) == 15]
    assert [row[0] for row in rows] == ["none", "joint", "mima"]
    furthest = [int(row[2].removesuffix("\u00a0%")) for row in rows]
    assert furthest == sorted(furthest, reverse=True)
    assert compared.row("immunized by")[1:] == ["none", "joint", "mima"]
    # the same original model is drawn once, and its pictures too
    told = [
        s["aria-label"] for s in compared.all("svg") if "tiger, LoRA" in s.get("aria-label", "")
    ]
    assert all(label.count("original from") == 1 for label in told)
    assert all(f"{name} from" in told[0] for name in ("none", "joint", "mima"))
    alts = {image["alt"] for image in compared.all("img")}
    assert {f"{who}, step 50, picture 1" for who in ("Original", "none", "joint", "mima")} <= alts


def test_settings_that_differ_are_marked(compared):
    marked = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', compared.source)
    assert marked == ["run", "immunized by", "immunized model"]


def test_settings_are_written_as_people_do(compared):
    assert set(compared.row("grid.seeds")[1:]) == {"0"}
    assert set(compared.row("sampler.guidance")[1:]) == {"3.0"}
    assert [setting_text(value) for value in (None, [], {}, [None, 1])] == [
        *("none", "none", "{}", "none, 1")
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_evaluation(tmp_path / x, name="mima", **SMALL) for x in "ab"]
    page = Page(write_report(folders, tmp_path / "page.html"))
    assert page.row("run")[1:] == ["mima", "mima (2)"]


def test_the_order_of_settings_is_no_difference(tmp_path):
    runs = [
        write_evaluation(tmp_path / str(n), name=str(n), **SMALL, config={"grid": {"methods": one}})
        for n, one in enumerate(
            ({"lora": {"rank": 4, "alpha": 1}}, {"lora": {"alpha": 1, "rank": 4}})
        )
    ]
    assert "Not alike." not in Page(write_report(runs, tmp_path / "page.html")).text


def test_ordinary_use_on_other_prompts_is_marked(tmp_path):
    """CMMD of few prompts is larger."""
    one = write_evaluation(tmp_path / "one", name="one", **SMALL)
    other = EvaluationFolder(write_evaluation(tmp_path / "other", name="other", **SMALL))
    said = "Alignment and CMMD are of"
    assert said not in Page(write_report([one, other.path], tmp_path / "alike.html")).text
    evaluation = other.evaluation()
    benign = evaluation.benign.model_copy(update={"prompts": ("a cat",)})
    other.write_evaluation(evaluation.model_copy(update={"benign": benign}))
    page = Page(write_report([one, other.path], tmp_path / "differing.html"))
    assert said in page.text
