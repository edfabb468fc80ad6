"""Results as ordinary models: folders, deltas, cards."""

from __future__ import annotations

import itertools
import re
import sys
from typing import get_args

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import builders, tiny
from support.immunizing import assert_same, concepts, settings

import mima
from mima._version import installed_versions
from mima.adaptation import TextualInversion
from mima.choices import MergeRule, Method
from mima.errors import MimaError
from mima.families import ModelSource, load_pipeline
from mima.families.pipelines import readers
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.release.delta import Delta, load_delta, read_delta
from mima.release.repository import apply_delta
from mima.storage.names import DELTA_FILE

WORD = "<new1>"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def result(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    return immunize(base, concepts(), settings(folder, steps=1, seed=5))


@pytest.fixture(scope="module")
def whole(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result.save_pretrained(folder, metrics={"MSGR": 0.25}, license="openrail")
    return folder


@pytest.fixture(scope="module")
def delta(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("delta")
    result.save_pretrained(folder, delta=True)
    return folder


def test_a_result_opens_without_mima(result, whole, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mima"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        __import__("mima.release.delta")
    opened = DiffusionPipeline.from_pretrained(whole, local_files_only=True)
    for part in ("unet", "text_encoder", "vae"):
        written = getattr(opened, part).state_dict()
        assert_same(written, getattr(result.pipeline, part).state_dict())


def test_text_encoders_are_written_under_names_that_every_transformers_reads(whole):
    """transformers 4 wants the prefix, and draws random weights where it is missing."""
    names = load_file(whole / "text_encoder" / "model.safetensors")
    assert names
    assert all(name.startswith("text_model.") for name in names)


def test_a_delta_holds_what_changed_and_nothing_else(base, result, delta):
    stored = load_file(delta / DELTA_FILE)
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    after = result.pipeline.unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert set(stored) == {f"unet.{name}" for name in changed}
    assert_same(stored, {f"unet.{name}": after[name] for name in changed})
    assert all(path.is_file() for path in delta.iterdir())
    origin = read_delta(delta).origin
    assert (origin["model"], origin["concepts"]) == (str(base), ["cat", "dog"])


def test_a_delta_makes_the_model_again(base, result, delta):
    pipeline = DiffusionPipeline.from_pretrained(base)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    again = load_delta(pipeline, delta)
    assert_same(again.unet.state_dict(), result.pipeline.unet.state_dict())
    assert_same(pipeline.unet.state_dict(), before)


def snippet(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def test_the_lines_on_a_deltas_card_work(result, delta, monkeypatch):
    monkeypatch.chdir(delta)
    namespace = {}
    exec(snippet(delta), namespace)
    assert_same(namespace["pipeline"].unet.state_dict(), result.pipeline.unet.state_dict())


def test_the_lines_on_a_delta_of_the_embedded_model_work(result, tmp_path, monkeypatch):
    pipeline = mima.load_embedded()
    pipeline.unet.conv_in.bias.data += 1
    changes = {"pipeline": pipeline, "model": "embedded", "changed": ["unet.conv_in.bias"]}
    type(result)(**{**vars(result), **changes}).save_pretrained(tmp_path, delta=True)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(snippet(tmp_path), namespace)
    assert_same(namespace["pipeline"].unet.state_dict(), pipeline.unet.state_dict())


def test_the_lines_on_a_card_with_new_words_work(base, tmp_path, monkeypatch):
    rows = torch.arange(64.0).view(2, 32)
    save_file({WORD: rows}, tmp_path / "word.safetensors")
    merged = mima.merge_adapters(base, [tmp_path / "word.safetensors"], method="weighted")
    merged.save_pretrained(tmp_path / "delta", delta=True)
    monkeypatch.chdir(tmp_path / "delta")
    namespace = {}
    exec(snippet(tmp_path / "delta"), namespace)
    for pipeline in (
        namespace["pipeline"],
        load_delta(DiffusionPipeline.from_pretrained(base), tmp_path / "delta"),
    ):
        tokens = pipeline.tokenizer.convert_tokens_to_ids([WORD, f"{WORD}_1"])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[tokens], rows)


def test_the_card_says_how_it_was_made(base, result, whole, delta):
    card = ModelCard.load(whole / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.license == "openrail"
    assert set(card.data.tags) == {"mima", "model-immunization"}
    (config,) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    assert yaml.safe_load(config) == result.config.read()
    for said in (
        *("| cat | a cat in red |", "| dog | a dog in red |", "| MSGR | 0.25 |", "Seed 5;"),
        *(f"{name} {version}" for name, version in installed_versions().items()),
        "| outer steps | 1 |",
    ):
        assert said in card.text
    # a folder is not a repository of the hub
    assert card.data.base_model is None
    assert "huggingface.co" not in card.text
    assert "delta" in ModelCard.load(delta / "README.md").data.tags


def cards(result):
    """A card for every combination of what a card speaks of, with what was combined."""
    for method, merge, erase_first, erased, new_words, number in itertools.product(
        get_args(Method),
        get_args(MergeRule),
        (False, True),
        (None, "esd.pt"),
        (False, True),
        (1, 2),
    ):
        if (erased and erase_first) or (method == "imma" and number == 2):
            continue
        if method == "alternating" and merge != "projected":
            continue
        if merge == "sum" and method != "mima":
            continue
        if merge == "average" and method in ("none", "imma", "joint"):
            continue
        settings = {"method": method, "merge": merge, "erase_first": erase_first}
        config = ImmunizeConfig(new_words=new_words, hypergradient="first_order", **settings)
        names = {"concepts": result.concepts[:number], "prompts": result.prompts[:number]}
        changed = {"config": config, "erased": erased, **names}
        yield type(result)(**{**vars(result), **changed}).card().text, config, erased, number


def test_a_card_is_true_of_every_combination(result):
    seen = set()
    for text, config, erased, number in cards(result):
        story, _, rest = text.partition("Made from")
        (block,) = re.findall(r"```yaml\n(.*?)```", rest, flags=re.DOTALL)
        settings = yaml.safe_load(block)
        method, immunized = config.method, config.method != "none"
        merged = method in ("mima", "compose", "alternating")
        assert ("# Immunized model" in story) == ("meant to fail" in story) == immunized
        assert ("Nothing was immunized" in story) == (not immunized)
        assert ("erased by a closed-form edit" in story) == config.erase_first
        assert ("Begun with the erased checkpoint esd.pt" in story) == (erased is not None)
        assert ("new words" in story) == (config.new_words and immunized)
        # a merge is spoken of where there was one, by the rule that it had
        assert ("keys and values by the text" in story) == (merged and config.merge == "projected")
        assert ("the mean of all weights" in story) == (merged and config.merge == "average")
        assert ("by the sum of what" in story) == (merged and config.merge == "sum")
        assert ("merge" in settings) == (method in ("mima", "compose", "alternating"))
        assert ("lam" in settings) == (
            method in ("mima", "compose") and config.merge == "projected"
        )
        assert ("differentiable merging" in story) == (method == "mima")
        assert ("MIMA" in story) == (method in ("mima", "alternating"))
        assert ("authors published" in story) == (method == "alternating")
        assert ("(IMMA)" in story) == (method == "imma")
        assert ("against each concept alone" in story) == (method == "compose")
        assert ("without a merge" in story) == (method == "joint" and number == 2)
        assert ("hypergradient" in settings) == (immunized and method != "alternating")
        assert ("lower" in settings) == ("upper" in settings) == immunized
        if immunized:
            assert ("optimizer" in settings["lower"]) == (method != "alternating")
            assert "rank" not in settings["lower"]
        counted = ("2 concepts at once", "one concept")[number == 1]
        if method in ("mima", "joint", "alternating"):
            assert f"Immunized against {counted}" in story
        assert settings["seed"] == config.seed
        assert ("the concept below" in story) == (immunized and number == 1)
        assert ("the concepts below" in story) == (immunized and number == 2)
        assert text.count("| a cat in red |") == 1
        seen.add(story)
    # every combination is told apart, but for settings that change nothing
    assert len(seen) > 60


def test_a_base_model_of_the_hub_is_linked_and_odd_names_stay_text(result):
    result = type(result)(**{**vars(result), "model": "owner/a_model", "concepts": ["*|x", "<b>"]})
    card = result.card()
    assert card.data.base_model == "owner/a_model"
    assert "](https://huggingface.co/owner/a_model)" in card.text
    assert r"| \*\|x | a cat in red |" in card.text
    assert "| &lt;b&gt; | a dog in red |" in card.text


def test_the_card_says_how_the_base_model_was_opened(result):
    opened = {"revision": "v/1", "variant": "fp16"}
    result = type(result)(**{**vars(result), "model": "owner/name", "opened_with": opened})
    text = str(result.card(delta=True))
    assert "Made from [owner/name](https://huggingface.co/owner/name/tree/v%2F1) at " in text
    assert 'from_pretrained("owner/name", revision="v/1", variant="fp16")' in text


def test_the_card_of_a_single_file_opens_it_as_one(result):
    result = type(result)(**{**vars(result), "model": "/models/sd15.safetensors"})
    assert 'load_pipeline("/models/sd15.safetensors")' in str(result.card(delta=True))
    opened = ModelSource("/models/sd15.safetensors", config="/models/sd15").options
    result = type(result)(**{**vars(result), "opened_with": opened})
    assert 'sd15.safetensors", config="/models/sd15")' in str(result.card(delta=True))


def test_the_lines_on_a_card_with_new_words_of_several_encoders_work(tmp_path, monkeypatch):
    base = builders.save(builders.sdxl, tmp_path / "xl")
    images = [picture.image for picture in tiny.concept().images]
    concept = mima.Concept("thing", "a <new1> emoji", images, token="<new1>")
    run = TextualInversion(learning_rate=1e-2, steps=1).start(load_pipeline(base), concept)
    run.advance(1)
    run.save(tmp_path / "word")
    merged = mima.merge_adapters(base, [tmp_path / "word"], method="weighted")
    merged.save_pretrained(tmp_path / "delta", delta=True)
    monkeypatch.chdir(tmp_path / "delta")
    namespace = {}
    exec(snippet(tmp_path / "delta"), namespace)
    for ours, theirs in zip(readers(namespace["pipeline"]), readers(merged.pipeline), strict=True):
        assert torch.equal(ours.rows, theirs.rows)


def test_a_delta_of_nothing_is_refused(tmp_path):
    with pytest.raises(MimaError, match="nothing was changed"):
        Delta({}).save(tmp_path)


def foreign(path):
    save_file({"unet.conv_in.weight": torch.zeros(1)}, path / DELTA_FILE)


BAD = {
    "absent": (lambda path: None, "does not exist"),
    "damaged": (lambda path: (path / DELTA_FILE).write_bytes(b"x" * 40), "is damaged"),
    "foreign": (foreign, "is no delta that mima wrote"),
    "other-shape": (
        lambda path: Delta({"unet.conv_in.weight": torch.zeros(2)}).save(path),
        r"it holds unet.conv_in.weight \[2\], the model has a \[16, 4, 3, 3\]",
    ),
    "other-width": (
        lambda path: Delta({}, {"<new1>": torch.zeros(1, 7)}).save(path),
        r"its word '<new1>' is \[1, 7\], the model's words are of 32",
    ),
    "not-finite": (
        lambda path: Delta({"unet.conv_in.bias": torch.full((16,), torch.nan)}).save(path),
        "unet.conv_in.bias holds numbers that are not finite",
    ),
    "other-part": (
        lambda path: Delta(
            {"transformer.x.weight": torch.zeros(2)}, origin={"model": "owner/name"}
        ).save(path),
        "the model has nothing there; it was made from 'owner/name'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_delta_that_does_not_fit(base, tmp_path, case):
    make, message = BAD[case]
    make(tmp_path)
    with pytest.raises(MimaError, match=message):
        load_delta(DiffusionPipeline.from_pretrained(base), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_a_delta_of_few_bits_is_applied(base, tmp_path, dtype):
    bias, rows = torch.full((16,), 0.3).to(dtype), torch.full((1, 32), 0.7).to(dtype)
    Delta({"unet.conv_in.bias": bias}, {WORD: rows}).save(tmp_path)
    applied = load_delta(DiffusionPipeline.from_pretrained(base), tmp_path)
    assert torch.equal(applied.unet.conv_in.bias, bias.float())
    token = applied.tokenizer.convert_tokens_to_ids(WORD)
    assert torch.equal(applied.text_encoder.get_input_embeddings().weight[token], rows[0].float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize(("name", "shape"), [("unet.conv_in.bias", (16,)), (WORD, (1, 32))])
def test_a_delta_of_no_floating_point_is_refused(base, tmp_path, dtype, name, shape):
    value = {name: torch.ones(shape).to(dtype)}
    Delta(*(({}, value) if name == WORD else (value,))).save(tmp_path)
    with pytest.raises(MimaError, match=rf"{name} is of {dtype}, expected numbers of floating"):
        load_delta(DiffusionPipeline.from_pretrained(base), tmp_path)


def test_a_deltas_origin_is_in_the_files_metadata(delta):
    with safe_open(delta / DELTA_FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_delta_of_a_text_encoder_fits_whichever_transformers_wrote_it(base, tmp_path, prefix):
    pipeline = load_pipeline(base)
    own = next(iter(dict(pipeline.text_encoder.named_parameters())))
    name = f"text_encoder.{prefix}{own.removeprefix('text_model.')}"
    value = torch.full_like(pipeline.text_encoder.get_parameter(own), 0.5)
    Delta({name: value}, {}, {"model": str(base)}).save(tmp_path)
    applied = apply_delta(base, tmp_path)
    assert torch.equal(applied.pipeline.text_encoder.get_parameter(own), value)
    # lines by hand would hold one of the two names
    assert "load_delta" in str(applied.card(delta=True))
