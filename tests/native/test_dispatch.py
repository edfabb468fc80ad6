"""Which instruction set runs, and what the backend says where it cannot serve."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.native_cases import needs_cpu_kernels

from mima.ops.backends import cpu, extension
from mima.ops.backends.arguments import WeightedMerge

pytestmark = needs_cpu_kernels


def test_unknown_level_is_an_error(monkeypatch):
    monkeypatch.setenv("MIMA_CPU_LEVEL", "sse9")
    with pytest.raises(
        ValueError, match="MIMA_CPU_LEVEL must be generic, avx2 or avx512, got sse9"
    ):
        cpu.cpu_level()
    with pytest.raises(ValueError, match="MIMA_CPU_LEVEL"):
        cpu.weighted_merge_forward(WeightedMerge([torch.ones(3)], [], torch.empty(0)))


@pytest.mark.parametrize("op", extension.OPS["cpu"])
@pytest.mark.parametrize("dtype", list(extension.DTYPE_CODES), ids=str)
def test_every_operator_is_served_on_the_cpu(op, dtype):
    assert extension.unsupported_reasons(op, torch.empty(0, dtype=dtype)) == []


def test_reasons_name_device_and_dtype():
    (reason,) = extension.unsupported_reasons("weighted_merge", torch.empty(0, device="meta"))
    assert "meta" in reason
    (reason,) = extension.unsupported_reasons("weighted_merge", torch.empty(0, dtype=torch.int32))
    assert "int32" in reason


def test_a_module_of_older_sources_says_what_it_lacks(monkeypatch):
    older = SimpleNamespace(weighted_merge_forward=None)
    monkeypatch.setattr(extension, "_load", lambda device_type: (older, ""))
    assert extension.unsupported_reasons("weighted_merge", torch.empty(0)) == []
    (reason,) = extension.unsupported_reasons("combine", torch.empty(0))
    assert "mima._native was built from other sources, which lack it" in reason


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ([800, 900], (7, 5), False),
        ([800, 900], (8, 0), True),
        ([800, 900], (8, 9), True),
        ([800, 900], (10, 0), True),
        ([750, 900], (8, 6), False),
        # a module of older sources does not say
        (None, (7, 5), True),
    ],
)
def test_a_module_for_other_devices_says_so(monkeypatch, archs, capability, served):
    built = {} if archs is None else {"archs": archs}
    module = SimpleNamespace(Combine=None, **built)
    monkeypatch.setattr(extension, "_load", lambda device_type: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    reasons = extension.unsupported_reasons("combine", there)
    assert bool(reasons) != served
    if not served:
        own = "{}{}".format(*capability)
        assert f"cuda:1 is sm_{own}: install mima again with MIMA_CUDA_ARCHS={own}" in reasons[0]


def test_missing_module_gives_the_reason_that_the_installation_wrote_down(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    recorded = {"native": {"built": False, "reason": "no C++ compiler: install g++"}}
    monkeypatch.setattr(extension, "build_info", lambda: recorded)
    extension._load.cache_clear()
    try:
        (reason,) = extension.unsupported_reasons("merge_lora", torch.empty(0))
        assert reason == "mima._native was not built: no C++ compiler: install g++"
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
            cpu.weighted_merge_forward(WeightedMerge([torch.ones(3)], [], torch.empty(0)))
    finally:
        extension._load.cache_clear()


def test_module_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "__version__", "99.0")
    extension._load.cache_clear()
    try:
        (reason,) = extension.unsupported_reasons("merge_lora", torch.empty(0))
        assert "this is 99.0" in reason
    finally:
        extension._load.cache_clear()


def test_bindings_refuse_what_would_be_a_wild_read():
    module = extension.loaded("cpu")
    one, x, wide = torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(2, 3).mT
    zero = torch._efficientzerotensor((1, 1))
    with pytest.raises(ValueError, match="out: expected 2 tensors, got 1"):
        module.weighted_merge_forward(0, 1, [one, one], [], [], [one])
    with pytest.raises(ValueError, match="dtype code"):
        module.weighted_merge_forward(9, 1, [], [], [], [])
    with pytest.raises(ValueError, match=r"index must be in \[-1, 1\), got 1"):
        module.batched_lora_forward(0, 1, x, one, True, [one], [one], [1.0], [1], x, True, None)
    with pytest.raises(ValueError, match=r"A\[0\]: the elements of a row must lie side by side"):
        module.merge_lora_forward(0, 1, one, [wide], [one], [1.0], [1.0], one)
    with pytest.raises(TypeError, match=r"thetas\[0\] must be a strided tensor in memory"):
        module.weighted_merge_forward(0, 1, [one], [zero], [1.0], [one])
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.weighted_merge_forward(0, 1, [1], [], [], [one])
