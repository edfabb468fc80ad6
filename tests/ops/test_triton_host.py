"""What a call of the Triton backend costs the host: nothing is copied twice, nothing waited for."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

import mima.kernels
import triton
from mima.kernels import (
    _common,
    adam_step,
    attention,
    batched_lora,
    combine,
    group_norm,
    merge_lora,
    projected_merge,
    token_products,
    weighted_merge,
)
from support.operator_cases import skip_unless_available
from support.triton_aot import recorded_launches

from mima import ops
from mima.adapters.adapter import LowRank
from mima.adapters.mixed_batch import MixedLinear, Rows
from mima.ops._autograd import _functions
from mima.ops.backends import arguments, choice, cpu

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the launches"
)


@pytest.fixture(autouse=True)
def _no_tables() -> None:
    """Every test makes its own tables, wherever in memory earlier ones had their tensors."""
    for cache in (_common._pointer_table, _common._sizes_on_device, _common._block_map):
        cache.cache_clear()


class _NoReads(TorchDispatchMode):
    """Refuse operations that would wait for a GPU: a value that is read back, a copy across."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
        assert name not in waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Refuse everything by which Python learns of a tensor's values, or copies it to a device."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("waits for the device")

    readers = ("item", "tolist", "numpy", "cpu", "cuda", "__bool__", "__int__", "__float__")
    with mock.patch.multiple(torch.Tensor, **dict.fromkeys(readers, refuse)), _NoReads():
        yield


@contextmanager
def _copies() -> Iterator[list[torch.Tensor]]:
    """Keep what is copied to the device."""
    copied: list[torch.Tensor] = []
    original = _common._copied

    def copy(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(host)
        return original(host, device)

    with mock.patch.object(_common, "_copied", copy):
        yield copied


def test_a_forward_of_adapted_layers_waits_for_nothing() -> None:
    rows = Rows()
    layers = [
        MixedLinear(
            torch.nn.Linear(8, 6),
            [None if n == skipped else LowRank(*_factors(), 0.5) for n in range(3)],
            rows,
        )
        for skipped in (0, 2, 3)
    ]
    x = torch.randn(4, 5, 8, requires_grad=True)
    rows.choose([0, 2])
    for layer in layers:
        # the values are checked on the host: no operator reads the indices again
        index = rows.index(layer._places, len(layer._A), 4, x.device)
        assert index.tolist() == [layer._places[n] for n in (0, 2, 0, 2)]
    with (
        mock.patch.object(choice, "resolve", return_value=mima.kernels),
        recorded_launches(batched_lora) as launches,
        _no_synchronisation(),
    ):
        outputs = [layer(x) for layer in layers]
        torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
    assert [launch.kernel.__name__ for launch in launches] == ["_batched_lora_fwd_kernel"] * 6


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8), torch.randn(6, 4)


def test_an_adapter_that_is_not_there_is_refused_where_it_is_chosen() -> None:
    rows = Rows()
    layer = MixedLinear(torch.nn.Linear(8, 6), [LowRank(*_factors(), 1.0)], rows)
    rows.choose([2])
    with pytest.raises(IndexError):
        layer(torch.randn(1, 5, 8))


def _adapted(b: int, t: int) -> arguments.BatchedLoraSaved:
    A, B = (list(pair) for pair in zip(*(_factors() for _ in range(3)), strict=True))
    x, weight = torch.randn(b, t, 8), torch.randn(6, 8)
    return arguments.BatchedLoraSaved(x, weight, A, B, torch.ones(3), torch.arange(b) % 3, None)


@pytest.mark.parametrize("concepts", [1, 2, 3, 4, 5, 6, 7, 9])
def test_no_product_of_a_merge_in_float32_is_made_twice(concepts: int) -> None:
    W0, C = [torch.empty(6, 8)], [torch.empty(2, 8)] * concepts
    with recorded_launches(projected_merge) as launches:
        projected_merge.projected_merge_forward(arguments.ProjectedMerge(W0, W0 * concepts, C, C))
    (launch,) = launches
    assert concepts % launch.arguments["GROUP"] == 0


def test_gradients_of_adapters_are_split_over_tokens() -> None:
    with recorded_launches(batched_lora) as launches:
        needs = False, False, True, True, False, False
        batched_lora.batched_lora_backward(torch.randn(2, 4096, 6), _adapted(2, 4096), needs)
    outer = [x for x in launches if x.kernel.__name__ == "_batched_lora_outer_kernel"]
    assert len(outer) == 2
    for launch in outer:
        assert launch.grid[0] == 2 * 4096 // launch.arguments["SPLIT_T"]
        assert launch.arguments["SPLIT_T"] <= 512


