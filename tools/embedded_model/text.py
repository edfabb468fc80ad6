"""The tokenizer and the text towers: small CLIP models over a vocabulary made from emoji names."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from common import STYLES

MAX_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
EXTRA_WORDS = [
    "a",
    "an",
    "the",
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "icon",
    "of",
    "in",
    "with",
    "on",
    "and",
    "emoji",
    "style",
    "styled",
    "artwork",
]


def bpe_tables(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary and merges, in which each of `words` ends up as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [
        *alphabet,
        *(f"{byte}</w>" for byte in alphabet),
        *("".join(merge) for merge in merges),
    ]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


def build_tokenizer(names: list[str]) -> CLIPTokenizer:
    """A CLIPTokenizer that knows the words of `names`, the styles and ordinary caption words."""
    words = sorted({word for name in names for word in name.split()} | {*STYLES, *EXTRA_WORDS})
    vocab, merges = bpe_tables(words)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save for transformers 5, and add the two files that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def text_config(tokenizer: CLIPTokenizer, width: int, heads: int, layers: int) -> CLIPTextConfig:
    """A CLIP text tower for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode_text(tokenizer: CLIPTokenizer, captions: list[str]):
    """Token ids [B, 16], padded as Stable Diffusion pads them."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
