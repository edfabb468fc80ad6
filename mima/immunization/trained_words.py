"""New words as variables of the lower level: text and tokens as functions of an embedding."""

# S = tokens, D = width of the text encoder's embeddings

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mima.concepts import Concept
from mima.families import Conditioning, Family
from mima.families.new_words import encode_with


@dataclass(frozen=True)
class Word:
    """A concept's new word, which the tokenizer knows.

    Attributes:
        name: what its embedding is called among the parameters: the word itself.
        index: its token id.
        embedding: [D] what the lower level starts from: the text encoder's own.
        prompt: the concept's prompt, whose tokens the merge's constraint is about.
        prompts: the distinct prompts of the concept's pictures, in the order of
            ``Encoded.prompts``.
    """

    name: str
    index: int
    embedding: torch.Tensor
    prompt: str
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, family: Family, concept: Concept) -> Word:
        """The word of a concept that has one."""
        assert concept.token is not None
        index = family.pipeline.tokenizer.convert_tokens_to_ids(concept.token)
        embeddings = family.pipeline.text_encoder.get_input_embeddings().weight
        return cls(
            concept.token,
            index,
            embeddings[index].detach().to(family.device, family.dtype),
            concept.prompt,
            tuple(dict.fromkeys(picture.prompt for picture in concept.images)),
        )

    def encode(self, family: Family, rows: Sequence[int], embedding: torch.Tensor) -> Conditioning:
        """Some of ``prompts`` as the denoiser reads them, differentiable in the embedding.

        Args:
            family: the model.
            rows: B indices into ``prompts``.
            embedding: [D].

        Returns:
            B rows of each conditioning tensor.
        """
        return encode_with(family, self.index, embedding, [self.prompts[row] for row in rows])

    def tokens(self, family: Family, embedding: torch.Tensor) -> torch.Tensor:
        """C_n [S_n, D'] of ``prompt``, as ``Family.token_embeddings`` gives it, differentiable."""
        hidden_SD = family.read_text(encode_with(family, self.index, embedding, [self.prompt]))[0]
        return hidden_SD[family.token_mask([self.prompt])[0].to(hidden_SD.device)]
