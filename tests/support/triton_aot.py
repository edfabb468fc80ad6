"""Compile, without a GPU, exactly what a launcher would launch."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SM80 = GPUTarget("cuda", 80, 32)
SM90 = GPUTarget("cuda", 90, 32)
SM100 = GPUTarget("cuda", 100, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the function, its keyword arguments, and how many programs."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...]


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid), f"empty grid {grid}"
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments, grid))


@contextmanager
def recorded_launches(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Keep the launches of the modules' kernels instead of running them."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module in modules:
            kernels = {
                name: _Recorder(value, launches)
                for name, value in vars(module).items()
                if isinstance(value, JITFunction) and name.endswith("_kernel")
            }
            stack.enter_context(mock.patch.multiple(module, **kernels))
        yield launches


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile as Triton's own just-in-time path would specialise these arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or (type(value) is int and value == 1):
            signature[param.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = _POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
            divisible = False
        else:
            assert type(value) is int, f"{param.name}: {value!r}"
            signature[param.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    return triton.compile(source, target=target, options=options)


@dataclass(frozen=True)
class Resources:
    """What a program of a compiled kernel takes of a multiprocessor."""

    registers: int
    """Of a thread; on AMD, vector registers."""
    spilled: int
    """Bytes (CUDA) or registers (HIP) that live in memory for want of registers."""
    shared: int
    """Bytes of shared memory."""


def resources(compiled: Any) -> Resources:
    """Read a compiled kernel's use of registers and shared memory."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run(
                [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
            ).stdout
        registers = re.findall(r"REG:(\d+)", text)
        spilled = re.findall(r"(?:STACK|LOCAL):(\d+)", text)
    assert registers, text[:1000]
    assert spilled, text[:1000]
    return Resources(
        registers=max(int(count) for count in registers),
        spilled=sum(int(count) for count in spilled),
        shared=compiled.metadata.shared,
    )


def widest_accesses(compiled: Any) -> tuple[int, int]:
    """Number of 128-bit global loads and of 128-bit global stores."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        loads, stores = r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_store_dwordx4"
    else:
        text = compiled.asm["ptx"]
        loads = r"ld\.global[.\w:]*\.v4\.[bf]32|cp\.async\.cg\.shared\.global .*0x10"
        stores = r"st\.global[.\w:]*\.v4\.[bf]32"
    return len(re.findall(loads, text)), len(re.findall(stores, text))


def narrow_loads(compiled: Any) -> int:
    """Number of global loads of 16 bits: single elements of half-precision matrices."""
    if "amdgcn" in compiled.asm:
        pattern = r"(?:global|buffer)_load_(?:ushort|short|u16|d16)"
        return len(re.findall(pattern, compiled.asm["amdgcn"]))
    return len(re.findall(r"ld\.global[.\w:]*\.[bus]16", compiled.asm["ptx"]))
