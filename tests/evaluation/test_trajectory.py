import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from mima.adaptation import LoRA
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation import Sampler, attack, compare
from mima.evaluation.trajectory import score

SAMPLER = Sampler(steps=3, batch_size=3)
FAST = LoRA(learning_rate=1e-2, batch_size=4)


class MeanColour:
    """Normalised mean colour: a similarity that can be worked out by hand."""

    name = "mean-colour"

    def embed(self, images):
        means = [np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(means)), dim=-1)


def plain(pipeline, prompt, seed, **keywords):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=3, generator=generator, **keywords).images[0]


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.mark.parametrize("guidance", [None, 3.0, 1.0])
def test_batched_samples_are_those_of_a_plain_loop(pipeline, guidance):
    prompts, seeds = ["a cat", "a red round emoji"], (0, 5)
    rows = dataclasses.replace(SAMPLER, guidance=guidance)(pipeline, prompts, seeds)
    for row, prompt in zip(rows, prompts, strict=True):
        for image, seed in zip(row, seeds, strict=True):
            told = {} if guidance is None else {"guidance_scale": guidance}
            expected = plain(pipeline, prompt, seed, **told)
            # rounding to 8 bits may fall either way
            assert difference(image, expected) <= 1
    assert difference(rows[0][0], rows[1][0]) > 1
    assert difference(rows[0][0], rows[0][1]) > 1


def test_sampling_leaves_the_pipeline_as_it_was(pipeline, monkeypatch):
    scheduler, before = pipeline.scheduler, dict(pipeline.scheduler.__dict__)
    monkeypatch.setattr(
        pipeline, "_progress_bar_config", {"disable": False, "desc": "mine"}, raising=False
    )
    sampler = dataclasses.replace(SAMPLER, scheduler="dpm++", negative_prompt="a dog")
    images = sampler(pipeline, ["a cat"], (0,))
    assert difference(images[0][0], SAMPLER(pipeline, ["a cat"], (0,))[0][0]) > 1
    assert pipeline.scheduler is scheduler
    assert pipeline.scheduler.__dict__ == before
    assert pipeline._progress_bar_config == {"disable": False, "desc": "mine"}


def test_sampler_can_draw_other_sizes(pipeline):
    image = dataclasses.replace(SAMPLER, size=16)(pipeline, ["a cat"], (0,))[0][0]
    assert image.size == (16, 16)
    assert difference(image, plain(pipeline, "a cat", 0, height=16, width=16)) <= 1


def test_sampler_refuses_bad_input(pipeline):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Sampler(steps=0)
    with pytest.raises(ValueError, match=r"own or dpm\+\+, got 'euler'"):
        Sampler(scheduler="euler")
    with pytest.raises(ValueError, match="needs prompts and seeds, got 1 and 0"):
        SAMPLER(pipeline, ["a cat"], ())


def test_score_compares_with_references_of_the_same_row():
    def flat(*colour):
        return Image.new("RGB", (4, 4), colour)

    encoder = MeanColour()
    rows = [[flat(255, 0, 0), flat(0, 255, 0)], [flat(0, 0, 255), flat(255, 255, 0)]]
    references = [
        encoder.embed([flat(255, 0, 0), flat(0, 255, 0)]),
        encoder.embed([flat(0, 0, 255)]),
    ]
    np.testing.assert_allclose(score(rows, references, encoder), [[0.5, 0.5], [1, 0]], atol=1e-6)


def test_attack_learns_and_reports_what_it_drew(pipeline):
    concept = tiny.concept()
    calls = []
    curve = attack(
        pipeline,
        concept,
        FAST,
        encoder=MeanColour(),
        steps=(0, 2, 6),
        seeds=(0, 1),
        sampler=SAMPLER,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert curve.prompts == ("a red round emoji",)
    assert len(curve.losses) == 6
    # 6 steps, then two pictures at each of three evaluations
    assert calls[-1] == (12, 12)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)

    # step 0 is the model itself, and scores belong to the pictures kept
    assert difference(curve.images[0][0][1], plain(pipeline, concept.prompt, 1)) <= 1
    references = MeanColour().embed([picture.load() for picture in concept.held_out])
    for step in range(3):
        drawn = MeanColour().embed(curve.images[step][0])
        expected = (drawn @ references.T).mean(1)
        np.testing.assert_allclose(curve.scores[step, 0], expected, atol=1e-6)
    assert curve.similarity == pytest.approx(curve.scores.mean((1, 2)))
    assert curve.by_seed[2, 1] == pytest.approx(curve.scores[2, :, 1].mean())

    # the same as training and sampling by hand
    run = FAST.start(pipeline, concept)
    run.advance(6)
    assert tuple(run.losses) == curve.losses
    assert difference(plain(run.pipeline, concept.prompt, 0), curve.images[2][0][0]) <= 1


def test_references_are_grouped_by_prompt_and_thinned_evenly(pipeline):
    prompts = ["a cat", "a dog", "a bird", "a fish"]
    references = [
        Picture(tiny.picture("red", "round", seed=seed), prompt)
        for seed in range(2)
        for prompt in prompts
    ]
    curve = attack(
        pipeline,
        tiny.concept(),
        FAST,
        encoder=MeanColour(),
        steps=(1,),
        seeds=(0,),
        sampler=SAMPLER,
        references=references,
        max_prompts=2,
    )
    assert curve.prompts == ("a cat", "a bird")
    assert curve.scores.shape == (1, 2, 1)
    assert [len(group) for group in curve.references] == [2, 2]


def test_compare_gives_the_gap_of_two_attacks(pipeline):
    curve = attack(
        pipeline,
        tiny.concept(),
        FAST,
        encoder=MeanColour(),
        steps=(0, 1),
        seeds=(0,),
        sampler=SAMPLER,
    )
    weaker = dataclasses.replace(curve, scores=curve.scores * 0.75)
    assert compare(curve, weaker).sgr == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match="differ in seeds"):
        compare(curve, dataclasses.replace(curve, seeds=(1,)))


def test_attack_refuses_bad_input(pipeline):
    concept = tiny.concept()
    for keywords, message in (
        ({"steps": (2, 1)}, "steps must ascend"),
        ({"seeds": ()}, "seeds be given"),
        ({"max_prompts": 0}, "max_prompts must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(pipeline, concept, FAST, encoder=MeanColour(), **keywords)
    with pytest.raises(MimaError, match="'red round' has no held_out pictures"):
        attack(pipeline, dataclasses.replace(concept, held_out=()), FAST, encoder=MeanColour())


def test_a_model_that_is_not_finite_is_not_measured(pipeline):
    broken = copy.deepcopy(pipeline)
    broken.unet.conv_in.weight.data[0] = float("nan")
    with pytest.raises(MimaError, match="before any training the model's pictures are not of"):
        attack(
            broken, tiny.concept(), FAST, encoder=MeanColour(), steps=(0,), seeds=(0,),
            sampler=SAMPLER,
        )  # fmt: skip
