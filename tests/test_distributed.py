"""Several gloo processes give what one gives; one that dies ends the others."""

import signal
import socket
import time

import pytest
import torch
from support import ranks, tiny
from support.immunizing import settings, weights

from mima.storage.checkpoint import CheckpointFolder
from mima.storage.runs import default_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


def start(processes, size, *args, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        processes.Process(target=ranks.immunize, args=(rank, size, port, args, options))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def finish(started, limit=240):
    for process in started:
        process.join(limit)
    return [process.exitcode for process in started]


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
def test_a_run_resumes_on_another_number_of_ranks(processes, model, tmp_path, changes):
    config = settings(tmp_path, steps=3, checkpoint_every=1, **changes)
    assert finish(start(processes, 1, model, config, 3, output=tmp_path / "one")) == [0]
    two = start(processes, 2, model, config, 3, output=tmp_path / "more", resume=True)
    folder = default_folder(tmp_path / "more")
    while not list(folder.glob("**/step-*")):
        assert all(process.is_alive() for process in two)
        time.sleep(0.01)
    for process in two:
        process.kill()
    finish(two)
    assert not (tmp_path / "more").exists()
    three = start(processes, 3, model, config, 3, output=tmp_path / "more", resume=True)
    assert finish(three) == [0, 0, 0]
    # AdamW's first steps divide a gradient by its own size, which magnifies rounding
    assert_near(weights(tmp_path / "more"), weights(tmp_path / "one"), 1e-4)


def test_a_rank_that_dies_ends_the_others(processes, model, tmp_path):
    config = settings(tmp_path, steps=1000, checkpoint_every=1)
    started = start(processes, 3, model, config, 3, output=tmp_path / "out")
    while not list(default_folder(tmp_path / "out").glob("step-*")):
        assert all(process.is_alive() for process in started)
        time.sleep(0.01)
    started[1].kill()
    codes = finish(started, limit=120)
    assert codes[1] == -signal.SIGKILL
    assert None not in codes, "a rank hangs"
    assert codes[0] != 0
    assert codes[2] != 0
    assert CheckpointFolder(default_folder(tmp_path / "out")).latest().step >= 1
