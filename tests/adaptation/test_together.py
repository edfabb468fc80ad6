"""Several LoRA at once are the same LoRA one by one."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from support import tiny

from mima.adaptation import DreamBooth, DreamBoothLoRA, LoRA, Together
from mima.errors import MimaError

FAST = LoRA(learning_rate=1e-2, batch_size=2)


def concepts():
    return [tiny.concept("red", "round"), tiny.concept("blue", "square"), tiny.concept("green")]


def adapters(run):
    state = run.pipeline.unet.state_dict()
    return {name: value for name, value in state.items() if "lora" in name}


def assert_same_training(settings, pipeline, steps=4):
    starts = [one.start for one in settings]
    alone, shared = (
        [start(pipeline, concept) for start, concept in zip(starts, concepts(), strict=False)]
        for _ in range(2)
    )
    untrained = [{n: v.clone() for n, v in adapters(run).items()} for run in alone]
    for run in alone:
        run.advance(steps)
    Together(shared).advance(steps)
    for one, other, start in zip(alone, shared, untrained, strict=True):
        assert one.step == other.step == steps
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
        got, wanted = adapters(other), adapters(one)
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            moved = (value - start[name]).norm()
            assert moved > 0
            # Adam turns a gradient's rounding at zero into a step of its own
            assert (got[name] - value).norm() < 1e-2 * moved
    return alone, shared


def test_same_result_as_one_by_one(pipeline, folder, tmp_path):
    settings = [dataclasses.replace(FAST, seed=seed) for seed in range(3)]
    alone, shared = assert_same_training(settings, pipeline)
    # each is saved by itself, for diffusers
    generator = torch.Generator
    options = {"num_inference_steps": 3, "output_type": "pt"}
    pictures = []
    for run in shared:
        fresh = StableDiffusionPipeline.from_pretrained(folder)
        fresh.load_lora_weights(
            run.save(tmp_path / run.concept.name), weight_name=LORA_WEIGHT_NAME_SAFE
        )
        drawn = [
            model("a red emoji", generator=generator().manual_seed(0), **options).images
            for model in (fresh, run.pipeline)
        ]
        assert torch.equal(*drawn)
        pictures.append(drawn[0])
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    assert alone[0].losses != alone[1].losses


def test_settings_may_differ_from_run_to_run(pipeline):
    attention = ("attn2.to_k", "attn2.to_v")
    assert_same_training(
        [
            dataclasses.replace(FAST, rank=2, alpha=6.0, gradient_accumulation_steps=2),
            dataclasses.replace(
                FAST, target_modules=attention, batch_size=1, gradient_accumulation_steps=2
            ),
            DreamBoothLoRA(
                learning_rate=3e-3,
                prior_weight=0.5,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
            ),
        ],
        pipeline,
        steps=2,
    )


def test_half_precision_model(folder):
    half = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.bfloat16)
    runs = [FAST.start(half, concept) for concept in concepts()]
    alone = FAST.start(half, concepts()[0])
    Together(runs).advance(3)
    alone.advance(3)
    assert runs[0].losses == pytest.approx(alone.losses, rel=2e-2)
    assert {value.dtype for value in adapters(runs[0]).values()} == {torch.float32}


def test_the_given_pipeline_and_one_by_one_training_are_not_disturbed(pipeline):
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    runs = [FAST.start(pipeline, concept) for concept in concepts()[:2]]
    seen = []
    Together(runs).advance(2, on_step=lambda together: seen.append(together.runs[0].step))
    runs[0].advance(1)
    assert seen == [1, 2]
    assert [run.step for run in runs] == [3, 2]
    now = pipeline.unet.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_what_cannot_be_trained_together(pipeline, folder):
    concept = tiny.concept()
    run = FAST.start(pipeline, concept)
    other = StableDiffusionPipeline.from_pretrained(folder)
    cases = [
        (DreamBooth().start(pipeline, concept), "method dreambooth trains one concept at a time"),
        (dataclasses.replace(FAST, dropout=0.1).start(pipeline, concept), "dropout: several"),
        (dataclasses.replace(FAST, dora=True).start(pipeline, concept), "dora: several"),
        (FAST.start(other, concept), "the same model"),
        (
            dataclasses.replace(FAST, gradient_accumulation_steps=2).start(pipeline, concept),
            "gradient_accumulation_steps must be the same",
        ),
        (
            dataclasses.replace(FAST, target_modules=("conv1",)).start(pipeline, concept),
            "is a Conv2d",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(MimaError, match=message):
            Together([run, bad])
    for runs in ([], [run, run]):
        with pytest.raises(ValueError, match="each of them once"):
            Together(runs)
