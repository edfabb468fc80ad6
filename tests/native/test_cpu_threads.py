"""Results do not depend on threads; the pool survives concurrent callers and fork()."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import native_cases

from mima.ops.backends import cpu
from mima.ops.backends.arguments import BatchedLora, WeightedMerge
from mima.ops.backends.extension import DTYPE_CODES, loaded

pytestmark = native_cases.needs_cpu_kernels


@pytest.fixture
def _threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _bits(case: native_cases.Case) -> list[torch.Tensor]:
    torch.manual_seed(7)
    out = case.run(case.inputs)
    upstream = [torch.randn(x.shape, dtype=x.dtype) for x in out]
    return [*out, *case.backward(upstream, case.inputs)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            lambda: native_cases.weighted_merge([(700, 300), (99,)] * 4, 2, torch.float32)
        ),
        pytest.param(lambda: native_cases.projected_merge([320, 640], [9, 9], 768, torch.float32)),
        pytest.param(lambda: native_cases.adam_step([(700, 300), (99,)] * 4, torch.float32)),
        pytest.param(
            lambda: native_cases.combine([(700, 300), (99,)] * 4, [[1, 0.5]], torch.float32)
        ),
        pytest.param(lambda: native_cases.merge_lora(640, 512, [16, 4], torch.float32)),
        pytest.param(lambda: native_cases.group_norm((4, 64, 500), 8, torch.float32, second=True)),
        pytest.param(lambda: native_cases.group_norm((999, 320), 1, torch.float32, second=True)),
        pytest.param(lambda: native_cases.geglu((99, 2048), torch.float32, second=True)),
        pytest.param(lambda: native_cases.attention(5, 99, 99, 32, 32, torch.float32, True)),
    ],
    ids=[
        *("weighted_merge", "projected_merge", "adam_step", "combine", "merge_lora"),
        *("group_norm", "layer_norm", "geglu", "attention"),
    ],
)
@pytest.mark.usefixtures("_threads_restored")
def test_same_bits_for_any_number_of_threads(case):
    built = case()
    torch.set_num_threads(1)
    expected = _bits(built)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for a, b in zip(_bits(built), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_threads_restored")
def test_low_rank_part_has_same_bits_for_any_number_of_threads():
    # the base product is PyTorch's, which promises nothing: zero weights leave the low-rank part
    case = native_cases.batched_lora(8, 200, 320, 320, [4, 16, 64], torch.float32, bias=False)
    case.inputs[1].zero_()
    torch.set_num_threads(1)
    expected = _bits(case)
    # 64 take blocks of fewer tokens
    for threads in (2, 3, 8, 64):
        torch.set_num_threads(threads)
        actual = _bits(case)
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            # d_weight, the only one that PyTorch sums
            assert i == 2 or torch.equal(a, b)


@pytest.mark.parametrize("tokens", [200, 700], ids=["one by one", "merged"])
def test_a_sample_has_the_same_bits_whatever_is_beside_it(tokens):
    if cpu.cpu_level() == "generic":
        pytest.skip("the base product is PyTorch's, which promises nothing")
    torch.manual_seed(0)
    x, weight = torch.randn(6, tokens, 320), torch.randn(320, 320)
    A = [torch.randn(r, 320) for r in (4, 64)]
    B = [torch.randn(320, r) for r in (4, 64)]
    index = torch.tensor([1, -1, 0, 1, 1, 0])
    scale = torch.tensor([0.5, 2.0])
    kept: list[torch.Tensor] = []
    together = cpu.batched_lora_forward(BatchedLora(x, weight, A, B, scale, index, None), kept)
    assert [h.shape for h in kept] == ([(6, 200, 64)] if tokens == 200 else [])
    for b in range(6):
        alone = BatchedLora(x[b : b + 1], weight, A, B, scale, index[b : b + 1], None)
        assert torch.equal(cpu.batched_lora_forward(alone)[0], together[b])


def test_concurrent_callers():
    torch.manual_seed(0)
    base, theta = torch.randn(400_000), torch.randn(400_000)
    merge = WeightedMerge([base], [theta], torch.tensor([0.5]))
    expected = cpu.weighted_merge_forward(merge)[0]

    def call(_: int) -> bool:
        return torch.equal(cpu.weighted_merge_forward(merge)[0], expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(64)))


@pytest.mark.parametrize("pool", ["own", "openmp"])
@pytest.mark.parametrize("size", [500_000, 10], ids=["threads", "one thread"])
def test_pool_works_in_a_forked_child(size, pool, tmp_path):
    code = f"""
import os, torch
from mima.ops.backends import cpu
from mima.ops.backends.arguments import WeightedMerge
torch.set_num_threads(2)
w = torch.tensor([0.5])
merge = WeightedMerge([torch.zeros(500_000)], [torch.ones(500_000)], w)
first = WeightedMerge(*([x[:{size}] for x in xs] for xs in merge[:2]), w)
assert cpu.weighted_merge_forward(first)[0].sum() == {size} / 2
# PyTorch's own threads, whatever the first call took
torch.ones(500_000).exp()
child = os.fork()
# no PyTorch operator that uses OpenMP here: its threads do not survive a fork
out = cpu.weighted_merge_forward(merge)[0]
value = out[::100_000].tolist()
if child == 0:
    os._exit(0 if value == [0.5] * 5 else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert value == [0.5] * 5
"""
    # a fresh interpreter: forking the test process would copy its threads' locks
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MIMA_CPU_POOL": pool},
    )
    assert done.returncode == 0, done.stderr


def test_own_pool_gives_the_same_bits(tmp_path):
    # which pool is in use is settled once in a process
    code = """
import torch
from concurrent.futures import ThreadPoolExecutor
from mima.ops.backends import cpu
from mima.ops.backends.arguments import WeightedMerge
torch.manual_seed(0)
base, theta, w = torch.randn(700_001), torch.randn(700_001), torch.tensor([0.3])
def call(_):
    merge = WeightedMerge([base], [theta], w)
    return cpu.weighted_merge_backward([base], merge, [False, False, True])[2].item()
values = set()
for threads in (1, 2, 3, 8):
    torch.set_num_threads(threads)
    values.add(call(0))
    with ThreadPoolExecutor(4) as pool:
        values.update(pool.map(call, range(16)))
assert len(values) == 1, values
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"MIMA_CPU_POOL": "own"},
    )
    assert done.returncode == 0, done.stderr


def test_the_lock_of_the_interpreter_is_released():
    base = torch.zeros(30_000_000)
    out = torch.empty_like(base)
    kernel = loaded("cpu").weighted_merge_forward

    def gets_on_during(call, *args) -> bool:
        """Whether this thread runs before another's call returns."""
        entered, passed = threading.Event(), threading.Event()

        def work() -> bool:
            entered.set()
            call(*args)
            return passed.is_set()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)
            entered.wait()
            passed.set()
            return done.result()

    before = sys.getswitchinterval()
    # so that no thread gives the lock up unless it says so
    sys.setswitchinterval(1000)
    try:
        merge = (DTYPE_CODES[base.dtype], 1, [base], [base], [0.5], [out])
        # a busy machine may let this thread wait for longer than a call takes
        assert any(gets_on_during(kernel, *merge) for _ in range(20))
        holds = ctypes.PyDLL(None).usleep
        assert not any(gets_on_during(holds, 20_000) for _ in range(5))
    finally:
        sys.setswitchinterval(before)
