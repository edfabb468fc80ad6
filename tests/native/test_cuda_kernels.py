"""The CUDA kernels: values in an emulation, registers as nvcc reports them, values on a device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import native_cases
from support.native_cases import DTYPE_IDS, DTYPES, check_values

from mima._version import __version__
from mima.ops.backends import cuda, extension, reference
from mima.ops.backends.arguments import AdamStep, AdamStepSaved, WeightedMerge

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"

# Small: the emulation runs one thread at a time. Whole vectors, tails, more tokens than a warp sums
# at once, empty layers and concepts.
CASES = {
    "weighted_merge": lambda dtype: native_cases.weighted_merge(
        [(0,), (1,), (63,), (17, 241), (3, 3001)], 3, dtype, cuda
    ),
    "weighted_merge-none": lambda dtype: native_cases.weighted_merge([(1023,)], 0, dtype, cuda),
    "projected_merge-64": lambda dtype: native_cases.projected_merge(
        [21, 0, 4], [3, 17], 64, dtype, cuda
    ),
    "projected_merge-37": lambda dtype: native_cases.projected_merge([5], [9, 0], 37, dtype, cuda),
    "projected_merge-none": lambda dtype: native_cases.projected_merge([5], [], 24, dtype, cuda),
    "projected_merge-no-rows": lambda dtype: native_cases.projected_merge(
        [0], [2], 24, dtype, cuda
    ),
    # several pieces of one tensor, whole tiles and tails, a tensor of no dimensions
    "adam_step": lambda dtype: native_cases.adam_step(
        [(0,), (), (63,), (17, 241), (2, 9001)], dtype, cuda
    ),
    "combine-momentum": lambda dtype: native_cases.combine(
        [(0,), (), (63,), (17, 241), (2, 9001)], [[1.0, -0.5, -0.25], [0.0, 1.0, 0.5]], dtype, cuda
    ),
    "combine-one": lambda dtype: native_cases.combine(
        [(1023,), (5,)], [[-0.5], [2.0], [0.25]], dtype, cuda
    ),
    "combine-add": lambda dtype: native_cases.combine([(4097,), (5,)], [[1.0, 0.3]], dtype, cuda),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """mima._native_cuda compiled against the stand-in for the CUDA runtime."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation")
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the emulation converts float16 with F16C")
    pybind11 = pytest.importorskip("pybind11")
    target = tmp_path_factory.mktemp("emulated") / (
        "_native_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
    )
    flags = [
        *(compiler, "-std=c++20", "-fPIC", "-mf16c", "-Wno-attributes"),
        *(f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}"),
        f"-I{sysconfig.get_path('include')}",
        f'-DMIMA_VERSION="{__version__}"',
    ]
    bindings = target.with_suffix(".o")
    kernels = *(EMULATION.glob("*.cpp")), *sorted((ROOT / "csrc/cuda").glob("*.cu"))
    for command in (
        # pybind11's templates, which take longest, are not worth the time to optimise them
        ["-O0", "-c", ROOT / "csrc/cuda/bindings.cpp", "-o", bindings],
        ["-O1", "-shared", bindings, "-x", "c++", *kernels, "-o", target],
    ):
        done = subprocess.run([*flags, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_native_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _on_emulation(emulated, monkeypatch):
    """Let the functions for CUDA launch the emulated kernels on CPU tensors."""

    @contextlib.contextmanager
    def launching(call, device):
        # a copy at another address, as on a device
        yield torch.frombuffer(call.table(), dtype=torch.uint8).clone(), 0

    for module in (cuda, extension):
        monkeypatch.setattr(module, "loaded", lambda device_type: emulated)
    monkeypatch.setattr(cuda, "_launching", launching)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_on_emulation")
def test_values_in_emulation(name, dtype):
    check_values(CASES[name](dtype))


@pytest.mark.usefixtures("_on_emulation")
def test_views_off_the_16_byte_grid():
    base, theta = torch.randn(5001)[1:], torch.randn(5002)[2:]
    (actual,) = cuda.weighted_merge_forward(
        WeightedMerge([base], [theta[:5000]], torch.tensor([0.25]))
    )
    torch.testing.assert_close(actual, base + 0.25 * (theta[:5000] - base))
    case = native_cases.projected_merge([9], [3], 64, torch.float32, cuda)
    off = [torch.cat([x.new_zeros(x.shape[0], 1), x], 1)[:, 1:] for x in case.inputs]
    for a, b in zip(case.run(off), case.reference(off), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_on_emulation")
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "off-the-grid"])
def test_lists_are_overwritten_where_they_may_be(offset):
    z, g, m, v = (torch.rand(5001)[offset:5000] for _ in range(4))
    given = AdamStep([z], [g], [m], [v], 0.5, 0.75, 0.9, 0.1, 0.25, 2)
    expected = reference.adam_step_forward(given)
    actual = cuda.adam_step_forward(given, overwrite=True)
    assert [x.data_ptr() for x in actual[1:]] == [m.data_ptr(), v.data_ptr()]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    x, y = torch.rand(5001)[offset:5000], torch.rand(5001)[offset:5000]
    total = x + 0.5 * y
    cuda.combine_into([x], [x, y], [[1.0, 0.5]])
    torch.testing.assert_close(x, total)
    # a factor of zero reads nothing: infinity times 0 would be NaN
    y.fill_(float("inf"))
    cuda.combine_into([x], [x, y], [[2.0, 0.0]])
    torch.testing.assert_close(x, 2 * total)


@pytest.mark.usefixtures("_on_emulation")
def test_gradients_of_a_step_that_nobody_needs_are_not_written():
    lists = [[torch.rand(70)] for _ in range(3)]
    saved = AdamStepSaved(*lists, 0.5, 0.75, 0.9, 0.1, 0.25, 2)
    d_out = [torch.rand(70) for _ in range(3)]
    every = cuda.adam_step_backward(d_out, saved, [True] * 4)
    for needs in ([False, True, False, True], [True, False, False, False], [False] * 4):
        some = cuda.adam_step_backward(d_out, saved, needs)
        for grads, need, expected in zip(some, needs, every, strict=True):
            assert len(grads) == need
            assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=need))


