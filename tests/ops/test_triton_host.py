"""What a call of the Triton backend costs the host: nothing is copied twice, nothing waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    batched_lora,
    group_norm,
    merge_lora,
    projected_merge,
    token_products,
    weighted_merge,
)
from support.triton_aot import recorded_launches

from mima.adapters.adapter import LowRank
from mima.adapters.mixed_batch import MixedLinear, Rows
from mima.ops._autograd import _functions
from mima.ops.backends import arguments, choice

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the launches"
)


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


def test_gradients_of_adapters_are_split_over_tokens() -> None:
    with recorded_launches(batched_lora) as launches:
        needs = False, False, True, True, False, False
        batched_lora.batched_lora_backward(torch.randn(2, 4096, 6), _adapted(2, 4096), needs)
    outer = [x for x in launches if x.kernel.__name__ == "_batched_lora_outer_kernel"]
    assert len(outer) == 2
    for launch in outer:
        assert launch.grid[0] == 2 * 4096 // launch.arguments["SPLIT_T"]
        assert launch.arguments["SPLIT_T"] <= 512


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


def test_tables_of_one_stream_serve_no_other() -> None:
    # Nothing makes another stream wait for the copy.
    x = torch.randn(3)
    with mock.patch.object(_common, "_stream", side_effect=[1, 2, 1]), _copies() as copied:
        first, second, again = (_common.pointer_table([x], x.device) for _ in range(3))
    assert len(copied) == 2
    assert first is again
    assert first is not second


def test_an_address_says_whether_it_is_aligned() -> None:
    x = torch.empty(64)
    assert _common.pointer_table([x, None, x[4:]], x.device).aligned
    assert not _common.pointer_table([x, x[1:]], x.device).aligned


def test_launches_under_a_default_device() -> None:
    base = [torch.randn(size, device="cpu") for size in (7, 2048)]
    with recorded_launches(weighted_merge) as launches, torch.device("meta"):
        _common._pointer_table.cache_clear()
        _common._sizes_on_device.cache_clear()
        _common._block_map.cache_clear()
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
