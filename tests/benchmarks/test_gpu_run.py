"""The run on a GPU goes through its stages on a machine that has none."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_the_gpu_run_goes_through_its_stages_without_a_gpu(tmp_path):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("mima._native", reason="it measures native kernels")
    # children of a pytest-xdist worker count as workers, in which pytest-benchmark measures nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"PYTHON": sys.executable, "MIMA_BENCH_THREADS": "1"}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out", "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    log = tmp_path / "out" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
    summary = (tmp_path / "out" / "summary.md").read_text()
    for stage in ("install", "machine", "tests", "benchmark_merge_lora", "memory"):
        assert f"| {stage} | ok |" in summary
    assert re.search(r"^    two-pass +2 +\d+ +\d+ +1\.\d\d ", summary, flags=re.MULTILINE)
    assert re.search(r"2 passed, .*\n", summary)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| merge_lora forward o,d=(320, 768) r=4 | eager |" in report
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert "merge_lora.json" in names


# Python on a GPU machine where not everything can be compiled; it runs nothing
WITHOUT_COMPILER = """#!/usr/bin/env bash
echo "$* [native $MIMA_BUILD_NATIVE, cuda $MIMA_BUILD_CUDA, device $MIMA_BENCH_DEVICE]" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90 ;;
  "-m pip install"*)
    [[ $PIP_BUILDS != nothing ]] || exit 1
    mkdir -p "${@: -2:1}/mima"
    for module in $PIP_BUILDS; do touch "${@: -2:1}/mima/$module.so"; done ;;
  "-m mima doctor") cp -r "$PYTHONPATH" "$SITE" ;;
  benchmarks/memory.py*) [[ $MEMORY != fails ]] || exit 1 ;;
  *--benchmark-json=*) file=${@: -1}; echo "{}" >"${file#*=}" ;;
  "-m benchmarks.report"*) echo "a report" >"${@: -1}/report.md" ;;
esac
"""


LOOK = """
import sys
# an editable installation would lend its native code
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
import torch, mima.kernels
from mima.ops.backends import choice
print("found", mima.__file__, mima.kernels.__file__)
for row in choice.report("cpu"):
    print(row.operator, row.backend, *row.reasons)
"""


@pytest.mark.parametrize(
    ("builds", "lacks"),
    [
        ("_native _native_cuda", []),
        ("_native", ["_native_cuda"]),
        ("", ["_native", "_native_cuda"]),
        ("nothing", []),
    ],
)
def test_the_gpu_run_goes_on_without_native_code(tmp_path, builds, lacks):
    pytest.importorskip("triton")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(WITHOUT_COMPILER)
    python.chmod(0o755)
    site = tmp_path / "site"
    environment = {"PYTHON": python, "CALLS": calls, "SITE": site, "PIP_BUILDS": builds}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    summary = (tmp_path / "out" / "summary.md").read_text()
    installed = "copied, not installed" if builds == "nothing" else "installed."
    assert f"mima was {installed}" in summary
    assert re.findall(r"mima\.(\w+) could not be built", summary) == lacks
    stages = re.findall(r"^\| (\w+) \| ok \| \d+ \|$", summary, flags=re.MULTILINE)
    operators = "batched_lora", "adam_step", "weighted_merge", "projected_merge", "merge_lora"
    benchmarks = [f"benchmark_{name}" for name in ("step", *operators)]
    assert stages == ["install", "machine", "tests", *benchmarks, "memory", "benchmark_sampling"]
    lines = calls.read_text().splitlines()
    (build,) = (line for line in lines if line.startswith("-m pip install"))
    assert "[native auto, cuda auto" in build
    (tests,) = (line for line in lines if "cuda and not slow" in line)
    assert "tests/ops tests/native" in tests
    measured = [line for line in lines if "--benchmark-json" in line]
    assert len(measured) == len(benchmarks) + 1
    assert all("device cuda]" in line for line in measured)
    if builds != "nothing":
        modules = {path.stem for path in (site / "mima").glob("_native*")}
        assert modules == set(builds.split())
        return
    # what was copied has Triton's kernels, and no native code
    found = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"found {site}/mima/__init__.py {site}/mima/kernels/__init__.py" in found
    assert "combine triton on the CPU only in Triton's interpreter" in found
    assert "combine native No module named 'mima._native'" in found


def test_the_gpu_run_says_that_peak_memory_could_not_be_measured(tmp_path):
    python = tmp_path / "python"
    python.write_text(WITHOUT_COMPILER)
    python.chmod(0o755)
    environment = {"PYTHON": python, "CALLS": "/dev/null", "SITE": tmp_path / "site"}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out"],
        env={**os.environ, **environment, "PIP_BUILDS": "nothing", "MEMORY": "fails"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| memory | failed with 1 |" in summary
    assert "| benchmark_sampling | ok |" in summary


def test_a_measurement_of_memory_that_fails_says_why(capfd):
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks/memory.py")
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    with pytest.raises(subprocess.CalledProcessError):
        memory.table("cpu", SimpleNamespace(engines=["two-pass"], concepts=[1], batch="two"))
    assert "invalid int value: 'two'" in capfd.readouterr().err


# pip that has one wheel it cannot install
ONE_DOES_NOT_FIT = """#!/usr/bin/env bash
case "$*" in
  "-m pip install"*)
    [[ $* != *" ."* && $* != *other-python* ]] || exit 1
    while [[ $1 != --target ]]; do shift; done
    mkdir -p "$2/shared"
    for wheel in "${@:3}"; do touch "$2/shared/$(basename "$wheel")"; done ;;
  "-m mima doctor") cp -r "$PYTHONPATH" "$SITE" ;;
esac
"""


def test_a_wheel_that_does_not_fit_is_left_out_of_the_gpu_run(tmp_path):
    python, wheels, site = (tmp_path / name for name in ("python", "wheels", "site"))
    python.write_text(ONE_DOES_NOT_FIT)
    python.chmod(0o755)
    wheels.mkdir()
    for name in ("a", "other-python", "z"):
        (wheels / f"{name}.whl").touch()
    subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out", "--wheels", wheels],
        env={**os.environ, "PYTHON": python, "SITE": site},
        capture_output=True,
        check=False,
    )
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| install | ok |" in summary
    assert "- other-python.whl could not be installed: see log.txt." in summary
    assert "mima was copied, not installed" in summary
    assert {path.name for path in (site / "shared").iterdir()} == {"a.whl", "z.whl"}
    assert (site / "mima" / "kernels" / "attention.py").exists()
    assert not list((site / "mima").glob("_native*"))


def test_the_gpu_run_lists_the_wheels_to_carry():
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", "--list-wheels"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {"diffusers", "pydantic", "pydantic-core", "transformers"} <= names
    assert not {"torch", "triton", "numpy", "mima"} & names


def test_an_interrupted_gpu_run_leaves_what_it_has(tmp_path):
    run = subprocess.Popen(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path, "--dry-run"],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert "| install | ok |" in run.stdout.readline()
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == 1
    assert "| install | ok |" in (tmp_path / "summary.md").read_text()


def test_the_gpu_run_says_what_failed(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path, "--dry-run", "--seconds", "0"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "| tests | not started, no time was left |" in done.stdout
