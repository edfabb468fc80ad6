"""What every test runs under: seeds, strict backends, poisoned memory, no network, few threads."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

# an installation without a compiler has no kernels that could serve on the CPU
os.environ.setdefault("MIMA_STRICT", "1" if find_spec("mima._native") else "0")
# before torch, transformers and huggingface_hub are imported: they read these once
os.environ["HF_HOME"] = os.environ["TORCH_HOME"] = tempfile.mkdtemp(prefix="mima-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# other processes too must import the installed package, not the sources in the working directory
os.environ["PYTHONSAFEPATH"] = "1"
# what deterministic algorithms need on CUDA
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# two torch processes that spin on the same cores slow each other several times over
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # the processes share the cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

# a busy machine is no failure, and the same examples everywhere make one reproducible
settings.register_profile("mima", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mima")

SEED = 20_251


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two processes share the tests unless -n says otherwise or pytest-xdist is not installed."""
    if (
        config.pluginmanager.hasplugin("xdist")
        and "PYTEST_XDIST_WORKER" not in os.environ
        and config.option.numprocesses is None
        and not config.option.usepdb
    ):
        config.option.numprocesses = 2
        config.option.dist = "worksteal"


LONG = (
    "tests/ops/test_triton_interpreter.py",
    "tests/benchmarks/test_gpu_run.py",
    "tests/benchmarks/test_roofline.py",
    "tests/immunization/test_shards.py",
    "tests/test_distributed.py",
    "tests/test_faults.py",
    "tests/evaluation/test_attack_families.py",
    "tests/evaluation/test_originals.py",
    "tests/immunization/test_resume.py",
    "tests/cli/test_reproducible.py",
    "tests/erasure/test_embedded.py",
    "tests/native/test_cuda_kernels.py",
    "tests/ops/test_triton_aot.py",
)
"""Files with tests of half a minute, and those that ask for the server of processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, long ones begin first: none is waited for at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {file: place for place, file in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(LONG)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the collector need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, run in this process, keep mima's log for the terminal; tests hear it again."""
    logger = logging.getLogger("mima")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Make `torch.empty` return NaN, so that reading what nobody wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small Stable Diffusion in a folder, which tests leave as it is."""
    from support import tiny

    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A smaller one, for what runs a model often or in several processes; left as it is, too."""
    from support import tiny

    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("small"), blocks=1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small Stable Diffusion in memory, likewise."""
    from support import tiny

    return tiny.tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def float64():
    """float64 as the default dtype, in which transformers 4 makes the mask of a text encoder."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what tests draw out of the user's cache, and the user's out of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """A shell makes what it starts in the background deaf to SIGINT, and all that this starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _devices() -> list[str]:
    """The devices to test on: MIMA_TEST_DEVICES=cpu,cuda, default the CPU."""
    return os.environ.get("MIMA_TEST_DEVICES", "cpu").split(",")


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device under test; skips, with the reason, one that this machine lacks."""
    chosen = torch.device(request.param)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return chosen


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """A server that has imported everything once and forks each process in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.served"])
    with pytest.MonkeyPatch.context() as patch:
        # before Python 3.13 the server ignores the paths that it is given
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        # it has its working directory on its path, where the sources hide the installed package
        patch.chdir(tmp_path_factory.mktemp("server"))
        forkserver.ensure_running()
    yield context
    # a failed test's are not waited for
    for process in multiprocessing.active_children():
        process.kill()
