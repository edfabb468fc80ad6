"""Every example runs as it is, on a CPU, in seconds, away from the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import run_script

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, processes):
    folder, said = tmp_path / "out", tmp_path / "said"
    folder.mkdir()
    process = processes.Process(target=run_script, args=(example, folder, said))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0, said.read_text()
    assert said.read_text().strip()
