"""The choice of a backend is explained, can be overridden, and is never silent."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import pytest
import torch

from mima import ops
from mima.ops.backends import choice, extension, reference

x = torch.ones(2, 2)


@pytest.fixture(autouse=True)
def _fresh_choices() -> Any:
    _clear()
    yield
    _clear()


def _clear() -> None:
    for cached in (
        *(choice._choose, choice._reasons, choice._load_error),
        *(choice._module, choice._launchers),
    ):
        cached.cache_clear()


class _Narrow:
    """Kernels that hold heads of 128 columns; the others they would not compute."""

    def __init__(self) -> None:
        self.widest_attention = lambda device, dtype: 128


@pytest.fixture
def _narrow_kernels() -> Any:
    launchers = choice._launchers

    def narrow(backend: str, device_type: str) -> Any:
        return _Narrow() if backend == "native" else launchers(backend, device_type)

    # undone before the choices are forgotten
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_choose", lambda *args: args[3] or "native")
        patch.setattr(choice, "_launchers", narrow)
        patch.delenv("MIMA_STRICT", raising=False)
        choice._say_once.cache_clear()
        yield


@pytest.mark.usefixtures("_narrow_kernels")
def test_heads_that_a_kernel_cannot_hold_are_plain_pytorchs_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(choice.resolve("attention", x, width=128), _Narrow)
        assert not caplog.records
        assert choice.resolve("attention", x, width=160) is reference
        assert choice.resolve("attention", x, width=160) is reference
    assert len(caplog.records) == 1
    assert "heads of 160 columns are wider than the 128" in caplog.text
    with pytest.raises(choice.BackendError, match="heads of 160 columns"):
        choice.resolve("attention", x, "native", width=160)
    monkeypatch.setenv("MIMA_STRICT", "1")
    with pytest.raises(choice.BackendError, match="heads of 160 columns"):
        choice.resolve("attention", x, width=160)
    assert choice.resolve("attention", x, "reference", width=10_000) is reference


@pytest.mark.usefixtures("_narrow_kernels")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_heads_that_a_kernel_cannot_hold_are_served(compiled: bool) -> None:
    torch.compiler.reset()
    q, k, v = (torch.randn(2, n, 160, requires_grad=True) for n in (3, 4, 4))

    def f(*args: torch.Tensor, **options: str) -> torch.Tensor:
        return ops.attention(*args, **options).square().sum()

    run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    loss, expected = run(q, k, v), f(q, k, v, backend="reference")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, (q, k, v)) for y in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def _break(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make backends fail to load, as an extension built for another Python would."""
    load = choice.import_module

    def import_module(name: str) -> ModuleType:
        if name in [choice._MODULES[broken] for broken in names]:
            raise ImportError(f"{name}: built for something else")
        return load(name)

    monkeypatch.setattr(choice, "import_module", import_module)


def _served_by(monkeypatch: pytest.MonkeyPatch) -> str:
    for row in choice.report("cpu"):
        if row.operator == "weighted_merge" and row.chosen:
            return row.backend
    return ""


def test_report_is_the_whole_table() -> None:
    rows = choice.report("cpu")
    assert [(row.operator, row.backend) for row in rows] == [
        (op, backend) for op in choice.OPERATORS for backend in choice.BACKENDS
    ]
    for row in rows:
        assert row.available == (not row.reasons)
        assert all(isinstance(reason, str) and reason for reason in row.reasons)
        assert row.device == "cpu"
        assert row.dtype == torch.float32
    for op in choice.OPERATORS:
        assert sum(row.chosen for row in rows if row.operator == op) == 1
        assert all(row.available for row in rows if row.backend == "reference")


def test_report_of_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    rows = [row for row in choice.report("cuda") if row.backend != "reference"]
    assert rows
    assert not any(row.available or row.chosen for row in rows)


def test_triton_serves_the_cpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from mima import kernels

    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(choice.BackendError, match=r"triton cannot serve .* TRITON_INTERPRET=1"):
        ops.weighted_merge(x, [x], [1.0], backend="triton")


def test_an_unserved_dtype_is_a_reason() -> None:
    with pytest.raises(choice.BackendError, match=r"native cannot serve torch\.complex64"):
        choice.resolve("merge_lora", torch.zeros(1, dtype=torch.complex64), "native")
    assert extension.unsupported_reasons("merge_lora", torch.zeros(1, dtype=torch.complex64))


def test_the_argument_and_the_environment_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.resolve("weighted_merge", x, "reference").__name__.endswith("backends.reference")
    monkeypatch.setenv("MIMA_BACKEND", "reference")
    assert choice.resolve("weighted_merge", x).__name__.endswith("backends.reference")
    assert _served_by(monkeypatch) == "reference"
    monkeypatch.setenv("MIMA_BACKEND", "nativ")
    with pytest.raises(choice.BackendError, match=r"unknown backend 'nativ'; .*native"):
        ops.weighted_merge(x, [x], [1.0])
    assert _served_by(monkeypatch) == ""
    # The argument wins.
    ops.weighted_merge(x, [x], [1.0], backend="reference")


def test_a_backend_that_was_asked_for_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "native")
    monkeypatch.setenv("MIMA_STRICT", "0")
    with pytest.raises(
        choice.BackendError, match=r"native cannot serve .*cannot be loaded \(mima.ops.backends"
    ):
        ops.weighted_merge(x, [x], [1.0], backend="native")


def test_a_fallback_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _break(monkeypatch, "native")
    monkeypatch.setenv("MIMA_STRICT", "0")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ops.weighted_merge(x, [x], [1.0])
    (record,) = caplog.records
    assert "plain PyTorch serves torch.float32 on cpu" in record.getMessage()
    assert "built for something else" in record.getMessage()


def test_strict_raises_instead_of_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "native")
    monkeypatch.setenv("MIMA_STRICT", "1")
    with pytest.raises(choice.BackendError, match=r"MIMA_STRICT=1 is set.*native: cannot be"):
        ops.weighted_merge(x, [x], [1.0])
    assert _served_by(monkeypatch) == ""
    # The reference may still be asked for.
    ops.weighted_merge(x, [x], [1.0], backend="reference")


def test_the_backward_is_served_by_the_backend_of_the_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaf = torch.ones(2, 2, requires_grad=True)
    merged = ops.weighted_merge(leaf, [x], [1.0], backend="reference")
    monkeypatch.setenv("MIMA_BACKEND", "nonsense")
    merged.sum().backward()
    assert leaf.grad is not None
