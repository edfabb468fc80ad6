"""Which code serves an operator, and why other code does not.

The only place that loads native and Triton code. A backend is a module with the functions
`<op>_forward` and `<op>_backward`, which take the tuples of `mima.ops.backends.arguments`, and
`unsupported_reasons(op, *tensors) -> list[str]`; the native one has the first two in a module for
each type of device.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from mima.errors import MimaError, nearest

logger = logging.getLogger(__name__)

OPERATORS = (
    *("weighted_merge", "projected_merge", "batched_lora", "merge_lora"),
    *("adam_step", "combine", "token_outputs"),
    *("group_norm", "geglu", "attention"),
)

_MODULES = {
    "reference": "mima.ops.backends.reference",
    "triton": "mima.kernels",
    "native": "mima.ops.backends.extension",
}
# the halves of the native backend
_LAUNCHERS = {
    ("native", "cpu"): "mima.ops.backends.cpu",
    ("native", "cuda"): "mima.ops.backends.cuda",
}
BACKENDS = tuple(_MODULES)

# Best first; the reference stands behind each. Triton serves CPU tensors in its interpreter only,
# which is for tests and never chosen.
_KERNELS_FOR_DEVICE = {"cpu": ("native",), "cuda": ("triton", "native")}


class BackendError(MimaError):
    """A backend that was asked for, by name or by `MIMA_STRICT`, cannot serve."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report: an operator on a kind of tensor, and one backend."""

    operator: str
    device: str
    dtype: torch.dtype
    backend: str
    reasons: tuple[str, ...]
    """Why the backend cannot serve; empty if it can."""
    chosen: bool
    """Whether it serves calls that name no backend."""

    @property
    def available(self) -> bool:
        """Whether the backend can serve."""
        return not self.reasons


def resolve(
    op: str, tensor: torch.Tensor, requested: str = "", width: int | None = None
) -> ModuleType:
    """Return the module that serves `op` for tensors like this one.

    Args:
        op: one of `OPERATORS`.
        tensor: any of the operator's tensors; its device and dtype count.
        requested: a name in `BACKENDS`; empty: `MIMA_BACKEND`, or the best that can serve.
        width: columns of a head, of ``attention``: plain PyTorch serves those that kernels do not.

    Raises:
        BackendError: the requested backend is unknown or cannot serve, heads so wide included; or
            none but the reference can and `MIMA_STRICT=1` is set. The message gives the reasons.
        TypeError: `requested` is no name.
    """
    if not isinstance(requested, str):
        raise TypeError(f"{op}: backend must be a string or None, got {requested!r}")
    if not requested:
        requested = os.environ.get("MIMA_BACKEND", "")
    strict = os.environ.get("MIMA_STRICT", "") == "1"
    backend = _choose(op, tensor.device, tensor.dtype, requested, strict)
    module = _launchers(backend, tensor.device.type)
    if width is None or not hasattr(module, f"widest_{op}"):
        return module
    most = getattr(module, f"widest_{op}")(tensor.device, tensor.dtype)
    if most is None or width <= most:
        return module
    why = f"heads of {width} columns are wider than the {most} that {tensor.device} holds"
    if requested or strict:
        raise BackendError(f"{op}: no kernel can serve {tensor.dtype} on {tensor.device}: {why}")
    _say_once(op, str(tensor.dtype), why)
    return _launchers("reference", tensor.device.type)


@functools.cache
def _say_once(op: str, dtype: str, why: str) -> None:
    logger.warning("%s: plain PyTorch serves %s: %s", op, dtype, why)


def report(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Return the table operator × backend for a device and dtype.

    Args:
        device: None means CUDA where there is one, else CPU.
        dtype: of the tensors that an operator would be called with.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    requested = os.environ.get("MIMA_BACKEND", "")
    strict = os.environ.get("MIMA_STRICT", "") == "1"
    rows = []
    for op in OPERATORS:
        try:
            chosen = _choose(op, device, dtype, requested, strict)
        except BackendError:
            chosen = ""  # what MIMA_BACKEND or MIMA_STRICT asks for cannot serve: nothing does
        rows += [
            Row(
                operator=op,
                device=device.type,
                dtype=dtype,
                backend=backend,
                reasons=_reasons(op, device, dtype, backend),
                chosen=backend == chosen,
            )
            for backend in BACKENDS
        ]
    return rows


@functools.cache
def _choose(op: str, device: torch.device, dtype: torch.dtype, requested: str, strict: bool) -> str:
    """Return a backend's name. Cached, so that a fallback is logged once."""
    if requested:
        if requested not in _MODULES:
            raise BackendError(
                f"{op}: unknown backend {requested!r}; {nearest(requested, BACKENDS)}"
            )
        reasons = _reasons(op, device, dtype, requested)
        if reasons:
            raise BackendError(
                f"{op}: backend {requested} cannot serve {dtype} on {device}: {'; '.join(reasons)}"
            )
        return requested
    refusals = []
    for backend in _KERNELS_FOR_DEVICE.get(device.type, ()):
        reasons = _reasons(op, device, dtype, backend)
        if not reasons:
            return backend
        refusals.append(f"{backend}: {'; '.join(reasons)}")
    why = ". ".join(refusals) or f"no kernel is written for device {device.type}"
    if strict:
        raise BackendError(
            f"{op}: no kernel can serve {dtype} on {device} and MIMA_STRICT=1 is set. {why}"
        )
    logger.warning("%s: plain PyTorch serves %s on %s. %s", op, dtype, device, why)
    return "reference"


@functools.cache
def _reasons(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> tuple[str, ...]:
    """Return why a backend cannot serve an operator; empty if it can."""
    broken = _load_error(backend)
    if broken:
        return (broken,)
    if device.type == "cuda" and not torch.cuda.is_available():
        return ("no CUDA device",)
    sample = torch.empty(0, dtype=dtype, device=device)
    reasons: list[str] = _module(backend).unsupported_reasons(op, sample)
    return tuple(reasons)


@functools.cache
def _load_error(backend: str) -> str:
    try:
        _module(backend)
    except (ImportError, OSError) as error:  # not installed, or built for something else
        return f"cannot be loaded ({error})"
    return ""


@functools.cache
def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


@functools.cache
def _launchers(backend: str, device_type: str) -> ModuleType:
    """Return the module with a backend's functions for a type of device."""
    return import_module(_LAUNCHERS.get((backend, device_type), _MODULES[backend]))
