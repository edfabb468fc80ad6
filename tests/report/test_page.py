"""The page about evaluations, as text: what it says, what it leaves out, and what it refuses."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support.evaluations import write_evaluation
from support.pages import SMALL, Page
from typer.testing import CliRunner

from mima.cli import app
from mima.errors import MimaError
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report import content, write_report
from mima.report.runs import load_runs
from mima.report.wording import number, ratio, share, steps_to_half

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7*7 }}'


def test_headline_numbers_are_those_of_the_evaluation(folder, page):
    summary = EvaluationFolder(folder).evaluation().summary
    big = re.findall(r'<p class="big">(.*?)</p>', page.source)
    clip = summary["clip"]
    assert big == [
        share(clip.worst_rise.rise_left),
        share(clip.targets.rise_left.mean),
        number(clip.msgr.mean),
        number(clip.worst_attack.sgr),
        number(clip.worst_concept.sgr),
        number(clip.mrsgr),
        "−2.0\u00a0%",
    ]
    dino = summary["dino"]
    assert page.row("dino") == [
        "dino",
        share(dino.worst_rise.rise_left),
        share(dino.targets.rise_left.mean),
        steps_to_half(
            dino.targets.steps_to_half.original,
            dino.targets.steps_to_half.immunized,
            dino.targets.steps_ratio.at_least,
        ),
        ratio(dino.targets.steps_ratio),
        number(dino.targets.before.original),
        number(dino.targets.before.immunized),
        number(dino.targets.sgr_before.mean),
        number(dino.worst_attack.sgr),
        number(dino.msgr.mean),
        f"range of 2 attack seeds: {number(dino.msgr.low)} to {number(dino.msgr.high)}",
        number(dino.worst_concept.sgr),
        "tiger",
        number(dino.mrsgr),
    ]
    assert f"adds {100 * clip.worst_rise.rise_left:.0f} % of the similarity" in page.text
    assert "score 0.30 (original) and 0.30 (immunized)" in page.text
    assert page.row("Distance of distributions (CMMD)")[1] == "0.042"
    assert page.row("SGR of learning owl")[1].endswith("0.03")


def test_the_table_has_every_attack_the_worst_first(folder, page):
    attacks = EvaluationFolder(folder).attacks()
    table = [row for row in page.rows if len(row) == 19][1:]
    assert len(table) == len(attacks) == 2 * 2 * 2 * 2
    # on paper the rows of all judges are there
    assert {row[2] for row in table} == {"clip", "dino"}
    gaps = [float(row[3].replace("−", "-")) for row in table]
    assert gaps == sorted(gaps)
    assert gaps == [round(gap, 2) for gap in sorted(row.sgr_mean for row in attacks)]
    assert {row[1] for row in table} == {"LoRA"}
    first = min(attacks, key=lambda row: row.sgr_mean)
    half = steps_to_half(first.half_original, first.half_immunized, False)
    assert re.fullmatch(r"\d+\u00a0→ \d+", half)
    assert table[0][8] == half
    assert steps_to_half(None, None, False) == "–"
    assert steps_to_half(21.6, 100, True) == "22\u00a0→ ≥\u00a0100"


def test_the_page_needs_nothing_but_itself(page):
    for name, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(key) or ""
            assert not value or value.startswith(("#", "data:")), (name, key, value)
        assert "style" not in attributes
        assert not [key for key in attributes if key.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", page.source)
    (policy,) = (m["content"] for m in page.all("meta") if "content" in m and "http-equiv" in m)
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_figures_are_beside_the_page_as_png_and_svg(folder, page):
    beside = folder / "report-figures"
    stems = {path.stem for path in beside.iterdir()}
    # strips and, for each concept and method, the usual attack and the worst variation of it
    curves = {f"{c}-lora-{s}-usual" for c in ("tiger", "owl") for s in ("clip", "dino")}
    assert curves | {"attacks-clip", "attacks-dino"} <= stems
    assert "tiger-lora-clip-worst" in stems
    for stem in stems:
        with Image.open(beside / f"{stem}.png") as image:
            assert image.width > 500
        if stem != "grid":
            assert ET.parse(beside / f"{stem}.svg").getroot().tag.endswith("svg")
    figures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(figures) == len(stems) - len({"curves", "grid"})
    told = [svg["aria-label"] for svg in figures if "tiger, LoRA, 100 steps" in svg["aria-label"]]
    curve = [p for p in EvaluationFolder(folder).curves() if p.attack.startswith("tiger_lora_x1_")]
    last = [p for p in curve if p.step == 100 and p.similarity == "clip"]
    original, immunized = (
        sum(getattr(p, side) for p in last) / len(last) for side in ("original", "immunized")
    )
    assert f"original from 0.30 at step 0 to {original:.2f} at step 100" in told[0]
    assert f"immunized from 0.30 at step 0 to {immunized:.2f} at step 100" in told[0]


def test_pictures_are_those_of_each_step_and_side(page):
    shown = {
        image["alt"]: Image.open(BytesIO(b64decode(image["src"].split(",")[1]))).convert("RGB")
        for image in page.all("img")
        if "picture 2" in image["alt"]
    }
    for side, green in (("Original", 200), ("Immunized", 60)):
        for step in (0, 25, 50, 100):
            colour = shown[f"{side}, step {step}, picture 2"].getpixel((16, 16))
            assert colour == pytest.approx((2 * step, green, 60), abs=4)


def test_pictures_beyond_the_budget_are_left_out_and_said(small, tmp_path):
    path = write_report([small], tmp_path / "small.html", picture_budget=1)
    page = Page(path)
    # the worst attack on the first concept always has its pictures
    assert len({image["alt"] for image in page.all("img")}) == 2 + 2 * 4 * 2
    assert "Pictures of 1 of 2 attacks are in this page" in page.text
    assert (tmp_path / "small-figures" / "attacks-clip.png").is_file()


def test_whatever_people_wrote_is_text(tmp_path):
    concepts = [
        (f"a{HOSTILE}", "target", f"b{HOSTILE}"),
        ("owl", "other", "$x$ %s {0} \\frac"),
    ]
    folder = write_evaluation(
        tmp_path / "run",
        name=f"c{HOSTILE}",
        concepts=concepts,
        config={f"d{HOSTILE}": [f"e{HOSTILE}"]},
        versions={f"f{HOSTILE}": f"g{HOSTILE}"},
        models={"original": f"h{HOSTILE}", "immunized": f"i{HOSTILE}"},
        preset=f"j{HOSTILE}",
        similarities=("clip", f"k{HOSTILE}"),
        adaptations=("lora",),
        seeds=(0,),
    )
    page = Page(write_report([folder]))
    assert len(page.all("script")) == 1
    assert {image["src"].split(";")[0] for image in page.all("img")} == {"data:image/webp"}
    assert not [key for _, attributes in page.elements for key in attributes if key[:2] == "on"]
    for letter in "abcdefghijk":
        assert f"{letter}{HOSTILE}" in "".join(page.texts)
    assert "$x$ %s {0} \\frac" in page.text
    for path in (folder / "report-figures").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(path).iter()}
        assert not tags & {"script", "img", "image", "foreignObject"}


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", ".", "a/b"])
def test_a_table_cannot_lead_out_of_the_folder(name, tmp_path):
    folder = write_evaluation(tmp_path / "run", **SMALL)
    table = folder / "attacks.csv"
    table.write_text(table.read_text().replace("tiger_lora_x1_name_seed0", name))
    with pytest.raises(MimaError, match="names an attack"):
        write_report([folder])


@pytest.mark.parametrize("table", ["attacks", "curves"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "holds no {} of a complete evaluation"),
        (lambda path: path.write_text(""), "holds no {} of a complete evaluation"),
        (lambda path: (path.unlink(), path.mkdir()), r"{}\.csv: no ordinary file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), r"{}\.csv: no ordinary file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), r"{}\.csv: no ordinary file"),
        (
            lambda path: path.write_text(re.sub(",100,", f",{9**99},", path.read_text())),
            r"{}\.csv: .*less than or equal to 2147483647",
        ),
    ],
    ids=["gone", "empty", "folder", "pipe", "circle", "steps"],
)
def test_tables_that_are_not_there_are_named(table, change, message, tmp_path):
    folder = write_evaluation(tmp_path / "run", **SMALL)
    change(folder / f"{table}.csv")
    with pytest.raises(MimaError, match=message.format(table)):
        load_runs([folder])


def test_what_was_not_measured_is_a_dash(tmp_path):
    folder = write_evaluation(
        tmp_path / "run",
        concepts=[("tiger", "target", "a tiger")],
        **SMALL,
        complete=False,
        benign={},
        method=None,
    )
    source = EvaluationFolder(folder)
    (row,) = source.attacks()
    nothing = {"sgr_mean": None, "sgr_final": None, "sgr_max": None}
    diverged = row.model_copy(
        update=nothing | {"attack": "diverged", "learned": False, "learned_immunized": False}
    )
    source.write_rows([row, diverged], source.curves())
    page = Page(write_report([folder]))
    (cells,) = (cells for cells in page.rows if cells[0] == "tiger not learned")
    assert cells[2:5] == ["–", "–", "–"]
    assert "Unfinished." in page.text
    assert "Prompt alignment was not measured." in page.text
    assert "No other concept was attacked." in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarities": ("other",)}, "holds attacks with the similarity 'clip', which its"),
        ({"similarities": ()}, "names no similarities"),
        ({"concepts": ()}, "holds attacks with the concept 'tiger', which its evaluation.json"),
    ],
)
def test_tables_of_another_evaluation_are_named(small, tmp_path, changes, message):
    source, other = EvaluationFolder(small), EvaluationFolder(tmp_path / "run")
    other.write_evaluation(source.evaluation().model_copy(update=changes))
    other.write_rows(source.attacks(), source.curves())
    with pytest.raises(MimaError, match=message):
        write_report([other.path])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_that_no_figure_can_hold_are_drawn_all_the_same(small, tmp_path):
    """A control character is in no XML file; the page says the name as it is."""
    concepts = [("ti\x02ger\uffff", "target", "a tiger")]
    paths = [
        write_evaluation(tmp_path / n, name=f"{n}\x01", concepts=concepts, **SMALL) for n in "ab"
    ]
    page = Page(write_report(paths, tmp_path / "page.html"))
    drawn = list((tmp_path / "page-figures").glob("*.svg"))
    assert len(drawn) == 3
    assert all("\ufffd" in "".join(ET.parse(path).getroot().itertext()) for path in drawn)
    assert "a\x01" in "".join(page.texts)


def test_a_home_is_expanded(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ev").symlink_to(small)
    monkeypatch.chdir(tmp_path)
    assert write_report(["~/ev"], "~/page.html") == tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", "~/ev", "-o", "~/second.html"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "second.html").is_file()
    assert EvaluationFolder("~/ev").exists()


def test_single_seeds_and_overlaps_are_marked(small, tmp_path, folder):
    page = Page(write_report([small], tmp_path / "page.html"))
    assert "One seed. Every attack of run ran once" in page.text
    assert "One judge. Everything of run is by clip" in page.text
    both = Page(write_report([folder])).text
    assert "One seed." not in both
    assert "One judge." not in both
    assert "tuned" not in both
    plain = "attacks as configured, not tuned"
    for trials, words in ((0, plain), (1, plain), (2, "tuned by 2 trials on each")):
        grid = {"grid": {"tune": {"trials": trials}}}
        run = write_evaluation(tmp_path / f"tuned{trials}", **SMALL, config=grid)
        text = Page(write_report([run])).text
        assert words in text
        assert ("Not tuned. The attacks of run ran with the rate" in text) == (trials < 2)
    idle = write_evaluation(tmp_path / "idle", **SMALL, hardly_trained=("red_lora",))
    said = "Trials. The settings that trials of 1 attack chose hardly train the immunized model"
    assert said in Page(write_report([idle])).text
    assert "Trials." not in page.text
    seen = write_evaluation(tmp_path / "seen", **SMALL, overlaps=("<b>Pictures</b> were seen.",))
    assert "Overlap. <b>Pictures</b> were seen." in Page(write_report([seen])).text
    both = Page(write_report([seen, small], tmp_path / "both.html")).text
    assert "Overlap in run. <b>Pictures</b> were seen." in both


RECORDED = {
    "tuned_original": "rate 0.001, constant, batch 4, adamw",
    "tuned_immunized": "rate 0.003, cosine, batch 2, muon",
    "objects_original": 0.75,
    "objects_immunized": 0.25,
    "repaired_original": 0.61,
    "repaired_immunized": 0.52,
}


def test_what_else_is_recorded_is_shown(folder, tmp_path, page):
    run = write_evaluation(tmp_path / "run", **SMALL | {"seeds": (0, 1, 2)}, recorded=RECORDED)
    shown = Page(write_report([run]))
    row = shown.row("tiger", "LoRA", "100 steps", "clip", "3")
    assert row[5:7] == ["75\u00a0%", "25\u00a0%"]
    curves = [p for p in EvaluationFolder(run).curves() if p.attack.startswith("tiger_lora")]
    last = [p for p in curves if p.step == 100 and p.similarity == "clip"]
    assert row[7:] == [
        number(sum(p.original for p in last) / 3),
        number(sum(p.immunized for p in last) / 3),
        "0.61",
        "0.52",
    ]
    tuned = shown.row("tiger", "LoRA, 100 steps")
    assert tuned[2:] == [RECORDED["tuned_original"], RECORDED["tuned_immunized"]]
    assert "25 % of the immunized model's pictures" in shown.text
    assert "pictures are broken" in shown.text
    assert "3 seeds. The bars and bands of run are the range of 3 runs" in shown.text
    assert "100 steps, 3 seeds" in shown.source
    # of an evaluation that records none of it, nothing is shown
    for word in ("Are the pictures whole?", "What the trials chose", "right object"):
        assert word in shown.text
        assert word not in page.text


def test_an_evaluation_without_any_attack_yet_has_a_page(tmp_path):
    folder = write_evaluation(tmp_path / "run", **SMALL)
    source = EvaluationFolder(folder)
    source.write_rows([], [])
    evaluation = source.evaluation()
    empty = {"clip": summarize([], evaluation.concepts, "clip")}
    source.write_evaluation(evaluation.model_copy(update={"summary": empty, "complete": False}))
    page = Page(write_report([folder]))
    assert "No attack has been measured yet" in page.text
    assert "No attack taught either model" not in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    source.write_evaluation(evaluation.model_copy(update={"summary": {}, "complete": False}))
    assert "No attack has been measured yet" in Page(write_report([folder])).text


def test_what_cannot_be_written_or_read_is_refused_before_any_work(small, tmp_path):
    diary = tmp_path / "diary.html"
    diary.write_text("<p>mine</p>")
    for folders, output, message in (
        ([], None, "at least one folder"),
        ([small] * 6, tmp_path / "x.html", "at most 5"),
        ([tmp_path], None, "holds no evaluation.json"),
        ([small], diary, "not a report of mima's"),
        ([small], tmp_path, "is a folder"),
        (
            [small],
            Path("/proc/report.html"),
            "output /proc/report.html cannot be made: /proc is not",
        ),
        ([small], Path("/dev/null"), "is no ordinary file"),
        ([small], tmp_path / "no" / "x.html", "there is no folder"),
        ([small], tmp_path / "x.pdf", r"x.pdf is a page; give it a name that ends in .html"),
    ):
        with pytest.raises(MimaError, match=message):
            write_report(folders, output)
    assert diary.read_text() == "<p>mine</p>"
    assert [path.name for path in tmp_path.iterdir()] == ["diary.html"]


def test_the_command_writes_the_page_and_replaces_it(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = CliRunner().invoke(app, ["report", str(small), str(small)])
        assert result.exit_code == 0, result.output
        assert result.output.strip() == "report.html"
    first = (tmp_path / "report.html").read_text()
    assert "run (2)" in first
    result = CliRunner().invoke(app, ["report", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere holds no evaluation.json" in " ".join(result.output.split())


def test_figures_that_cannot_be_written_are_one_line(small, tmp_path):
    (tmp_path / "page-figures").write_text("somebody's")
    with pytest.raises(MimaError, match=r"cannot write .*page-figures: File exists"):
        write_report([small], tmp_path / "page.html")


def test_two_sheets_hold_all_curves_and_a_picture_of_each_attack(folder, page):
    for name in ("curves", "grid"):
        with Image.open(folder / "report-figures" / f"{name}.png") as image:
            assert min(image.size) > 400


def test_the_same_evaluation_gives_the_same_page(small, tmp_path):
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pages.append(write_report([small], tmp_path / name / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_names_of_figures_that_are_cut_off_stay_apart():
    one, other = (content._file_name("x" * 130, kind) for kind in ("usual", "worst"))
    assert one != other
    assert max(len(one), len(other)) < 200
