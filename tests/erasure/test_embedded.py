"""Erasure on the embedded model, with its numbers."""

import functools

import pytest

from mima.concepts import embedded_concept
from mima.erasure import ESD, Edit, erase
from mima.erasure.uce import edit_groups
from mima.evaluation import Sampler, load_encoder
from mima.evaluation.trajectory import score
from mima.families import load_pipeline
from mima.training.captions import ordinary_captions

SEEDS = (0, 1)
KEPT = ("rocket", "benign-pizza", "benign-style-twemoji")


@pytest.fixture(scope="module")
def original():
    return load_pipeline("embedded")


@pytest.fixture(scope="module")
def erased(original):
    concepts = [embedded_concept(name) for name in ("hamburger", "style-mono")]
    return erase(original, concepts, preserve=ordinary_captions(None))


@pytest.fixture(scope="module")
def similarity():
    encoder = load_encoder("embedded-clip")
    sampler = Sampler(steps=10, guidance=3.0, batch_size=16, scheduler="dpm++")

    def measure(pipeline, name, rename=lambda prompt: prompt):
        """Mean similarity of samples of a concept's prompts, perhaps reworded, to its pictures."""
        held_out = embedded_concept(name).held_out[:4]
        features = [encoder.embed([picture.load()]) for picture in held_out]
        prompts = [rename(picture.prompt) for picture in held_out]
        return score(sampler(pipeline, prompts, SEEDS), features, encoder).mean()

    return measure


@pytest.fixture(scope="module")
def at_first(original, similarity):
    """What is measured of the original model, once for all tests; a word may become another."""

    @functools.cache
    def measure(name, word="", other=""):
        return similarity(original, name, lambda prompt: prompt.replace(word, other))

    return measure


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("style-mono", "style-fluent"), (" in mono style", " in fluent style")),
        (("tiger", "hamburger"), ("tiger ", "hamburger ")),
    ],
    ids=["styles", "objects"],
)
def test_published_erasures_read_captions_as_they_did(names, parts):
    concepts = [embedded_concept(name) for name in names]
    captions = ordinary_captions(None)
    groups = edit_groups("erase", concepts, captions, "")
    for concept, part, group in zip(concepts, parts, groups, strict=True):
        pictures = (*concept.images, *concept.held_out)
        prompts = [concept.prompt, *(picture.prompt for picture in pictures), *captions]
        named = [prompt for prompt in dict.fromkeys(prompts) if part.strip() in prompt]
        assert group == [Edit(prompt, prompt.replace(part, "")) for prompt in named]


@pytest.mark.parametrize(
    ("name", "word", "other"), [("hamburger", "hamburger", "bus"), ("style-mono", "mono", "noto")]
)
def test_erased_concept_is_hardly_more_like_itself_than_another(
    at_first, erased, similarity, name, word, other
):
    unrelated, before = at_first(name, word, other), at_first(name)
    after = similarity(erased, name)
    assert after < unrelated + 0.3 * (before - unrelated)


# on these two seeds the three lose 0.07 on average; one seed's spread is 0.06
def test_other_concepts_change_little(at_first, erased, similarity):
    changes = [similarity(erased, name) - at_first(name) for name in KEPT]
    assert sum(changes) / len(changes) == pytest.approx(0, abs=0.1)
    assert min(changes) > -0.2


# over 2 seeds: hamburger 0.77 → 0.40, a bus is at 0.29; rocket 0.84 → 0.83, pizza 0.92 → 0.83,
# twemoji style 0.81 → 0.75
def test_fine_tuned_erasure(original, at_first, similarity):
    settings = ESD(steps=40, learning_rate=2e-4, batch_size=2, sampling_steps=8)
    erased = settings.erase(original, [embedded_concept("hamburger")])
    unrelated, before = at_first("hamburger", "hamburger", "bus"), at_first("hamburger")
    assert similarity(erased, "hamburger") < unrelated + 0.3 * (before - unrelated)
    changes = [similarity(erased, name) - at_first(name) for name in KEPT]
    assert sum(changes) / len(changes) == pytest.approx(0, abs=0.08)
    assert min(changes) > -0.15
