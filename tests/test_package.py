"""What `import mima` gives, and how little it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

import mima


def isolated(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", mima.__all__)
def test_every_public_name_is_there(name):
    assert getattr(mima, name) is not None
    assert name in dir(mima)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'immunise'"):
        _ = mima.immunise


def test_importing_does_no_work():
    code = "import sys, mima; print(sorted({'torch', 'numpy', 'PIL', 'yaml'} & set(sys.modules)))"
    assert isolated(code) == "[]"


def test_the_embedded_model_is_an_ordinary_pipeline():
    pipeline = mima.load_embedded()
    assert isinstance(pipeline, StableDiffusionPipeline)
    modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(parameter.requires_grad for parameter in parameters)
    assert not any(module.training for module in modules)
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_the_embedded_model_in_half_precision():
    assert mima.load_embedded(dtype=torch.float16).unet.dtype == torch.float16


def test_an_installation_without_assets_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("mima.families.loading.assets", lambda: tmp_path)
    with pytest.raises(mima.MimaError, match="missing from this installation"):
        mima.load_embedded()
