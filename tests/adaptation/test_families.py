"""Every model family, from one code: adapt, sample on the way, save and read back."""

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import PeftModel
from support import builders, tiny

from mima.adaptation import CustomDiffusion, DreamBooth, LoRA, TextualInversion
from mima.adapters.files import AdapterReader
from mima.adapters.merge import merge_adapters
from mima.concepts import Concept, Picture
from mima.erasure import Edit, erase
from mima.erasure.uce import _rows
from mima.errors import MimaError
from mima.evaluation import Sampler, attack
from mima.families import family_of, frozen
from mima.families.frozen import Upcast, hold_frozen
from mima.families.new_words import add_word
from mima.families.pipelines import readers


class Flat:
    name = "pixels"

    def embed(self, images):
        pixels = [torch.tensor(list(image.resize((4, 4)).tobytes())).float() for image in images]
        return torch.nn.functional.normalize(torch.stack(pixels), dim=-1)


@pytest.fixture(scope="module", params=builders.KINDS)
def folder(request, tmp_path_factory):
    return builders.save(
        builders.KINDS[request.param], tmp_path_factory.mktemp("families") / request.param
    )


def draw(pipeline):
    return Sampler(steps=2)(pipeline, ["a red round emoji"], (0,))[0][0]


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_attack_and_round_trip(folder, tmp_path, dora):
    pipeline = builders.opened(folder)
    concept = tiny.concept()
    settings = LoRA(learning_rate=2e-2, batch_size=2, dora=dora)
    curve = attack(
        pipeline,
        concept,
        settings,
        encoder=Flat(),
        steps=(0, 2),
        seeds=(0,),
        sampler=Sampler(steps=2),
    )
    drawn = draw(pipeline)
    # in a batch of several adapters, rounding to 8 bits may fall either way
    assert difference(curve.images[0][0][0], drawn) <= 1
    run = settings.start(pipeline, concept)
    run.advance(2)
    adapted = draw(run.pipeline)
    assert tuple(run.losses) == curve.losses
    assert difference(curve.images[1][0][0], adapted) <= 1 < difference(adapted, drawn)

    run.save(tmp_path)
    fresh = builders.opened(folder)
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
    else:
        fresh.transformer = PeftModel.from_pretrained(fresh.transformer, tmp_path).base_model.model
    assert draw(fresh) == adapted
    # and as mima reads it, which sums in another order
    merged = merge_adapters(builders.opened(folder), [tmp_path], weights=[1.0], method="weighted")
    assert difference(draw(merged.pipeline), adapted) <= 1


def test_custom_diffusion_is_read_back(folder, tmp_path):
    pipeline = builders.opened(folder)
    family, settings = family_of(pipeline), CustomDiffusion(learning_rate=1e-2, batch_size=1)
    if not hasattr(family.denoiser, "attn_processors"):
        with pytest.raises(MimaError, match="custom-diffusion needs attention processors"):
            settings.start(pipeline, tiny.concept())
        return
    run = settings.start(pipeline, tiny.concept())
    run.advance(1)
    run.save(tmp_path)
    trained = family_of(run.pipeline).denoiser
    values = AdapterReader(pipeline).read(tmp_path).values
    names = {f"{family.denoiser_name}.{name}": name for name in family.text_projections()}
    assert values.keys() == names.keys()
    for name, value in values.items():
        assert torch.equal(value, trained.get_parameter(names[name]))
        assert not torch.equal(value, family.denoiser.get_parameter(names[name]))


def test_dora_trains_a_magnitude_for_each_output(folder):
    pipeline = builders.opened(folder)
    run = LoRA(dora=True, rank=2).start(pipeline, tiny.concept())
    family = family_of(run.pipeline)
    found = {n: w for n, w in family.denoiser.named_parameters() if "magnitude" in n}
    targets = family_of(pipeline).lora_targets()
    assert len(found) == len(targets)
    assert all(weight.requires_grad for weight in found.values())
    outputs = sum(len(family_of(pipeline).denoiser.get_parameter(name)) for name in targets)
    assert sum(weight.numel() for weight in found.values()) == outputs


