"""The build of the extensions: with a compiler, without one, and where it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.native_cases import needs_cpu_kernels

from mima._version import __version__
from mima.ops.backends import extension

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


def with_cpu_code(tmp_path: Path, **files: str) -> Path:
    """A copy of the sources in which the CPU code is these files, which compile in seconds."""
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
    for name, text in files.items():
        (copy / f"csrc/cpu/{name}.cpp").write_text(text)
    return copy


COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


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


def test_a_failing_compilation_is_recorded(tmp_path):
    broken = with_cpu_code(tmp_path, dispatch="this is no C++;\n")
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


SMALL = {
    "bindings": """
#include <pybind11/pybind11.h>
#include "cpu/dispatch.h"
PYBIND11_MODULE(_native, module) {
  module.attr("version") = MIMA_VERSION;
  module.def("level", [] { return mima::name(mima::CpuLevel::kAvx2); });
}
""",
    "dispatch": """
#include "cpu/dispatch.h"
const char* mima::name(CpuLevel) { return "the only one"; }
""",
}


@needs_a_compiler
def test_with_a_compiler_and_without_nvcc(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    small, home = with_cpu_code(tmp_path, **SMALL), tmp_path / "no-cuda"
    done = build(tmp_path, small, CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert modules(tmp_path) == ["_native"]
    assert outcome(tmp_path)["native"]["built"] is True
    assert f"no nvcc: {home}/bin/nvcc does not exist" in outcome(tmp_path)["native_cuda"]["reason"]
    said = alone(tmp_path / "lib/mima", "print(_native.version, _native.level())")
    assert said == f"{__version__} the only one"
    # pip puts what it builds with elsewhere each time
    shutil.copytree(Path(pybind11.__file__).parent, tmp_path / "elsewhere" / "pybind11")
    path = str(tmp_path / "elsewhere")
    done = build(tmp_path, small, CUDA_HOME=str(home), MIMA_BUILD_CUDA="1", PYTHONPATH=path)
    assert "no work to do" in done.stderr
    assert done.returncode != 0
    assert "mima._native_cuda cannot be built (MIMA_BUILD_CUDA=1): no nvcc" in done.stderr


@needs_a_compiler
def test_nvcc_is_given_the_compiler_and_not_what_launches_it(tmp_path):
    pytest.importorskip("pybind11")
    nothing = with_cpu_code(tmp_path, dispatch="")
    (nothing / "csrc/cuda/bindings.cpp").write_text("")
    launcher, nvcc = tmp_path / "ccache", tmp_path / "nvcc"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    for tool in (launcher, nvcc):
        tool.chmod(0o755)
    done = build(tmp_path, nothing, CXX=f"{launcher} {COMPILER} -O0", CUDACXX=str(nvcc))
    assert done.returncode == 0, done.stderr
    (rules,) = (tmp_path / "temp").rglob("_native_cuda.ninja")
    assert set(re.findall(r"-ccbin (\S+)", rules.read_text())) == {COMPILER}


def alone(folder: Path, code: str) -> str:
    """What code says of the module in a folder, in a process without torch."""
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import _native; {code};"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@needs_cpu_kernels
def test_what_is_installed_runs_on_its_own():
    """No symbol of torch, Python's alone."""
    said = alone(Path(extension.loaded("cpu").__file__).parent, "print(_native.cpu_level())")
    assert said in {"generic", "avx2", "avx512"}


@pytest.mark.slow
@needs_a_compiler
def test_the_sources_compile_without_a_warning(tmp_path):
    """csrc/sanitize.sh, which the whole check runs, takes a warning for an error, too."""
    # half the time of -O3, and the compiler still looks at what is used before it is set
    done = build(tmp_path, CXXFLAGS="-O1", MIMA_BUILD_NATIVE="1", MIMA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
