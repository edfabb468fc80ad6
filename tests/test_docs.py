"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mima.cli import app
from mima.config import ImmunizeConfig, ImmunizeRun, parse_config
from mima.ops.backends import BACKENDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def settings(kind: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Every setting by its dotted name, with its default."""
    found: dict[str, object] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= settings(type(field.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def test_the_guide_lists_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", GUIDE, flags=re.MULTILINE))
    expected = settings(ImmunizeConfig)
    assert set(rows) == set(expected)
    for name, default in expected.items():
        if default is None or default == ():
            continue
        stated = yaml.safe_load(re.fullmatch(r"`(.+)`", rows[name].strip())[1])
        assert type(default)(stated) == default, name


def test_the_guides_config_is_valid():
    (text,) = re.findall(r"```yaml\n(# run.yaml.*?)```", GUIDE, flags=re.DOTALL)
    assert parse_config(ImmunizeRun, yaml.safe_load(text), source="guide").immunize.lower.steps == 4


def test_the_readme_has_the_two_commands_and_every_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install . && mima demo\n" in readme
    assert "\npip install '.[test]' && pytest\n" in readme
    for command in app.registered_commands:
        assert f"`mima {command.callback.__name__}" in readme


def test_the_environment_variables_are_those_that_are_read():
    stated = set(re.findall(r"`(MIMA_[A-Z_]+)`", GUIDE))
    tests = [ROOT / "tests" / name for name in ("conftest.py", "report/test_browser.py")]
    sources = [ROOT / "setup.py", *tests, *(ROOT / "mima").rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(re.findall(r"environ(?:\.get)?[\[(][\"'](MIMA_[A-Z_]+)", text))
    read |= set(re.findall(r"[\"'](MIMA_BUILD_[A-Z]+)[\"']", text))
    assert stated == read
    for backend in BACKENDS:
        assert f"`{backend}`" in GUIDE


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
