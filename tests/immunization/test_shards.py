"""Processes that hold a model between them give what one gives, each with its share of memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import ranks, tiny
from support.immunizing import captions, concepts, settings, weights
from test_distributed import finish, kill_after_a_step, launch, start

from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.families import Family, ModelSource
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.planning.plan import plan
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import default_folder

# the folder that a process runs in holds nothing to import; Python 3.10 cannot be told so
SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []

RECIPE = {
    "merge": "sum",
    "attack_every": 2,
    "gradient_checkpointing": True,
    # Adam's first steps divide a gradient by its own size, which magnifies rounding
    "lower": {
        "steps": 2,
        "optimizer": "sgd",
        "lr": 1e-2,
        "batch_size": 3,
        "parameters": "denoiser",
    },
    "upper": {
        "lr": 1e-3,
        "parameters": "denoiser",
        "batch_size": 2,
        "prior_batch_size": 3,
        "objective": "hinge",
        "margin": 0.3,
        "path_every": 1,
        "retain": "distill",
        "ascent_ratio": 0.5,
        "projection": True,
    },
}
PAPER = {"method": "mima", "lower": {"lr": 1e-3, "steps": 2, "optimizer": "sgd"}}
LIVING = {
    "method": "joint",
    "concepts_per_step": 2,
    "lower": {"lr": 1e-3, "optimizer": "adam", "age": (2, 3)},
}


@pytest.mark.parametrize(
    ("changes", "later"),
    [(PAPER, (4, 2)), (RECIPE, (4, 4)), (LIVING, (1, 1))],
    ids=["paper", "recipe", "living"],
)
def test_a_run_in_shards_is_that_of_one_process_and_resumes_on_others(
    processes, small_model, tmp_path, changes, later
):
    config = settings(tmp_path, steps=3, checkpoint_every=1, **changes)
    assert finish(start(processes, 1, small_model, config, 2, output=tmp_path / "one")) == [0]

    def in_shards(size, shards, **options):
        split = config.model_copy(update={"shards": shards})
        options |= {"output": tmp_path / "more", "resume": True}
        return start(processes, size, small_model, split, 2, **options)

    kill_after_a_step(in_shards(2, 2, callbacks=[ranks.Hold()]), tmp_path / "more")
    assert finish(in_shards(*later)) == [0] * later[0]
    more, one, before = (
        weights(path) for path in (tmp_path / "more", tmp_path / "one", small_model)
    )
    # AdamW divides a gradient by its own size, too
    assert distance(more, one) < 5e-3 * distance(one, before)
    for ours, theirs in zip(steps(tmp_path / "more"), steps(tmp_path / "one"), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
        assert ours["drift"] == pytest.approx(theirs["drift"], rel=1e-3)
        assert ours["residual"] == pytest.approx(theirs["residual"], rel=1e-3, abs=1e-6)


def distance(a, b):
    return sum(float((a[name] - b[name]).norm()) ** 2 for name in b) ** 0.5


def steps(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_blocks_are_computed_in_half_precision(processes, small_model, tmp_path):
    changes = RECIPE | {"attack_every": 1, "steps": 1}
    seen = {}
    for precision, size in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        config = settings(tmp_path, **changes | {"precision": precision, "shards": size})
        output = tmp_path / f"{precision}-{size}"
        assert finish(start(processes, size, small_model, config, 2, output=output)) == [0] * size
        first = steps(output)[0]
        seen[precision, size] = [*first["losses"].values(), first["gradient_norm"]]
    one, two = seen["bfloat16", 1], seen["bfloat16", 2]
    assert two == pytest.approx(one, rel=2e-2)
    assert two != pytest.approx(seen["float32", 1], rel=1e-5)


def test_each_process_holds_its_share(processes, model, tmp_path, monkeypatch):
    config = settings(tmp_path, **RECIPE | {"attack_every": 1, "steps": 1})
    held = {}
    for size in (1, 2):
        split = config.model_copy(update={"shards": size})
        path = tmp_path / f"{size}.txt"
        started = start(processes, size, model, split, 2, callbacks=[ranks.HeldBytes(path)])
        assert finish(started) == [0] * size
        held[size] = int(path.read_text())
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    whole = num_bytes(pipeline.unet)
    others = num_bytes(pipeline.vae) + num_bytes(pipeline.text_encoder)
    # θ, the start that is distilled, two gradients and their sum, two moments
    assert held[1] - others == pytest.approx(7 * whole, rel=0.05)
    # and the shards that the module computes from
    assert held[2] - others == pytest.approx(8 * whole / 2, rel=0.05)
    monkeypatch.setenv("WORLD_SIZE", "2")
    split = config.model_copy(update={"shards": 2})
    found = plan(ModelSource(model), concepts(2), split, device="cpu")
    assert (found.processes, found.shards) == (2, 2)
    parts = found.memory["outer steps"]
    kept = ("the denoiser's shard", "trained weights' rows", "weights as they were before")
    assert sum(parts[name] for name in kept) == pytest.approx(3 * whole / 2, rel=0.05)
    assert parts["the optimizer's moments"] == pytest.approx(2 * whole / 2, rel=0.05)
    # θ', its gradient, the states of its path and what they sum up to
    step = parts["attacks, their gradients and merge"] + parts["further states of the path"]
    assert 3 * whole / 2 <= step < 7 * whole / 2
    assert "of each process on cpu" in str(found)


def test_a_plan_says_what_a_process_receives(processes, small_model, tmp_path, monkeypatch):
    config = settings(tmp_path, **RECIPE | {"attack_every": 1, "steps": 2, "shards": 2})
    path = tmp_path / "received.json"
    started = start(processes, 4, small_model, config, 2, callbacks=[ranks.ReceivedBytes(path)])
    assert finish(started) == [0] * 4
    received = json.loads(path.read_text())
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = plan(ModelSource(small_model), concepts(2), config, device="cpu").received
    for where, named in (("within", "within a group"), ("between", "between groups")):
        told = sum(size for what, size in found.items() if what.endswith(named))
        # weights that FSDP2 need not gather again are counted on paper
        assert 0.9 * told <= received[where] <= 1.01 * told


def num_bytes(module):
    return sum(value.nbytes for value in module.parameters())


@pytest.mark.parametrize(
    ("how", "size", "shards"),
    [(signal.SIGKILL, 4, 2), (signal.SIGSTOP, 2, 1)],
    ids=["dies", "stands still"],
)
def test_a_process_that_gives_no_sign_of_life_ends_the_others(
    processes, small_model, tmp_path, how, size, shards
):
    config = settings(tmp_path, steps=1000, checkpoint_every=1, shards=shards)
    run = (small_model, config, 2), {"output": tmp_path / "out"}
    started = launch(processes, ranks.immunize_or_say, size, tmp_path, *run)
    while not list(default_folder(tmp_path / "out").glob("step-*")):
        assert all(process.is_alive() for process in started)
        time.sleep(0.01)
    os.kill(started[1].pid, how)
    others = [process for process in started if process is not started[1]]
    assert finish(others, limit=60) == [1] * (size - 1)
    started[1].kill()
    said = (tmp_path / "0.txt").read_text()
    assert re.search(r"distributed: process 1 has given no sign of life for \d+ s", said)
    assert CheckpointFolder(default_folder(tmp_path / "out")).latest().step >= 1


@pytest.mark.parametrize("command", ["torchrun", "accelerate"])
def test_both_launching_commands_start_it(small_model, tmp_path, command):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        tiny.picture(name, "round").save(tmp_path / name / "0.png")
    run = {
        "model": str(small_model),
        "concepts": [
            {"name": name, "prompt": f"a {name} emoji", "images": str(tmp_path / name)}
            for name in ("red", "blue")
        ],
        "immunize": {
            "shards": 2,
            "steps": 1,
            "hypergradient": "first_order",
            "captions": str(captions(tmp_path)),
            "upper": {"prior_weight": 0.0},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    launched = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        "accelerate": [
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "-m"),
        ],
    }[command]
    done = subprocess.run(
        [sys.executable, *SAFE_PATH, *launched, "mima", "immunize", "run.yaml", "-o", "out"],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("immunized against red, blue") == 1
    assert weights(tmp_path / "out")


BENIGN_LORA = {"ascent_ratio": 1.0, "benign": {"lower": {"parameters": "lora"}}}
REFUSED = {
    "`hypergradient: exact`, `finite_difference`": [
        ({"hypergradient": "exact"}, "twice; use hypergradient 'first_order', got 'exact'"),
        ({"hypergradient": "finite_difference"}, "got 'finite_difference'"),
    ],
    "`method: compose`, `alternating`": [
        ({"method": "compose"}, "got 'compose'.*use shards 1"),
        ({"method": "alternating"}, "got 'alternating'.*use shards 1"),
    ],
    "LoRA attackers, LoRA in `upper.benign`": [
        ({"lower": {"parameters": "lora"}}, "LoRA's factors are not split; use lower.parameters"),
        ({"upper": BENIGN_LORA}, "are not split; use upper.benign.lower.parameters"),
    ],
    "`lower.train_token`": [
        (
            {"new_words": True, "lower": {"parameters": None, "train_token": True}},
            "leave out lower.train_token",
        ),
    ],
}
"""Settings that are refused, by their row of docs/distributed.md."""
REFUSED_OTHERWISE = {
    "class pictures drawn by the model, on GPUs",
    "a number of processes that `shards` does not divide",
    "a denoiser a weight of which goes by several names",
}
"""Rows of pictures, processes and models: two tests below refuse these."""


@pytest.mark.parametrize(("changes", "message"), [case for row in REFUSED.values() for case in row])
def test_what_shards_do_not_go_with_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ImmunizeConfig(**{"shards": 2, "hypergradient": "first_order"} | changes)


def test_the_page_lists_what_is_refused():
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    section = page.split("## What does not go with shards")[1]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert set(rows) == REFUSED.keys() | REFUSED_OTHERWISE | {"---"}


def test_a_number_of_processes_that_shards_do_not_divide_is_refused(monkeypatch):
    config = ImmunizeConfig(shards=2, hypergradient="first_order")
    concept = tiny.concept()
    assert isinstance(concept.images[0], Picture)
    for size in (1, 3):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        with pytest.raises(MimaError, match=f"shards: 2 .* but {size} were started"):
            immunize("nowhere", [concept], config)
        # of one process, a plan is of those that are to be started
        refused = "nowhere" if size == 1 else f"shards: 2 .* but {size} were started"
        with pytest.raises(MimaError, match=refused):
            immunize("nowhere", [concept], config, dry_run=True)


def test_a_plan_refuses_what_the_run_in_shards_refuses(model, tmp_path, monkeypatch):
    config = settings(tmp_path, hypergradient="first_order", shards=2)
    bare = [replace(concept, class_images=()) for concept in concepts(2)]
    arguments = {"dry_run": True, "device": "h100"}
    with pytest.raises(MimaError, match=r"no GPU holds here; give class_images .* to cat, dog"):
        immunize(model, bare, config, **arguments)
    found = immunize(model, concepts(2), config, **arguments)
    assert found.refusal is None
    # on a GPU, the whole denoiser is on the CPU before and after
    assert not any("weights" in part for part in found.memory["preparing"])
    assert sum(found.host.values()) > 0
    assert "2 processes, 2 of which hold a model between them\n" in str(found)
    monkeypatch.setattr(Family, "shares_weights", True)
    with pytest.raises(MimaError, match="go by several names and cannot be split"):
        immunize(model, concepts(2), config, **arguments)
