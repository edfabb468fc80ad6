"""Results as ordinary models: diffusers folders, deltas, model cards, the hub.

What is written here opens without mima. A *delta* is one safetensors file with the new values of
the parameters that differ from a base model; plain diffusers reads it in three lines (see the
card that is written beside it).
"""

from __future__ import annotations

import html
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mima._version import __version__, installed_versions
from mima.adaptation.copies import with_values
from mima.adaptation.text import with_words
from mima.errors import MimaError
from mima.hub import Repository, is_hub_id

DELTA_FILE = "model_delta.safetensors"
CARD_FILE = "README.md"
_HEADER = "mima_delta"
_WORD = "new_words."


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a diffusers folder that any transformers from 4 on reads.

    transformers 5 writes a ``CLIPTextModel`` under names without the prefix ``text_model.``, which
    transformers 4 takes for missing, and draws random weights with no more than a warning; both
    read the names with the prefix.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    for name, component in pipeline.components.items():
        if type(component).__name__ == "CLIPTextModel":
            prefix = "text_model."
            state = {
                prefix + key.removeprefix(prefix): value
                for key, value in component.state_dict().items()
            }
            for file in (folder / name).glob("*.safetensors*"):
                file.unlink()
            component.save_pretrained(folder / name, state_dict=state)


@dataclass(frozen=True)
class Delta:
    """What a model changes of its base.

    Attributes:
        values: new values by component and parameter, as in ``unet.conv_in.weight``.
        words: embeddings [K, D] of new words.
        origin: where it came from, as plain data.
    """

    values: Mapping[str, torch.Tensor]
    words: Mapping[str, torch.Tensor] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipeline: Any, names: Iterable[str], **rest: Any) -> Delta:
        """The pipeline's present values of some parameters, as ``values`` names them."""
        values = {}
        for name in names:
            component, _, parameter = name.partition(".")
            values[name] = getattr(pipeline, component).get_parameter(parameter).detach()
        return cls(values, **rest)

    def save(self, folder: str | Path) -> Path:
        """Write ``model_delta.safetensors``; what it came from is in the file's metadata.

        Raises:
            MimaError: nothing changed.
        """
        tensors = {**self.values, **{_WORD + word: rows for word, rows in self.words.items()}}
        if not tensors:
            raise MimaError("delta: nothing was changed, so there is nothing to write")
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", _HEADER: json.dumps(dict(self.origin), ensure_ascii=False)}
        save_file(stored, folder / DELTA_FILE, metadata=metadata)
        return folder / DELTA_FILE


def read_delta(path: str | Path) -> Delta:
    """Read a delta.

    Args:
        path: the file, or a folder that holds ``model_delta.safetensors``.

    Raises:
        MimaError: nothing there, damaged, or no delta.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / DELTA_FILE
    if not path.is_file():
        raise MimaError(f"delta {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise MimaError(f"delta {path} is no delta that mima wrote")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            origin = json.loads(header)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise MimaError(f"delta {path} is damaged or no safetensors file: {error}") from error
    words = {
        key.removeprefix(_WORD): value for key, value in tensors.items() if key.startswith(_WORD)
    }
    values = {key: value for key, value in tensors.items() if not key.startswith(_WORD)}
    return Delta(values, words, origin)


def is_delta(path: Path) -> bool:
    """Whether a safetensors file is a delta of this package."""
    with safe_open(path, framework="pt") as file:
        return _HEADER in (file.metadata() or {})


def load_delta(pipeline: Any, path: str | Path) -> Any:
    """Apply a delta to the model that it was made for.

    Args:
        pipeline: the base model, which stays as it is.
        path: as for ``read_delta``.

    Returns:
        A pipeline of the same class; what the delta leaves alone is shared with ``pipeline``.

    Raises:
        MimaError: not a delta, or one of another model.

    Example:
        >>> immunized = mima.load_delta(DiffusionPipeline.from_pretrained("base"), "immunized")
    """
    delta = read_delta(path)
    for name, value in delta.values.items():
        component, _, parameter = name.partition(".")
        module = getattr(pipeline, component, None)
        own = dict(module.named_parameters()).get(parameter) if module is not None else None
        if own is None or own.shape != value.shape:
            found = "nothing" if own is None else f"a {list(own.shape)}"
            raise MimaError(
                f"delta {path} is not of this model: it holds {name} {list(value.shape)}, the "
                f"model has {found} there"
            )
    return with_words(with_values(pipeline, delta.values), delta.words)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says."""

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


