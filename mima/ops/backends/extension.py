"""The native backend's extension modules, which are optional: loading, or why one is not there.

`mima.ops.backends.cpu` and `mima.ops.backends.cuda` pass tensors to their kernels.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mima._version import __version__
from mima.ops.backends.arguments import AdamStep, AdamStepSaved, Needs, Tensors
from mima.ops.backends.choice import OPERATORS

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As in csrc/params.h."""

OPS = {"cpu": OPERATORS, "cuda": ("weighted_merge", "projected_merge", "adam_step", "combine")}
MODULES = {"cpu": "_native", "cuda": "_native_cuda"}


@cache
def build_info() -> dict[str, Any]:
    """What the installation wrote down: which modules were built, with what, or why they were not.

    Empty where mima runs from a tree that was never installed.
    """
    path = Path(__file__).parents[2] / "_build_info.json"
    if not path.exists():
        return {}
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info


@cache
def _load(device_type: str) -> tuple[Any, str]:
    """Return the extension module for a device type, or None and the reason."""
    name = MODULES[device_type]
    try:
        module = importlib.import_module(f"mima.{name}")
    except ImportError as error:
        recorded = build_info().get(name.lstrip("_"), {}).get("reason")
        return None, f"mima.{name} was not built: {recorded}" if recorded else str(error)
    if module.version != __version__:
        return None, (
            f"mima.{name} was built for mima {module.version}, this is {__version__}: "
            "install mima again"
        )
    return module, ""


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Say why the native backend cannot serve `op` for these tensors; empty if it can.

    Args:
        op: name of a public function of `mima.ops`.
        tensors: any of its tensors; their devices and dtypes count.
    """
    reasons = []
    for device_type in sorted({x.device.type for x in tensors}):
        if device_type not in OPS:
            reasons.append(f"no kernels for device {device_type}, only for {' and '.join(OPS)}")
            continue
        if op not in OPS[device_type]:
            reasons.append(
                f"no {device_type} kernel for it, only for {', '.join(OPS[device_type])}"
            )
        module, missing = _load(device_type)
        if module is None:
            reasons.append(missing)
        elif not _has(module, op):
            reasons.append(
                f"mima.{MODULES[device_type]} was built from other sources, which lack it: "
                "install mima again"
            )
        if module is None or device_type != "cuda":
            continue
        if not torch.cuda.is_available():
            reasons.append("no CUDA device")
            continue
        for device in sorted({str(x.device) for x in tensors if x.device.type == "cuda"}):
            reasons += _capability_reasons(module, torch.device(device))
    for dtype in sorted({str(x.dtype) for x in tensors if x.dtype not in DTYPE_CODES}):
        served = ", ".join(str(d) for d in DTYPE_CODES)
        reasons.append(f"no kernels for {dtype}, only for {served}")
    return reasons


def _capability_reasons(module: Any, device: torch.device) -> list[str]:
    """Say that none of the devices that the kernels were compiled for is like this one, or nothing.

    What is compiled for a device runs on later ones of its generation, and the newest, of which
    there is PTX, on all that came after it.
    """
    # absent from modules of older sources
    archs: list[int] = getattr(module, "archs", [])
    major, minor = torch.cuda.get_device_capability(device)
    own = 100 * major + 10 * minor
    if not archs or own >= max(archs) or any(a <= own < a // 100 * 100 + 100 for a in archs):
        return []
    built = ", ".join(f"sm_{a // 10}" for a in archs)
    return [
        f"mima.{MODULES['cuda']} was built for {built}, and {device} is sm_{own // 10}: install "
        f"mima again with MIMA_CUDA_ARCHS={own // 10}"
    ]


def _has(module: Any, op: str) -> bool:
    # for the CPU a function, or one for each direction; for CUDA a class of calls
    names = op, f"{op}_forward", op.title().replace("_", "")
    return any(hasattr(module, name) for name in names)


def loaded(device_type: str) -> Any:
    """Return the extension module for a device type; without it, RuntimeError says why."""
    module, missing = _load(device_type)
    if module is None:
        raise RuntimeError(missing)
    return module


def contiguous(tensors: Tensors) -> list[Tensor]:
    """Return the tensors, copied where they are not contiguous."""
    if not tensors or loaded(tensors[0].device.type).are_contiguous(tensors):
        return list(tensors)
    return [x.contiguous() for x in tensors]


def empty_like(tensors: Tensors) -> list[Tensor]:
    """Return contiguous tensors of the same shapes."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def adam_step_lists(inputs: AdamStep, overwrite: bool) -> tuple[list[Any], list[Tensor]]:
    """Return what the forward kernel takes: numbers, step, lists; and the results among these.

    The results are z, m and v one after the other, m and v in place on request.
    """
    z, g, m, v = map(contiguous, inputs[:4])
    *numbers, step = inputs[4:]
    out = empty_like(z), m if overwrite else empty_like(m), v if overwrite else empty_like(v)
    return [numbers, step, z, g, m, v, *out], [x for values in out for x in values]


def adam_step_backward_lists(
    d_out: Tensors, saved: AdamStepSaved, needs: Needs
) -> tuple[list[Any], list[list[Tensor]]]:
    """Return what the backward kernel takes, and of that the gradients, empty where not needed."""
    d_out, g, m, v = map(contiguous, (d_out, *saved[:3]))
    *numbers, step = saved[3:]
    P = len(g)
    grads = [empty_like(g) if need else [] for need in needs]
    bars = d_out[:P], d_out[P : 2 * P], d_out[2 * P :]
    return [numbers, step, *bars, g, m, v, *grads], grads
