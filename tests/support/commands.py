"""A command as a person types it, and a config file to type it with."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from mima.cli import app


def run(*arguments: object, code: int = 0) -> str:
    """Run a command, check its exit code, and give back what it printed, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    # usage errors come in a box
    return " ".join(result.output.replace("│", " ").split())


def write_config(path: Path, **changes: object) -> Path:
    settings = {
        "steps": 2,
        "num_captions": 8,
        "num_class_images": 2,
        "hypergradient": "first_order",
        "lower": {"steps": 1},
    }
    config = {"model": "model", "concepts": ["cat", "dog"], "immunize": settings, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    return path
