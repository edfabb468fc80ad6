"""The page about evaluations, as text: what it says, what it leaves out, and what it refuses."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support.evaluations import write_evaluation
from typer.testing import CliRunner

from mima.cli import app
from mima.errors import MimaError
from mima.evaluation.records import EvaluationFolder
from mima.evaluation.summary import summarize
from mima.report import write_report
from mima.report.runs import load_runs
from mima.report.wording import number, ratio, setting_text, share, steps_to_half

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7*7 }}'


SMALL = {"adaptations": ("lora",), "seeds": (0,), "similarities": ("clip",)}


class Page(HTMLParser):
    """Elements, texts by element, and table rows of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *cells: str) -> list[str]:
        """The one row that starts with these cells."""
        (found,) = (row for row in self.rows if row[: len(cells)] == list(cells))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_evaluation(
        tmp_path_factory.mktemp("one") / "run",
        adaptations=("lora",),
        lr_factors=(1, 10),
        seeds=(0, 1),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """One attack on each of two concepts: three figures."""
    return write_evaluation(tmp_path_factory.mktemp("small") / "run", **SMALL)


@pytest.fixture(scope="module")
def page(folder) -> Page:
    path = write_report([folder])
    assert path == folder / "report.html"
    return Page(path)


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


def told(source, path, rows, **changes):
    """Headline and text of a page about changed rows, or with changes to the summary."""
    evaluation = source.evaluation()
    summary = summarize(rows, evaluation.concepts, "clip").model_copy(update=changes)
    other = EvaluationFolder(path)
    other.write_evaluation(evaluation.model_copy(update={"summary": {"clip": summary}}))
    other.write_rows(rows, source.curves())
    page = Page(write_report([other.path]))
    return re.findall("<h1>(.*?)</h1>", page.source)[0], page.text


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
    assert "By dino b holds most: there it is 20 %." in text
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


def test_what_runs_do_not_have_in_common_is_marked(tmp_path):
    def write(name, **changes):
        config = {
            "grid": {"methods": {"lora": {"rank": 4}}, "evaluations": 4},
            "weights": {"original": "1", "immunized": name},
            "pictures": {"tiger": {"images": "1"}},
        }
        for key, value in changes.items():
            config[key] = config[key] | value
        return write_evaluation(tmp_path / name, name=name, **SMALL, config=config)

    one = write("one")
    for name, changes, words in (
        ("same", {}, None),
        ("weights", {"weights": {"original": "2"}}, "the original model"),
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


def test_a_home_is_expanded(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ev").symlink_to(small)
    monkeypatch.chdir(tmp_path)
    assert write_report(["~/ev"], "~/page.html") == tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", "~/ev", "-o", "~/second.html"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "second.html").is_file()
    assert EvaluationFolder("~/ev").exists()


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


def test_a_lower_bound_is_one_beside_another_run_too(tmp_path):
    taught_alone = {"learned": False, "rise_left_best": 0.5, "rise_left_at_least": True}
    paths = [
        write_evaluation(tmp_path / name, name=name, recorded=recorded, **SMALL)
        for name, recorded in (("bound", taught_alone), ("other", {"rise_left_best": 0.7}))
    ]
    text = Page(write_report(paths, tmp_path / "page.html")).text
    assert "that attack still adds at least 50 % of what it adds" in text
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


def test_single_seeds_and_overlaps_are_marked(small, tmp_path, folder):
    page = Page(write_report([small], tmp_path / "page.html"))
    assert "One seed. Every attack of run ran once" in page.text
    assert "One judge. Everything of run is by clip" in page.text
    both = Page(write_report([folder])).text
    assert "One seed." not in both
    assert "One judge." not in both
    assert "tuned" not in both
    for trials, words in ((0, "attacks as configured, not tuned"), (1, "tuned by 1 trial on each")):
        grid = {"grid": {"tune": {"trials": trials}}}
        run = write_evaluation(tmp_path / f"tuned{trials}", **SMALL, config=grid)
        text = Page(write_report([run])).text
        assert words in text
        assert ("Not tuned. The attacks of run ran with the rate" in text) == (trials == 0)
    idle = write_evaluation(tmp_path / "idle", **SMALL, hardly_trained=("red_lora",))
    said = "Trials. On the immunized model of run the trials of 1 attack chose settings"
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
