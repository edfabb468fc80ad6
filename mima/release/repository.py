"""Models as folders that diffusers opens, and as repositories on the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedTokenizerFast

from mima.errors import MimaError, one_line
from mima.families import ModelSource, load_pipeline
from mima.families.hub import TRANSPORT_ERRORS, unreachable
from mima.families.pipelines import (
    Pipeline,
    names_for_all,
    networks,
    readers,
    save_network,
    tensors,
)
from mima.release.card import CARD_FILE, CardFacts, as_text, model_card
from mima.release.delta import Delta, load_delta, read_delta
from mima.storage.atomic import sha256_of
from mima.storage.inputs import expanded, resolved
from mima.storage.record import (
    RECORD_FILE,
    read_record,
    record_text,
    without_thumbnails,
    write_record,
)

# RuntimeError: the hub refused a large file
REFUSALS: tuple[type[Exception], ...] = (
    *(*TRANSPORT_ERRORS, HFValidationError, OfflineModeIsEnabled, ConnectionError, RuntimeError),
)


class Repository:
    """A model's repository on the hub, to publish to.

    Args:
        repo_id: ``owner/name``; made where it does not exist.
        private: whether a new one is private; None leaves it to the owner's settings.
        token: of the hub; None takes the one that ``hf auth login`` stored.

    Raises:
        MimaError: the hub cannot be reached, or refuses.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> None:
        self._name = repo_id
        problem = unreachable()
        if problem:
            raise MimaError(f"hub: cannot publish {repo_id!r}: {problem}")
        self._api = HfApi(token=token)
        with self._explained():
            self._name = self._api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    def upload(
        self,
        folder: str | Path,
        *,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload with mima",
    ) -> str:
        """Publish what a folder holds.

        Its record goes without the thumbnails of the pictures that an immunization saw.

        Args:
            folder: the folder.
            revision: a branch, made from the main one where it is missing; default the main one.
            create_pr: open a pull request instead of committing.
            commit_message: of the commit.

        Returns:
            The commit's address, or the pull request's.

        Raises:
            MimaError: the hub refuses.
        """
        with self._explained():
            if revision is not None and not create_pr:
                self._api.create_branch(self._name, branch=revision, exist_ok=True)
            with _published(Path(folder)) as public:
                commit = self._api.upload_folder(
                    repo_id=self._name,
                    folder_path=public,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                )
        return str(commit.pr_url or commit.commit_url)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except REFUSALS as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MimaError(f"hub: cannot publish {self._name!r}: {first}") from error


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """Links to what a folder holds, also by links, beside records without thumbnails."""
    with tempfile.TemporaryDirectory() as links:
        try:
            shutil.copytree(
                *(resolved(folder), links),
                ignore=_refuse_circles,
                copy_function=_link_or_clean,
                dirs_exist_ok=True,
            )
        except shutil.Error as error:
            place, _, why = error.args[0][0]
            raise MimaError(f"hub: cannot read {place}: {one_line(why)}") from error
        yield Path(links)


def _link_or_clean(source: str, place: str) -> None:
    path = Path(source)
    record = (read_record(path.parent) or {}) if path.name == RECORD_FILE else {}
    shown = without_thumbnails(record)
    if shown == record:
        os.symlink(source, place)
    else:
        Path(place).write_text(record_text(shown), encoding="utf-8")


def _refuse_circles(folder: str, names: Iterable[str]) -> tuple[str, ...]:
    """What ``copytree`` is to leave out: nothing, but a link to where it came from has no end."""
    passed = {resolved(place) for place in (Path(folder), *Path(folder).parents)}
    for name in names:
        if resolved(Path(folder, name)) in passed:
            raise MimaError(f"hub: {Path(folder, name)} is a link that leads in a circle")
    return ()


def save_pipeline(pipeline: Pipeline, folder: str | Path) -> None:
    """Write a diffusers folder that any transformers from 4 on reads."""
    folder = Path(folder)
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedTokenizerFast):
            # the last call's, which every call sets: the same bytes whatever was read before
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    pipeline.save_pretrained(folder)
    for part, network in networks(pipeline).items():
        state = network.state_dict()
        if names_for_all(network, state).keys() != state.keys():
            for file in (folder / part).glob("*.safetensors*"):
                file.unlink()
            save_network(network, folder / part)


def _by_hand(pipeline: Pipeline, delta: Delta) -> bool:
    """Whether a few lines with diffusers put a delta in place, whichever transformers is there."""
    several = bool(delta.words) and len(readers(pipeline)) > 1
    return not several and not any(name.startswith("text_encoder") for name in delta.values)


