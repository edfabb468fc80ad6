from pathlib import Path

import pytest

from mima.errors import MimaError
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
