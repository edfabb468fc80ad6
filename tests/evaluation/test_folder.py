import json
import random
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from support.evaluations import write_evaluation

from mima.errors import MimaError
from mima.evaluation.folder import EvaluationFolder
from mima.evaluation.ledger import Ledger
from mima.evaluation.records import (
    AttackRow,
    Benign,
    ConceptGap,
    ConceptRecord,
    CurvePoint,
    Evaluation,
    Gap,
    Interval,
    Ratio,
    SimilaritySummary,
    WorstAttack,
    WorstConcept,
)

ROW = AttackRow(
    attack="red-cat-lora-0",
    concept='red "cat", and more',
    role="target",
    method="lora",
    lr=1e-4,
    lr_factor=1,
    steps=50,
    prompt_variant="name",
    images="same",
    preparation="none",
    seed=0,
    similarity="clip",
    sgr_mean=0.1,
    sgr_final=None,
    sgr_max=-0.25,
    sgr_before=0.5,
    before_original=0.3,
    before_immunized=0.15,
    rise_left=0.75,
    rise_left_best=None,
    half_original=12.5,
    half_immunized=None,
    steps_ratio=4.0,
    steps_ratio_at_least=True,
    nearest_original=0.5,
    nearest_immunized=None,
    seconds=1.5,
    learned=True,
    learned_immunized=False,
)
POINT = CurvePoint(
    attack="red-cat-lora-0",
    similarity="clip",
    step=50,
    original=0.8,
    immunized=0.6,
    sgr=0.25,
    rise_left=None,
)
EVALUATION = Evaluation(
    name="mima",
    method="mima",
    models={"original": "a", "immunized": "b"},
    preset="quick",
    protocol="standard",
    similarities=("clip",),
    seeds=(0, 1),
    concepts=(ConceptRecord(name="red cat", slug="cat", kind="style", prompt="x", role="target"),),
    benign=Benign(cmmd=0.25, adaptability={"dog": None}),
    summary={
        "clip": SimilaritySummary(
            targets=Gap(
                mean=0.1,
                low=0.0,
                high=0.2,
                runs=2,
                kind="range",
                steps_ratio=Ratio(mean=4, at_least=True),
            ),
            worst_attack=WorstAttack(sgr=0.1, attack="red-cat-lora-0"),
            worst_concept=WorstConcept(sgr=0.1, concept="red cat"),
            mrsgr=None,
            sgr={"red cat": ConceptGap(mean=0.1, max=0.3, methods={"lora": Gap(mean=0.1)})},
        )
    },
    config={"grid": [1, 2]},
    versions={"torch": "2"},
    complete=False,
)


def test_what_is_written_is_read_back(tmp_path):
    folder = EvaluationFolder(tmp_path / "new" / "folder")
    assert not folder.exists()
    assert folder.attacks() == folder.curves() == []
    unfinished = POINT.model_copy(update={"attack": "unfinished"})
    folder.write_rows([ROW, ROW.model_copy(update={"similarity": "dino"})], [POINT, unfinished])
    folder.write_evaluation(EVALUATION)
    assert folder.exists()
    assert folder.evaluation() == EVALUATION
    first, second = folder.attacks()
    assert first == ROW
    assert second.similarity == "dino"
    # curves are written first: what has no row is of an attack that was cut short
    assert folder.curves() == [POINT]
    assert [path.name for path in folder.path.glob(".*")] == []


def test_the_json_is_plain_and_has_no_nan(tmp_path):
    folder = EvaluationFolder(tmp_path)
    folder.write_evaluation(EVALUATION)
    plain = json.loads((tmp_path / "evaluation.json").read_text())
    assert plain["format"] == 2
    targets = plain["summary"]["clip"]["targets"]
    assert [targets[key] for key in ("mean", "low", "high", "runs", "kind", "final")] == [
        *(0.1, 0.0, 0.2, 2, "range", None)
    ]
    assert targets["steps_ratio"]["at_least"] is True
    assert targets["rise_left"]["mean"] is None
    with pytest.raises(ValidationError, match="finite"):
        Interval(mean=float("nan"), low=0, high=0)


