"""New words as variables of the lower level: text and tokens as functions of an embedding."""

# S = tokens, D = width of the text encoder's embeddings

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mima.concepts import Concept
from mima.families import Conditioning, Family
from mima.families.new_words import Word
from mima.families.pipelines import readers


@dataclass(frozen=True, kw_only=True)
class TrainedWord(Word):
    """A concept's new word; the lower level starts from the text encoder's own embedding.

    Attributes:
        prompt: the concept's prompt, whose tokens the merge's constraint is about.
        prompts: the distinct prompts of the concept's pictures, in the order of
            ``Encoded.prompts``.
    """

    prompt: str
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, family: Family, concept: Concept) -> TrainedWord:
        """The word of a concept that has one."""
        assert concept.token is not None
        several = readers(family.pipeline)
        indices = [reader.tokenizer.convert_tokens_to_ids(concept.token) for reader in several]
        rows = [reader.rows[i].detach() for reader, i in zip(several, indices, strict=True)]
        return cls(
            text=concept.token,
            indices=tuple(indices),
            embedding=torch.cat(rows).to(family.device, family.dtype),
            prompt=concept.prompt,
            prompts=tuple(dict.fromkeys(picture.prompt for picture in concept.images)),
        )

    def read(self, family: Family, rows: Sequence[int], embedding: torch.Tensor) -> Conditioning:
        """The conditioning of B ``prompts``, by their rows; differentiable in ``embedding`` [D]."""
        return self.encode(family, [self.prompts[row] for row in rows], embedding)

    def tokens(self, family: Family, embedding: torch.Tensor) -> torch.Tensor:
        """C_n [S_n, D'] of ``prompt``, as ``Family.token_embeddings`` gives it, differentiable."""
        hidden_SD = family.read_text(self.encode(family, [self.prompt], embedding))[0]
        return hidden_SD[family.token_mask([self.prompt])[0].to(hidden_SD.device)]
