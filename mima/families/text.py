"""What a prompt becomes: conditions of the denoiser, and inputs of its weights that read text."""

# B = batch, S = tokens, D = width of what the text projections read

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mima.errors import MimaError, one_line
from mima.families.pipelines import Pipeline, readers
from mima.options import TrainingOptions

Conditioning = dict[str, torch.Tensor]
"""What a denoiser reads beside noisy latents: tensors by name, one row for each of them."""


@dataclass(frozen=True)
class TextReader:
    """Weights that read text and nothing else, so that an edit of them can be exact.

    Attributes:
        names: of [o, D] weights, relative to the denoiser.
        embed: what they all read for B prompts, [B, S, D].
        tokenizers: which tokens stand at the S places: tokenizers with the places that each has,
            in order. The last may have None, the rest. Places after them hold no tokens.
        columns: D, where the weights have further columns, which read something else.
    """

    names: Sequence[str]
    embed: Callable[[Sequence[str]], torch.Tensor]
    tokenizers: Sequence[tuple[Any, int | None]]
    columns: int | None = None


class ReadsText(ABC):
    """A model family's half that encodes prompts and names the weights that read them.

    Attributes:
        pipeline: the wrapped pipeline.
        denoiser: its network that text reaches.
    """

    text_weights: ClassVar[str] = r"\.attn2\.to_[kv]\.weight$"
    """Matches the names of the denoiser's weights that read text embeddings."""
    reads_text_alone: ClassVar[bool] = True
    """Whether what the text projections read is ``read_text`` of the text encoders' output."""
    pipeline: Pipeline
    denoiser: torch.nn.Module

    @property
    @abstractmethod
    def denoiser_name(self) -> str: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def training(self) -> TrainingOptions: ...

    def encode_prompts(
        self, prompts: Sequence[str], *, differentiable: bool = False
    ) -> Conditioning:
        """Encode prompts as the pipeline does when it samples.

        Args:
            prompts: B texts; longer ones than the model reads are cut, with a warning.
            differentiable: keep the graph into the text encoders, for adapters that train them.

        Returns:
            Batch-first tensors that ``predict`` takes, in the denoiser's dtype.
        """
        with torch.set_grad_enabled(differentiable):
            encoded = self._encode(list(prompts))
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in encoded.items()
        }

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning: ...

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return what the text projections read for ``prompts``: [B, S, D], padding included."""
        return self.read_text(self.encode_prompts(prompts))

    def read_text(self, conditioning: Conditioning) -> torch.Tensor:
        """What the text projections read of encoded prompts, where they read nothing else.

        Args:
            conditioning: what ``encode_prompts`` returned, B rows; with its graph, if it has one.

        Returns:
            [B, S, D], padding included.
        """
        return conditioning["encoder_hidden_states"]

    @abstractmethod
    def token_mask(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, S]: True where ``text_embeddings`` holds a token of the prompt or its end token."""

    def token_text(self, prompt: str) -> str:
        """The text that the tokenizers read for a prompt."""
        return prompt

    def token_ids(self, tokenizer: Any, prompt: str, length: int) -> list[int]:
        """The tokens at the first of ``length`` places of a text stream, without padding."""
        text = self._as_tokens(tokenizer, [self.token_text(prompt)])[0]
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    def reads(self, prompt: str, word: str) -> bool:
        """Whether a text encoder reads a word of a prompt: of long ones it reads the beginning."""
        before = prompt.partition(word)[0].rstrip()
        for reader in readers(self.pipeline):
            tokenizer = reader.tokenizer
            length = tokenizer.model_max_length if reader.is_clip else self._tokens_read
            # where the prompt is cut before the word, what leads to it is all that is read
            if self.token_ids(tokenizer, prompt, length) != self.token_ids(
                tokenizer, before, length
            ):
                return True
        return False

    @torch.no_grad()
    def token_embeddings(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Return what the text projections read for the real tokens of a prompt, or of several.

        Returns:
            [S, D], one prompt's after the other's; end tokens are kept, start tokens and padding
            are not.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        mask = self.token_mask(several)
        return self.text_embeddings(several)[mask.to(self.device)]

    @property
    def _stream_tokenizer(self) -> Any:
        """The tokenizer of the longest text stream; None where that has no tokens."""
        return self.pipeline.tokenizer

    @property
    def _tokens_read(self) -> int:
        """Places of the longest text stream in training."""
        return self._max_tokens(self.training.max_sequence_length)

    def _max_tokens(self, wanted: int | None) -> int:
        """As many of the wanted tokens as the tokenizer gives."""
        assert wanted is not None
        tokenizer = self._stream_tokenizer
        return wanted if tokenizer is None else min(wanted, int(tokenizer.model_max_length))

    def _mask(self, tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
        """[B, length]: the tokens of each prompt and its end token."""
        batch = tokenizer(
            self._as_tokens(tokenizer, prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask: torch.Tensor = batch.attention_mask.bool()
        if tokenizer.bos_token_id is not None:
            mask[:, 0] &= batch.input_ids[:, 0] != tokenizer.bos_token_id
        return mask

    def _as_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[str]:
        """Texts in which learned words of several vectors are spelt out as several tokens."""
        if not hasattr(self.pipeline, "maybe_convert_prompt"):
            return list(texts)
        spelt: list[str] = self.pipeline.maybe_convert_prompt(list(texts), tokenizer)
        return spelt

    def text_projections(self) -> list[str]:
        """Names, relative to the denoiser, of the [o, D] weights that read text embeddings.

        Raises:
            MimaError: none, because adapters are loaded, whose weights go by other names.
        """
        names = [
            name
            for name, _ in self.denoiser.named_parameters()
            if re.search(self.text_weights, name)
        ]
        if not names:
            raise MimaError(
                f"model: the {self.denoiser_name} has no weights named {self.text_weights}; if "
                "adapters are loaded, fuse_lora() and unload_lora_weights() first"
            )
        return names

    def text_readers(self) -> list[TextReader]:
        """Everything through which text reaches the denoiser."""
        tokenizers = [(self.pipeline.tokenizer, None)]
        return [TextReader(self.text_projections(), self.text_embeddings, tokenizers)]

    def _pooled_reader(self, name: str, pooled: str, columns: int | None = None) -> TextReader:
        """Of a weight that embeds the pooled text, a condition of that name."""
        return TextReader(
            [name], lambda prompts: self.encode_prompts(prompts)[pooled].unsqueeze(1), [], columns
        )

    def _check_text(self) -> None:
        """Refuse tokenizers, text encoders and a denoiser of different models."""
        for reader in readers(self.pipeline):
            tokens, rows = len(reader.tokenizer), len(reader.rows)
            if tokens > rows:
                raise MimaError(
                    f"model: tokenizer{reader.number} has {tokens} tokens and "
                    f"text_encoder{reader.number} knows {rows}: they are of different models"
                )
        for what, read, made in self._text_widths():
            if read != made:
                raise MimaError(
                    f"model: the {self.denoiser_name} reads {what} of width {one_line(read)} and "
                    f"the text encoders make {made}: they are of different models"
                )

    @abstractmethod
    def _text_widths(self) -> list[tuple[str, Any, int]]:
        """Kinds of text, each with the width that the denoiser reads and the one it is given."""
