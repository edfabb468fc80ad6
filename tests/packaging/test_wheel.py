"""The package as others get it: sdist, then wheel, then an import far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mima

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}


def python(*arguments: str, cwd: Path, **variables: str) -> str:
    """Run this interpreter with a clean path, and give back its stdout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MIMA_STRICT")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, made from a copy so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("checkout") / "mima"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "mima-demo"
        ),
    )
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    python("-c", code, cwd=copy)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel made from the sdist on a machine without a compiler and without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    arguments = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index")
    python(*arguments, "--wheel-dir", str(folder), cwd=source, **NO_COMPILER)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it and nothing else."""
    folder = tmp_path_factory.mktemp("target")
    python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)),
        cwd=folder,
    )
    return folder


def test_only_mima_is_installed(names):
    top = {name.split("/")[0] for name in names}
    assert top == {"mima", f"mima-{mima.__version__}.dist-info"}


def test_every_module_of_the_checkout_is_in_the_wheel(names):
    expected = {f"mima/{path.relative_to(ROOT / 'mima')}" for path in (ROOT / "mima").rglob("*.py")}
    kernels = ROOT / "kernels" / "triton"
    expected |= {f"mima/kernels/{path.relative_to(kernels)}" for path in kernels.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def test_every_asset_is_in_the_wheel(names):
    assets = ROOT / "mima" / "assets"
    expected = {f"mima/assets/{p.relative_to(assets)}" for p in assets.rglob("*") if p.is_file()}
    assert expected
    assert {name for name in names if name.startswith("mima/assets/")} == expected
    assert "mima/py.typed" in names
    page = {f"mima/report/page/report.{kind}" for kind in ("html", "css", "js")}
    assert {name for name in names if name.startswith("mima/report/page/")} == page


def test_licence_and_command_are_in_the_wheel(wheel, names):
    info = f"mima-{mima.__version__}.dist-info"
    embedded = ("LICENSE", "mima/assets/ATTRIBUTION.md", "csrc/THIRD_PARTY.md")
    assert {f"{info}/licenses/{file}" for file in embedded} <= set(names)
    with zipfile.ZipFile(wheel) as archive:
        assert "mima = mima.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        described = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in described
    for heavy in ("torchvision", "lpips", "timm"):
        lines = [line for line in described.splitlines() if line.startswith("Requires-Dist")]
        assert all("extra ==" in line for line in lines if heavy in line)


def test_the_build_environment_is_small():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert sorted(item.split(">")[0] for item in requires) == ["ninja", "pybind11", "setuptools"]


def test_without_a_compiler_the_reason_is_kept(target):
    info = json.loads((target / "mima" / "_build_info.json").read_text())
    assert info["native"]["built"] is False
    assert "/nonexistent" in info["native"]["reason"]
    output = python("-m", "mima", "doctor", cwd=target, PYTHONPATH=str(target))
    assert "/nonexistent" in output


def test_the_wheel_works_far_from_the_checkout(target, tmp_path):
    code = """
import importlib.util, json
import torch
import mima, mima.kernels
from mima.ops import weighted_merge
base, theta = torch.zeros(3), torch.ones(3)
print(json.dumps({
    "mima": mima.__file__,
    "kernels": mima.kernels.__file__,
    "top-level kernels": importlib.util.find_spec("kernels") is not None,
    "merged": weighted_merge(base, [theta, 3 * theta], torch.tensor([0.25, 0.25])).tolist(),
    "concepts": len(mima.embedded_concepts()),
}))
"""
    found = json.loads(python("-c", code, cwd=tmp_path, PYTHONPATH=str(target)))
    assert Path(found["mima"]).is_relative_to(target)
    assert Path(found["kernels"]).is_relative_to(target)
    assert found["top-level kernels"] is False
    assert found["merged"] == [1.0, 1.0, 1.0]
    assert found["concepts"] >= 18


def test_the_embedded_model_opens_far_from_the_checkout(target, tmp_path):
    command = ("-m", "mima", "sample", "a cat emoji in noto style", "--steps", "2", "-o", "x.png")
    python(*command, cwd=tmp_path, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.slow
def test_the_wheel_runs_the_demonstration_without_a_compiler(target, tmp_path):
    python("-m", "mima", "demo", "--quick", "-o", "out", cwd=tmp_path, PYTHONPATH=str(target))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "grid.png", "curves.png", "report.html"} <= written


def test_the_tests_run_on_the_installed_package():
    """Nothing is imported from the checkout by accident."""
    origin = metadata.distribution("mima").read_text("direct_url.json")
    if origin and json.loads(origin).get("dir_info", {}).get("editable"):
        pytest.skip("mima is installed in editable mode")
    assert not Path(mima.__file__).is_relative_to(ROOT)
    assert str(ROOT) not in sys.path
