"""What a run keeps out of its device's memory: encoders that wait, an optimizer's moments."""

from __future__ import annotations

import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mima.errors import MimaError
from mima.families import family_of, frozen
from mima.families.frozen import Upcast
from mima.families.pipelines import Pipeline, networks, networks_beside
from mima.storage.memory import trim
from mima.storage.tensor_files import spill

logger = logging.getLogger(__name__)


def idle_modules(pipeline: Pipeline, *, reads_text: bool) -> list[torch.nn.Module]:
    """The networks that no outer step reads: the VAE and, unless ``reads_text``, text encoders."""
    denoiser = family_of(pipeline).denoiser
    return [
        module
        for name, module in networks_beside(pipeline, denoiser).items()
        if not (reads_text and name.startswith("text_encoder"))
    ]


@contextmanager
def out_of_memory_while(modules: Sequence[torch.nn.Module], folder: Path | None) -> Iterator[None]:
    """Move networks from a GPU to the CPU's memory, or from there to a file that is mapped.

    They go on working where they are; afterwards they are back. Small ones stay. The file is on the
    folder's disk, where there is such a folder, else on that of temporary files.
    """
    moved = [m for m in modules if sum(map(frozen.stored_bytes, m.parameters())) >= frozen.LARGE]
    # safetensors stores no quantized tensor
    moved = [m for m in moved if not any(map(frozen.is_quantized, map(_stored, m.parameters())))]
    devices = [next(module.parameters()).device for module in moved]
    for module, device in zip(moved, devices, strict=True):
        if device.type == "cpu":
            _spill(module, folder if folder is not None and folder.is_dir() else None)
        else:
            module.to("cpu")
    trim()
    yield
    # of attacks and moments, nothing stays beside the result
    trim()
    for module, device in zip(moved, devices, strict=True):
        if device.type == "cpu":
            # nothing may write into a mapped file
            for parameter in module.parameters():
                _set(parameter, _stored(parameter).clone())
        else:
            module.to(device)


def _spill(module: torch.nn.Module, folder: Path | None) -> None:
    parameters = dict(module.named_parameters())
    try:
        mapped = spill({name: _stored(value) for name, value in parameters.items()}, folder)
    except MimaError as error:
        name = type(module).__name__
        logger.warning("%s; the %s stays in memory while the run lasts", error, name)
        return
    for name, value in parameters.items():
        _set(value, mapped[name])


def _stored(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.stored if isinstance(parameter, Upcast) else parameter.detach()


def _set(parameter: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(parameter, Upcast):
        parameter.stored = values
    else:
        parameter.data = values


def make_whole(pipeline: Pipeline, device: torch.device, *, own: bool) -> None:
    """Make every network of a pipeline plain float32, in the CPU's memory if a GPU is too small.

    Args:
        pipeline: a run's result.
        device: where it is to be.
        own: its half-precision weights are this run's, not those of a caller's pipeline.
    """
    modules = networks(pipeline).values()
    more = sum(
        value.numel() * 4 - frozen.stored_bytes(value)
        for module in modules
        for value in module.parameters()
        if isinstance(value, Upcast)
    )
    if device.type == "cuda" and more > torch.cuda.mem_get_info(device)[0]:
        logger.warning(
            "the result is left in the CPU's memory: in float32 it is %.1f GiB larger than %s "
            "has free",
            more / 2**30,
            device,
        )
        pipeline.to("cpu")
    for module in modules:
        frozen.make_dense(module, own=own)


class MomentsOnDisk:
    """An optimizer's moments in a file without a name, which is mapped: in memory during a step.

    Args:
        optimizer: an AdamW, or a Muon, of parameters on the CPU, which has no state yet. Linux
            alone tells a full disk before the moments are written, and leaves memory when it is
            asked to.
        folder: whose disk takes the file; None: that of temporary files.

    Raises:
        MimaError: the disk is full.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, folder: Path | None) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.numel()]
        muon = isinstance(optimizer, torch.optim.Muon)
        keys = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq")
        size = len(keys) * sum(parameter.nbytes for parameter in parameters)
        try:
            with tempfile.TemporaryFile(prefix="mima-", dir=folder) as file:
                # otherwise a full disk would end the process when a page is written
                os.posix_fallocate(file.fileno(), 0, size)
                self._mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise MimaError(
                f"cannot write the optimizer's moments to {where}: {error.strerror}"
            ) from error
        offset = 0
        for parameter in parameters:
            state = optimizer.state[parameter]
            if not muon:
                state["step"] = torch.tensor(0.0)
            for key in keys:
                count = parameter.numel()
                flat = torch.frombuffer(
                    self._mapped, dtype=parameter.dtype, count=count, offset=offset
                )
                # Muon sees filters as matrices
                state[key] = flat.view((len(parameter), -1) if muon else parameter.shape)
                offset += parameter.nbytes

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether moments of parameters on a device can be kept so."""
        return device.type == "cpu" and sys.platform == "linux"

    def leave_memory(self) -> None:
        """Give the pages back; what they hold is in the file."""
        self._mapped.madvise(mmap.MADV_DONTNEED)


def step_offloaded(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, gradient: torch.Tensor
) -> None:
    """A step of one parameter, by an optimizer whose state stays on the CPU.

    Parameter and gradient are on the device.
    """
    state = optimizer.state[parameter]
    for key, value in state.items():
        if key != "step":
            state[key] = value.to(parameter.device)
    parameter.grad = gradient
    # parameters without a gradient are left out
    optimizer.step()
    parameter.grad = None
    for key, value in optimizer.state[parameter].items():
        state[key] = value.cpu()