def test_too_many_tokens_for_shared_memory_is_an_error(emulated):
    W, C = torch.zeros(4, 64), torch.zeros(3073, 64)
    with pytest.raises(ValueError, match="at most 3072 tokens on CUDA"):
        emulated.ProjectedMerge(0, [W], [W], [C], [C], [], [], [], [])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_nothing_spills(source, arch, tmp_path):
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc"))
    if nvcc is None:
        pytest.skip("no nvcc")
    command = (
        f"{shlex.quote(nvcc)} -std=c++17 -O3 -cubin -arch={arch} -Xptxas -v -I{ROOT}/csrc "
        f"{source} -o {tmp_path}/out.cubin"
    )
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        done.stderr,
        re.DOTALL,
    )
    assert len(usage) >= 8, done.stderr
    for kernel, *numbers in usage:
        assert numbers == ["0", "0", "0"], f"{kernel}: stack, spill stores, spill loads {numbers}"


def test_a_capture_is_refused_before_anything_is_copied(monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    copied = []
    call = SimpleNamespace(table=lambda: copied.append(1) or bytearray(8))
    cpu = torch.device("cpu")
    refused = pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph")
    with refused, cuda._launching(call, cpu):
        pass
    assert not copied
    capturing.append(False)
    with cuda._launching(call, cpu) as (table, current):
        assert (len(table), current) == (8, 7)


@pytest.fixture
def _built():
    """Skip where the module was left out; one that is there has to work."""
    if importlib.util.find_spec("mima._native_cuda") is None:
        pytest.skip("mima._native_cuda was not built")


@pytest.mark.cuda
@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "name", [n for n in native_cases.CASES if n.split("-")[0] in extension.OPS["cuda"]]
)
def test_values_on_a_device(name, dtype):
    case = native_cases.CASES[name](dtype)
    reasons = extension.unsupported_reasons(name.split("-")[0], torch.empty(0, device="cuda"))
    assert reasons == []

    def there(xs):
        return [x.cuda() for x in xs]

    def here(xs):
        return [x.cpu() for x in xs]

    moved = native_cases.Case(
        case.inputs,
        lambda xs: here(case.run(there(xs))),
        case.reference,
        lambda d_out, xs: here(case.backward(there(d_out), there(xs))),
        case.length,
    )
    check_values(moved)


@pytest.mark.cuda
@pytest.mark.usefixtures("_built")
def test_work_is_queued_on_the_current_stream():
    stream = torch.cuda.Stream()
    base, late, out = (torch.full((1 << 20,), 1.0, device="cuda") for _ in range(3))

    def late_sum():
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        late.fill_(3.0)
        cuda.combine_into([out], [base, late], [[1.0, 1.0]])

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late_sum()  # loads the kernels, for which it may wait
        stream.synchronize()
        late.zero_()
        late_sum()
        waited = stream.query()
    stream.synchronize()
    assert bool((out == 4).all())
    if waited:
        pytest.skip("the driver waited for the stream to copy the table: this shows nothing")
