import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL
from support import tiny

from mima.concepts import Concept
from mima.erasure import Edit, edits_of, erase, uce
from mima.erasure.uce import align, edit_groups
from mima.errors import MimaError
from mima.families import family_of
from mima.families.new_words import with_words

pytestmark = pytest.mark.usefixtures("float64")

COLOURS = ("green", "blue", "yellow")
OTHERS = ("square", "cat", "dog", "bird", "fish", "castle", "house", "tree")
CAPTIONS = [f"a {colour} {other} emoji" for colour in COLOURS for other in OTHERS]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    # float64, so that the closed form can be checked to rounding
    return tiny.tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer")).to(dtype=torch.float64)


@pytest.fixture(scope="module")
def concept():
    return dataclasses.replace(tiny.concept(), name="red")


def text(pipeline, prompts):
    return family_of(pipeline).encode_prompts(prompts)["encoder_hidden_states"]


def projections(pipeline):
    family = family_of(pipeline)
    return {name: family.denoiser.get_parameter(name) for name in family.text_projections()}


def change(erased, pipeline, prompts):
    """Largest relative change, over weights, of what prompts are read as."""
    hidden = text(pipeline, prompts).flatten(0, 1)
    return max(
        ((hidden @ (new - old).mT).norm() / (hidden @ old.mT).norm()).item()
        for new, old in zip(
            projections(erased).values(), projections(pipeline).values(), strict=True
        )
    )


# the end of a prompt continues into its padding
@pytest.mark.parametrize(
    ("source", "target", "places"),
    [
        ([0, 5, 6, 1], [0, 5, 6, 1], [0, 1, 2, 3, 4, 5]),
        ([0, 5, 6, 1], [0, 5, 7, 1], [0, 1, 2, 3, 4, 5]),
        ([0, 5, 6, 7, 1], [0, 5, 7, 1], [0, 1, 2, 2, 3, 4]),
        ([0, 5, 6, 7, 1], [0, 1], [0, 1, 1, 1, 1, 2]),
        ([0, 5, 1], [0, 6, 7, 8, 1], [0, 3, 4, 5, 5, 5]),
        ([0, 5, 5, 1], [0, 5, 1], [0, 1, 2, 2, 3, 4]),
    ],
    ids=["same", "replaced", "removed", "all-removed", "longer", "repeated"],
)
def test_tokens_are_aligned_with_their_counterparts(source, target, places):
    assert align(source, target, 6).tolist() == places


@pytest.mark.parametrize(
    ("name", "prompt", "target", "expected"),
    [
        ("cat", "a cat emoji in mono style", "", "a emoji in mono style"),
        ("cat", "a cat emoji in mono style", "dog", "a dog emoji in mono style"),
        ("mono style", "a cat emoji in mono style", "", "a cat emoji"),
        ("mono-style", "a mono style cat", "", "a cat"),
        ("mono style", "a cat emoji in mono style", "noto style", "a cat emoji in noto style"),
        ("Van Gogh", "a house by van gogh, in red", "", "a house, in red"),
        ("cat", "a photo of a cat", "", "a photo"),
        ("cat", "two cats, and a dog,", "", "two, and a dog,"),
        ("猫", "赤い猫の写真", "犬", "赤い犬の写真"),
        ("cat", "a Cat and a cat", "dog", "a dog and a dog"),
        ("a.b", "the a.b thing", r"\1", r"the \1 thing"),
    ],
)
def test_name_is_replaced_in_prompts(name, prompt, target, expected):
    concept = dataclasses.replace(tiny.concept(), name=name, prompt=prompt, held_out=())
    edits = edits_of(concept, target=target)
    assert edits == [Edit(prompt, expected)]


def test_captions_that_name_the_concept_are_edited_too(concept):
    edits = edits_of(concept, ["a red cat", "a reddish cat", "a blue cat"])
    assert edits == [Edit("a red round emoji", "a round emoji"), Edit("a red cat", "a cat")]


def test_accents_may_stand_apart():
    """As macOS writes them; tokenizers read both alike."""
    apart = "a photo of Beyonce\u0301"
    assert edits_of("Beyonc\u00e9", [apart])[1:] == [Edit(apart, "a photo")]


@pytest.mark.parametrize(
    ("target", "left"), [("", "a cat"), ("big cat", "a big cat big cat cat in big cat")]
)
def test_a_caption_that_names_several_concepts_loses_all_their_names(target, left):
    caption = "a red round cat in blue style"
    learnt = Concept("red", caption, tiny.picture("red", "round"))
    # one name begins as another does
    groups = edit_groups("erase", [learnt, "round", "blue", "Blue Style"], [caption], target)
    assert [group[-1] for group in groups] == 4 * [Edit(caption, left)]