TEXT = "a red round emoji"


@pytest.mark.parametrize("method", [LoRA, DreamBooth])
def test_text_encoders_are_trained_where_they_are_clip(folder, method, tmp_path):
    """And diffusers and mima read from the folder what was learned."""
    pipeline = builders.opened(folder)
    clip = {reader.part: reader.encoder for reader in readers(pipeline) if reader.is_clip}
    # diffusers has no LoRA of Flux' T5, nor scripts that train one
    if not clip:
        with pytest.raises(MimaError, match="text_encoder needs a CLIP text encoder"):
            method(text_encoder=True).start(pipeline, tiny.concept())
        return
    before = {part: weights(encoder) for part, encoder in clip.items()}
    rate = 2e-2 if method is LoRA else 1e-3
    run = method(text_encoder=True, learning_rate=rate, batch_size=2).start(
        pipeline, tiny.concept()
    )
    run.advance(3)
    plain = method(learning_rate=rate, batch_size=2).start(pipeline, tiny.concept())
    plain.advance(3)
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert run.losses[2] != pytest.approx(plain.losses[2], rel=1e-4)
    text, other = (family_of(p).encode_prompts([TEXT]) for p in (run.pipeline, pipeline))
    assert any((text[name] - other[name]).abs().max() > 1e-4 for name in text)
    for part, values in before.items():
        assert getattr(run.pipeline, part) is not clip[part]
        assert all(map(torch.equal, clip[part].state_dict().values(), values.values()))
    for reader in readers(pipeline):
        if not reader.is_clip:
            assert getattr(run.pipeline, reader.part) is reader.encoder

    run.save(tmp_path)
    found = AdapterReader(pipeline).read(tmp_path)
    parts = {name.partition(".")[0] for name in (*found.factors, *found.values)}
    assert parts == {family_of(pipeline).denoiser_name, *clip}
    merged = merge_adapters(builders.opened(folder), [tmp_path], weights=[1.0], method="weighted")
    assert difference(draw(merged.pipeline), draw(run.pipeline)) <= 1
    fresh = builders.opened(folder)
    if method is LoRA:
        fresh.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
    else:
        places = {name: getattr(fresh, name) for name in parts}
        for name, module in places.items():
            setattr(fresh, name, type(module).from_pretrained(tmp_path, subfolder=name))
    read = family_of(fresh).encode_prompts([TEXT])
    for name, value in text.items():
        torch.testing.assert_close(read[name], value)
    assert draw(fresh) == draw(run.pipeline)


def test_dora_of_text_encoders_is_read_back(folder, tmp_path):
    """With the magnitudes, which transformers leaves as they began."""
    pipeline = builders.opened(folder)
    if not any(reader.is_clip for reader in readers(pipeline)):
        return
    settings = LoRA(dora=True, text_encoder=True, learning_rate=5e-2, batch_size=2)
    run = settings.start(pipeline, tiny.concept())
    run.advance(3)
    run.save(tmp_path)
    merged = merge_adapters(builders.opened(folder), [tmp_path], weights=[1.0], method="weighted")
    trained, read = (family_of(one.pipeline).encode_prompts([TEXT]) for one in (run, merged))
    for name, value in trained.items():
        torch.testing.assert_close(read[name], value, rtol=1e-4, atol=1e-5)
    assert difference(draw(merged.pipeline), draw(run.pipeline)) <= 1


