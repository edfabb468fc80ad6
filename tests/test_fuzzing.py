"""Whatever a file holds, it is read or refused: kept inputs again, and some new ones each time.

`python tools/fuzz.py` gives every parser ten thousand; docs/security.md has the outcomes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.fuzzing import damaged, outcome_of, parsers

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 40
GOOD = ("ok", "refused")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Parsers by name, each made once."""
    return parsers(tmp_path_factory.mktemp("parsers"))


NAMES = tuple(parsers(Path()))


def slug(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_no_input_is_an_accident(name, known):
    parser = known[name]()
    good = next(iter(parser.files.values()))
    assert outcome_of(parser, good) == ("ok", None)
    draw = random.Random(name)
    kept = [path.read_bytes() for path in sorted((CORPUS / slug(name)).glob("*"))]
    new = [damaged(parser, draw) for _ in range(INPUTS)]
    for data in (*kept, *new):
        outcome, problem = outcome_of(parser, data)
        assert outcome in GOOD, (outcome, problem, data[:500])


def test_the_corpus_is_of_parsers_that_there_are():
    found = {path.name for path in CORPUS.iterdir()}
    assert found
    assert found <= {slug(name) for name in NAMES}


def test_what_starts_or_writes_or_fails_otherwise_is_seen(known, tmp_path):
    parser = known["JSON"]()

    def told(read) -> str:
        return outcome_of(type(parser)(parser.files, read), b"x")[0]

    assert told(lambda at: (at / "made").touch()) == "escape"
    assert told(lambda at: (at / "made").write_text("x")) == "escape"
    assert told(lambda at: {}["absent"]) == "accident"
    assert told(lambda at: None) == "ok"
