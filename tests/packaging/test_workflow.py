"""GitHub runs what runs everywhere else, and nothing of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import mima

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_every_job_runs_a_script_of_the_repository():
    scripts = {}
    for name, job in WORKFLOW["jobs"].items():
        (scripts[name],) = (step["run"] for step in job["steps"] if "run" in step)
    assert scripts == {"run": "bash .ci/run", "oldest": "bash tools/oldest.sh"}
    for script in scripts.values():
        assert (ROOT / script.removeprefix("bash ")).is_file()


def test_it_runs_on_the_oldest_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        project["requires-python"]
        == f">={WORKFLOW['jobs']['run']['strategy']['matrix']['python'][0]}"
    )


def test_a_step_beside_the_rest_that_fails_ends_the_whole_check_and_is_shown():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    functions = text[text.index("work=$(mktemp -d)") : text.index("missing=()")]
    script = f"""
set -euo pipefail
{functions}
good() {{ echo well; }}
bad() {{ echo ill; (exit 3); echo never; }}
slow() {{ sleep 600; }}
begin good; begin bad; begin slow
end good
end bad
echo never
"""
    # what still runs is ended, or this would wait for it
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 3
    assert re.fullmatch(r"well\n\(\d+ s, beside the rest\)\nill\n", done.stdout)
    assert "bad failed with status 3" in done.stderr


def test_the_changelog_knows_this_version_and_ends_none_before_it():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert mima.__version__ in headings
    assert all(
        heading.endswith(" (unreleased)")
        for heading in headings[: headings.index(mima.__version__)]
    )
