"""Model cards: what was done to a model, from what, with which settings."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData

from mima._version import installed_versions
from mima.release.delta import NEW_WORDS
from mima.storage.inputs import is_hub_id
from mima.storage.names import DELTA_FILE

CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says."""

    command: str
    """What made it, as the command line calls it."""
    title: str
    method: str
    """Sentences on what was done, by mima's own hand: Markdown."""
    base_model: str | None
    """What it was made from; a hub id is linked."""
    opened_with: Mapping[str, str]
    """The base model's ``ModelSource.options``."""
    concepts: Sequence[tuple[str, str]]
    """Names and prompts."""
    settings: Mapping[str, Any]
    seed: int | None
    metrics: Mapping[str, float]
    tags: Sequence[str]


def model_card(
    facts: CardFacts,
    metrics: Mapping[str, float],
    license: str | None,
    delta: bool,
    sums: Mapping[str, str],
    by_hand: bool,
) -> ModelCard:
    """A model card that says all of the facts.

    Args:
        facts: what was done.
        metrics: measured values by name.
        license: the hub's identifier of the licence, where the publisher gives one.
        delta: whether the card stands beside a delta rather than a whole model.
        sums: SHA-256 of the files with weights, by their name in the folder.
        by_hand: whether diffusers alone can put a delta in place: new words of several text
            encoders it cannot, nor weights of one, whose names hang on transformers' version.
    """
    base = facts.base_model or "a model in memory"
    # a folder may be called owner/name, too
    hub = facts.base_model is not None and is_hub_id(base) and not Path(base).exists()
    data = ModelCardData(
        base_model=base if hub else None,
        library_name="diffusers",
        license=license,
        pipeline_tag="text-to-image",
        tags=["mima", *facts.tags, *(["delta"] if delta else [])],
    )
    at = facts.opened_with.get("revision")
    tree = "" if at is None else f"/tree/{quote(at, safe='')}"
    origin = f"[{as_text(base)}](https://huggingface.co/{base}{tree})" if hub else as_text(base)
    parts = [
        f"# {facts.title}",
        facts.method,
        f"Made from {origin}" + (f" at revision {as_text(at)}." if at else "."),
        _usage(facts.base_model, facts.opened_with, delta, by_hand),
    ]
    if facts.concepts:
        rows = [f"| {as_text(name)} | {as_text(prompt)} |" for name, prompt in facts.concepts]
        parts += ["## Concepts", "\n".join(["| concept | prompt |", "|---|---|", *rows])]
    if metrics:
        rows = [f"| {as_text(name)} | {value:.4g} |" for name, value in metrics.items()]
        parts += ["## Measurements", "\n".join(["| | |", "|---|---|", *rows])]
    settings = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True)
    parts += ["## How it was made", _fenced(settings.strip(), "yaml")]
    if sums:
        lines = "\n".join(f"{digest}  {name}" for name, digest in sums.items())
        parts += ["SHA-256, as `sha256sum --check` reads it:", _fenced(lines, "text")]
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    seed = "" if facts.seed is None else f"Seed {facts.seed}; "
    parts += [f"{seed}{versions}.", "## Licence"]
    own = f"Published under `{license}`. " if license else ""
    parts.append(
        f"{own}The weights derive from {origin}, whose licence and terms of use bind whoever "
        "publishes or uses them."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _usage(base: str | None, opened_with: Mapping[str, str], delta: bool, by_hand: bool) -> str:
    opener, opened = "from diffusers import DiffusionPipeline", "DiffusionPipeline.from_pretrained"
    if not delta:
        lines = [opener, "", f'pipeline = {opened}("this folder or repository")']
        return _fenced("\n".join(lines), "python")
    called = {"single_file_config": "config"}
    options = [f"{called.get(key, key)}={json.dumps(told)}" for key, told in opened_with.items()]
    where = ", ".join([json.dumps(base or "the base model"), *options])
    if base == "embedded":
        # diffusers knows no such model
        opener, opened, where = "from mima import load_embedded", "load_embedded", ""
    elif base is not None and base.endswith(".safetensors"):
        # which class of diffusers opens a file hangs on what is in it
        opener, opened = "from mima.families import load_pipeline", "load_pipeline"
    put = f"`{DELTA_FILE}` holds the weights that differ from the base model, and nothing else. "
    if not by_hand:
        lines = [
            *(opener, "from mima import load_delta", ""),
            f'pipeline = load_delta({opened}({where}), "{DELTA_FILE}")',
        ]
        put += "`mima apply` puts them in place, or, where diffusers alone cannot,"
        return f"{put}\n\n" + _fenced("\n".join(lines), "python")
    lines = [
        *(opener, "from safetensors.torch import load_file", ""),
        f"pipeline = {opened}({where})",
        f'for name, value in load_file("{DELTA_FILE}").items():',
        '    component, parameter = name.split(".", 1)',
        f'    if component == "{NEW_WORDS}":',
        "        pipeline.load_textual_inversion({parameter: value})",
        "    else:",
        "        getattr(pipeline, component).get_parameter(parameter).data.copy_(value)",
    ]
    put += "`mima.load_delta` and `mima apply` put them in place; so does\n\n"
    return put + _fenced("\n".join(lines), "python")


def _fenced(text: str, language: str) -> str:
    # a fence longer than any in the text
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def as_text(value: str) -> str:
    """A user's words as Markdown that shows them as they are, on one line."""
    flat = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", flat)