def test_pictures_come_in_the_order_of_their_index(tmp_path):
    folder = EvaluationFolder(tmp_path)
    for place in (folder.image_folder("a", "original", 50), folder.reference_folder("cat")):
        place.mkdir(parents=True)
        for index in (10, 9, 0):
            (place / f"{index}.png").touch()
    names = ["0.png", "9.png", "10.png"]
    assert [path.name for path in folder.images("a", "original", 50)] == names
    assert [path.name for path in folder.references("cat")] == names
    assert folder.image_folder("a", "original", 50) == tmp_path / "images/a/original/00050"
    assert folder.images("a", "immunized", 50) == []


def test_what_cannot_be_read_is_named(tmp_path):
    folder = EvaluationFolder(tmp_path)
    with pytest.raises(MimaError, match=r"holds no evaluation.json: mima evaluate"):
        folder.evaluation()
    (tmp_path / "evaluation.json").write_text('{"format": 9}')
    with pytest.raises(MimaError, match="has format 9; this version reads 2"):
        folder.evaluation()
    (tmp_path / "evaluation.json").write_text('{"format": 2}')
    with pytest.raises(MimaError, match="is damaged"):
        folder.evaluation()
    (tmp_path / "attacks.csv").write_text("attack,lr\na,b\n")
    with pytest.raises(MimaError, match="cannot read"):
        folder.attacks()


@pytest.fixture(scope="module")
def evaluation_files(tmp_path_factory):
    """The files of a small evaluation, by name."""
    path = write_evaluation(
        tmp_path_factory.mktemp("e") / "run", seeds=(0,), similarities=("clip",)
    )
    names = ("evaluation.json", "attacks.csv", "curves.csv")
    return {name: (path / name).read_bytes() for name in names}


def mutated(content, chance):
    """Some bytes cut, doubled, or replaced by what readers stumble over."""
    at = chance.randrange(len(content))
    end = min(len(content), at + chance.choice([1, 5, 100]))
    hostile = [b"", b"\0", b"\xff\xfe", b'"', b"{", b"[" * 50_000, b"1e999", b"NaN", b"null"]
    hostile += [b"../../..", b",", b"\n", "\u2028".encode(), b"9" * 5000, content[at:end] * 3]
    return content[:at] + chance.choice(hostile) + content[end:]


def refusal(folder):
    """What reading a folder says against it; None where it is read."""
    try:
        for row in folder.attacks():
            folder.images(row.attack, "original", row.steps)
        for concept in folder.evaluation().concepts:
            folder.references(concept.slug)
        folder.curves()
    except MimaError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["evaluation.json", "attacks.csv", "curves.csv"])
def test_a_damaged_folder_is_read_or_refused_in_one_line(tmp_path, evaluation_files, name):
    for other, content in evaluation_files.items():
        (tmp_path / other).write_bytes(content)
    refused = 0
    for seed in range(150):
        content = mutated(evaluation_files[name], random.Random(seed))
        (tmp_path / name).write_bytes(content)
        folder = EvaluationFolder(tmp_path)
        said = refusal(folder)
        if said is not None:
            refused += 1
            assert "\n" not in said
            assert len(said) < 500
    assert refused > 30


@pytest.mark.parametrize("name", ["..", "a/b", "a\0b", "", "/etc", "x" * 300, "\ud800"])
def test_names_lead_out_of_no_folder(tmp_path, name):
    for read in (lambda f: f.images(name, "original", 1), lambda f: f.references(name)):
        with pytest.raises(MimaError, match="names a folder"):
            read(EvaluationFolder(tmp_path))


def test_pictures_of_others_are_not_ours(tmp_path):
    folder = EvaluationFolder(tmp_path)
    place = folder.image_folder("a", "original", 1)
    place.mkdir(parents=True)
    for name in ("10", "9", "x", "-1", "1.5"):
        (place / f"{name}.png").write_bytes(b"")
    assert [path.name for path in folder.images("a", "original", 1)] == ["9.png", "10.png"]


def test_an_evaluation_that_lacks_attacks_is_not_complete(tmp_path):
    folder = EvaluationFolder(write_evaluation(tmp_path / "run"))
    evaluation = folder.evaluation().model_copy(update={"complete": False})
    folder.write_evaluation(evaluation)
    ids = [*dict.fromkeys(row.attack for row in folder.attacks()), "lost"]
    ledger = Ledger(folder, evaluation, [SimpleNamespace(id=name) for name in ids])
    with pytest.raises(MimaError, match=rf"nothing came back of 1 of {len(ids)} attacks, as lost"):
        ledger.write(Benign())
    assert not folder.evaluation().complete
