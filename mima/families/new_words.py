"""New words: added to all tokenizers and text encoders of a pipeline, their embeddings trained."""

# V = vocabulary, D = text embeddings, those of several encoders one after the other

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Conditioning, Family, family_of
from mima.families.frozen import Upcast, at_least_float32
from mima.families.pipelines import Pipeline, Reader, readers, with_modules
from mima.storage.names import WORD_FILE

TOKEN = "token"
"""Under which a file of a word for several encoders says the word, in its header."""


def text_parts(pipeline: Pipeline) -> dict[str, Any]:
    """Tokenizers and text encoders by component name: what new words change."""
    return {
        f"{part}{reader.number}": getattr(reader, attribute)
        for reader in readers(pipeline)
        for part, attribute in (("tokenizer", "tokenizer"), ("text_encoder", "encoder"))
    }


def _with_own_text(pipeline: Pipeline) -> Pipeline:
    """The pipeline with copies of its tokenizers and text encoders, whose rows can be written."""
    copies = {name: copy.deepcopy(part) for name, part in text_parts(pipeline).items()}
    adapted = with_modules(pipeline, **copies)
    for reader in readers(adapted):
        if isinstance(held := reader.rows, Upcast):
            rows = torch.nn.Parameter(at_least_float32(held), requires_grad=False)
            for module in _holders(reader.encoder, torch.nn.Module):
                module.weight = rows
    return adapted


