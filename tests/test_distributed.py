"""Several gloo processes give what one gives."""

import os
import signal
import socket
import time
from collections import deque
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from support import ranks, tiny
from support.immunizing import settings, weights
from torch.distributed import TCPStore

from mima import distributed
from mima.errors import MimaError
from mima.evaluation import EvaluationFolder
from mima.evaluation.ranks import SharedFolder, over_ranks
from mima.evaluation.worker import Outcome
from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import default_folder


def start(processes, size, *args, **options):
    return launch(processes, ranks.immunize, size, args, options)


def launch(processes, target, size, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        processes.Process(target=target, args=(rank, size, port, *args)) for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def finish(started, limit=240):
    for process in started:
        process.join(limit)
    return [process.exitcode for process in started]


def kill_after_a_step(started, output):
    """Kill processes that hold in the second step of a run, whose first is saved then."""
    # a recursive glob fails where a folder is renamed meanwhile
    while not any(
        name.startswith("step-")
        for _, folders, _ in os.walk(default_folder(output))
        for name in folders
    ):
        assert all(process.is_alive() for process in started)
        time.sleep(0.01)
    for process in started:
        process.kill()
    finish(started)
    assert not output.exists()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.device_of(None) == torch.device("cuda:0")
    # whichever is current
    assert distributed.device_of("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in (None, "cuda", "cuda:1", torch.device("cuda")):
        assert distributed.device_of(name) == torch.device("cuda:1")
    assert distributed.device_of("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name, found in {None: 2, "cuda": 2, "cuda:7": 7}.items():
        with pytest.raises(MimaError, match=f"device cuda:{found}: .* has 2 usable CUDA devices"):
            distributed.device_of(name)


def test_who_does_not_come_is_not_waited_for_long(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # as torchrun would start one of two
    told = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(MimaError, match="WORLD_SIZE is 2, but the processes cannot meet"):
        distributed.join()


def test_who_holds_a_model_with_others_waits_as_long_as_they_need(processes, tmp_path):
    started = launch(processes, ranks.patience, 2, tmp_path)
    assert finish(started) == [0, 0]
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == str([distributed.PATIENT] * 3)


def assert_near(a, b, tolerance):
    for name in b:
        gap = (a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-30)
        assert gap <= tolerance, f"{name}: {gap:.1e}"


def test_any_number_of_ranks_gives_the_gradient_of_one(processes, tmp_path):
    started = [
        processes.Process(target=ranks.gradients, args=(rank, tmp_path / "store", tmp_path))
        for rank in range(3)
    ]
    for process in started:
        process.start()
    assert finish(started) == [0, 0, 0]
    for mode in ranks.MODES:
        alone = ranks.solve(mode)
        for size in (1, 2, 3):
            results = [torch.load(tmp_path / f"{size}-{rank}.pt")[mode] for rank in range(size)]
            for result in results:
                assert_near(result["tensors"], alone["tensors"], 1e-12)
                for name in ("losses", "drift", "residual"):
                    assert result[name] == pytest.approx(alone[name], rel=1e-12), (mode, size)
                # every process takes the same step, to the bit
                same = result["tensors"]
                assert all(torch.equal(same[n], v) for n, v in results[0]["tensors"].items())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "mima"},
        {"method": "compose"},
        {
            "method": "joint",
            "concepts_per_step": 2,
            "lower": {"lr": 1e-3, "optimizer": "sgd", "age": (2, 3)},
        },
    ],
    ids=["mima", "compose", "living attackers"],
)
def test_a_run_resumes_on_another_number_of_ranks(processes, small_model, tmp_path, changes):
    config = settings(tmp_path, steps=3, checkpoint_every=1, **changes)
    assert finish(start(processes, 1, small_model, config, 3, output=tmp_path / "one")) == [0]
    more = {"output": tmp_path / "more", "resume": True}
    two = start(processes, 2, small_model, config, 3, **more, callbacks=[ranks.Hold()])
    kill_after_a_step(two, tmp_path / "more")
    told = ranks.Told(tmp_path / "told")
    three = start(processes, 3, small_model, config, 3, **more, callbacks=[told])
    assert finish(three) == [0, 0, 0]
    assert set(told.path.read_text()) == {"0"}
    # AdamW's first steps divide a gradient by its own size, which magnifies rounding
    assert_near(weights(tmp_path / "more"), weights(tmp_path / "one"), 1e-4)


def test_a_checkpoint_after_ctrl_c_takes_its_time(processes, small_model, tmp_path):
    config = settings(tmp_path, steps=3, checkpoint_every=1000)
    run = (small_model, config, 2), {"output": tmp_path / "out"}
    assert finish(launch(processes, ranks.interrupt, 2, *run)) == [0, 0]
    assert CheckpointFolder(default_folder(tmp_path / "out")).latest().step == 2


GRID = {
    "methods": {"lora": {"learning_rate": 1e-2, "batch_size": 2, "steps": 4}},
    # Muon computes in bfloat16, whose rounding depends on where a matrix lies in memory
    "tune": {"trials": 2, "steps": 2, "optimizers": ["adamw"]},
    "lr_factors": [1.0],
    "seeds": [0, 1],
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 2,
    "sampler": {"steps": 1, "guidance": 1.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("models"))


def test_processes_share_an_evaluation_and_go_on_with_it(processes, models, tmp_path):
    def run(size, name):
        return launch(processes, ranks.evaluate, size, models, tmp_path / name, GRID)

    assert finish(run(1, "one")) == [0]
    two = run(2, "two")
    folder, alone = EvaluationFolder(tmp_path / "two"), EvaluationFolder(tmp_path / "one")
    # killed after the first trial that the other process handed over, or the main one wrote down
    while not (folder.path / "tuning.csv").is_file():
        assert all(process.is_alive() for process in two)
        time.sleep(0.01)
    for process in two:
        process.kill()
    finish(two)
    assert not folder.evaluation().complete
    # what the other process has finished and the main one did not take over is found
    shared, early = SharedFolder(folder.path), alone.attacks()[0].attack
    assert early not in [row.attack for row in folder.attacks()]
    outcome = Outcome(
        [row for row in alone.attacks() if row.attack == early],
        [point for point in alone.curves() if point.attack == early],
    )
    shared.put(0, 99, outcome)
    assert finish(run(2, "two")) == [0, 0]
    assert not (folder.path / "shared").exists()
    assert folder.evaluation().complete
    assert not folder.images(early, "original", 0)
    mine, theirs = folder.attacks(), alone.attacks()
    assert [row.attack for row in mine] == [row.attack for row in theirs]
    # a process of another history may round a matrix product otherwise, and a picture's 8 bits
    for one, other in zip(mine, theirs, strict=True):
        assert one.sgr_mean == pytest.approx(other.sgr_mean, abs=2e-3)
    ours, others = folder.evaluation(), alone.evaluation()
    mean = others.summary["clip"].msgr.mean
    assert ours.summary["clip"].msgr.mean == pytest.approx(mean, abs=2e-3)
    assert ours.benign.prompts == others.benign.prompts


def test_an_evaluation_does_not_wait_for_who_stands_still(processes, models, tmp_path):
    grid = GRID | {"tune": {"trials": 2, "steps": 100_000}}
    run = (tmp_path, models, tmp_path / "out", grid)
    started = launch(processes, ranks.evaluate_or_say, 2, *run)
    # the other has begun a trial of its own
    while not (tmp_path / "out" / "shared" / "taken-0-1").is_file():
        assert all(process.is_alive() for process in started)
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGSTOP)
    assert finish(started[:1], limit=60) == [1]
    started[1].kill()
    assert "process 1 has given no sign of life" in (tmp_path / "0.txt").read_text()


def test_what_the_folder_shows_late_is_taken_over_once(tmp_path):
    """As on a network file system, whose list of names may be half a minute old."""
    shared = SharedFolder(tmp_path)
    shared.clear()
    for stage in (0, 1):
        (tmp_path / "shared" / f"taken-{stage}-1").touch()
    there = Outcome([], [])

    def all_gather(mine):
        # it shows in the stage after its own
        shared.put(0, 1, None)
        return [mine, {1: there}]

    two = SimpleNamespace(main=True, broadcast=lambda value: value, all_gather=all_gather)
    bench = SimpleNamespace(work=lambda task: task)
    worker = SimpleNamespace(run=lambda task: None)
    tasks, found, others = deque([1, 2]), [], []
    for task, result in over_ranks(two, shared, bench, worker, tasks, others.append):
        found.append((task, result))
        if task == 1:
            tasks += [3, 4]
    assert found == [(1, None), (2, there), (3, None), (4, there)]
    assert others == [2, 4]


def test_every_task_is_taken_once(tmp_path):
    shared = SharedFolder(tmp_path)
    shared.clear()
    one, two = shared.take(0, 5), shared.take(0, 5)
    assert [next(one), next(two), next(one), *two] == [0, 1, 2, 3, 4]
    assert list(one) == []
    assert list(shared.take(1, 1)) == [0]
