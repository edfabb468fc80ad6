"""Whatever a file holds, it is read or refused: kept inputs again, and some new ones each time.

`python tools/fuzz.py` gives every parser ten thousand; docs/security.md has the outcomes.
"""

from __future__ import annotations

import random
import socket
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from support import fuzzing
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


MEGABYTE = 2**20
LARGE = {
    "json": {
        "values": b"[" + b"1," * (MEGABYTE // 2) + b"1]",
        "names": b"{" + b",".join(b'"k%d":0' % n for n in range(MEGABYTE // 12)) + b"}",
        "a text": b'{"name": "' + b"a " * (MEGABYTE // 2) + b'"}',
        "a number": b"[" + b"9" * MEGABYTE + b"]",
        "levels": b"[" * MEGABYTE,
        "escapes": b'["' + b"\\u0000" * (MEGABYTE // 6) + b'"]',
        "a text without an end": b'"' + b'\\"' * (MEGABYTE // 2),
    },
    "csv": {
        "rows": b"file_name,text\n" + b"0.png,a\n" * (MEGABYTE // 8),
        "columns": b"a," * (MEGABYTE // 2),
        "a cell": b"file_name,text\n0.png," + b"a" * MEGABYTE,
    },
    "bytes": {"zeros": bytes(MEGABYTE), "lines": b"a red cat\n" * (MEGABYTE // 10)},
}
LARGE["yaml"] = LARGE["json"] | {
    "lines": b"- a\n" * (MEGABYTE // 4),
    "aliases": b"- &a [1]\n" + b"- *a\n" * (MEGABYTE // 5),
    "remarks": b"# a\n" * (MEGABYTE // 4),
    "a block": b"a: |\n" + b" a\n" * (MEGABYTE // 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_takes_ten_seconds_and_500_megabytes_at_most(name, known):
    parser = known[name]()
    good = next(iter(parser.files.values()))
    if parser.kind == "safetensors":
        header = b'{"a": "' + b"a" * MEGABYTE + b'"}'
        large = {"a header": len(header).to_bytes(8, "little") + header}
    else:
        large = LARGE[parser.kind] | {"behind": good + bytes(MEGABYTE)}
    for what, data in large.items():
        outcome, problem = outcome_of(parser, data)
        assert outcome in GOOD, (what, outcome, problem)


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
    assert told(lambda at: subprocess.run(["true"], check=True)) == "escape"
    assert told(lambda at: socket.create_connection(("localhost", 1))) == "escape"
    assert told(lambda at: {}["absent"]) == "accident"
    assert told(lambda at: len(b"x" * (600 << 20))) == "hang"
    with mock.patch.object(fuzzing, "SECONDS", 0.2):
        assert told(lambda at: [None for _ in iter(int, 1)]) == "hang"
    assert told(lambda at: None) == "ok"