class Released(ABC):
    """A model to be given to others, whichever way it was made."""

    pipeline: Pipeline

    @abstractmethod
    def _facts(self) -> CardFacts: ...

    @abstractmethod
    def _delta(self) -> Delta: ...

    def _details(self) -> Mapping[str, Any]:
        """What the record says beside model and concepts."""
        return self._facts().settings

    def _write_records(self, folder: Path) -> None:
        """Write the folder's record, and what else the run leaves."""
        facts = self._facts()
        write_record(
            folder,
            facts.command,
            model=facts.base_model,
            opened_with=facts.opened_with,
            concepts=[name for name, _ in facts.concepts],
            prompts=[prompt for _, prompt in facts.concepts],
            details=self._details(),
        )

    def card(
        self,
        *,
        delta: bool = False,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
        sums: Mapping[str, str] | None = None,
    ) -> ModelCard:
        """The model card, as ``huggingface_hub`` reads and writes it.

        Args:
            delta: whether it stands beside a delta rather than a whole model.
            metrics: measured values by name, for a table; further to those of the run.
            license: the hub's identifier of the licence, such as ``"openrail"``. Without one the
                card says that the base model's applies.
            sums: SHA-256 of the files with weights, by their name in the folder.
        """
        facts = self._facts()
        measured = {**facts.metrics, **(metrics or {})}
        by_hand = not delta or _by_hand(self.pipeline, self._delta())
        return model_card(facts, measured, license, delta, sums or {}, by_hand=by_hand)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        delta: bool = False,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> None:
        """Write a diffusers folder, which opens without mima, with a model card.

        The card lists the SHA-256 of the files with weights.

        Args:
            folder: made where it does not exist; files of the same names are replaced.
            delta: write ``model_delta.safetensors``, the changed weights alone, instead.
            metrics: for the card, as for ``card``.
            license: for the card, as for ``card``.
        """
        folder = expanded(folder)
        if delta:
            self._delta().save(folder)
        else:
            save_pipeline(self.pipeline, folder)
        self._write_records(folder)
        weights = sorted(folder.rglob("*.safetensors"))
        sums = {file.relative_to(folder).as_posix(): sha256_of(file) for file in weights}
        card = self.card(delta=delta, metrics=metrics, license=license, sums=sums)
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
            The commit's address, or the pull request's.

        Raises:
            MimaError: the hub cannot be reached, or refuses; asked before anything is written.
        """
        repository = Repository(repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, delta=delta, metrics=metrics, license=license)
            return repository.upload(
                folder, revision=revision, create_pr=create_pr, commit_message=commit_message
            )


@dataclass
class AppliedDelta(Released):
    """A whole model, made of a delta and its base.

    Attributes:
        pipeline: the model.
        delta: what was put into the base.
        source: the base.
    """

    pipeline: Pipeline
    delta: Delta
    source: ModelSource

    def _facts(self) -> CardFacts:
        origin = self.delta.origin
        made = origin.get("model")
        return CardFacts(
            command="apply",
            title="Model from a delta",
            method="A delta's weights stand in the place of its base model's. The settings below "
            "are what the delta says of itself."
            + (f" It was made from {as_text(str(made))}." if made else ""),
            base_model=str(self.source.model),
            opened_with=self.source.options,
            concepts=_named(origin.get("concepts"), origin.get("prompts")),
            # `saw` lists the digests of all pictures
            settings={name: value for name, value in origin.items() if name != "saw"},
            seed=None,
            metrics={},
            tags=["delta-applied"],
        )

    def _details(self) -> Mapping[str, Any]:
        return {"origin": self.delta.origin}

    def _delta(self) -> Delta:
        return self.delta


@dataclass
class ErasedModel(Released):
    """A model that concepts were erased from.

    Attributes:
        pipeline: the model.
        base: the one that they were erased from.
        source: where that came from.
        concepts: names and prompts.
        settings: of the erasure, as plain data.
    """

    pipeline: Pipeline
    base: Pipeline
    source: ModelSource
    concepts: Sequence[tuple[str, str]]
    settings: Mapping[str, Any]

    def _facts(self) -> CardFacts:
        return CardFacts(
            command="erase",
            title="Model that concepts were erased from",
            method="The concepts below were erased with the settings below. Erasure is shallow: "
            "whoever trains the model on pictures of a concept gets it back within few steps.",
            base_model=str(self.source.model),
            opened_with=self.source.options,
            concepts=self.concepts,
            settings=self.settings,
            seed=None,
            metrics={},
            tags=["concept-erasure"],
        )

    def _delta(self) -> Delta:
        before = tensors(self.base)
        changed = [n for n, now in tensors(self.pipeline).items() if not before[n].equal(now)]
        return Delta.of(self.pipeline, changed, origin={"model": self._facts().base_model})


def apply_delta(
    model: Any,
    delta: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> AppliedDelta:
    """A delta's whole model, ready to be saved with a card: what ``mima apply`` writes.

    Args:
        model: the base: whatever ``ModelSource.model`` is, or a ``ModelSource``.
        delta: as for ``read_delta``.
        dtype: of the whole model.

    Raises:
        MimaError: not a delta, or one of another model.

    Examples:
        >>> apply_delta("base", "immunized").save_pretrained("whole")
    """
    source = model if isinstance(model, ModelSource) else ModelSource(model)
    read = read_delta(delta)
    return AppliedDelta(load_delta(load_pipeline(source, dtype=dtype), delta), read, source)


def _named(concepts: Any, prompts: Any) -> list[tuple[str, str]]:
    """Names and prompts, as far as a delta of any origin says them."""
    if not isinstance(concepts, list):
        return []
    if not isinstance(prompts, list) or len(prompts) != len(concepts):
        prompts = [""] * len(concepts)
    return [(str(name), str(prompt)) for name, prompt in zip(concepts, prompts, strict=True)]