def _holders(encoder: Any, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    """An encoder's modules around its tokens' rows: T5 has two that read them."""
    rows = encoder.get_input_embeddings().weight
    return [
        module
        for module in encoder.modules()
        if isinstance(module, kind) and getattr(module, "weight", None) is rows
    ]


@dataclass(frozen=True, kw_only=True)
class Word:
    """A new word that a pipeline's tokenizers know, and the embeddings that stand for it.

    Attributes:
        text: the word.
        indices: its token id in each tokenizer.
        embedding: [D], for each encoder one after the other; a parameter where it is trained in
            place.
    """

    text: str
    indices: tuple[int, ...]
    embedding: torch.Tensor

    def encode(
        self, family: Family, prompts: Sequence[str], embedding: torch.Tensor | None = None
    ) -> Conditioning:
        """Encode prompts with a graph to the word's embedding.

        Args:
            family: a pipeline whose tokenizers know the word.
            prompts: B texts.
            embedding: [D] in place of the word's own.
        """
        row = self.embedding if embedding is None else embedding
        with ExitStack() as hooks:
            for reader, index, part in self._parts(family.pipeline, row):
                hooks.enter_context(_reading(reader.encoder, index, part))
            return family.encode_prompts(prompts, differentiable=True)

    def _parts(
        self, pipeline: Pipeline, embedding: torch.Tensor
    ) -> Iterator[tuple[Reader, int, torch.Tensor]]:
        """Each encoder, with the word's token id and its part of an embedding."""
        several = readers(pipeline)
        parts = embedding.split([reader.rows.shape[1] for reader in several])
        yield from zip(several, self.indices, parts, strict=True)

    @torch.no_grad()
    def commit(self, pipeline: Pipeline) -> None:
        """Write the embedding into a pipeline's text encoders."""
        for reader, index, part in self._parts(pipeline, self.embedding):
            reader.rows[index] = part

    def save(self, folder: Path, pipeline: Pipeline) -> None:
        """Write the embedding, of one encoder for diffusers' `load_textual_inversion`.

        Of several encoders, a tensor for each by the encoder's name; the header says the word.
        """
        embedding = self.embedding.detach().cpu()
        parts = [*self._parts(pipeline, embedding)]
        if len(parts) == 1:
            save_file({self.text: embedding.contiguous()}, folder / WORD_FILE)
            return
        state = {reader.name: part.unsqueeze(0).contiguous() for reader, _, part in parts}
        save_file(state, folder / WORD_FILE, {TOKEN: self.text})


@contextmanager
def _reading(encoder: Any, index: int, row: torch.Tensor) -> Iterator[None]:
    """Let an encoder read a row [D] for one token."""

    def use_row(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
        here = (inputs[0] == index).unsqueeze(-1)
        return torch.where(here, row.to(output), output)

    with ExitStack() as hooks:
        for module in _holders(encoder, torch.nn.Embedding):
            hooks.callback(module.register_forward_hook(use_row).remove)
        yield


def with_words(pipeline: Pipeline, words: Mapping[str, torch.Tensor]) -> Any:
    """The pipeline with new words in copies of its tokenizers and its text encoders.

    Args:
        pipeline: a diffusers pipeline, left as it was.
        words: embeddings [K, D]; with K > 1 a word counts as K tokens, as diffusers has it, which
            is possible with one CLIP text encoder.

    Raises:
        MimaError: a word is blank or in a vocabulary already, or has several vectors where they
            cannot be.
    """
    if not words:
        return pipeline
    several = readers(pipeline)
    for word in words:
        if not word.strip():
            raise MimaError(f"the word {word!r} is blank; a new word needs a name")
        if any(_is_known(reader.tokenizer, word) for reader in several):
            raise MimaError(f"the word {word!r} is in the model's vocabulary already")
    adapted = _with_own_text(pipeline)
    if len(several) == 1 and hasattr(adapted, "load_textual_inversion"):
        # transformers draws the new rows at random before diffusers sets them
        with torch.random.fork_rng(devices=[]):
            adapted.load_textual_inversion([{word: rows} for word, rows in words.items()])
        return adapted
    for word, rows in words.items():
        if len(rows) != 1:
            raise MimaError(
                f"the word {word!r} has {len(rows)} vectors; for {type(pipeline).__name__} one is "
                "supported"
            )
        _add(adapted, word, rows[0])
    return adapted


def _add(pipeline: Pipeline, word: str, embedding: torch.Tensor) -> Word:
    """Add a word with an embedding [D] to a pipeline's own tokenizers and text encoders."""
    indices = []
    for reader in readers(pipeline):
        reader.tokenizer.add_tokens([word])
        index: int = reader.tokenizer.convert_tokens_to_ids(word)
        if index >= len(reader.rows):
            # without mean_resizing, which draws from the global random state: commit sets the row
            reader.encoder.resize_token_embeddings(len(reader.tokenizer), mean_resizing=False)
        indices.append(index)
    added = Word(text=word, indices=tuple(indices), embedding=embedding)
    added.commit(pipeline)
    return added


def add_word(pipeline: Pipeline, concept: Concept) -> tuple[Any, Word]:
    """Add a concept's new word to copies of a pipeline's tokenizers and text encoders.

    Its embedding starts from that of `concept.initializer`, or, without one, from the mean of all
    embeddings.

    Returns:
        The pipeline with the copies, nothing of whose text encoders is trained, and the word, whose
        embedding is a parameter in float32; `commit` it after it has changed.

    Raises:
        MimaError: as for `check_token`.
    """
    token, initial = check_token(pipeline, concept)
    own = _with_own_text(pipeline)
    starts = []
    for reader, ids in zip(readers(own), initial, strict=True):
        rows_VD = reader.rows.detach().float()
        starts.append((rows_VD if ids is None else rows_VD[ids]).mean(dim=0))
        reader.encoder.requires_grad_(False)
    word = _add(own, token, torch.nn.Parameter(torch.cat(starts)))
    for reader in readers(own):
        # resizing makes new rows, which want gradients
        reader.encoder.requires_grad_(False)
    return own, word


def check_token(pipeline: Pipeline, concept: Concept) -> tuple[str, list[list[int] | None]]:
    """Whether a concept's new word can be added to a pipeline.

    Returns:
        The word, and for each encoder the tokens whose mean its embedding starts from; None for all
        of the vocabulary.

    Raises:
        MimaError: no token, one that a vocabulary holds already or that prompts never show the
            model, or an initializer that is not one word of the first vocabulary.
    """
    token = concept.token
    if token is None:
        raise MimaError(
            f"concept {concept.name!r} has no token; name a new word, such as <new1>, that its "
            "prompts contain"
        )
    family = family_of(pipeline)
    read = family.token_text(token)
    if token not in read:
        raise MimaError(
            f"concept {concept.name!r}: a {type(pipeline).__name__} reads token {token!r} as "
            f"{read!r}, so that it would never be learned; name it so, in the prompts, too"
        )
    if not any(family.reads(picture.prompt, token) for picture in concept.images):
        raise MimaError(
            f"concept {concept.name!r}: token {token!r} stands so late in the pictures' captions "
            f"that a {type(pipeline).__name__} never reads it; put it first"
        )
    initial: list[list[int] | None] = []
    for reader in readers(pipeline):
        tokenizer = reader.tokenizer
        if _is_known(tokenizer, token):
            raise MimaError(
                f"concept {concept.name!r}: token {token!r} is in the model's vocabulary already"
            )
        if concept.initializer is None:
            initial.append(None)
            continue
        ids: list[int] = tokenizer.encode(concept.initializer, add_special_tokens=False)
        if len(ids) != 1 and not initial:
            raise MimaError(
                f"concept {concept.name!r}: initializer {concept.initializer!r} must be one token "
                f"of the vocabulary, it is {len(ids)}"
            )
        initial.append(ids)
    return token, initial


def _is_known(tokenizer: Any, word: str) -> bool:
    """Whether a word is a token of a vocabulary, whose entry may be spelt as "cat</w>"."""
    ids: list[int] = tokenizer.encode(word, add_special_tokens=False)
    return word in tokenizer.get_vocab() or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id)
