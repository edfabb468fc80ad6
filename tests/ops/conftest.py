"""The operators' tests choose backends themselves, and Triton's interpreter need not dawdle."""

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIMA_BACKEND", raising=False)


@pytest.fixture
def _full_float32():
    """Keep TF32 off, in kernels and in PyTorch: who starts the tests may have allowed it."""
    from mima.bilevel.hypergradient import full_float32

    with full_float32():
        yield


@pytest.fixture(autouse=True, scope="session")
def _functions_are_prepared_once():
    """Let Triton's interpreter prepare a kernel's inner functions once, not at each call.

    It looks through all of triton.language each time, which takes longer than what is called; a
    launch prepares what its own functions need by itself.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    prepared, first = set(), InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn)
        return first(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
