"""The build of the extensions: with a compiler, without one, and where it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(
    tmp_path: Path, source: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run build_ext into tmp_path, which leaves the checkout as it is."""
    code = (
        "import runpy, sys;"
        f"sys.argv = ['setup.py', '-q', 'build_ext', '-b', {str(tmp_path / 'lib')!r},"
        f" '-t', {str(tmp_path / 'temp')!r}];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    unset = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "CUDACXX", "CFLAGS", "CXXFLAGS", "MAX_JOBS")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def outcome(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "lib/mima/_build_info.json").read_text())


def modules(tmp_path: Path) -> list[str]:
    return sorted(p.name.split(".")[0] for p in (tmp_path / "lib/mima").glob("*.so"))


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the sources in which the CPU code does not compile, and is one file."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "mima").mkdir()
    shutil.copy(ROOT / "mima/_version.py", copy / "mima")
    for source in (copy / "csrc/cpu").glob("*.cpp"):
        source.unlink()
    (copy / "csrc/cpu/dispatch.cpp").write_text("this is no C++;\n")
    return copy


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param({"PATH": ""}, "no C++ compiler: install g++", id="empty-path"),
        pytest.param({"CC": "/nonexistent"}, "CC=/nonexistent does not exist", id="CC"),
        pytest.param({"CXX": "/nonexistent"}, "CXX=/nonexistent does not exist", id="CXX"),
    ],
)
def test_without_a_compiler_the_build_goes_on_and_says_why(tmp_path, variables, reason):
    done = build(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert "mima._native is left out: " in done.stderr
    assert reason in done.stderr
    assert modules(tmp_path) == []
    for module in ("native", "native_cuda"):
        assert outcome(tmp_path)[module]["built"] is False
        assert reason in outcome(tmp_path)[module]["reason"]


def test_asked_for_and_impossible_is_an_error(tmp_path):
    done = build(tmp_path, CC="/nonexistent", MIMA_BUILD_NATIVE="1")
    assert done.returncode != 0
    assert "mima._native cannot be built (MIMA_BUILD_NATIVE=1): no C++ compiler" in done.stderr


def test_a_failing_compilation_is_recorded(tmp_path, broken):
    done = build(tmp_path, broken)
    assert done.returncode == 0, done.stderr
    assert "the compiler failed: " in outcome(tmp_path)["native"]["reason"]
    assert "dispatch.cpp" in outcome(tmp_path)["native"]["reason"]
    assert modules(tmp_path) == []
    assert build(tmp_path, broken, MIMA_BUILD_NATIVE="1").returncode != 0


def test_left_out_on_request(tmp_path):
    done = build(tmp_path, MIMA_BUILD_NATIVE="0", MIMA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path)["native"]["reason"] == "left out at build time by MIMA_BUILD_NATIVE=0"
    done = build(tmp_path, MIMA_BUILD_NATIVE="0", MIMA_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "MIMA_BUILD_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr


def test_with_a_compiler_and_without_nvcc(tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    home = tmp_path / "no-cuda"
    # half the time of -O3, and the compiler still looks at what is used before it is set
    done = build(tmp_path, CUDA_HOME=str(home), CXXFLAGS="-O1")
    assert done.returncode == 0, done.stderr
    assert modules(tmp_path) == ["_native"]
    assert outcome(tmp_path)["native"]["built"] is True
    assert f"no nvcc: {home}/bin/nvcc does not exist" in outcome(tmp_path)["native_cuda"]["reason"]
    assert "warning:" not in done.stderr
    done = build(tmp_path, CUDA_HOME=str(home), MIMA_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "mima._native_cuda cannot be built (MIMA_BUILD_CUDA=1): no nvcc" in done.stderr
    # what was built runs on its own: no symbol of torch, Python's alone
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'lib/mima')!r}); import _native;"
        "assert 'torch' not in sys.modules; print(_native.cpu_level())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in {"generic", "avx2", "avx512"}
