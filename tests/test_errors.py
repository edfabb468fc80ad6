"""Small pieces of what people read."""

from __future__ import annotations

import pytest

from mima.errors import told_apart


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat", "cat", "cat"], ["cat", "cat (2)", "cat (3)"]),
        (["cat (2)", "cat"], ["cat (2)", "cat"]),
        (["cat", "cat (2)", "cat"], ["cat", "cat (2)", "cat (3)"]),
        (["cat", "cat", "cat (2)"], ["cat", "cat (2)", "cat (2) (2)"]),
    ],
)
def test_names_are_told_apart(names: list[str], told: list[str]) -> None:
    assert told_apart(names) == told
