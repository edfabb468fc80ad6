"""An adaptation that is stopped goes on as if it had not been, and shows its pictures meanwhile."""

import copy
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny
from typer.testing import CliRunner

from mima.adaptation import Together, configure
from mima.adaptation.resumable import adapt, learn
from mima.cli import app
from mima.concepts import Concept
from mima.errors import MimaError
from mima.evaluation import Sampler
from mima.families.pipelines import named_weights, names_for_all, tensors, with_modules
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import default_folder
from mima.storage.tensor_files import fingerprint

SAMPLER = Sampler(steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer"), blocks=1)


def start(pipeline, method="lora", names=("red",), steps=6, **settings):
    settings = {"steps": steps, "learning_rate": 1e-2, "batch_size": 3} | settings
    runs = []
    for name in names:
        concept = tiny.concept(name)
        if method == "textual-inversion":
            pictures = [picture.image for picture in concept.images]
            concept = Concept(name, "a <new1> emoji", pictures, token="<new1>")
        runs.append(configure(method, settings).start(pipeline, concept))
    return runs[0] if len(runs) == 1 else Together(runs)


def train(learner, folder, on_step=lambda: None, checkpoint_every=4, sample_every=0, **options):
    folder = CheckpointFolder(folder)
    learn(
        learner,
        folder,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        sampler=SAMPLER,
        on_step=on_step,
        **options,
    )
    return folder


def runs_of(learner):
    return getattr(learner, "runs", [learner])


def weights(learner):
    return [p.detach().clone() for run in runs_of(learner) for p in run._injection.parameters]


@pytest.mark.parametrize(
    ("method", "names", "settings"),
    [
        ("lora", ("red",), {}),
        ("lora", ("red", "blue"), {}),
        ("dreambooth-lora", ("red",), {"prior_weight": 1.0, "num_class_images": 2}),
        ("custom-diffusion", ("red",), {"gradient_accumulation_steps": 2}),
        ("textual-inversion", ("red",), {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_interrupted_it_goes_on_bit_by_bit(method, names, settings, pipeline, tmp_path):
    undisturbed = start(pipeline, method, names, **settings)
    undisturbed.advance(6)
    steps = []

    def interrupt():
        steps.append(1)
        if len(steps) in (2, 5):
            signal.raise_signal(signal.SIGINT)

    for stop in (2, 5):
        learner = start(pipeline, method, names, **settings)
        with pytest.raises(KeyboardInterrupt):
            train(learner, tmp_path, interrupt)
        assert len(steps) == stop
    learner = start(pipeline, method, names, **settings)
    train(learner, tmp_path, interrupt)
    assert len(steps) == 6
    assert all(map(torch.equal, weights(learner), weights(undisturbed)))
    for run, other in zip(
        getattr(learner, "runs", [learner]),
        getattr(undisturbed, "runs", [undisturbed]),
        strict=True,
    ):
        assert (run.step, run.losses) == (6, other.losses)


def test_killed_it_goes_on_from_the_last_checkpoint(pipeline, tmp_path):
    class Killed(BaseException):
        pass

    undisturbed = start(pipeline)
    undisturbed.advance(6)
    steps = []

    def kill():
        steps.append(1)
        if len(steps) == 5:
            raise Killed

    with pytest.raises(Killed):
        train(start(pipeline), tmp_path, kill)
    learner = start(pipeline)
    train(learner, tmp_path, lambda: steps.append(1))
    # 5, then again from 4
    assert len(steps) == 5 + 2
    assert all(map(torch.equal, weights(learner), weights(undisturbed)))
    with pytest.raises(MimaError, match="6 are done already, more than 5"):
        train(start(pipeline, steps=5), tmp_path)


def stopped_between(pipeline, folder, monkeypatch, step):
    """Two runs, of which the second did not write its checkpoint of that step."""

    def write(self, checkpoint, save=None):
        if (self.path.name, checkpoint.step) == ("run-001", step):
            raise MimaError("the disk is full")
        written(self, checkpoint, save)

    written = CheckpointFolder.write
    learner = start(pipeline, names=("red", "blue"))
    monkeypatch.setattr(CheckpointFolder, "write", write)
    with pytest.raises(MimaError, match="the disk is full"):
        train(learner, folder, checkpoint_every=2)
    monkeypatch.setattr(CheckpointFolder, "write", written)


def resumed(pipeline, folder):
    """How many steps two runs took to their end, and that it is that of runs left alone."""
    undisturbed = start(pipeline, names=("red", "blue"))
    undisturbed.advance(6)
    learner, steps = start(pipeline, names=("red", "blue")), []
    train(learner, folder, lambda: steps.append(1), checkpoint_every=2)
    assert all(map(torch.equal, weights(learner), weights(undisturbed)))
    return len(steps)


def test_several_go_on_from_the_last_step_that_all_have_kept(pipeline, tmp_path, monkeypatch):
    stopped_between(pipeline, tmp_path, monkeypatch, step=4)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("run-*/step-*")}
    assert kept == {f"run-{n:03d}/step-0000000{step}" for n, step in ((0, 2), (0, 4), (1, 2))}
    assert resumed(pipeline, tmp_path) == 6 - 2


def test_several_go_on_from_the_step_before_a_damaged_one(pipeline, tmp_path, caplog):
    train(start(pipeline, names=("red", "blue")), tmp_path, checkpoint_every=2)
    damaged = tmp_path / "run-001" / "step-00000006" / "state.json"
    damaged.write_text("{")
    assert resumed(pipeline, tmp_path) == 6 - 4
    assert f"{damaged} is damaged" in caplog.text
    assert "going on from step-00000004" in caplog.text
    for path in (tmp_path / "run-000").glob("step-*/state.json"):
        path.write_text("{")
    with pytest.raises(MimaError, match=r"is damaged.*remove .*run-000 to begin anew"):
        train(start(pipeline, names=("red", "blue")), tmp_path)


def test_several_begin_anew_aloud_where_only_some_have_kept(
    pipeline, tmp_path, monkeypatch, caplog
):
    stopped_between(pipeline, tmp_path, monkeypatch, step=2)
    assert resumed(pipeline, tmp_path) == 6
    assert "run-001 have none of the same step; beginning anew" in caplog.text


def test_pictures_come_while_it_learns(pipeline, tmp_path):
    seen = []
    learner = start(pipeline)

    def look(step, place):
        assert learner.step == step
        seen.append((step, sorted(path.name for path in place.iterdir())))

    train(learner, tmp_path / "one", sample_every=4, on_pictures=look)
    assert seen == [(4, ["0.png"]), (6, ["0.png"])]
    (last,) = (tmp_path / "one" / "samples" / "00006").iterdir()
    (expected,) = SAMPLER(learner.pipeline, [learner.concept.images[0].prompt], (0,))
    assert Image.open(last).tobytes() == expected[0].tobytes()

    several = start(pipeline, names=("red", "blue"), steps=1)
    train(several, tmp_path / "two", sample_every=1)
    found = {str(p.relative_to(tmp_path / "two")) for p in tmp_path.glob("two/samples/**/*.png")}
    assert found == {"samples/00001/000/0.png", "samples/00001/001/0.png"}


def test_another_model_or_length_of_a_phase_is_another_run(pipeline, tmp_path):
    pictures = [picture.image for picture in tiny.concept().images]
    concept = Concept("red", "a <new1> emoji", pictures, token="<new1>")

    def adapted(method, steps, model=pipeline, **options):
        settings = {"steps": steps, "batch_size": 1, "learning_rate": 1e-2}
        adaptation = configure(method, settings)
        return adapt(model, [concept], adaptation, tmp_path / method, **options)

    def stopped(runs):
        if runs[0].step == 3:
            raise KeyboardInterrupt

    for method in ("textual-inversion", "pivotal"):
        with pytest.raises(KeyboardInterrupt):
            adapted(method, 6, on_step=stopped, sample_every=0)
    changed = with_modules(pipeline, text_encoder=copy.deepcopy(pipeline.text_encoder))
    next(changed.text_encoder.parameters()).data += 0.1
    with pytest.raises(MimaError, match="differs in model"):
        adapted("textual-inversion", 6, changed, resume=True, sample_every=0)
    # half of the steps are for the word
    with pytest.raises(MimaError, match="steps: 6 then, 8 now"):
        adapted("pivotal", 8, resume=True, sample_every=0)
    adapted("pivotal", 6, resume=True, sample_every=0)


def test_a_concept_cannot_have_the_folder_of_samples(pipeline, tmp_path):
    concepts = [replace(tiny.concept(), name=name) for name in ("red", "Samples")]
    with pytest.raises(MimaError, match="concept 'Samples': the folder samples is that of sample"):
        adapt(pipeline, concepts, configure("lora", {"steps": 1}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_at_home_is_written_there(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    learned = adapt(
        pipeline, [tiny.concept()], configure("lora", {"steps": 1}), "~/learned", sample_every=0
    )
    assert learned.folders == [tmp_path / "learned"]
    assert (tmp_path / "learned" / "pytorch_lora_weights.safetensors").is_file()


def test_the_command_is_interrupted_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny_stable_diffusion(tmp_path / "model", blocks=1)
    (tmp_path / "cat").mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32), (80 * index, 0, 90)).save(tmp_path / "cat" / f"{index}.png")
    command = ["adapt", "cat", "--prompt", "a cat", "--model", "model", "--steps", "40"]
    command += ["--lr", "0.01", "--sample-every", "5", "--checkpoint-every", "40"]

    def invoke(*more, code=0):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    kept = default_folder(Path("out"))
    ended = threading.Event()

    def interrupt():
        while not list(kept.glob("samples/*/0.png")) and not ended.wait(0.01):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        output = invoke("-o", "out", code=130)
    finally:
        ended.set()
        thread.join()
    assert "the same command with --resume goes on from it" in output
    assert not Path("out").exists()
    done = CheckpointFolder(kept).latest().step
    assert 5 <= done < 40
    assert "holds an unfinished run" in invoke("-o", "out", code=2)
    assert "differs in learning_rate" in invoke("-o", "out", "--resume", "--lr", "0.1", code=2)
    output = invoke("-o", "out", "--resume")
    assert f"step {done + 5 - done % 5}: pictures in" in output
    invoke("-o", "whole")
    out, whole = (
        load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in ("out", "whole")
    )
    assert out.keys() == whole.keys()
    assert all(torch.equal(out[name], whole[name]) for name in out)
    for name in ("samples/00040/0.png", "samples/00005/0.png"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat", "model", "out", "whole"]


def test_a_model_is_the_same_whichever_transformers_named_its_weights(pipeline, monkeypatch):
    reader = type(pipeline.text_encoder)
    told, state = fingerprint(named_weights(pipeline)), reader.state_dict
    assert "text_encoder.embeddings.token_embedding.weight" in named_weights(pipeline)
    # as transformers 4 does
    monkeypatch.setattr(reader, "state_dict", lambda own: names_for_all(own, state(own)))
    assert fingerprint(tensors(pipeline)) != told
    assert fingerprint(named_weights(pipeline)) == told
