"""What an immunization saw is kept apart from what it is measured with, or said."""

import json
from dataclasses import replace

import pytest
from support import tiny

from mima.errors import MimaError
from mima.evaluation.seen import digest, seen_by


def record(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "mima.json").write_text(json.dumps(values))
    return folder


def test_what_was_seen_and_is_measured_is_said(tmp_path):
    target, other = tiny.concept("red", "round"), tiny.concept("blue", "square")
    saw = {
        "lower": {"pictures": [digest(picture) for picture in target.images]},
        "benign": {"concepts": [other.name], "prompts": ["a dog"]},
    }
    seen = seen_by(record(tmp_path / "model", saw=saw, config={"seed": 7}))
    assert seen.seed == 7
    assert seen.prompts == {"a dog"}
    # the pictures that attacks train on are meant to have been seen
    (sentence,) = seen.overlaps([target], [other])
    assert sentence.startswith("blue square, which is to stay learnable, was a concept of the")
    leaked = replace(target, held_out=(*target.held_out, target.images[0]))
    (first, _) = seen.overlaps([leaked], [other])
    assert first.startswith("1 of the pictures that attacks on red round are compared with")
    (third,) = seen.overlaps([other], [target])
    assert third.startswith("Pictures of red round, which is to stay learnable, were seen by")


def test_a_model_without_a_record_has_no_overlaps(tmp_path):
    target = tiny.concept("red", "round")
    for folder in (tmp_path / "nothing", record(tmp_path / "old", config={})):
        assert seen_by(folder).overlaps([target], [target]) == []
    with pytest.raises(MimaError, match="saw is damaged"):
        seen_by(record(tmp_path / "damaged", saw=[1]))
