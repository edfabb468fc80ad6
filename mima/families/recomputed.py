"""Activations that the backward pass computes anew, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where diffusers' modules keep how they recompute."""


@contextmanager
def recomputed_blocks(
    denoiser: torch.nn.Module, on: bool, *, sharded: bool = False
) -> Iterator[None]:
    """While it lasts, let a denoiser of diffusers recompute each block's activations.

    diffusers' own way would recompute with the module's parameters, not with those that the block
    was called with under ``torch.func.functional_call``. Only a sharded one has no others.
    """

    def run(block: torch.nn.Module, *args: Any) -> Any:
        params: dict[str, torch.Tensor] = dict(block.named_parameters())
        return checkpoint(
            lambda *inputs: functional_call(block, params, inputs), *args, use_reentrant=False
        )

    if not on:
        yield
        return
    before = [
        (module, module.gradient_checkpointing, getattr(module, CHECKPOINT_FUNCTION, None))
        for module in denoiser.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    denoiser.enable_gradient_checkpointing(None if sharded else run)  # type: ignore[operator]
    try:
        yield
    finally:
        for module, was_on, function in before:
            module.gradient_checkpointing = was_on
            setattr(module, CHECKPOINT_FUNCTION, function)