def test_a_name_alone_is_its_own_prompt(pipeline):
    assert edits_of("Red Cat", ["a red cat", "a cat"], "dog") == [
        Edit("Red Cat", "dog"),
        Edit("a red cat", "a dog"),
    ]
    by_name = erase(pipeline, ["red cat"], preserve=["a red cat", "a blue cat"])
    by_edits = erase(
        pipeline, [[Edit("red cat", ""), Edit("a red cat", "")]], preserve=["a blue cat"]
    )
    for a, b in zip(by_name.unet.parameters(), by_edits.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unnamed_concept_is_refused(concept):
    with pytest.raises(
        MimaError, match=r"'purple': none of its prompts contains its name .* name it as"
    ):
        edits_of(dataclasses.replace(concept, name="purple"), ["a purple cat"])


def test_weights_are_stationary_for_the_stated_objective(pipeline, concept):
    groups = [edits_of(concept), [Edit("a blue cat", "a dog"), Edit("a blue bird", "a bird")]]
    scales = {"erase_scale": 0.7, "preserve_scale": 0.3, "ridge": 0.02}
    erased = erase(pipeline, [concept, groups[1]], preserve=CAPTIONS[-8:], **scales)

    sources, targets = [], []
    for group in groups:
        source = text(pipeline, [edit.source for edit in group])
        target = text(pipeline, [edit.target for edit in group])
        for edit, x, t in zip(group, source, target, strict=True):
            ids = [pipeline.tokenizer(p).input_ids for p in (edit.source, edit.target)]
            sources.append((x, len(group)))
            targets.append(t[align(*ids, tiny.MAX_TOKENS)])
    kept = text(pipeline, CAPTIONS[-8:]).flatten(0, 1)

    def objective(new, old, ridge):
        fit = sum(
            ((x @ new.mT - t @ old.mT) ** 2).sum() / (tiny.MAX_TOKENS * count)
            for (x, count), t in zip(sources, targets, strict=True)
        )
        keep = ((kept @ (new - old).mT) ** 2).sum() / len(kept)
        return 0.7 * fit + 0.3 * keep + ridge * ((new - old) ** 2).sum()

    gram = 0.7 * sum(x.mT @ x / (tiny.MAX_TOKENS * count) for x, count in sources)
    gram = gram + 0.3 * kept.mT @ kept / len(kept)
    ridge = 0.02 * gram.diagonal().mean()
    for name, new in projections(erased).items():
        old = projections(pipeline)[name].detach()
        new = new.detach().requires_grad_()
        start = old.clone().requires_grad_()
        (at_solution,) = torch.autograd.grad(objective(new, old, ridge), new)
        (at_start,) = torch.autograd.grad(objective(start, old, ridge), start)
        assert at_solution.norm() < 1e-9 * at_start.norm()


def test_without_competition_erased_prompts_read_as_their_targets(pipeline, concept):
    erased = erase(pipeline, [concept], ridge=1e-12)
    edit = edits_of(concept)[0]
    source, target = text(pipeline, [edit.source, edit.target])
    ids = [pipeline.tokenizer(p).input_ids for p in (edit.source, edit.target)]
    wanted = target[align(*ids, tiny.MAX_TOKENS)]
    for name, new in projections(erased).items():
        old = projections(pipeline)[name]
        torch.testing.assert_close(source @ new.mT, wanted @ old.mT, rtol=1e-6, atol=1e-6)


def test_tokens_of_cut_captions_are_read_as_their_counterparts(pipeline):
    """As a caption moves up by its concept's name, the tokenizer reads a word more of it."""
    source = "a red cat in the house on a green tree of blue fish in a round castle"
    target = source.replace("red ", "")
    assert len(pipeline.tokenizer(target).input_ids) > tiny.MAX_TOKENS
    erased = erase(pipeline, [[Edit(source, target)]], ridge=1e-12)
    hidden, wanted = text(pipeline, [source, target])
    # up to the end token, which stands where the caption is cut
    places = [0, 1, 2, *range(2, tiny.MAX_TOKENS - 2), tiny.MAX_TOKENS - 1]
    for name, new in projections(erased).items():
        old = projections(pipeline)[name]
        torch.testing.assert_close(hidden @ new.mT, wanted[places] @ old.mT, rtol=1e-6, atol=1e-6)


def test_preserved_prompts_move_far_less_than_erased_ones(pipeline, concept):
    erased = erase(pipeline, [concept], preserve=CAPTIONS, preserve_scale=10.0)
    moved = change(erased, pipeline, ["a red round emoji"])
    assert moved > 0.1
    assert change(erased, pipeline, CAPTIONS) < 0.25 * moved
    # preserving is what does it
    assert change(erase(pipeline, [concept]), pipeline, CAPTIONS) > moved


def test_concepts_are_erased_together(pipeline, concept):
    second = dataclasses.replace(tiny.concept("blue", "square"), name="blue")
    both = erase(pipeline, [concept, second], ridge=1e-12)
    for part in (concept, second):
        one = erase(pipeline, [part], ridge=1e-12)
        hidden = text(pipeline, [part.prompt])[0]
        for name, weight in projections(both).items():
            expected = hidden @ projections(one)[name].mT
            torch.testing.assert_close(hidden @ weight.mT, expected, rtol=1e-4, atol=1e-4)


def test_preserved_caption_that_names_the_concept_is_edited_instead(pipeline, concept):
    erased = erase(pipeline, [concept], preserve=[*CAPTIONS, "a red cat"])
    without = erase(pipeline, [concept], preserve=CAPTIONS)
    edits = [*edits_of(concept), Edit("a red cat", "a cat")]
    expected = projections(erase(pipeline, [edits], preserve=CAPTIONS))
    for name, weight in projections(erased).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)
        assert (weight - projections(without)[name]).norm() > 1e-2 * weight.norm()


