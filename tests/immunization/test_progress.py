"""What a run says of its steps: to callbacks, files, trackers and the terminal."""

import io
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from support.immunizing import assert_same, concepts, settings

from mima.errors import MimaError
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.progress import ProgressBar, StepReport, Tracker, open_trackers


def test_a_run_reports_what_it_does(model, tmp_path):
    seen = []
    config = settings(tmp_path, steps=2)
    result = immunize(model, concepts(), config, output=tmp_path / "out", callbacks=[seen.append])
    assert seen == result.history
    last = seen[-1]
    assert (last.step, last.steps, last.eta) == (2, 2, 0)
    assert sorted(last.losses) == sorted(last.prior_losses) == ["cat", "dog"]
    assert last.prior_loss == pytest.approx(sum(last.prior_losses.values()) / 2)
    assert last.seconds > 0
    assert last.memory > 2**20
    assert 0 < last.residual < 1
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    lasting = [replace(report, seconds=0.0, eta=0.0, memory=0) for report in seen]
    assert [StepReport.from_dict(json.loads(line)) for line in lines] == lasting
    saved = json.loads((tmp_path / "out" / "mima.json").read_text())
    assert ImmunizeConfig.model_validate(saved["config"]) == config
    # an ordinary diffusers folder
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert_same(opened.unet.state_dict(), result.pipeline.unet.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt", "out"]


def test_a_callback_stops_the_run(model, tmp_path, caplog):
    called = []
    callbacks = [lambda report: "stop" if report.step == 2 else None, called.append]
    with caplog.at_level(logging.INFO, "mima"):
        result = immunize(model, concepts(), settings(tmp_path, steps=9), callbacks=callbacks)
    assert len(result.history) == len(called) == 2
    assert caplog.messages.count("a callback ended the run after step 2 of 9") == 1


def test_what_else_a_callback_returns_stops_nothing(model, tmp_path):
    """tqdm's ``update`` returns True, a file's ``write`` a number."""
    callbacks = [lambda _, told=told: told for told in (True, 1, torch.ones(2), "stopped")]
    result = immunize(model, concepts(1), settings(tmp_path, steps=2), callbacks=callbacks)
    assert len(result.history) == 2


def test_trackers_get_the_same_numbers(model, tmp_path):
    class Recorder:
        def __init__(self):
            self.logged, self.config, self.open = [], None, False

        def start(self):
            self.open = True

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.open = False

    recorder = Recorder()
    config = settings(tmp_path)
    tracker = Tracker(recorder, config.model_dump(mode="json"))
    result = immunize(model, concepts(), config, callbacks=[tracker])
    assert recorder.open
    tracker.finish()
    assert not recorder.open
    assert recorder.config["lower.lr"] == 1e-3
    # text, where it is neither a number nor text
    assert (recorder.config["trackers"], recorder.config["lower.alpha"]) == ("[]", "None")
    assert [step for step, _ in recorder.logged] == [1, 2]
    assert recorder.logged[-1][1]["loss/cat"] == result.history[-1].losses["cat"]
    with pytest.raises(MimaError, match=r"trackers: 'tensorbord' is unknown.*tensorboard"):
        open_trackers(["tensorbord"], tmp_path, {})


@pytest.mark.parametrize(("argument", "logs"), [("checkpoint", "out"), ("output", "out.logs")])
def test_tensorboard_gets_the_same_numbers_and_keeps_them(model, tmp_path, argument, logs):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    config = settings(tmp_path, trackers=("tensorboard",))
    result = immunize(model, concepts(), config, **{argument: tmp_path / "out"})
    # a record: length, its checksum, the event, its checksum
    shown = {}
    for file in (tmp_path / logs).rglob("events.*"):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    for report in result.history:
        losses = {f"loss/{name}": loss for name, loss in report.losses.items()}
        losses |= {f"prior_loss/{name}": loss for name, loss in report.prior_losses.items()}
        assert len(losses) == 4
        for name, loss in losses.items():
            # TensorBoard's names have neither blanks nor brackets
            tag = re.sub(r"[^-/.\w]", "_", name)
            assert shown[tag, report.step] == pytest.approx(loss, rel=1e-6)


def report_of(count, step=3, steps=10):
    losses = {f"concept {n}": 1.25 for n in range(count)}
    return StepReport(
        step, steps, losses, 1e-3, 0.7, 0.02, 1.5, 3661.0, 2**30, 2, prior_losses={"x": 0.5}
    )


def test_the_progress_bar_says_what_matters():
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=True, width=200)) as bar:
        bar(report_of(2))
    shown = out.getvalue()
    for part in (
        *("3/10", "loss 1.250", "prior 0.500", "drift 1.0e-03", "residual 2.0e-02"),
        *("2 skipped", "1.50 s/step", "1.0 GiB", "1:01:01 left"),
    ):
        assert part in shown


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("stage", ["", "a concept of a very long name [red]"])
def test_progress_has_room_in_80_columns(count, stage):
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=True, width=80, color_system=None)) as bar:
        bar(replace(report_of(count, 999, 1000), stage=stage))
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text) if line.strip()]
    assert max(map(len, lines)) <= 80
    line = lines[-1]
    for part in (" 999/1000 ", "1.50 s/step", "1:01:01 left"):
        assert part in line


def test_where_output_is_no_terminal_there_is_a_line_for_each_tenth():
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=80)) as bar:
        for step in range(1, 41):
            bar(report_of(3, step, 40))
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        f"immunizing: {step} of 40" for step in range(4, 41, 4)
    ]
    assert all("1.50 s/step · 1:01:01 left" in line for line in lines)
