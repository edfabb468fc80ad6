"""New words: added to tokenizer and text encoder, one embedding trained."""

# V = vocabulary, D = text embedding

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Conditioning, Family
from mima.families.pipelines import with_modules
from mima.storage.names import WORD_FILE


@dataclass(frozen=True, kw_only=True)
class Word:
    """A new word that a pipeline's tokenizer knows, and the embedding that stands for it.

    Attributes:
        text: the word.
        index: its token id.
        embedding: [D]; a parameter where it is trained in place.
    """

    text: str
    index: int
    embedding: torch.Tensor

    def encode(
        self, family: Family, prompts: Sequence[str], embedding: torch.Tensor | None = None
    ) -> Conditioning:
        """Encode prompts with a graph to the word's embedding.

        Args:
            family: a pipeline with one text encoder, whose tokenizer knows the word.
            prompts: B texts.
            embedding: [D] in place of the word's own.
        """
        row = self.embedding if embedding is None else embedding

        def use_row(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
            here = (inputs[0] == self.index).unsqueeze(-1)
            return torch.where(here, row.to(output.dtype), output)

        embeddings = family.pipeline.text_encoder.get_input_embeddings()
        hook = embeddings.register_forward_hook(use_row)
        try:
            return family.encode_prompts(prompts, differentiable=True)
        finally:
            hook.remove()

    @torch.no_grad()
    def commit(self, text_encoder: Any) -> None:
        """Write the embedding into a text encoder."""
        text_encoder.get_input_embeddings().weight[self.index] = self.embedding

    def save(self, folder: Path) -> None:
        """Write the embedding for diffusers' `load_textual_inversion`."""
        save_file({self.text: self.embedding.detach().cpu().contiguous()}, folder / WORD_FILE)


def with_words(pipeline: Any, words: Mapping[str, torch.Tensor]) -> Any:
    """The pipeline with new words in copies of its tokenizer and its text encoder.

    Args:
        pipeline: a diffusers pipeline with one text encoder, left as it was.
        words: embeddings [K, D]; with K > 1 a word counts as K tokens, as diffusers has it.

    Raises:
        MimaError: the vocabulary holds a word already.
    """
    if not words:
        return pipeline
    for word in words:
        if word in pipeline.tokenizer.get_vocab():
            raise MimaError(f"the word {word!r} is in the model's vocabulary already")
    adapted = with_modules(
        pipeline,
        tokenizer=copy.deepcopy(pipeline.tokenizer),
        text_encoder=copy.deepcopy(pipeline.text_encoder),
    )
    # the new rows are drawn before they are set
    with torch.random.fork_rng(devices=[]):
        adapted.load_textual_inversion([{word: rows} for word, rows in words.items()])
    return adapted


def add_word(pipeline: Any, concept: Concept) -> tuple[Any, Word]:
    """Add a concept's new word to copies of a pipeline's tokenizer and text encoder.

    Its embedding starts from that of `concept.initializer`, or, without one, from the mean of all
    embeddings.

    Returns:
        The pipeline with the copies, nothing of whose text encoder is trained, and the word, whose
        embedding is a parameter in float32; `commit` it after it has changed.

    Raises:
        MimaError: as for `check_token`.
    """
    token, initial = check_token(pipeline, concept)
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    text_encoder = copy.deepcopy(pipeline.text_encoder)
    tokenizer.add_tokens([token])
    index = tokenizer.convert_tokens_to_ids(token)
    old_VD = text_encoder.get_input_embeddings().weight.detach()
    start_D = (old_VD.float().mean(dim=0) if initial is None else old_VD[initial].float()).clone()
    if index >= len(old_VD):
        # without mean_resizing, which draws from the global random state: commit sets the row
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.requires_grad_(False)
    word = Word(text=token, index=index, embedding=torch.nn.Parameter(start_D))
    word.commit(text_encoder)
    return with_modules(pipeline, tokenizer=tokenizer, text_encoder=text_encoder), word


def check_token(pipeline: Any, concept: Concept) -> tuple[str, int | None]:
    """Whether a concept's new word can be added to a pipeline.

    Returns:
        The word, and the token that its embedding starts from; None for the mean of all.

    Raises:
        MimaError: no token, one that the vocabulary holds already, an initializer that is not
            one word of the vocabulary, or a pipeline with several text encoders.
    """
    token = concept.token
    if token is None:
        raise MimaError(
            f"concept {concept.name!r} has no token; name a new word, such as <new1>, that its "
            "prompts contain"
        )
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise MimaError(
            f"model: new tokens need a pipeline with one text encoder, {type(pipeline).__name__} "
            "has several"
        )
    tokenizer = pipeline.tokenizer
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False)
    # a word's own entry may be spelt otherwise, such as "cat</w>"
    if token in tokenizer.get_vocab() or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
        raise MimaError(
            f"concept {concept.name!r}: token {token!r} is in the model's vocabulary already"
        )
    if concept.initializer is None:
        return token, None
    ids = tokenizer.encode(concept.initializer, add_special_tokens=False)
    if len(ids) != 1:
        raise MimaError(
            f"concept {concept.name!r}: initializer {concept.initializer!r} must be one token "
            f"of the vocabulary, it is {len(ids)}"
        )
    return token, ids[0]
