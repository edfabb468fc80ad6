"""The Triton backend, imported as `mima.kernels`: kernels, and the launchers that serve operators.

The launchers take validated tensors of one dtype on one CUDA device (or on the CPU, in Triton's
interpreter) and differentiate nothing; :mod:`mima.ops` does the rest.
"""

from __future__ import annotations

import functools
import subprocess

import torch
import triton
from torch import Tensor

from mima.kernels._common import TRITON_DTYPE
from mima.kernels.adam_step import adam_step_backward, adam_step_forward
from mima.kernels.attention import (
    attention_backward,
    attention_double_backward,
    attention_forward,
    widest,
)
from mima.kernels.batched_lora import batched_lora_backward, batched_lora_forward
from mima.kernels.combine import combine_into
from mima.kernels.geglu import geglu_backward, geglu_double_backward, geglu_forward
from mima.kernels.group_norm import (
    group_norm_backward,
    group_norm_double_backward,
    group_norm_forward,
)
from mima.kernels.merge_lora import merge_lora_backward, merge_lora_forward
from mima.kernels.projected_merge import projected_merge_backward, projected_merge_forward
from mima.kernels.token_products import add_token_outputs, token_outputs, token_sums
from mima.kernels.weighted_merge import weighted_merge_backward, weighted_merge_forward

__all__ = [
    "adam_step_backward",
    "adam_step_forward",
    "add_token_outputs",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "batched_lora_backward",
    "batched_lora_forward",
    "combine_into",
    "geglu_backward",
    "geglu_double_backward",
    "geglu_forward",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "merge_lora_backward",
    "merge_lora_forward",
    "projected_merge_backward",
    "projected_merge_forward",
    "token_outputs",
    "token_sums",
    "unsupported_reasons",
    "weighted_merge_backward",
    "weighted_merge_forward",
    "widest_attention",
]


@functools.cache
def widest_attention(device: torch.device, dtype: torch.dtype) -> int | None:
    """Return the widest heads that `attention` serves on a device; None: of any width."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    # HIP has no larger one to opt into, and before torch 2.11 said of none
    least = getattr(properties, "shared_memory_per_block", 65_536)
    return widest(getattr(properties, "shared_memory_per_block_optin", least), dtype)


@functools.cache
def _launch_error() -> str:
    """Return why Triton cannot launch anything on a GPU here; empty if it can.

    It compiles a part of itself, in C, when it is first asked for: which takes a compiler, Python's
    headers and a folder to keep the result in.
    """
    try:
        # Triton looks for the driver here, or when the driver is made
        _ = triton.runtime.driver.active.utils
    # the libraries of the driver are an assertion there
    except (
        RuntimeError,
        OSError,
        ImportError,
        AssertionError,
        subprocess.SubprocessError,
    ) as error:
        return f"Triton cannot launch kernels here ({type(error).__name__}: {error})"
    return ""


def unsupported_reasons(op: str, *tensors: Tensor) -> list[str]:
    """Return why these kernels cannot serve tensors like the given ones; empty if they can."""
    reasons = []
    for x in tensors:
        if x.dtype not in TRITON_DTYPE:
            reasons.append(f"no kernel for {x.dtype}: float32, bfloat16 and float16 only")
        if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
            reasons.append("on the CPU only in Triton's interpreter, TRITON_INTERPRET=1")
        elif x.device.type not in ("cpu", "cuda"):
            reasons.append(f"no kernel for device {x.device.type}")
    on_gpu = any(x.device.type == "cuda" for x in tensors)
    if on_gpu and not triton.knobs.runtime.interpret and _launch_error():
        reasons.append(_launch_error())
    return reasons
