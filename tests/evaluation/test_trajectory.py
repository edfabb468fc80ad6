"""Attacks on one model and what it draws on the way, and two of them compared."""

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny

from mima.adaptation import DreamBooth, LoRA
from mima.adapters.adapter import Adapter
from mima.adapters.merge import apply
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation import Sampler, attack, compare
from mima.evaluation.trajectory import score, trajectory
from mima.sampling import Job

SAMPLER = Sampler(steps=3, batch_size=3)
COMMON = Sampler(steps=3, batch_size=5, guidance=3.0)
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


def test_one_batch_of_many_adapters_draws_what_each_adapter_draws(pipeline):
    run_ = LoRA(learning_rate=1e-2, rank=3, alpha=6.0).start(pipeline, tiny.concept())
    adapters, expected = [], []
    for _ in run_.until(2, 6):
        adapters.append(Adapter.of(run_.pipeline).copied())
        expected.append(COMMON(run_.pipeline, ["a cat"], (0, 1))[0])
    expected.append(COMMON(pipeline, ["a cat"], (0, 1))[0])
    jobs = [Job("a cat", seed, adapter) for seed in (0, 1) for adapter in (1, -1, 0)]
    drawn = list(COMMON.draw(pipeline, jobs, adapters))
    for job, image in zip(jobs, drawn, strict=True):
        # rounding to 8 bits may fall either way
        assert difference(image, expected[job.adapter][job.seed]) <= 1
    assert difference(drawn[0], drawn[1]) > 1
    assert difference(drawn[0], drawn[2]) > 1
    with pytest.raises(ValueError, match="names none of 2 adapters"):
        list(COMMON.draw(pipeline, [Job("a cat", 0, 2)], adapters))


def test_merged_adds_the_mean_update(pipeline):
    adapters = []
    for seed in (0, 1):
        run_ = LoRA(learning_rate=1e-2, seed=seed).start(pipeline, tiny.concept())
        run_.advance(2)
        adapters.append(Adapter.of(run_.pipeline))
    before = pipeline.unet.state_dict()
    after = apply(pipeline, adapters).unet.state_dict()
    for name, value in before.items():
        expected = value
        if adapters[0].changes(f"unet.{name}"):
            factors = [adapter.factors[f"unet.{name}"] for adapter in adapters]
            expected = value + sum(f.scale * f.B @ f.A for f in factors) / 2
        torch.testing.assert_close(after[name], expected)


def test_trajectory_is_the_same_with_and_without_common_batches(pipeline, monkeypatch):
    jobs = [Job("a cat", seed) for seed in (0, 1)]
    arguments = (pipeline, tiny.concept(), LoRA(learning_rate=1e-2), (0, 2, 5), jobs, COMMON)
    seen = []
    mixed = trajectory(*arguments, on_picture=lambda step, i, _: seen.append((step, i)))
    module = sys.modules["mima.evaluation.trajectory"]
    monkeypatch.setattr(module, "can_share_batches", lambda _: False)
    plain = trajectory(*arguments)
    assert seen == [(step, i) for step in (0, 2, 5) for i in (0, 1)]
    assert mixed.steps == plain.steps == (0, 2, 5)
    assert mixed.losses == plain.losses
    for row, expected in zip(mixed.images, plain.images, strict=True):
        assert all(difference(a, b) <= 1 for a, b in zip(row, expected, strict=True))


def test_a_divergence_ends_the_trajectory_where_it_happens(pipeline):
    broken = LoRA(learning_rate=1e30, max_grad_norm=None)
    drawn = trajectory(pipeline, tiny.concept(), broken, (0, 50), [Job("a cat", 0)], COMMON)
    assert drawn.steps == (0,)
    assert len(drawn.images) == 1
    assert "the loss is" in str(drawn.diverged)


@pytest.mark.parametrize("method", [LoRA, DreamBooth])
def test_a_last_step_that_breaks_every_number_is_a_divergence(pipeline, method):
    # the last step's loss was that of the weights before it; the pictures after it are black
    broken = method(learning_rate=1e30, max_grad_norm=None)
    drawn = trajectory(pipeline, tiny.concept(), broken, (0, 1), [Job("a cat", 0)], COMMON)
    assert "after step 1 pictures are not finite numbers" in str(drawn.diverged)
    whole = trajectory(pipeline, tiny.concept(), method(), (0, 1), [Job("a cat", 0)], COMMON)
    assert whole.diverged is None
    assert whole.images[0] == drawn.images[0]
