"""What `mima doctor` finds and shows."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from mima import __version__
from mima.cli import app
from mima.cli.diagnosis import diagnose
from mima.ops.backends.choice import BACKENDS, OPERATORS


def test_the_diagnosis_is_complete():
    found = diagnose()
    assert found.versions["mima"] == __version__
    assert found.versions["torch"] == torch.__version__.split("+")[0]
    assert found.devices[0].startswith("cpu: ")
    on_cpu = {service.operator: service for service in found.services if service.device == "cpu"}
    assert set(on_cpu) == set(OPERATORS)
    for service in on_cpu.values():
        assert set(service.refusals) == set(BACKENDS)
        assert service.refusals["reference"] == ""
        assert service.refusals[service.serving] == ""


def test_the_backend_variable_is_obeyed_and_shown(monkeypatch):
    monkeypatch.setenv("MIMA_BACKEND", "reference")
    found = diagnose()
    assert found.variables["MIMA_BACKEND"] == "reference"
    assert {service.serving for service in found.services} == {"reference"}


def test_every_operator_and_reason_is_printed():
    output = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).output
    for service in diagnose().services:
        assert service.operator in output
        for reason in filter(None, service.refusals.values()):
            assert reason in output


@pytest.mark.parametrize("backend", ["cuda", "tritno"])
def test_a_backend_that_is_none_serves_nothing(monkeypatch, backend):
    monkeypatch.setenv("MIMA_BACKEND", backend)
    assert {service.serving for service in diagnose().services} == {""}
    output = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).output
    assert f"MIMA_BACKEND: no backend {backend!r};" in output
    assert "Known: native, reference, triton" in output
