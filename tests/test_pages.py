"""Every block and command of README and guide runs, on the files that the text describes.

Small: models are tiny, steps few. What is left out here runs elsewhere: `mima demo` and
`pip install` in `.ci/run`, `torchrun` in the tests of several processes, `mima push` in its own,
`mima immunize` with the guide's two files and its several attackers in `test_docs.py`.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from support import tiny
from support.commands import run
from support.evaluations import write_evaluation
from support.faults import GRID, SAMPLER

from mima.evaluation import Sampler, attack

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md")}
ELSEWHERE = ("demo", "push", "immunize")
STEPS = ("--steps", "1")
TINY = ("--model", "M")
SMALL = {
    "adapt": (*TINY, *STEPS, "--overwrite"),
    "apply": (*TINY, "--overwrite"),
    "erase": (*TINY, "--overwrite"),
    "evaluate": (
        *("--processes", "1", "--overwrite"),
        *(
            part
            for name, value in GRID.items()
            for part in ("--set", f"{name}={json.dumps(value)}")
        ),
    ),
    "merge": (*TINY, "--overwrite"),
    "sample": (*TINY, "--steps", "2", "--overwrite"),
}
"""What commands are told besides; of an option that stands twice, the last counts."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    cells = re.findall(r"^\| `(mima [^`]+)` \|", PAGES[page], flags=re.MULTILINE)
    found = [line for line in (*lines, *cells) if line.startswith("mima ")]
    return [line for line in found if line.split()[1] not in ELSEWHERE]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the models, pictures, adapters and results that the pages speak of."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("M", "MODEL", "IMMUNIZED", "path/or/hub-id"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.save_tiny_stable_diffusion(folder / name)
    within = ("cat", "cat-held-out", "dog", "van-gogh")
    pictures = ("cat", "dog", *(f"pictures/{name}" for name in within))
    for number, name in enumerate(pictures):
        (folder / name).mkdir(parents=True)
        for index in range(2):
            one = tiny.picture("red", "round", seed=10 * number + index)
            one.save(folder / name / f"{index}.png")
        (folder / name / "concept.yaml").write_text(f"prompt: a photo of a {Path(name).name}\n")
    (folder / "captions.txt").write_text("a red thing\na blue thing\n" * 4)
    for name in ("front", "back"):
        (folder / "castle").mkdir(exist_ok=True)
        tiny.picture("blue", "square").save(folder / "castle" / f"{name}.jpg")
    (text,) = re.findall(r"```yaml\n(# concepts.yaml.*?)```", PAGES["docs/guide.md"], re.DOTALL)
    (folder / "concepts.yaml").write_text(text)
    entries = [
        {"instance_prompt": f"a {name}", "instance_data_dir": f"pictures/{name}"}
        for name in ("cat", "van-gogh")
    ]
    (folder / "lists.json").write_text(json.dumps({"cat+dog": entries}))
    for name in ("none", "joint", "mima"):
        write_evaluation(folder / name, seeds=(0,), adaptations=("lora",), name=name)
    tiny.save_tiny_clip(folder / "clip")
    tiny.save_tiny_dino(folder / "dino")
    return folder


@pytest.fixture(autouse=True)
def _in_it(world, monkeypatch):
    monkeypatch.chdir(world)
    for name in ("clip", "dino"):
        monkeypatch.setattr(f"mima.evaluation.encoders.{name.upper()}_DEFAULT", str(world / name))


@pytest.fixture(scope="module")
def adapters(world) -> None:
    """What the guide's commands make before those that read it, under the names that they read."""
    learned = {
        "cat-lora": ("cat", "lora", ()),
        "dog-lora": ("dog", "lora", ()),
        "tiger-dreambooth": ("tiger", "dreambooth", ()),
        "castle-custom-diffusion": (
            "castle",
            "custom-diffusion",
            ("--prompt", "a <new1> castle", "--token", "<new1>", "--initializer", "castle"),
        ),
    }
    for name, (concept, method, more) in learned.items():
        source = world / concept if (world / concept).exists() else concept
        told = ("--model", world / "M", *STEPS, "--lr", "1e-3")
        run("adapt", source, "--method", method, "-o", world / name, *told, *more)
    both = [world / "cat-lora", world / "dog-lora"]
    run("merge", *both, "-o", world / "immunized", "--delta", "--model", world / "M")


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands(line, world, adapters):
    _, name, *words = shlex.split(line, comments=True)
    small = SMALL.get(name, ())
    if "esd-x" in words:
        small = (*small, *STEPS)
    assert run(name, *words, *small)


def small(code: str) -> str:
    """The same code, with settings that take seconds."""
    return code.replace("steps=200", "steps=1, num_class_images=1, num_captions=8")


def test_blocks_of_the_readme(world, tmp_path, monkeypatch):
    # what it writes is not what the commands find
    for name in ("pictures", "path", "captions.txt"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md", "python")
    names: dict[str, object] = {}
    exec(small(code), names)
    assert type(names["pipeline"]).__name__ == "StableDiffusionPipeline"


def test_blocks_of_the_guide(world, monkeypatch):
    def quick(*args, steps, **more):
        return attack(
            *args, steps=(0, 1), seeds=(0,), max_prompts=1, sampler=Sampler(**SAMPLER), **more
        )

    monkeypatch.setattr("mima.evaluation.attack", quick)
    names: dict[str, object] = {}
    for code in blocks("docs/guide.md", "python"):
        exec(code, names)
    assert names["gap"].sgr == (0, 0)
