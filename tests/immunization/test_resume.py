"""No run is lost: killed, interrupted, out of disk, not finite."""

import json
import logging
import math
import os
import random
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import immunizing, tiny
from support.faults import small_files
from support.immunizing import assert_same, concepts, problem_of, settings, weights

from mima.bilevel.upper import UpperLevel
from mima.concepts.pictures import digest
from mima.errors import MimaError
from mima.families import load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.config import UpperConfig
from mima.immunization.levels import Problem
from mima.immunization.outer_loop import Ascent
from mima.immunization.progress import StepReport
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import default_folder, uninterrupted


def immunized(model, config, **options):
    return immunize(model, concepts(), config, **options)


def unet(result):
    return result.pipeline.unet.state_dict()


def steps_in(output):
    path = default_folder(output) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    "changes",
    [
        {"hypergradient": "exact"},
        {"hypergradient": "finite_difference"},
        {"method": "alternating"},
    ],
    ids=["exact", "finite_difference", "alternating"],
)
def test_killed_at_random_points_it_resumes_bit_by_bit(small_model, tmp_path, processes, changes):
    config = settings(tmp_path, steps=7, checkpoint_every=2, **changes)

    def start(output):
        process = processes.Process(
            target=immunizing.run,
            args=(small_model, config),
            kwargs={"output": output, "resume": True},
        )
        process.start()
        return process

    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0

    output = tmp_path / "killed"
    chance = random.Random(7)
    for lines in (0, 1, 3, 4):
        process = start(output)
        # the first is killed while it encodes pictures, the others somewhere within a step
        while not (default_folder(output) / "run.json").exists() or steps_in(output) < lines:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not output.exists()
    last = start(output)
    last.join()
    assert last.exitcode == 0
    assert_same(weights(output), weights(tmp_path / "undisturbed"))
    assert not default_folder(output).exists()
    reports = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == list(range(1, 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"hypergradient": "exact"},
        {"method": "joint"},
        {"method": "compose"},
        {"upper": {"prior_weight": 0}},
    ],
    ids=["exact", "joint", "compose", "no-prior"],
)
def test_an_interrupt_writes_a_checkpoint(model, tmp_path, changes):
    config = settings(tmp_path, steps=3, checkpoint_every=None, **changes)
    whole = immunized(model, config)
    seen = []

    def interrupt(report):
        seen.append(report)
        if len(seen) == len(whole.history) - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunized(model, config, checkpoint=tmp_path / "c", callbacks=[interrupt])
    resumed = immunized(model, config, checkpoint=tmp_path / "c", resume=True)
    assert_same(unet(resumed), unet(whole))
    assert [r.losses for r in resumed.history] == [r.losses for r in whole.history]
    assert [r.drift for r in resumed.history] == [r.drift for r in whole.history]


