"""New words that adapters bring, whoever wrote them."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support import tiny

import mima
import mima.adaptation
from mima.errors import MimaError

WORD = "<new1>"


@pytest.fixture(scope="module")
def customs(base, tmp_path_factory):
    """Two Custom Diffusion deltas, each with a word."""
    folders = []
    for n, word in enumerate((WORD, "<new2>")):
        images = [tiny.picture("red", "round", seed=10 * n + i) for i in range(2)]
        concept = mima.Concept(f"thing {n}", f"a {word} emoji", images, token=word)
        run = mima.adaptation.CustomDiffusion(learning_rate=1e-2, seed=n).start(base, concept)
        run.advance(2)
        folders.append(run.save(tmp_path_factory.mktemp("custom") / f"custom-{n}"))
    return folders


def test_custom_diffusion_and_its_words_are_merged_and_reopened(base, customs, tmp_path):
    prompts = [f"a {WORD} emoji", "a <new2> emoji"]
    merged = mima.merge_adapters(base, customs, prompts=prompts, lam=1e-8)
    # both prompts begin with the same "a", of which the two adapters ask different things
    assert all(0 < residual < 0.5 for residual in merged.residual)
    merged.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    rows = opened.text_encoder.get_input_embeddings().weight
    for custom, word in zip(customs, (WORD, "<new2>"), strict=True):
        learned = load_file(custom / "learned_embeds.safetensors")[word]
        index = opened.tokenizer.convert_tokens_to_ids(word)
        assert opened.tokenizer(f"a {word} emoji").input_ids.count(index) == 1
        assert torch.equal(rows[index], learned)
    assert torch.equal(rows[:-2], base.text_encoder.get_input_embeddings().weight)
    alone = mima.merge_adapters(base, customs, prompts=prompts, weights=[0, 1])
    assert WORD not in alone.pipeline.tokenizer.get_vocab()
    stored = load_file(customs[1] / "pytorch_custom_diffusion_weights.safetensors")
    unet = alone.pipeline.unet.state_dict()
    for key, value in stored.items():
        if value.numel():
            name = key.replace(".processor", "").replace("_custom_diffusion", "")
            assert torch.equal(unet[name], value)


def test_a_learned_word_of_another_program(base, tmp_path):
    row = torch.arange(64.0).view(2, 32)
    torch.save({"string_to_param": {"*": row}, "name": "<two>"}, tmp_path / "word.bin")
    merged = mima.merge_adapters(base, [tmp_path / "word.bin"], method="weighted")
    tokens = merged.pipeline.tokenizer.convert_tokens_to_ids(["<two>", "<two>_1"])
    assert torch.equal(merged.pipeline.text_encoder.get_input_embeddings().weight[tokens], row)


@pytest.mark.parametrize(
    ("word", "message"),
    [("cat", "'cat' is in the model's vocabulary already"), ("", "'' is blank"), (" ", "is blank")],
)
def test_a_word_that_prompts_have_already_is_refused(base, tmp_path, word, message):
    """CLIP's vocabulary has it as "cat</w>"."""
    save_file({word: torch.zeros(1, 32)}, tmp_path / "word.safetensors")
    with pytest.raises(MimaError, match=f"the word {message}" if word.strip() else message):
        mima.merge_adapters(base, [tmp_path / "word.safetensors"], method="weighted")


@pytest.mark.parametrize("word", ["<flora>", "explorer"])
def test_a_word_that_is_spelt_like_another_kind_of_file_is_a_word(base, tmp_path, word):
    row = torch.arange(32.0)[None]
    save_file({word: row}, tmp_path / "learned_embeds.safetensors")
    merged = mima.merge_adapters(base, [tmp_path], method="weighted")
    token = merged.pipeline.tokenizer.convert_tokens_to_ids(word)
    assert torch.equal(merged.pipeline.text_encoder.get_input_embeddings().weight[token], row[0])


def test_words_as_web_interfaces_write_them(base, tmp_path):
    rows = [torch.arange(32.0)[None] + n for n in range(2)]
    whole = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows[0]}, "name": "<web>"}
    torch.save(whole | {"step": 10, "sd_checkpoint": None}, tmp_path / "web.pt")
    save_file({"emb_params": rows[1]}, tmp_path / "styled.safetensors")
    files = [tmp_path / "web.pt", tmp_path / "styled.safetensors"]
    merged = mima.merge_adapters(base, files, method="weighted")
    tokens = merged.pipeline.tokenizer.convert_tokens_to_ids(["<web>", "styled"])
    found = merged.pipeline.text_encoder.get_input_embeddings().weight[tokens]
    assert torch.equal(found, torch.cat(rows))


def test_two_meanings_of_one_word_are_refused(base, tmp_path):
    for n in range(2):
        save_file({WORD: torch.full((32,), float(n))}, tmp_path / f"{n}.safetensors")
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    with pytest.raises(MimaError, match=f"two adapters bring the word '{WORD}'"):
        mima.merge_adapters(base, files, method="weighted")
