"""The documentation says what the code does."""

from __future__ import annotations

import doctest
import re
import shlex
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel
from support import tiny
from support.commands import run, write_config
from typer.main import get_command
from typer.testing import CliRunner

from mima.cli import app
from mima.cli.diagnosis import VARIABLES
from mima.concepts import embedded_names
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.from_file import parse_run
from mima.immunization.recipes import TASKS, paper
from mima.ops.backends.choice import BACKENDS
from mima.settings import group_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def settings(kind: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Every setting by its dotted name, with its default."""
    found: dict[str, object] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= settings(type(field.default), f"{prefix}{name}.")
        elif is_dataclass(field.default):
            found |= {f"{prefix}{name}.{key}": value for key, value in vars(field.default).items()}
        else:
            found[prefix + name] = field.default
        group = group_of(field.annotation)
        # a group that is off unless it is set; those of a lower level are listed once
        if field.default is None and group not in (None, LowerConfig):
            found |= settings(group, f"{prefix}{name}.")
    return found


def test_the_guide_lists_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", GUIDE, flags=re.MULTILINE))
    expected = settings(ImmunizeConfig)
    assert set(rows) == set(expected)
    for name, default in expected.items():
        if default is None or default == ():
            continue
        stated = yaml.safe_load(re.fullmatch(r"`(.+)`", rows[name].strip())[1])
        if isinstance(default, tuple) and not isinstance(stated, list):
            stated = [stated]
        assert type(default)(stated) == default, name


def test_the_guide_says_where_the_released_scripts_differ_from_the_defaults():
    heading = r"\| \| default \| released scripts: `recipe: paper` \|\n\|[-|]+\|\n((?:\|.*\|\n)+)"
    (table,) = re.findall(heading, GUIDE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    plain = {None: {}, "relearn": TASKS["relearn"], "personalize": TASKS["personalize"]}
    ours = {task: flattened(ImmunizeConfig(**own)) for task, own in plain.items()}
    theirs = {task: flattened(paper(task)) for task in plain}
    differ = {name for name, value in ours[None].items() if theirs[None][name] != value}
    # what the tasks change is in the row of their own
    assert {name for name, *_ in rows} == {*differ, "task personalize"}
    for name, default, released in rows[:-1]:
        stated = [yaml.safe_load(value) for value in re.findall("`(.+?)`", default)][:1]
        value = ours[None][name]
        assert [type(value)(x) for x in stated] == ([] if value is None else [value]), name
        first, *second = re.findall("`(.+?)`", released)
        for task, text in (("relearn", first), ("personalize", (second or [first])[0])):
            value = theirs[task][name]
            assert type(value)(yaml.safe_load(text)) == value, (task, name)


def flattened(config: BaseModel, prefix: str = "") -> dict[str, object]:
    """A configuration's settings by their dotted names."""
    found: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        inner = flattened(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else None
        found |= inner if inner is not None else {prefix + name: value}
    return found


def test_the_guides_config_is_valid():
    (text,) = re.findall(r"```yaml\n(# run.yaml.*?)```", GUIDE, flags=re.DOTALL)
    config = parse_run(yaml.safe_load(text), source="guide").immunize
    assert (config.steps, config.upper.objective) == (200, "log")


def test_the_guides_two_files_work_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concepts", "run"):
        (text,) = re.findall(rf"```yaml\n(# {name}.yaml.*?)```", GUIDE, flags=re.DOTALL)
        Path(f"{name}.yaml").write_text(text)
    pictures = ("cat/0.jpg", "cat/1.jpg", "cat-held-out/0.jpg")
    for file in (*(f"pictures/{name}" for name in pictures), "castle/front.jpg", "castle/back.jpg"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture("red", "round").save(file)
    tiny.save_tiny_stable_diffusion(tmp_path / "model")
    changes = ("model=model", "steps=1", "num_class_images=1", "num_captions=8")
    changes += ("lower.steps=5", "upper.path_every=2")
    options = [part for change in changes for part in ("--set", change)]
    done = CliRunner().invoke(app, ["immunize", "run.yaml", *options], catch_exceptions=False)
    assert "immunized against cat, my castle: immunized" in done.output


def test_the_guides_several_attackers_are_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(lower:.*?)```", GUIDE, flags=re.DOTALL)
    told = yaml.safe_load(text)
    told["lower"] = [{**one, "steps": 1} for one in told["lower"]]
    tiny.save_tiny_stable_diffusion(tmp_path / "model")
    small = {"steps": 2, "num_class_images": 1, "num_captions": 8, "hypergradient": "first_order"}
    config = {"concepts": ["tiger"], "output": "out", "immunize": {**small, **told}}
    path = write_config(tmp_path / "run.yaml", **config)
    assert "immunized against tiger: " in run("immunize", path)
    assert (tmp_path / "out" / "model_index.json").is_file()


def commands() -> list[str]:
    """What the pages say to type."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") + GUIDE
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", "")
    cells = re.findall(r"^\| `(mima [^`]+)` \|", text, flags=re.MULTILINE)
    return [line for line in [*blocks.splitlines(), *cells] if line.startswith("mima ")]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_are_understood(line):
    _, name, *words = shlex.split(line, comments=True)
    command = get_command(app).commands[name]
    said = command.make_context(name, words).params
    sources = [said.get("concept"), said.get("concepts"), said.get("others")]
    concepts = {one for source in sources for one in source or ()}
    assert concepts - {"cat", "dog", "pictures/cat"} <= set(embedded_names())


def test_the_readme_has_the_two_commands_and_every_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install . && mima demo\n" in readme
    assert "\npip install '.[test]' && pytest\n" in readme
    for command in app.registered_commands:
        assert f"`mima {command.callback.__name__}" in readme


def test_the_environment_variables_are_those_that_are_read():
    stated = set(re.findall(r"`(MIMA_[A-Z_]+)`", GUIDE))
    tests = [ROOT / "tests" / f"{n}.py" for n in ("conftest", "report/test_browser", "test_demo")]
    sources = [ROOT / "setup.py", *tests, *(ROOT / "mima").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(re.findall(r"environ(?:\.get)?[\[(][\"'](MIMA_[A-Z_]+)", text))
    read |= set(re.findall(r"[\"'](MIMA_BUILD_[A-Z]+)[\"']", text))
    assert stated == read
    for backend in BACKENDS:
        assert f"`{backend}`" in GUIDE


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]+)?\)", text):
        place = page.parent / link if link else page
        if not place.exists() or (anchor and anchor[1:] not in anchors(place)):
            missing.append(link + anchor)
    assert not missing


def anchors(page):
    """What a page's headings are called in links: as Python-Markdown makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    bare = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in bare}


def test_doctor_shows_every_variable_that_the_guide_names():
    named = re.findall(r"\bMIMA_[A-Z_]+\b", GUIDE)
    assert len(set(named)) > 6
    assert set(named) <= set(VARIABLES)


def test_the_site_has_every_page_and_the_reference_names_what_is_there():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages: list[str] = []

    def walk(part: object) -> None:
        if isinstance(part, str):
            pages.append(part)
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                walk(inner)

    walk(site["nav"])
    written = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages) == sorted(written)
    for name in referenced():
        found = resolve_name(name)
        # the line below a choice is read by the site alone
        assert get_origin(found) is Literal or found.__doc__, name


def referenced() -> list[str]:
    """What the reference shows, by its path: objects, and of some the members that it lists."""
    entry = re.compile(r"^::: (\S+)$(?:\n +options:\n +members: \[(.+)\]$)?", re.MULTILINE)
    found = []
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for name, members in entry.findall(page.read_text(encoding="utf-8")):
            found += [f"{name}.{one}" for one in members.split(", ")] if members else [name]
    return found


def rooms() -> list[str]:
    """The modules that say by ``__all__`` what people import, but for the commands' own."""
    files = [*(ROOT / "mima").glob("*.py"), *(ROOT / "mima").glob("*/__init__.py")]
    saying = [file for file in files if "\n__all__ = " in file.read_text(encoding="utf-8")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in saying]
    return sorted({name.removesuffix(".__init__") for name in names} - {"mima.cli"})


@pytest.mark.parametrize("room", rooms())
def test_the_reference_shows_every_name_that_a_room_gives(room):
    shown = [resolve_name(name) for name in referenced()]
    module = import_module(room)
    names = [name for name in module.__all__ if name != "__version__"]
    assert [name for name in names if not any(getattr(module, name) is x for x in shown)] == []


def test_sections_of_docstrings_are_those_that_the_site_reads():
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "mima").rglob("*.py"))
    sections = {
        name for text in texts for name in re.findall(r"^ *([A-Z]\w+):$", text, re.MULTILINE)
    }
    assert sections == {"Args", "Attributes", "Examples", "Raises", "Returns", "Yields"}


def modules_with_examples() -> list[str]:
    """Those whose examples need no model: of the operators, and of what is counted."""
    files = [*(ROOT / "mima" / "ops").glob("*.py"), ROOT / "mima" / "reference.py"]
    files += [
        ROOT / "mima" / "adaptation" / "steps.py",
        ROOT / "mima" / "evaluation" / "metrics.py",
    ]
    saying = [file for file in files if "    >>> " in file.read_text(encoding="utf-8")]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in saying)


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_print_what_they_say(module):
    found = doctest.testmod(import_module(module), extraglobs={"torch": torch})
    assert found.attempted
    assert not found.failed
