"""The operators' tests choose backends themselves."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIMA_BACKEND", raising=False)