def test_a_resumed_run_writes_the_same_tokenizer(model, tmp_path):
    config = settings(tmp_path, merge="average", steps=2)

    def interrupt(report):
        raise KeyboardInterrupt

    immunized(model, config, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        immunized(model, config, output=tmp_path / "resumed", callbacks=[interrupt])
    immunized(model, config, output=tmp_path / "resumed", resume=True)
    # a resumed run reads no text, whose padding tokenizers keep
    whole, resumed = (tmp_path / name / "tokenizer/tokenizer.json" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_an_interrupt_waits_for_the_update():
    done = []

    def update():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_steps_can_be_asked_for(model, tmp_path):
    stop = lambda report: "stop" if report.step == 1 else None  # noqa: E731
    short = settings(tmp_path, steps=1)
    immunized(model, short, checkpoint=tmp_path / "c")
    longer = immunized(model, settings(tmp_path, steps=2), checkpoint=tmp_path / "c", resume=True)
    assert_same(unet(longer), unet(immunized(model, settings(tmp_path, steps=2))))
    # so can the rest of a run that a callback ended, as one does when its time is up
    immunized(model, settings(tmp_path, steps=2), checkpoint=tmp_path / "d", callbacks=[stop])
    rest = immunized(model, settings(tmp_path, steps=2), checkpoint=tmp_path / "d", resume=True)
    assert_same(unet(rest), unet(longer))


@pytest.mark.parametrize("method", ["joint", "compose", "alternating"])
def test_fewer_steps_than_are_done_are_refused(model, tmp_path, method):
    config = settings(tmp_path, method=method, steps=2, checkpoint_every=1)

    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunized(model, config, checkpoint=tmp_path / "c", callbacks=[interrupt])
    fewer = config.model_copy(update={"steps": 1})
    with pytest.raises(MimaError, match=r"^steps: 2 are done already, more than 1$"):
        immunized(model, fewer, checkpoint=tmp_path / "c", resume=True)


def test_another_run_is_not_continued(model, tmp_path):
    first = settings(tmp_path)
    immunized(model, first, checkpoint=tmp_path / "c")
    with pytest.raises(MimaError, match=r"unfinished run.*resume"):
        immunized(model, first, checkpoint=tmp_path / "c")
    other = settings(tmp_path, seed=3, lower={"lr": 2e-3})
    with pytest.raises(MimaError, match=r"lower\.lr: 0\.001 then, 0\.002 now") as caught:
        immunized(model, other, checkpoint=tmp_path / "c", resume=True)
    assert "seed: 0 then, 3 now" in str(caught.value)
    assert "steps" not in str(caught.value)
    with pytest.raises(MimaError, match=r"concepts\.1\.name: dog then, None now"):
        immunize(model, concepts(1), first, checkpoint=tmp_path / "c", resume=True)
    elsewhere = tiny.save_tiny_stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(MimaError, match="differs in model"):
        immunized(elsewhere, first, checkpoint=tmp_path / "c", resume=True)
    reader = load_pipeline(model)
    next(reader.text_encoder.parameters()).data += 0.1
    with pytest.raises(MimaError, match="differs in model"):
        immunized(reader, first, checkpoint=tmp_path / "c", resume=True)
    # overwrite starts anew
    again = immunized(model, other, checkpoint=tmp_path / "c", overwrite=True)
    assert_same(unet(again), unet(immunized(model, other)))


def test_a_checkpoint_folder_is_a_runs_alone(model, tmp_path):
    """It is removed at the end."""
    config = settings(tmp_path, steps=1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    for options in ({}, {"overwrite": True}, {"output": tmp_path / "out"}):
        with pytest.raises(MimaError, match="holds files that no run wrote"):
            immunized(model, config, checkpoint=mine, **options)
    (tmp_path / "file").touch()
    with pytest.raises(MimaError, match="is a file, expected a folder"):
        immunized(model, config, checkpoint=tmp_path / "file")
    at = tmp_path / "at"
    for output, checkpoint in ((at / "out", at), (at, at / "kept"), (at, at)):
        for options in ({}, {"dry_run": True}):
            with pytest.raises(MimaError, match="hold each other"):
                immunized(model, config, output=output, checkpoint=checkpoint, **options)
    assert not at.exists()
    assert (mine / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    immunized(model, config, output=at, checkpoint=tmp_path / "empty")


def test_class_pictures_are_drawn_once(model, tmp_path, monkeypatch):
    bare = [c.__class__(c.name, c.prompt, c.images, class_prompt="a picture") for c in concepts()]
    config = settings(tmp_path, steps=1, num_class_images=2)
    first = immunize(model, bare, config, checkpoint=tmp_path / "c")
    monkeypatch.setattr("mima.immunization.encoding.encode", None)
    monkeypatch.setattr("mima.training.class_images.ClassPictures.latents", None)
    again = immunize(model, bare, config, checkpoint=tmp_path / "c", resume=True)
    assert_same(unet(again), unet(first))


def test_damaged_encodings_are_made_again(model, tmp_path, caplog):
    config = settings(tmp_path, steps=1)
    immunized(model, config, checkpoint=tmp_path / "c")
    file = tmp_path / "c" / "concept-000.safetensors"
    kept = load_file(file)
    fewer = {"images.latents": kept["images.latents"][:1].clone()}
    longer, intact = config.model_copy(update={"steps": 2}), file.read_bytes()
    for content in (kept | fewer, {"other": torch.ones(1)}):
        save_file(content, file)
        again = immunized(model, longer, checkpoint=tmp_path / "c", resume=True)
        assert "concept-000.safetensors has no checksum; it is made again" in caplog.text
        assert file.read_bytes() == intact
        caplog.clear()
    assert_same(unet(again), unet(immunized(model, longer)))


def test_large_encodings_are_mapped(model, tmp_path, monkeypatch):
    config = settings(tmp_path, steps=1)
    small = immunized(model, config)
    monkeypatch.setattr("mima.immunization.encoding.LARGE", 0)
    assert_same(unet(immunized(model, config)), unet(small))
    assert_same(unet(immunized(model, config, checkpoint=tmp_path / "c")), unet(small))


def test_pictures_may_change_or_go_once_a_run_has_read_them(model, tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for n, file in enumerate(files):
        tiny.picture("red", "round", seed=n).save(file)
    concept = replace(concepts(1)[0], images=files)
    before = list(map(digest, concept.images))

    def change(report):
        tiny.picture("green", "square").save(files[1])
        files[2].unlink()

    result = immunize(model, [concept], settings(tmp_path, steps=1), callbacks=[change])
    assert result.saw["lower"]["pictures"] == before


@pytest.mark.parametrize("change", ["other", "gone"])
def test_captions_are_those_that_the_published_update_began_with(model, tmp_path, change):
    config = settings(tmp_path, method="alternating", steps=3, num_captions=5)
    undisturbed = immunized(model, config)

    def disturb(report):
        config.captions.unlink(missing_ok=True)
        if change == "other":
            config.captions.write_text("another caption\nand one more")

    assert_same(unet(immunized(model, config, callbacks=[disturb])), unet(undisturbed))


def break_losses(monkeypatch, factor):
    """Let `factor(step)` multiply every upper loss."""
    upper_level = Problem.upper_level

    def broken(self, concepts, step, *state):
        part = upper_level(self, concepts, step, *state)
        return UpperLevel(part.terms, lambda p: [x * factor(step) for x in part.losses(p)])

    monkeypatch.setattr(Problem, "upper_level", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(model, tmp_path, monkeypatch, caplog, value):
    config = settings(tmp_path, steps=3, max_skipped=1)
    break_losses(monkeypatch, lambda step: value if step == 1 else 1.0)
    seen = {}

    def keep(report):
        state = CheckpointFolder(tmp_path / "c").latest()
        seen[report.step] = state

    with caplog.at_level(logging.WARNING, "mima"):
        result = immunized(
            model,
            config.model_copy(update={"checkpoint_every": 1}),
            checkpoint=tmp_path / "c",
            callbacks=[keep],
        )
    assert [report.skipped for report in result.history] == [0, 1, 1]
    assert "step 2 left out, not finite" in caplog.text
    # checkpoints after steps 1 and 2 hold the same weights
    assert_same(
        *(
            {n: v for n, v in seen[step].tensors.items() if n.startswith("theta.")}
            for step in (2, 3)
        )
    )
    assert all(torch.isfinite(value).all() for value in unet(result).values())
    lines = (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()
    assert [StepReport.from_dict(json.loads(line)).step for line in lines] == [1, 2, 3]


def test_too_many_steps_that_are_not_finite_end_the_run(model, tmp_path, monkeypatch):
    config = settings(tmp_path, steps=6, max_skipped=1, checkpoint_every=1)
    break_losses(monkeypatch, lambda step: math.nan if step >= 2 else 1.0)
    with pytest.raises(MimaError, match=r"2 steps in a row were not finite.*upper\.lr") as caught:
        immunized(model, config, checkpoint=tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)
    kept = CheckpointFolder(tmp_path / "c").latest()
    assert kept.step == 3
    assert all(torch.isfinite(value).all() for value in kept.tensors.values())


def test_a_level_that_always_fails_ends_the_run(model, tmp_path):
    """Of the published pairs' steps, where the other level's are finite."""
    lower = {"lr": 1e30}
    config = settings(
        tmp_path,
        method="alternating",
        steps=9,
        max_skipped=2,
        lower=lower,
        checkpoint_every=1,
    )
    interrupted = config.model_copy(update={"steps": 2})
    immunized(model, interrupted, checkpoint=tmp_path / "c")
    with pytest.raises(MimaError, match=r"3 steps in a row were not finite.* step 5 "):
        immunized(model, config, checkpoint=tmp_path / "c", resume=True)


def test_other_pictures_captions_or_lengths_of_a_schedule_are_another_run(model, tmp_path):
    config = settings(tmp_path, upper={"lr_schedule": "cosine"})
    given = concepts()
    immunize(model, given, config, checkpoint=tmp_path / "c")
    more = immunizing.concepts()[0].images[:3]
    recaptioned = [replace(picture, prompt="a cat") for picture in given[0].images]
    for name, changed in {
        r"concepts\.0\.images": [replace(given[0], images=more), given[1]],
        r"concepts\.0\.images: .* then": [replace(given[0], images=recaptioned), given[1]],
        r"concepts\.1\.class_images": [given[0], replace(given[1], class_images=more)],
        r"concepts\.1\.initializer": [given[0], replace(given[1], initializer="cat")],
    }.items():
        with pytest.raises(MimaError, match=name):
            immunize(model, changed, config, checkpoint=tmp_path / "c", resume=True)
    # the step size at a step depends on how many there are
    longer = config.model_copy(update={"steps": 4})
    with pytest.raises(MimaError, match="steps: 2 then, 4 now"):
        immunize(model, given, longer, checkpoint=tmp_path / "c", resume=True)
    config.captions.write_text("another caption\nand one more")
    with pytest.raises(MimaError, match="the captions: "):
        immunize(model, given, config, checkpoint=tmp_path / "c", resume=True)


def test_divergence_is_seen_where_some_steps_have_no_such_loss(model, tmp_path):
    def history(priors):
        return [
            StepReport(
                step=n + 1,
                steps=90,
                losses={"cat": 1.0},
                drift=0.0,
                gradient_norm=1.0,
                residual=0.0,
                seconds=1.0,
                eta=0.0,
                memory=0,
                prior_losses={} if prior is None else {"cat": prior},
            )
            for n, prior in enumerate(priors)
        ]

    ascent = Ascent(problem_of(model, settings(tmp_path, divergence=20)))
    grown = [*(10 * [0.1]), *(10 * [10.0])]
    alternating = [value for one in grown for value in (None, one)]
    for priors in (grown, alternating, [math.nan, *grown]):
        ascent.history = history(priors)
        with pytest.raises(MimaError, match=r"from 0\.1 to 10, more than 20 times.*prior_weight"):
            ascent._check_divergence()
    # where the ascent follows what retains, a weight of that changes nothing
    upper = UpperConfig(ascent_ratio=0.5, objective="log")
    ascent._config = ascent._config.model_copy(update={"upper": upper})
    ascent.history = history(grown)
    with pytest.raises(MimaError, match=r"ascent_ratio \(0\.5\) or .*: hinge") as caught:
        ascent._check_divergence()
    assert "prior_weight" not in str(caught.value)
    for priors in (grown[:-1], 40 * [0.1], 40 * [None]):
        ascent.history = history(priors)
        ascent._check_divergence()


def test_divergence_ends_the_run(model, tmp_path, monkeypatch):
    break_losses(monkeypatch, lambda step: 100.0 if step >= 12 else 1.0)
    config = settings(tmp_path, steps=30, divergence=20)
    with pytest.raises(MimaError, match=r"step 2\d.*more than 20 times.*prior_weight"):
        immunized(model, config)


def test_a_disk_that_fills_during_a_run_ends_it_with_a_message(model, tmp_path):
    config = settings(tmp_path, steps=3, checkpoint_every=1)

    def fill(report):
        if report.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(MimaError, match=r"checkpoint: cannot write .*step-00000001 is intact"):
            immunized(model, config, checkpoint=tmp_path / "c", callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resumed = immunized(model, config, checkpoint=tmp_path / "c", resume=True)
    assert_same(unet(resumed), unet(immunized(model, config)))


def test_a_disk_that_is_full_at_the_end_costs_no_step(model, tmp_path):
    config, output = settings(tmp_path, steps=1), tmp_path / "out"
    # enough for the checkpoint, which holds cross-attention alone
    with small_files(300_000), pytest.raises(MimaError, match=r"cannot write .*out: .*resume"):
        immunized(model, config, output=output)
    assert not output.exists()
    resumed = immunized(model, config, output=output, resume=True)
    assert_same(unet(resumed), unet(immunized(model, config)))
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
