"""What this installation consists of, which devices it sees, and what serves each operator."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mima._version import __version__

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
)
VARIABLES = (
    *("MIMA_BACKEND", "MIMA_STRICT", "MIMA_CACHE"),
    *("MIMA_BUILD_NATIVE", "MIMA_BUILD_CUDA", "MIMA_CUDA_ARCHS"),
    *("MIMA_TEST_DEVICES", "MIMA_TEST_DEMO", "MIMA_TEST_ARTEFACTS", "MIMA_REQUIRE_CHROMIUM"),
    *("TRITON_INTERPRET", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
)


@dataclass(frozen=True)
class Service:
    """Who serves one operator on one kind of device.

    Attributes:
        operator: its public name in `mima.ops`.
        device: "cpu" or "cuda".
        serving: the backend that serves calls which name none; empty where none does.
        refusals: why each of the others cannot, by backend; empty for one that could.
    """

    operator: str
    device: str
    serving: str
    refusals: Mapping[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `mima doctor` shows."""

    versions: Mapping[str, str]
    devices: Sequence[str]
    native: Mapping[str, str]
    services: Sequence[Service]
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """Environment variables by name; None where one is not set."""


def diagnose() -> Diagnosis:
    """Look at the installation and the machine; nothing is changed and nothing is computed."""
    import torch

    device_types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return Diagnosis(
        versions=_versions(),
        devices=_devices(),
        native=_native(),
        services=[service for kind in device_types for service in _services(kind)],
        variables={name: os.environ.get(name) for name in VARIABLES},
    )


def show() -> None:
    """Print the diagnosis."""
    from rich.console import Group
    from rich.text import Text

    from mima.console import stdout
    from mima.errors import nearest
    from mima.ops.backends.choice import BACKENDS

    found = diagnose()
    console = stdout()
    console.print(_pairs("versions", found.versions))
    console.print(_pairs("devices", dict.fromkeys(found.devices, "")))
    console.print(_pairs("native code", found.native))
    shown = {name: "not set" if value is None else value for name, value in found.variables.items()}
    console.print(_pairs("environment", shown))
    for device in dict.fromkeys(service.device for service in found.services):
        services = [service for service in found.services if service.device == device]
        console.print(_table(device, services))
        notes = dict.fromkeys(
            f"{backend}: {reason}"
            for service in services
            for backend, reason in service.refusals.items()
            if reason
        )
        console.print(Group(*(Text(f"  {note}", style="dim") for note in notes)))
    asked = found.variables.get("MIMA_BACKEND")
    if asked and asked not in BACKENDS:
        hint = nearest(asked, BACKENDS)
        console.print(Text(f"MIMA_BACKEND: no backend {asked!r}; {hint}", style="red"))


def _versions() -> dict[str, str]:
    versions = {
        "mima": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> list[str]:
    import torch

    cpu = f"cpu: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"none visible (torch is built for {built})" if built else "torch is built without it"
        return [cpu, f"cuda: {why}"]
    found = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    return found


def _cpu_name() -> str:
    # platform.processor() is empty on Linux
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _native() -> dict[str, str]:
    from mima.ops.backends.extension import build_info

    info = build_info()
    if not info:
        return {"_native": "not built: this tree was never installed"}
    return {
        f"_{name}": _outcome(record) for name, record in info.items() if isinstance(record, Mapping)
    }


def _outcome(record: Mapping[str, Any]) -> str:
    return f"built with {record['tool']}" if record["built"] else f"not built: {record['reason']}"


def _services(device: str) -> list[Service]:
    from mima.ops.backends.choice import report

    services: dict[str, Service] = {}
    for row in report(device):
        service = services.setdefault(row.operator, Service(row.operator, device, "", {}))
        refusals = {**service.refusals, row.backend: "; ".join(row.reasons)}
        serving = row.backend if row.chosen else service.serving
        services[row.operator] = Service(row.operator, device, serving, refusals)
    return list(services.values())


def _pairs(title: str, pairs: Mapping[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    for name, value in pairs.items():
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _table(device: str, services: Sequence[Service]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"operators on {device}", title_justify="left", title_style="bold")
    backends = list(services[0].refusals)
    for heading in ("operator", *backends, "served by"):
        table.add_column(heading)
    for service in services:
        cells = []
        for backend in backends:
            refused = bool(service.refusals[backend])
            cells.append(Text("no", style="dim") if refused else Text("yes", style="green"))
        serving = Text(service.serving or "none", style="bold green" if service.serving else "red")
        table.add_row(service.operator, *cells, serving)
    return table
