"""Textual Inversion: one new word is learned, the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mima.adaptation.base import Adaptation, Injection, require_full_precision
from mima.concepts import Concept
from mima.families import family_of
from mima.families.new_words import add_word, check_token
from mima.families.pipelines import Pipeline, shared_copy, with_modules


@dataclass(frozen=True, kw_only=True)
class TextualInversion(Adaptation):
    """Learn the embedding of `concept.token`, a new word that the concept's prompts contain.

    After Gal et al., arXiv 2208.01618. Only the new row is trained; the embedding starts from the
    word `concept.initializer`. `Run.save` writes a file for diffusers' `load_textual_inversion`.
    The published command's `--scale_lr` multiplies the rate by the pictures of a step; nothing does
    so here: set `learning_rate` to 2e-3 with `batch_size` 4 for it.
    """

    method: ClassVar[str] = "textual-inversion"

    steps: int = 2000
    learning_rate: float = 5e-4

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse half precision, too, and words that cannot be added."""
        super().check(pipeline, concept)
        require_full_precision(pipeline, self.method)
        check_token(pipeline, concept)

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Add the word to copies of tokenizer and text encoder."""
        worded, word = add_word(pipeline, concept)
        family = family_of(pipeline)
        # a copy of the frozen denoiser, so that training leaves the caller's flags and modes alone
        modules = {family.denoiser_name: shared_copy(family.denoiser)}
        return Injection(
            pipeline=with_modules(worded, **modules),
            parameters=[word.embedding],
            save=lambda folder: word.save(folder, worded),
            encode_prompts=word.encode,
            after_step=lambda: word.commit(worded),
        )
