"""What prompts become, and what of a model reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from support.families import DDPM, FLOW, PROMPTS, of, open_family

from mima.families import Family

LANGUAGE_STARTS = {"Sana": 1, "Lumina2": 47, "QwenImage": 105}
"""The place of a prompt's first token, after what the tiny tokenizer makes of each template."""


def linear_inputs(family: Family, timestep: float) -> dict[str, torch.Tensor]:
    """What every weight matrix of the denoiser reads in one call."""
    inputs = {}
    hooks = []
    for name, layer in family.denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def record(_: Any, args: Any, name: str = name) -> None:
                inputs[f"{name}.weight"] = args[0]

            hooks.append(layer.register_forward_pre_hook(record))
    side = family.resolution // family.pipeline.vae_scale_factor
    noisy = torch.randn(2, 4, side, side)
    with torch.no_grad():
        family.predict(noisy, torch.full((2,), timestep), family.encode_prompts(PROMPTS))
    for hook in hooks:
        hook.remove()
    return inputs


@of(DDPM)
def test_text_projections_are_exactly_what_reads_text(family):
    text = family.text_embeddings(PROMPTS)
    readers = [
        name
        for name, value in linear_inputs(family, 500).items()
        if value.shape == text.shape and torch.allclose(value, text, atol=1e-6)
    ]
    assert set(family.text_projections()) == set(readers)
    assert len(readers) >= 4


@of(FLOW)
def test_the_text_streams_keys_and_values_are_the_text_projections(family):
    """The first block's read `text_embeddings`, exactly, at the middle noise level."""
    text = family.text_embeddings(PROMPTS)
    inputs = linear_inputs(family, family.num_train_timesteps / 2)
    assert family.text_projections() == [
        f"transformer_blocks.{block}.attn.add_{part}_proj.weight"
        for block in (0, 1)
        for part in "kv"
    ]
    readers = [
        name
        for name, value in inputs.items()
        if value.shape == text.shape and torch.allclose(value, text, atol=1e-6)
    ]
    assert set(readers) == {f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"}
    later = linear_inputs(family, family.num_train_timesteps)[readers[0]]
    assert (later - text).abs().max() > 1e-3  # the noise level changes what is read


def test_token_embeddings_are_the_rows_of_real_tokens(family):
    """Six words and the end; SD3 has them from CLIP and from T5, Gemma has no end."""
    rows = family.token_embeddings(PROMPTS[0])
    text = family.text_embeddings([PROMPTS[0]])[0]
    seven = list(range(1, 8)), list(range(7))  # CLIP has a start token, T5 has none
    name = type(family).__name__
    if name == "StableDiffusion3":
        has_t5 = family.pipeline.text_encoder_3 is not None
        places = seven[0] + [tiny.MAX_TOKENS + i for i in seven[1]] * has_t5
    elif name in LANGUAGE_STARTS:
        count = 7 if name == "QwenImage" else 6
        places = [LANGUAGE_STARTS[name] + i for i in range(count)]
    else:
        places = seven[1] if name in ("PixArt", "Flux") else seven[0]
    torch.testing.assert_close(rows, text[places], rtol=1e-5, atol=1e-6)


def test_prompts_longer_than_the_model_reads_are_cut(family):
    long = "cat " * 600
    length = family.text_embeddings([long]).shape[1]
    mask = family.token_mask([long])
    starts = {"PixArt": 0, "Flux": 0, **LANGUAGE_STARTS}.get(type(family).__name__, 1)
    padding = 0
    if type(family).__name__ == "StableDiffusion3" and family.pipeline.text_encoder_3 is None:
        padding = length - tiny.MAX_TOKENS  # zeros in T5's place are no tokens
    assert int(mask.sum()) == length - starts - padding
    short = family.encode_prompts(["a cat"])
    for name, value in family.encode_prompts([long]).items():
        assert value.shape == short[name].shape


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_end_is_found_by_the_mask_and_not_by_a_token(folder_of, pad):
    """A prompt may name the end token or the padding token itself."""
    family = open_family(folder_of("sd"))
    family.pipeline.tokenizer.pad_token = pad
    assert len(family.token_embeddings("a <|endoftext|> cat !")) == 5
    assert len(family.token_embeddings("")) == 1


def test_conditioning_has_one_row_per_prompt_in_the_denoisers_dtype(folder_of):
    family = open_family(folder_of("sd3"), dtype=torch.bfloat16)
    conditioning = family.encode_prompts([*PROMPTS, "a bird"])
    assert {len(value) for value in conditioning.values()} == {3}
    assert {value.dtype for value in conditioning.values()} == {torch.bfloat16}
    one = family.encode_prompts(PROMPTS[1:])
    for name, value in conditioning.items():
        torch.testing.assert_close(value[1:2], one[name], rtol=2e-2, atol=2e-2)


def test_prompts_can_be_encoded_differentiably(family):
    pipeline = family.pipeline
    encoder = pipeline.text_encoder
    weight = encoder.get_input_embeddings().weight.requires_grad_()
    assert not any(v.requires_grad for v in family.encode_prompts(PROMPTS).values())
    encoded = family.encode_prompts(PROMPTS, differentiable=True)
    total = sum(value.float().square().sum() for value in encoded.values())
    (gradient,) = torch.autograd.grad(total, [weight])
    cat, bird = (
        pipeline.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "bird")
    )
    assert gradient[cat].abs().sum() > 0
    assert gradient[bird].abs().sum() == 0
