"""The study's cells, its report on made-up evaluations, and one cell from end to end."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from support import tiny
from support.evaluations import write_evaluation

from mima.assets import assets
from mima.concepts import embedded_concept
from mima.errors import MimaError
from mima.evaluation import EvaluationFolder
from mima.evaluation.grid import grid_config
from mima.evaluation.seen import seen_by
from mima.families import load_pipeline
from mima.report.wording import number, share
from mima.sampling import Sampler
from mima.storage.tensor_files import fingerprint

ROOT = Path(__file__).parents[2]


def test_cells_are_what_the_cuts_say():
    from benchmarks.immunity.cells import CEILING, CUTS, UNTRAINED, Cell, Problem

    for cut in CUTS.values():
        cells = list(cut.cells())
        assert len({cell.name for cell in cells}) == len(cells)
        assert all(cut.cell(cell.name) == cell for cell in cells)
    full = list(CUTS["full"].cells())
    assert {len(cell.problem.targets) for cell in full if cell.method == "imma"} == {1}
    assert {cell.seed for cell in full if cell.method in (CEILING, UNTRAINED)} == {0}
    assert {cell.seed for cell in full if cell.method == "joint"} == {0, 1, 2}
    for name in {name for cell in full for name in cell.problem.targets}:
        embedded_concept(name)
    assert Cell(Problem("relearn", ("tiger",)), "joint", 2).name == "relearn_tiger.joint.seed2"
    with pytest.raises(MimaError, match=r"cell 'relearn_tigre\.joint\.seed0' is unknown"):
        CUTS["full"].cell("relearn_tigre.joint.seed0")


def test_the_ceiling_of_two_styles_is_shipped(tmp_path):
    from benchmarks.immunity.cells import CEILING, CUTS, STYLES, Problem, ceiling_of
    from benchmarks.immunity.study import Study

    made = [cell for cell in Study(tmp_path, CUTS["breadth"]).cells() if cell.method == CEILING]
    assert [cell.problem for cell in made] == [Problem("relearn", STYLES)]
    elsewhere = Study(tmp_path, CUTS["breadth"], ceilings=tmp_path).cells()
    assert all(cell.method != CEILING for cell in elsewhere)
    pipeline = load_pipeline(ceiling_of(made[0].problem, None))
    embedded = load_pipeline("embedded")
    # the same network, trained on other pictures
    shapes = [{n: w.shape for n, w in p.unet.state_dict().items()} for p in (pipeline, embedded)]
    assert shapes[0] == shapes[1]
    assert fingerprint(pipeline.unet.state_dict()) != fingerprint(embedded.unet.state_dict())
    assert fingerprint(pipeline.vae.state_dict()) == fingerprint(embedded.vae.state_dict())
    (picture,) = Sampler(steps=2)(pipeline, ["a tiger emoji in noto style"], seeds=(0,))[0]
    assert picture.size == (64, 64)


def test_every_method_simulates_as_many_attack_steps():
    from benchmarks.immunity.cells import CEILING, CUTS, UNTRAINED, attack_steps, configured

    cut = CUTS["full"]
    for cell in cut.cells():
        if cell.method in (CEILING, UNTRAINED):
            continue
        config, count = configured(cell, cut), len(cell.problem.targets)
        per_step = attack_steps(config, count)
        assert abs(config.steps * per_step - cut.budget * count) <= per_step / 2
        assert config.seed == cell.seed
        assert not config.erase_first


def test_what_trains_and_what_is_measured_are_apart():
    from benchmarks.immunity.cells import BENIGN, CUTS

    for cut in CUTS.values():
        targets = {name for problem in cut.plan for name in problem.targets}
        assert not set(BENIGN) & set(cut.others)
        assert not targets & {*BENIGN, *cut.others}
        assert not set(cut.grid["families"]) & set(cut.grid["methods"])


@pytest.fixture
def study(tmp_path):
    """Two methods with two seeds each, and a third that is not finished."""
    from benchmarks.immunity.cells import CUTS, Problem
    from benchmarks.immunity.study import Study

    cut = replace(
        CUTS["small"],
        plan={Problem("relearn", ("tiger",)): ("joint", "default", "mima")},
        seeds=(0, 1),
        grid={"methods": {"lora": {}}, "families": ["sgd"], "seeds": [0, 1]},
        similarities=("clip", "dino"),
        others=("benign-owl",),
    )
    made = Study(tmp_path / "study", cut)
    strengths = {"joint": (0.2, 0.3), "default": (0.6, 0.8)}
    for cell in made.cells():
        if cell.method in strengths:
            write_evaluation(
                made.place(cell) / "evaluation",
                name=cell.method,
                strength=strengths[cell.method][cell.seed],
                adaptations=("lora", "sgd"),
                seeds=(0, 1),
                similarities=("clip", "dino"),
                num_pictures=1,
                config={
                    "grid": grid_config("quick", cut.grid).model_dump(mode="json"),
                    "similarities": {"clip": "clip", "dino": "dino"},
                },
            )
    return made


def rows_of(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]


def test_the_report_says_what_the_cells_hold(study, tmp_path):
    from benchmarks.immunity import report

    docs = tmp_path / "results.md"
    docs.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    written = report.write(study, docs)
    assert {path.name for path in written} == {
        *("results.csv", "results.md"),
        *("relearn_tiger.clip.svg", "relearn_tiger.dino.svg"),
    }
    text = (study.folder / "results.md").read_text()
    assert "](plots/relearn_tiger.clip.svg)" in text
    for place in (study.folder, docs.parent):
        assert (place / "plots" / "relearn_tiger.clip.svg").is_file()
    assert docs.read_text().startswith("before\n")
    assert docs.read_text().endswith("after\n")
    assert text.strip() in docs.read_text()
    assert "old" not in docs.read_text()
    assert "Not finished: relearn_tiger.mima, seed 0, 1." in text
    table = rows_of(text)
    cells = {cell.name: cell for cell in study.cells()}

    def mean(method, seed, kind, field):
        attacks = study.evaluation(cells[f"relearn_tiger.{method}.seed{seed}"]).attacks()
        return fmean(
            getattr(row, field)
            for row in attacks
            if (row.role, row.method, row.similarity) == ("target", kind, "clip")
        )

    header, _ = (row for row in table if row[0] == "method")
    for method in ("joint", "default"):
        # the second is the other judge's
        line, _ = (row for row in table if row[0] == method and len(row) == len(header))
        assert line[1] == "2 × 2"
        rises = [mean(method, seed, "lora", "rise_left") for seed in (0, 1)]
        ends = [share(value) for value in (fmean(rises), min(rises), max(rises))]
        assert line[2] == "{} [{} to {}]".format(*ends)
        # two seeds of each of two attacks
        assert line[header.index("attacks that taught")] == "4 of 4"
        held_out = [mean(method, seed, "sgd", "rise_left") for seed in (0, 1)]
        assert line[header.index("rise left, held out")].startswith(share(fmean(held_out)))
        gaps = [mean(method, seed, "lora", "sgr_mean") for seed in (0, 1)]
        assert line[header.index("SGR")].startswith(number(fmean(gaps)))
        assert line[header.index("alignment")] == "−2.0\u00a0%"
        evaluation = study.evaluation(cells[f"relearn_tiger.{method}.seed0"]).evaluation()
        assert line[header.index("CMMD")] == number(evaluation.benign.cmmd)
        benign = [
            row.sgr_mean
            for seed in (0, 1)
            for row in study.evaluation(cells[f"relearn_tiger.{method}.seed{seed}"]).attacks()
            if (row.role, row.similarity) == ("other", "clip")
        ]
        assert line[header.index("benign, owl")].startswith(number(fmean(benign)))
    paired, _ = (row for row in table if row[0] == "joint" and len(row) == 4)
    expected = [
        fmean(
            mean("default", seed, kind, "sgr_mean") - mean("joint", seed, kind, "sgr_mean")
            for kind in ("lora", "sgd")
        )
        for seed in (0, 1)
    ]
    assert paired[1].startswith(number(fmean(expected)))
    assert paired[3] == "2"
    with (study.folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    # 4 cells, 2 concepts, 2 methods, 2 seeds, 2 judges
    assert len(lines) == 4 * 2 * 2 * 2 * 2
    assert {line["study_method"] for line in lines} == {"joint", "default"}


def test_a_cell_of_other_settings_is_neither_reported_nor_kept(study):
    from benchmarks.immunity import report
    from benchmarks.immunity.study import Study

    cell = next(cell for cell in study.cells() if cell.method == "joint")
    assert study.status(cell) == "done"
    for changes, name in (
        ({"grid": {**study.cut.grid, "seeds": [0]}}, "attacks"),
        ({"similarities": ("clip",)}, "similarities"),
        ({"others": ("benign-owl", "benign-guitar")}, "others"),
    ):
        changed = Study(study.folder, replace(study.cut, **changes))
        assert changed.status(cell) == f"made with other {name}"
        with pytest.raises(MimaError, match=f"made with other {name}; only what is done"):
            changed.keep(cell)
        with pytest.raises(MimaError, match="no cell is finished yet"):
            report.write(changed)


def test_the_table_of_rows_is_as_measured_and_bounds_are_said(study):
    from benchmarks.immunity import report

    cells = {cell.name: cell for cell in study.cells()}
    folder = study.evaluation(cells["relearn_tiger.joint.seed0"])
    away = {"rise_left": -0.5, "half_immunized": None, "steps_ratio_at_least": True}
    least = {"rise_left_at_least": True}
    rows = [row.model_copy(update=away if row.method == "lora" else least)
            for row in folder.attacks()]  # fmt: skip
    folder.write_rows(rows, folder.curves())
    report.write(study)
    with (study.folder / "results.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["cell"].endswith("joint.seed0")]
    mine = [line for line in lines if line["method"] == "lora"]
    assert {(line["rise_left"], line["half_immunized"]) for line in mine} == {("-0.5", "")}
    table = rows_of((study.folder / "results.md").read_text())
    header, first = (next(row for row in table if row[0] == name) for name in ("method", "joint"))
    # what led away counts as nothing in means
    assert "[0\u00a0% to " in first[header.index("rise left")]
    assert first[header.index("rise left, held out")].startswith("≥ ")
    assert first[header.index("steps ratio")].startswith("≥ ")


def test_methods_look_alike_in_every_plot_and_nothing_else_does(study, tmp_path):
    from benchmarks.immunity import report
    from benchmarks.immunity.cells import EVERY

    assert set(report._LOOKS) == set(EVERY)
    looks = [(look["color"], look["marker"]) for look in report._LOOKS.values()]
    assert len({*looks}) == len({colour for colour, _ in looks}) == len(EVERY)

    cells = [one for one in report.finished(study) if one.judge == "clip"]
    assert "beyond the axis" not in report._plot(cells, tmp_path / "a.svg").read_text()
    # a ratio to a similarity of nearly 0
    (point, *_) = [p for p in cells[0].points[cells[0].targets("lora")[0].attack] if p.step]
    far = point.model_copy(update={"sgr": -40.0})
    cells[0].points[point.attack] = [
        far if p == point else p for p in cells[0].points[point.attack]
    ]
    text = report._plot(cells, tmp_path / "b.svg").read_text()
    assert text.count(">beyond the axis<") == 1


def test_what_differs_between_methods_and_what_was_seen_is_said(study):
    from benchmarks.immunity import report

    said = "\n".join(report._text(study, report.finished(study)))
    assert "not the same ones for" not in said
    for cell in study.cells():
        folder = study.evaluation(cell)
        if folder.exists() and cell.method == "joint":
            evaluation = folder.evaluation()
            benign = evaluation.benign.model_copy(update={"prompts": ("another",)})
            update = {"benign": benign, "overlaps": ("Prompts of owl were seen.",)}
            folder.write_evaluation(evaluation.model_copy(update=update))
    said = "\n".join(report._text(study, report.finished(study)))
    assert said.count("which are not the same ones for joint; default.") == 2
    assert said.count("\njoint: Prompts of owl were seen.") == 2


def test_what_is_kept_is_summarized_anew(study, tmp_path):
    from mima.evaluation.ledger import summarized

    study.records = tmp_path / "records"
    cell = study.cut.cell("relearn_tiger.joint.seed0")
    folder = study.evaluation(cell)
    evaluation = folder.evaluation()
    # as an earlier version may have left it
    old = {
        judge: one.model_copy(update={"mrsgr": 9.0}) for judge, one in evaluation.summary.items()
    }
    folder.write_evaluation(evaluation.model_copy(update={"summary": old}))
    kept = EvaluationFolder(study.keep(cell))
    assert (
        kept.evaluation().summary
        == summarized(evaluation, folder.attacks(), folder.curves()).summary
    )
    assert {one.mrsgr for one in kept.evaluation().summary.values()}.isdisjoint({9.0})


def test_the_records_of_the_checkout_say_what_their_rows_come_to():
    from benchmarks.immunity.study import RECORDS
    from mima.evaluation.ledger import summarized

    folders = [EvaluationFolder(path) for path in sorted(RECORDS.iterdir())]
    assert len(folders) >= 40
    for folder in folders:
        found = folder.evaluation()
        assert summarized(found, folder.attacks(), folder.curves()) == found, folder.path


def test_a_cell_that_cannot_be_made_stops_no_other(study, monkeypatch, capsys):
    from benchmarks.immunity import __main__ as command

    ran = []

    def run(self, cell, say=print):
        ran.append(cell.name)
        if cell.seed == 0:
            raise MimaError("made with other steps")

    monkeypatch.setattr(command.Study, "run", run)
    monkeypatch.setitem(command.CUTS, "small", study.cut)
    assert command.main(["all", "-o", str(study.folder), "--cut", "small"]) == 2
    assert ran == ["relearn_tiger.mima.seed0", "relearn_tiger.mima.seed1"]
    assert capsys.readouterr().err == "relearn_tiger.mima.seed0: made with other steps\n"


def test_a_ratio_to_what_a_judge_does_not_tell_is_not_shown(study, monkeypatch):
    from benchmarks.immunity import report

    def benign():
        report.write(study)
        table = rows_of((study.folder / "results.md").read_text())
        header, first = (
            next(row for row in table if row[0] == name) for name in ("method", "joint")
        )
        return first[header.index("benign, owl")]

    assert benign() != "–"
    text = (study.folder / "results.md").read_text()
    assert "says nothing" not in text
    monkeypatch.setattr(report, "TOLD", 1.01)
    assert benign() == "–"
    text = (study.folder / "results.md").read_text()
    assert "Of tiger this judge has less than 1.01 after attacks on the original, too" in text


def test_runs_are_paired_with_those_of_their_own_seed(study):
    from benchmarks.immunity import report

    cells = {cell.name: cell for cell in study.cells()}
    shutil.rmtree(study.place(cells["relearn_tiger.joint.seed1"]))
    report.write(study)
    table = rows_of((study.folder / "results.md").read_text())
    paired, _ = (row for row in table if row[0] == "joint" and len(row) == 4)
    assert paired[3] == "1"


def test_a_text_without_marks_is_left_alone(study, tmp_path):
    from benchmarks.immunity import report

    text = tmp_path / "results.md"
    text.write_text("no marks")
    with pytest.raises(MimaError, match="needs one line <!-- study: begin -->"):
        report.write(study, text)
    assert text.read_text() == "no marks"


def test_a_cell_runs_once_and_goes_on(tmp_path, monkeypatch):
    from benchmarks.immunity import report, study
    from benchmarks.immunity.cells import CUTS

    tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    tiny.save_tiny_clip(tmp_path / "clip")
    smoke = CUTS["smoke"]
    cut = replace(
        smoke,
        model=str(tmp_path / "model"),
        similarities=(str(tmp_path / "clip"),),
        grid={**smoke.grid, "families": [], "sampler": {"steps": 1, "guidance": 1.0}},
    )
    records = tmp_path / "records"
    made = study.Study(tmp_path / "study", cut, records=records, processes=1)
    (cell,) = made.cells()
    assert made.status(cell) == "not begun"
    with pytest.raises(MimaError, match="not begun; only what is done can be kept"):
        made.keep(cell)
    said: list[str] = []
    made.run(cell, said.append)
    assert made.status(cell) == "done"
    compute = made.compute(cell)
    assert compute.attack_steps == cut.budget
    assert compute.seconds > 0
    assert seen_by(made.place(cell) / "immunized").levels.keys() == {"lower", "upper", "prior"}
    # nothing is erased, immunized or attacked twice
    for name in ("immunize", "erase"):
        monkeypatch.setattr(study, name, None)
    attacks = made.place(cell) / "evaluation" / "attacks.csv"
    # with the seconds that each took
    before = attacks.read_bytes()
    # in a checkout that has moved
    record = made.place(cell) / "immunized" / "mima.json"
    assert str(assets()) in record.read_text()
    record.write_text(record.read_text().replace(str(assets()), "/elsewhere"))
    again = study.Study(tmp_path / "study", cut, processes=1)
    again.run(cell, said.append)
    assert again.evaluation(cell).evaluation().complete
    assert [row.steps for row in again.evaluation(cell).attacks()] == [4, 4]
    assert attacks.read_bytes() == before
    assert "| joint | 1 × 1 |" in report.write(again)[1].read_text()
    other = study.Study(tmp_path / "study", replace(cut, budget=8), processes=1)
    with pytest.raises(MimaError, match="was immunized with other steps"):
        other.run(cell, said.append)
    # what is kept stands for the cell where there is nothing else, with its settings alone
    kept = made.keep(cell)
    for file in kept.iterdir():
        assert str(made.folder) not in file.read_text()
    assert made.status(cell) == "done"
    elsewhere = study.Study(tmp_path / "elsewhere", cut, records=records)
    assert elsewhere.status(cell) == "kept"
    assert elsewhere.compute(cell) == compute
    elsewhere.folder.mkdir()
    rows, text, *_ = report.write(elsewhere)
    assert rows.read_text() == (made.folder / "results.csv").read_text()
    assert text.read_text() == (made.folder / "results.md").read_text()
    for changes in ({"budget": 8}, {"others": ()}, {"grid": {**cut.grid, "seeds": [1]}}):
        changed = study.Study(tmp_path / "elsewhere", replace(cut, **changes), records=records)
        assert changed.status(cell) == "not begun"
    # settings that there are no more are other settings
    settings = json.loads((kept / "settings.json").read_text())
    for gone in ({"attacks": {**settings["attacks"], "gone": 1}}, {"immunization": {"gone": 1}}):
        (kept / "settings.json").write_text(json.dumps(settings | gone))
        assert elsewhere.status(cell) == "not begun"
    (kept / "settings.json").write_text("{")
    with pytest.raises(MimaError, match=r"cannot read .*settings\.json: "):
        elsewhere.status(cell)
