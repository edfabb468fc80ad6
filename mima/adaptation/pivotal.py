"""Pivotal tuning: a new word first, then a LoRA around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mima.adaptation.base import Injection, require_full_precision
from mima.adaptation.lora import LoRA
from mima.concepts import Concept
from mima.families.new_words import add_word, check_token
from mima.families.pipelines import Pipeline


@dataclass(frozen=True, kw_only=True)
class Pivotal(LoRA):
    """Learn the embedding of `concept.token`, keep it, and train a LoRA on prompts with it.

    After pivotal tuning (Roich et al., arXiv 2106.05744), as LoRA trainers have it. `Run.save`
    writes the files of both: `load_textual_inversion` and `load_lora_weights` of diffusers.
    """

    method: ClassVar[str] = "pivotal"

    word_share: float = 0.5
    """The share of `steps` that trains the word; the rest trains the LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.word_share < 1:
            raise ValueError(f"Pivotal: word_share must lie in (0, 1), got {self.word_share}")
        if self.text_encoder:
            raise ValueError("Pivotal: text_encoder is not adapted; the word is trained instead")

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse half precision, too, and words that cannot be added."""
        super().check(pipeline, concept)
        require_full_precision(pipeline, self.method)
        check_token(pipeline, concept)

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Add the word to copies of tokenizer and text encoder, and a LoRA to the denoiser."""
        with_word, word = add_word(pipeline, concept)
        lora = super().inject(with_word, concept)
        word_steps = round(self.word_share * self.steps)

        def leave_the_other(done: int) -> None:
            for parameter in lora.parameters if done < word_steps else [word.embedding]:
                parameter.grad = None

        def save(folder: Path) -> None:
            lora.save(folder)
            word.save(folder, with_word)

        return Injection(
            pipeline=lora.pipeline,
            parameters=[word.embedding, *lora.parameters],
            save=save,
            encode_prompts=word.encode,
            before_step=leave_the_other,
            after_step=lambda: word.commit(with_word),
        )