def test_no_grid_is_too_long_on_an_axis_that_is_not_the_first() -> None:
    b = 70_000
    with recorded_launches(batched_lora) as launches:
        for need_x in (True, False):
            needs = need_x, False, True, True, True, False
            batched_lora.batched_lora_backward(torch.empty(b, 1, 6), _adapted(b, 1), needs)
    assert {launch.kernel.__name__ for launch in launches} == {
        f"_batched_lora_{name}_kernel" for name in ("fwd", "project", "outer", "sum")
    }
    for launch in launches:
        assert max(launch.grid[1:], default=1) <= 65_535, launch.kernel.__name__


def test_heads_have_a_widest_where_there_is_no_shared_memory_to_opt_into() -> None:
    """As of HIP, whose properties have no such field."""
    said = mock.Mock(spec=["shared_memory_per_block"], shared_memory_per_block=65_536)
    for properties in (said, mock.Mock(spec=[])):
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
            widest = mima.kernels.widest_attention.__wrapped__
            assert widest(torch.device("cuda"), torch.bfloat16) == 128
    assert attention.widest(0, torch.float32) == 128


class _FixedOrder(TorchDispatchMode):
    """Refuse PyTorch's operations whose sums on CUDA come in any order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        anyhow = {"index_add", "scatter_add", "scatter_reduce", "index_put", "put", "index_reduce"}
        assert name not in anyhow, f"{func} adds in any order"
        return func(*args, **(kwargs or {}))


def test_sums_are_in_a_fixed_order() -> None:
    modules = batched_lora, group_norm, merge_lora, projected_merge, token_products, weighted_merge
    base, three = [torch.randn(6, 8)], torch.ones(3)
    adapted = _adapted(4, 5)
    merged = arguments.MergeLora(base[0], adapted.A, adapted.B, three, three)
    texts = [torch.randn(2, 8)] * 3
    x, channels = torch.randn(2, 8, 4, 4), torch.ones(8)
    norm = arguments.GroupNorm(x, channels, channels, 2, 1e-5, True)
    with recorded_launches(*modules) as launches, _FixedOrder():
        batched_lora.batched_lora_backward(torch.randn(4, 5, 6), adapted, (True,) * 6)
        merge_lora.merge_lora_backward(base[0], merged, (True,) * 5)
        weighted_merge.weighted_merge_backward(
            base, arguments.WeightedMerge(base, base * 3, three), (True,) * 3
        )
        projected_merge.projected_merge_backward(
            base, arguments.ProjectedMerge(base, base * 3, texts, texts), (True,) * 4
        )
        token_products.token_sums(base, torch.randn(6, 2))
        group_norm.group_norm_backward(x, norm, (True,) * 3)
        group_norm.group_norm_double_backward(x, (x, channels, channels), norm, (True,) * 4)
    assert launches
    for module in vars(mima.kernels).values():
        for function in vars(module).values() if hasattr(module, "__file__") else ():
            if isinstance(function, triton.JITFunction):
                assert "atomic" not in function.src, f"{function.__name__} adds in any order"


def test_tables_are_copied_once_for_the_same_tensors() -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    A, B = (list(pair) for pair in zip(*(_factors() for _ in range(3)), strict=True))
    scale, index = torch.ones(3), torch.tensor([2, 0])
    base = [torch.randn(size) for size in (5, 3000)]
    W0, C = [torch.randn(6, 8)], [torch.randn(2, 8)]

    def calls() -> None:
        adapted = x, weight, A, B, scale, index, None
        batched_lora.batched_lora_forward(arguments.BatchedLora(*adapted), [])
        needs = True, False, False, False, True, False
        saved = arguments.BatchedLoraSaved(*adapted)
        batched_lora.batched_lora_backward(x[..., :6], saved, needs)
        merge_lora.merge_lora_forward(arguments.MergeLora(weight, A, B, scale, scale))

    def merges() -> None:
        weighted_merge.weighted_merge_forward(arguments.WeightedMerge(base, base, torch.ones(1)))
        projected_merge.projected_merge_forward(arguments.ProjectedMerge(W0, W0, C, C))

    modules = batched_lora, merge_lora, weighted_merge, projected_merge
    with recorded_launches(*modules), _copies() as copied:
        calls()
        merges()
        assert copied
        copied.clear()
        calls()
        assert not copied
        # the results of a merge are new tensors: their addresses are, sizes and blocks are not
        merges()
        assert len(copied) <= 2


OF_LISTS = adam_step, combine, projected_merge, token_products, weighted_merge
"""The modules of operators whose lists have the tensors of a whole model."""
OURS = tuple(str(Path(module.__file__ or "").parent) for module in (mima, mima.kernels, triton))


@contextmanager
def _python_calls() -> Iterator[Counter[str]]:
    """Count the Python functions of mima and Triton that run, and those that they call."""
    calls: Counter[str] = Counter()

    def look(frame: FrameType, event: str, arg: object) -> None:
        caller = frame.f_back
        files = frame.f_code.co_filename, caller.f_code.co_filename if caller else ""
        # a generator is called once for each of its values
        if event == "call" and any(file.startswith(OURS) for file in files):
            calls[f"{Path(files[0]).name}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    # a collection may begin in any call, and others have callbacks there
    gc.disable()
    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        gc.enable()


def _calls_on_lists(P: int) -> dict[str, Callable[[], object]]:
    """Every operator on lists, and its gradients, for lists of P tensors."""
    a, b, c, d = ([torch.randn(4, 8) for _ in range(P)] for _ in range(4))
    leaves = [torch.randn(4, 8, requires_grad=True) for _ in range(2 * P)]
    up = [torch.randn(4, 8) for _ in range(3 * P)]
    texts = [torch.randn(2, 8, requires_grad=True) for _ in range(2)]
    text, A = texts[0].detach(), torch.randn(4 * P, 2)
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    rule = {"lr": 0.1, "step": 1}

    def gradients(outputs: Any, *inputs: torch.Tensor) -> object:
        return torch.autograd.grad(outputs, [*leaves[: 2 * P], *inputs], up[: len(outputs)])

    merged = leaves[:P], [leaves[P:], c]
    return {
        "weighted_merge": lambda: ops.weighted_merge(a, [b, c], weights.detach()),
        "weighted_merge backward": lambda: gradients(ops.weighted_merge(*merged, weights), weights),
        "weighted_merge_pullback": lambda: ops.weighted_merge_pullback(a, weights.detach()),
        "projected_merge": lambda: ops.projected_merge(a, [b, c], [text] * 2, [text] * 2),
        "projected_merge backward": lambda: gradients(
            ops.projected_merge(*merged, texts, texts), *texts
        ),
        "projected_merge_pullback": lambda: ops.projected_merge_pullback(a, [text], [text]),
        "adam_step": lambda: ops.adam_step(a, b, c, d, **rule),
        "adam_step, moments in place": lambda: ops.adam_step(a, b, c, d, **rule, overwrite=True),
        "adam_step backward": lambda: gradients(
            list(chain(*ops.adam_step(leaves[:P], leaves[P:], c, d, **rule)))
        ),
        "adam_step_pullback": lambda: ops.adam_step_pullback(a, b, c, d, a, b, **rule),
        "combine": lambda: ops.combine([a, b], [[1, 0.5]]),
        "combine in place": lambda: ops.combine([a, b], [[1, 0.5]], into=[a]),
        "combine backward": lambda: gradients(ops.combine([leaves[:P], leaves[P:]], [[1, 0.5]])[0]),
        "token_outputs": lambda: ops.token_outputs(a, text),
        "add_token_outputs_": lambda: ops.add_token_outputs_(a, A, text),
        "token_sums": lambda: ops.token_sums(a, A),
    }


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_no_python_function_runs_for_each_tensor_of_a_list(backend: str) -> None:
    if backend == "native":
        skip_unless_available("native", "combine", torch.float32)
    module = cpu if backend == "native" else mima.kernels
    found = []
    # A call's results may lie where an earlier one's did: its table would then be found or not.
    anew = mock.patch.object(_common, "_pointer_table", _common._pointer_table.__wrapped__)
    chosen = mock.patch.object(choice, "resolve", return_value=module)
    with chosen, anew, recorded_launches(*OF_LISTS):
        for P in (3, 40):
            calls = _calls_on_lists(P)
            for call in calls.values():
                # what is kept of sizes is made here
                call()
            counted = {}
            for name, call in calls.items():
                with _python_calls() as counted[name]:
                    call()
            found.append(counted)
    assert all(counted.total() > 20 for counted in found[0].values())
    few, many = found
    more = {name: many[name] - few[name] for name in few}
    assert more == {name: Counter() for name in few}


def test_tables_of_one_stream_serve_no_other() -> None:
    # Nothing makes another stream wait for the copy.
    x = torch.randn(3)
    with mock.patch.object(_common, "_stream", side_effect=[1, 2, 1]), _copies() as copied:
        first, second, again = (_common.pointer_table([x], x.device) for _ in range(3))
    assert len(copied) == 2
    assert first is again
    assert first is not second


@contextmanager
def _on_a_stream(*, captured: bool) -> Iterator[None]:
    """Let the CPU pass for a GPU, whose stream is being captured into a CUDA graph or is not."""
    original = _common._stream

    def stream(device: torch.device) -> int:
        return original(torch.device("cuda"))

    with (
        mock.patch.object(_common, "_stream", stream),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=captured),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.Mock(cuda_stream=7)),
    ):
        yield


@pytest.mark.parametrize("known", [False, True], ids=["new-tensors", "tables-are-there"])
@pytest.mark.parametrize("name", _calls_on_lists(1))
def test_a_capture_of_an_operator_on_lists_is_refused(name: str, known: bool) -> None:
    call = _calls_on_lists(3)[name]
    with (
        mock.patch.object(choice, "resolve", return_value=mima.kernels),
        recorded_launches(*OF_LISTS) as launches,
        _copies() as copied,
    ):
        if known:
            with _on_a_stream(captured=False):
                call()
            assert launches
        launches.clear()
        copied.clear()
        refused = pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph")
        with _on_a_stream(captured=True), refused:
            call()
        # a graph would have kept the addresses of tables, which stay as long as a cache keeps them
        assert not launches
        assert not copied
        # nothing of the refusal is kept
        with _on_a_stream(captured=False):
            call()
        assert launches


def test_what_is_asked_of_the_current_device_is_asked_of_the_tensors() -> None:
    """Whether a stream is captured, and who owns pinned memory, where another device is current."""
    current = [0]
    asked: list[str] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        yield
        current.pop()

    def is_capturing() -> bool:
        asked.append("captured")
        return current[-1] == 1

    host = mock.Mock(spec=["pin_memory"])
    host.pin_memory.side_effect = lambda: mock.Mock(to=lambda *a, **k: current[-1])
    with (
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", is_capturing),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.Mock(cuda_stream=7)),
    ):
        assert _common._stream(torch.device("cuda", 0)) == 7
        with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
            _common._stream(torch.device("cuda", 1))
        assert _common._copied(host, torch.device("cuda", 1)) == 1
    assert len(asked) == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, ["gcc"]),
        OSError(30, "Read-only file system"),
    ],
    ids=["no-compiler", "no-headers", "read-only"],
)
def test_what_keeps_triton_from_launching_is_a_reason(error: Exception) -> None:
    on_gpu = mock.Mock(dtype=torch.float32, device=torch.device("cuda", 0))
    works = mock.Mock(spec=["utils"])
    broken = mock.Mock(spec=[])
    type(broken).utils = mock.PropertyMock(side_effect=error)
    for active, says in ((works, []), (broken, [str(error)])):
        mima.kernels._launch_error.cache_clear()
        with mock.patch.object(triton.runtime.driver, "_active", active):
            reasons = mima.kernels.unsupported_reasons("combine", on_gpu)
        assert len(reasons) == len(says)
        assert all(said in reason for said, reason in zip(says, reasons, strict=True))
        assert all("Triton cannot launch kernels here" in reason for reason in reasons)
    mima.kernels._launch_error.cache_clear()
    # what runs on the CPU asks for no driver
    (reason,) = mima.kernels.unsupported_reasons("combine", torch.empty(0))
    assert "interpreter" in reason
    assert mima.kernels._launch_error.cache_info().currsize == 0


def test_an_address_says_whether_it_is_aligned() -> None:
    x = torch.empty(64)
    assert _common.pointer_table([x, None, x[4:]], x.device).aligned
    assert not _common.pointer_table([x, x[1:]], x.device).aligned


def test_launches_under_a_default_device() -> None:
    base = [torch.randn(size, device="cpu") for size in (7, 2048)]
    with recorded_launches(weighted_merge) as launches, torch.device("meta"):
        weighted_merge.weighted_merge_forward(
            arguments.WeightedMerge(base, base, torch.ones(1, device="cpu"))
        )
    (launch,) = launches
    assert launch.arguments["table_ptr"].tolist()[:2] == [b.data_ptr() for b in base]
    assert launch.arguments["sizes_ptr"].tolist() == [7, 2048]
    assert launch.arguments["block_map_ptr"].tolist() == [[0, 0], [1, 0], [1, 1]]


def test_torch_compile_leaves_the_operators_out_of_its_cuda_graphs() -> None:
    assert len(_functions) >= 2 * len(choice.OPERATORS)
    for op in _functions:
        assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


def test_products_follow_pytorchs_setting_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.version, "hip", None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert matmul.fp32_precision == "ieee"
        assert _common.dot_precision(torch.float32) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert _common.dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _common.dot_precision(torch.float32) == "ieee"