def test_text_encoders_are_trained_after_all_else_is_frozen(tmp_path):
    pipeline = builders.opened(builders.save(builders.sdxl, tmp_path / "sdxl"))
    every = tuple(name for name, _ in pipeline.unet.named_parameters())
    with pytest.raises(MimaError, match="frozen: names every parameter"):
        DreamBooth(frozen=every).start(pipeline, tiny.concept())
    run = DreamBooth(frozen=every, text_encoder=True, optimizer="muon", learning_rate=1e-3)
    run = run.start(pipeline, tiny.concept())
    muon, rest = run._optimizers
    (group,), (others,) = muon.param_groups, rest.param_groups
    # tables of embeddings are no matrices
    tables = [reader.rows for reader in readers(run.pipeline)]
    assert {id(rows) for rows in tables} <= {id(p) for p in others["params"]}
    assert not {id(rows) for rows in tables} & {id(p) for p in group["params"]}
    before = weights(run.pipeline.unet)
    run.advance(2)
    assert all(map(torch.equal, run.pipeline.unet.state_dict().values(), before.values()))
    assert run.losses[1] != run.losses[0]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_locon_leaves_grouped_convolutions_out(tmp_path):
    pipeline = builders.opened(builders.save(builders.sana, tmp_path / "sana"))
    convolutions = {
        f"transformer.{name}.weight": module.groups == 1
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    assert len(set(convolutions.values())) == 2
    run = LoRA(convolutions=True, learning_rate=1e-2).start(pipeline, tiny.concept())
    run.advance(1)
    run.save(tmp_path / "lora")
    found = AdapterReader(pipeline).read(tmp_path / "lora").factors
    assert {name: name in found for name in convolutions} == convolutions


def test_erasure_edits_what_reads_text(folder):
    pipeline = builders.opened(folder)
    concept = Concept("red", "a red round emoji", tiny.concept().images)
    kept = ["a blue cat", "a green dog"]
    erased = erase(pipeline, [concept], preserve=kept, preserve_scale=100.0, ridge=1e-9)
    family = family_of(pipeline)
    before = dict(family.denoiser.named_parameters())
    after = dict(family_of(erased).denoiser.named_parameters())
    readers = family.text_readers()
    names = {name for reader in readers for name in reader.names}
    assert {name for name in before if not torch.equal(before[name], after[name])} == names

    def moved(reader, change, prompts):
        hidden = reader.embed(prompts)
        mask = family.encode_prompts(prompts).get("encoder_attention_mask")
        hidden = hidden if mask is None else hidden[mask.bool()]
        return (hidden @ change.mT).norm() / hidden.norm()

    for reader in readers:
        change = after[reader.names[0]] - before[reader.names[0]]
        if reader.columns is not None:
            # the others read the picture's sizes
            assert not change[:, reader.columns :].any()
            change = change[:, : reader.columns]
        assert moved(reader, change, [concept.prompt]) > 1.5 * moved(reader, change, kept)


@pytest.mark.parametrize("kind", ["pixart", "sana", "lumina2"])
def test_what_is_erased_at_the_end_of_a_prompt_becomes_a_token_that_is_read(kind, tmp_path):
    """Gemma writes no end token behind it."""
    family = family_of(builders.opened(builders.save(builders.KINDS[kind], tmp_path / kind)))
    (reader, *_) = family.text_readers()
    _, (*_, last_D) = _rows(family, reader, [Edit("a red cat", "a red")])
    read = family.encode_prompts(["a red"])["encoder_attention_mask"][0].nonzero().max()
    torch.testing.assert_close(last_D, reader.embed(["a red"])[0, read].double())


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_erasure_is_exact(kind, tmp_path):
    """Of text, only what is edited is read: the prompt is its target, whatever the picture."""
    pipeline = builders.opened(builders.save(builders.KINDS[kind], tmp_path / kind))
    source, target = "a red emoji", "a cat emoji"
    erased = family_of(erase(pipeline, [[Edit(source, target)]], ridge=1e-12))
    family = family_of(pipeline)
    side = family.resolution // pipeline.vae_scale_factor
    noisy = torch.randn(1, pipeline.vae.config.latent_channels, side, side)
    steps = family.sampling_timesteps(3)[1:2]
    with torch.no_grad():
        drawn, wanted, unedited = (
            which.predict(noisy, steps, family.encode_prompts([prompt]))
            for which, prompt in ((erased, source), (family, target), (family, source))
        )
    # the prompt has more tokens than the tiny encoders have dimensions: not all are met exactly
    assert (drawn - wanted).norm() < 2e-2 * (unedited - wanted).norm()


def test_new_words_are_learned_in_all_encoders(folder, tmp_path):
    pipeline = builders.opened(folder)
    images = [picture.image for picture in tiny.concept().images]
    concept = Concept("thing", "a <new1> emoji", images, token="<new1>", initializer="cat")
    run = TextualInversion(learning_rate=1e-2).start(pipeline, concept)
    start = [reader.rows.detach().clone() for reader in readers(run.pipeline)]
    run.advance(1)
    for own, reader, before in zip(readers(pipeline), readers(run.pipeline), start, strict=True):
        assert "<new1>" not in own.tokenizer.get_vocab()
        index = reader.tokenizer.convert_tokens_to_ids("<new1>")
        cat = own.tokenizer.encode("cat", add_special_tokens=False)
        torch.testing.assert_close(before[index], own.rows[cat].mean(dim=0))
        moved = (reader.rows != before).any(dim=1).nonzero().flatten().tolist()
        assert moved == [index]
        # by a step of Adam, not by decay alone
        assert (reader.rows - before)[index].abs().max() > 5e-3
    run.save(tmp_path / "word")
    read = merge_adapters(builders.opened(folder), [tmp_path / "word"], method="weighted").pipeline
    texts = [family_of(one).encode_prompts([concept.prompt]) for one in (read, run.pipeline)]
    for name, value in texts[0].items():
        torch.testing.assert_close(value, texts[1][name])
    plain = family_of(pipeline).encode_prompts(["a cat emoji"])
    assert any(not torch.allclose(plain[name], value) for name, value in texts[0].items())


def test_new_words_find_room_in_encoders_that_are_held_in_half_precision(folder, monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)
    pipeline = builders.opened(folder, dtype=torch.bfloat16)
    for reader in readers(pipeline):
        hold_frozen(reader.encoder)
    held = [reader.rows for reader in readers(pipeline)]
    assert all(isinstance(rows, Upcast) for rows in held)
    family = family_of(pipeline)
    before = family.encode_prompts(["a cat emoji"])
    images = [picture.image for picture in tiny.concept().images]
    concept = Concept("thing", "a <new1> emoji", images, token="<new1>", initializer="cat")
    own, word = add_word(pipeline, concept)
    assert all(reader.rows is rows for reader, rows in zip(readers(pipeline), held, strict=True))
    for name, value in family_of(own).encode_prompts(["a cat emoji"]).items():
        torch.testing.assert_close(value, before[name])
    encoded = word.encode(family_of(own), [concept.prompt])
    total = sum(value.float().square().sum() for value in encoded.values())
    (gradient,) = torch.autograd.grad(total, word.embedding)
    for part in gradient.split([reader.rows.shape[1] for reader in readers(own)]):
        assert part.any()


@pytest.mark.parametrize("kind", ["pixart", "sana"])
def test_a_new_word_that_prompts_do_not_keep_is_refused(kind, tmp_path):
    pipeline = builders.opened(builders.save(builders.KINDS[kind], tmp_path / kind))
    images = [picture.image for picture in tiny.concept().images]
    concept = Concept("thing", "a <New1> emoji", images, token="<New1>")
    with pytest.raises(MimaError, match="reads token '<New1>' as '<new1>'"):
        add_word(pipeline, concept)


def test_a_new_word_that_is_cut_off_is_refused(folder):
    pipeline = builders.opened(folder)
    images = [picture.image for picture in tiny.concept().images]
    text = " ".join(["a red round emoji"] * 500)
    first, last = f"<new1>, {text}", f"{text}, <new1>"

    def thing(*captions):
        pictures = tuple(map(Picture, images, captions))
        return Concept("thing", "a <new1> emoji", pictures, token="<new1>")

    # one caption that shows it is enough
    own, word = add_word(pipeline, thing(last, first))
    for caption, read in ((first, True), (last, False)):
        assert family_of(pipeline).reads(caption, "<new1>") == read
        encoded = word.encode(family_of(own), [caption])
        total = sum(value.float().square().sum() for value in encoded.values())
        (gradient,) = torch.autograd.grad(total, word.embedding)
        assert bool(gradient.any()) == read
    with pytest.raises(MimaError, match="'<new1>' stands so late in the pictures' captions that"):
        add_word(pipeline, thing(last, last))
