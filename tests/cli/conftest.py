from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image
from support import tiny
from support.commands import run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A working directory with two folders of pictures, `cat` and `dog`."""
    for index, name in enumerate(("cat", "dog")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            color = (40 * number, 200 * index, 90)
            Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        described = {"name": name, "prompt": f"a photo of a {name}", "class_prompt": "a photo"}
        (folder / "concept.yaml").write_text(yaml.safe_dump(described))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def adapters(model, tmp_path_factory) -> Path:
    """A folder with LoRA of two concepts, as `mima adapt` writes them."""
    folder = tmp_path_factory.mktemp("adapters")
    for index, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        Image.new("RGB", (32, 32), (200 * index, 40, 90)).save(folder / name / "0.png")
    options = ["--model", model, "--steps", 1, "--lr", 0.01, "--rank", 2, "--prompt"]
    for name in ("cat", "dog"):
        run("adapt", folder / name, *options, f"a {name}", "-o", folder / f"{name}-lora")
    return folder
