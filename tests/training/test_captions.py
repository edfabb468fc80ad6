import dataclasses
from pathlib import Path

import pytest
from support import tiny

from mima.concepts import embedded_concept
from mima.errors import MimaError
from mima.families import load_pipeline
from mima.immunization.checks import warn_of_model
from mima.immunization.config import ImmunizeConfig
from mima.training.captions import ordinary_captions


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path):
    path = tmp_path / "captions.txt"
    path.write_text("a tree\na house", encoding="utf-8-sig")
    assert ordinary_captions(path) == ["a tree", "a house"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00a", "cannot read .*captions.txt: 'utf-8' codec"),
        (b"\n \n", "captions.txt holds no caption"),
        (None, "cannot read .*captions.txt: No such file"),
    ],
)
def test_a_file_of_captions_that_is_none_is_one_line(tmp_path: Path, content, message):
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MimaError, match=message) as caught:
        ordinary_captions(path)
    assert "\n" not in str(caught.value)


PLAIN = {"method": "joint", "upper": {"prior_weight": 0}}


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({}, True),
        (PLAIN, False),
        (PLAIN | {"erase_first": True}, True),
        ({"method": "joint"}, False),
        ({"method": "joint", "num_class_images": 4, "class_prompt": ""}, True),
        ({"captions": "captions.txt"}, False),
    ],
    ids=["merge", "nothing reads them", "erasure", "class prompt", "class pictures", "own"],
)
def test_captions_of_emoji_are_told_where_another_model_reads_them(
    pipeline, changes, warns, caplog
):
    changes = dict(changes)
    class_prompt = changes.pop("class_prompt", "a thing")
    concept = dataclasses.replace(tiny.concept(), class_prompt=class_prompt, class_images=())
    config = ImmunizeConfig(**changes)
    warn_of_model(pipeline, [concept], config)
    assert ("those that ship with mima are about emoji" in caplog.text) == warns


def test_the_embedded_model_reads_the_captions_that_ship(caplog):
    warn_of_model(load_pipeline("embedded"), [embedded_concept("tiger")], ImmunizeConfig())
    assert "captions:" not in caplog.text