def test_tensor_target_is_orthogonal_to_the_old_value(pipeline, concept):
    erased = erase(pipeline, [concept], technique="tensor", ridge=1e-12)
    hidden = text(pipeline, [concept.prompt])[0]
    # start token and "a" come before the erased word and keep their values
    for name, new in projections(erased).items():
        old = projections(pipeline)[name]
        cosine = torch.cosine_similarity(hidden @ new.mT, hidden @ old.mT, dim=-1)
        torch.testing.assert_close(cosine[:2], torch.ones(2).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(cosine[2:], torch.zeros(14).double(), atol=1e-5, rtol=0)


def test_result_shares_no_denoiser_weight_and_input_is_untouched(pipeline, concept):
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    erased = erase(pipeline, [concept], preserve=CAPTIONS)
    old, new = pipeline.unet.state_dict(), erased.unet.state_dict()
    edited = set(projections(pipeline))
    for name, value in before.items():
        assert torch.equal(old[name], value)
        assert old[name].data_ptr() != new[name].data_ptr()
        assert torch.equal(new[name], value) == (name not in edited)
    assert isinstance(erased.vae, AutoencoderKL)
    assert erased.text_encoder is pipeline.text_encoder
    assert erased.scheduler is not pipeline.scheduler


def test_erased_pipeline_saves_and_samples(pipeline, concept, tmp_path):
    erased = erase(pipeline, [concept], preserve=CAPTIONS)
    erased.save_pretrained(tmp_path)
    opened = type(pipeline).from_pretrained(tmp_path, torch_dtype=torch.float64)
    draws = [
        model(
            concept.prompt,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for model in (erased, opened, pipeline)
    ]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=1e-6)
    assert (draws[0] - draws[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"erase_scale": -1.0}, "erase_scale must be above 0"),
        ({"preserve_scale": -1.0}, "preserve_scale must be"),
        ({"technique": "melt"}, "technique must be replace or tensor, got 'melt'"),
    ],
)
def test_bad_setting_is_named(pipeline, concept, keywords, message):
    with pytest.raises(ValueError, match=message):
        erase(pipeline, [concept], **keywords)


@pytest.mark.parametrize("concepts", [[], [[]]], ids=["none", "no-edits"])
def test_nothing_to_erase_is_refused(pipeline, concepts):
    with pytest.raises(ValueError, match="is empty"):
        erase(pipeline, concepts)


@pytest.mark.parametrize("concepts", ["cat", tiny.concept()], ids=["name", "concept"])
def test_one_concept_is_no_list(pipeline, concepts):
    with pytest.raises(TypeError, match="must be a list"):
        erase(pipeline, concepts)


def test_an_empty_name_is_refused(pipeline):
    with pytest.raises(MimaError, match="name is empty"):
        erase(pipeline, [" "])


def test_learned_words_of_several_vectors_are_as_many_tokens(pipeline):
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    family = family_of(with_words(pipeline, {"<thing>": torch.randn(3, width)}))
    tokenizer, prompt = family.pipeline.tokenizer, "a <thing> emoji"
    ids = family.token_ids(tokenizer, prompt, tokenizer.model_max_length)
    # the mask leaves the start token out
    assert len(ids) == 1 + int(family.token_mask([prompt]).sum()) == 7


def test_captions_are_summed_up_a_few_at_a_time(pipeline, concept, monkeypatch):
    preserved = [f"a {colour} dog" for colour in ("red", "blue", "green")]
    at_once = erase(pipeline, [concept], preserve=preserved).unet.state_dict()
    monkeypatch.setattr(uce, "ENCODING_BATCH", 1)
    monkeypatch.setattr(uce, "EMBEDDED_AT_ONCE", 1)
    parts = erase(pipeline, [concept], preserve=preserved).unet.state_dict()
    assert all(torch.allclose(parts[name], at_once[name], atol=1e-6) for name in at_once)
