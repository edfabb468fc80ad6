"""The Triton kernels compute the right values: in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="test_values.py runs the kernels already"
)
@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="before Triton 3.7 its interpreter needs NumPy < 2.4",
)
def test_kernels_in_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when a kernel is defined.
    values, streaming = (
        Path(__file__).with_name(name) for name in ("test_values.py", "test_streaming.py")
    )
    # not python -m pytest, which would import the sources in the working directory
    pytest_script = Path(sys.executable).with_name("pytest")
    # nor in several processes: this may be one of several already
    options = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    # Whole blocks are read in one layout: the others differ from it in what is aligned to words,
    # of which the interpreter knows nothing, and small shapes have them all.
    others = "aligned and (transposed or expanded or offset or negated)"
    command = [pytest_script, "-q", *options, "-k", f"triton and not ({others})"]
    result = subprocess.run(
        [*command, values, streaming],
        cwd=values.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "MIMA_TEST_DEVICES": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    # Every case but those of float64, which the kernels lack.
    assert passed is not None, result.stdout
    assert int(passed[1]) > 100, result.stdout