class Released(ABC):
    """A model to be given to others, whichever way it was made."""

    pipeline: Any

    @abstractmethod
    def _facts(self) -> CardFacts: ...

    @abstractmethod
    def _delta(self) -> Delta: ...

    def _write_records(self, folder: Path) -> None:
        """Write `mima.json`, which marks a folder as mima's, and what else the run leaves."""
        origin = {"version": __version__, **self._facts().settings}
        text = json.dumps(origin, indent=2, ensure_ascii=False)
        (folder / "mima.json").write_text(text + "\n", encoding="utf-8")

    def card(
        self,
        *,
        delta: bool = False,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> ModelCard:
        """The model card, as ``huggingface_hub`` reads and writes it.

        Args:
            delta: whether it stands beside a delta rather than a whole model.
            metrics: measured values by name, for a table; further to those of the run.
            license: the hub's identifier of the licence, such as ``"openrail"``. Without one the
                card says that the base model's applies.
        """
        facts = self._facts()
        return _card(facts, {**facts.metrics, **(metrics or {})}, license, delta)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        delta: bool = False,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> None:
        """Write a diffusers folder, which opens without mima, with a model card.

        Args:
            folder: made where it does not exist; files of the same names are replaced.
            delta: write ``model_delta.safetensors``, the changed weights alone, instead.
            metrics: for the card, as for ``card``.
            license: for the card, as for ``card``.
        """
        folder = Path(folder)
        if delta:
            self._delta().save(folder)
        else:
            save_pipeline(self.pipeline, folder)
        self._write_records(folder)
        card = self.card(delta=delta, metrics=metrics, license=license)
        (folder / CARD_FILE).write_text(str(card), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload with mima",
        delta: bool = False,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> str:
        """Publish what ``save_pretrained`` writes as a model on the hub.

        The environment variable ``HF_ENDPOINT`` names another hub.

        Args:
            repo_id: ``owner/name``; made where it does not exist.
            private: whether a new one is private; None leaves it to the owner's settings.
            token: of the hub; None takes the one that ``hf auth login`` stored.
            revision: a branch; default the main one.
            create_pr: open a pull request instead of committing.
            commit_message: of the commit.
            delta: as for ``save_pretrained``.
            metrics: as for ``save_pretrained``.
            license: as for ``save_pretrained``.

        Returns:
            The commit's address.

        Raises:
            MimaError: the hub cannot be reached, or refuses; asked before anything is written.
        """
        repository = Repository(repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, delta=delta, metrics=metrics, license=license)
            return repository.upload(
                folder, revision=revision, create_pr=create_pr, commit_message=commit_message
            )


def _card(
    facts: CardFacts, metrics: Mapping[str, float], license: str | None, delta: bool
) -> ModelCard:
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
    origin = f"[{_text(base)}](https://huggingface.co/{base}{tree})" if hub else _text(base)
    parts = [
        f"# {facts.title}",
        facts.method,
        f"Made from {origin}" + (f" at revision {_text(at)}." if at else "."),
        _usage(facts.base_model, facts.opened_with, delta),
    ]
    if facts.concepts:
        rows = [f"| {_text(name)} | {_text(prompt)} |" for name, prompt in facts.concepts]
        parts += ["## Concepts", "\n".join(["| concept | prompt |", "|---|---|", *rows])]
    if metrics:
        rows = [f"| {_text(name)} | {value:.4g} |" for name, value in metrics.items()]
        parts += ["## Measurements", "\n".join(["| | |", "|---|---|", *rows])]
    parts += ["## How it was made", _fenced(_yaml(facts.settings), "yaml")]
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    seed = "" if facts.seed is None else f"Seed {facts.seed}; "
    parts += [f"{seed}{versions}.", "## Licence"]
    own = f"Published under `{license}`. " if license else ""
    parts.append(
        f"{own}The weights derive from {origin}, whose licence and terms of use bind whoever "
        "publishes or uses them."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _usage(base: str | None, opened_with: Mapping[str, str], delta: bool) -> str:
    opener, opened = "from diffusers import DiffusionPipeline", "DiffusionPipeline.from_pretrained"
    if not delta:
        lines = [opener, "", f'pipeline = {opened}("this folder or repository")']
        return _fenced("\n".join(lines), "python")
    options = [f"{name}={json.dumps(value)}" for name, value in opened_with.items()]
    where = ", ".join([json.dumps(base or "the base model"), *options])
    if base == "embedded":
        # which diffusers cannot find
        opener, opened, where = "from mima import load_embedded", "load_embedded", ""
    lines = [
        *(opener, "from safetensors.torch import load_file", ""),
        f"pipeline = {opened}({where})",
        f'for name, value in load_file("{DELTA_FILE}").items():',
        '    component, parameter = name.split(".", 1)',
        f'    if component == "{_WORD[:-1]}":',
        "        pipeline.load_textual_inversion({parameter: value})",
        "    else:",
        "        getattr(pipeline, component).get_parameter(parameter).data.copy_(value)",
    ]
    return (
        f"`{DELTA_FILE}` holds the weights that differ from the base model, and nothing else. "
        "`mima.load_delta` and `mima apply` put them in place; so does\n\n"
        + _fenced("\n".join(lines), "python")
    )


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).strip()


def _fenced(text: str, language: str) -> str:
    # a fence longer than any in the text
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _text(value: str) -> str:
    """A user's words as Markdown that shows them as they are, on one line."""
    flat = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", flat)
