"""The layers of a denoiser that have fused operators, while a run lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mima import ops
from mima.families.frozen import Upcast
from mima.ops.attention import FusedAttention, TwiceDifferentiable
from mima.ops.convolution import convolution

Forward = Callable[..., Any]
NORM, ROWS, GATE, MATRIX = 1 << 15, 1 << 14, 1 << 16, 1 << 16
"""Elements from which, on the CPU, an operator gains more than its call costs: of GroupNorm, of
LayerNorm, of a feed-forward, and of attention's matrices.

With none of these bounds, an outer step of the embedded model takes 1.03 (exact) and 1.16
(first_order) of its time, and at 16 times as many latents 0.71 and 0.92.
"""


class FusedLayers(AbstractContextManager[None]):
    """While it is entered, a denoiser's layers run as fused operators where these are faster.

    GroupNorm, LayerNorm and GEGLU. Where they are differentiated twice, convolutions that are not
    trained, of any size; and attention, whatever its processor, if that calls PyTorch's function
    without a mask.

    A GroupNorm takes along the SiLU that reads it, in the residual blocks and at the end of Stable
    Diffusion's networks. The modules keep their parameters and types; what changes is the function
    that each calls, and it is put back however the block ends. Other layers stay as they are, and
    so do those whose function or output somebody else replaces.

    Args:
        denoiser: the network; its layers are found once.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        modules = list(denoiser.modules())
        readers: dict[nn.SiLU, list[nn.GroupNorm]] = {}
        for norm, activation in _followed_norms(denoiser, modules):
            readers.setdefault(activation, []).append(norm)
        self._groups = [_activated(norms, activation) for activation, norms in readers.items()]
        followed = {module for group in self._groups for module in group}
        for module in modules:
            if module not in followed and (forward := _fused(module)) is not None:
                self._groups.append({module: forward})
        self._entered: list[list[nn.Module]] = []

    def __enter__(self) -> None:
        changed: list[nn.Module] = []
        self._entered.append(changed)
        for group in self._groups:
            if all(map(_is_free, group)):
                changed += group
                for module, forward in group.items():
                    module.forward = forward

    def __exit__(self, *error: object) -> None:
        for module in self._entered.pop():
            del module.forward


def _is_free(module: nn.Module) -> bool:
    """Whether a module calls its type's function, and nothing changes what that reads or makes.

    Hooks of gradients wrap both in other tensors.
    """
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return not ("forward" in vars(module) or any(hooks) or _has_any_global_hook())


def _followed_norms(
    denoiser: nn.Module, modules: Iterable[nn.Module]
) -> Iterator[tuple[nn.GroupNorm, nn.SiLU]]:
    """Each GroupNorm that a SiLU alone reads, with it."""
    pairs: list[tuple[object, object]] = []
    for block in modules:
        if type(block) is ResnetBlock2D:
            pairs.append((block.norm1, block.nonlinearity))
            if block.time_embedding_norm == "default":
                pairs.append((block.norm2, block.nonlinearity))
    pairs.append((getattr(denoiser, "conv_norm_out", None), getattr(denoiser, "conv_act", None)))
    for norm, activation in pairs:
        # a subclass may compute something else
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU:
            yield norm, activation


def _activated(norms: Iterable[nn.GroupNorm], activation: nn.SiLU) -> Mapping[nn.Module, Forward]:
    """Let norms apply the activation that reads them, and the activation pass on what they made."""
    made: list[Tensor] = []

    def noted(forward: Forward) -> Forward:
        def run(x: Tensor) -> Tensor:
            made[:] = [forward(x)]
            return made[0]

        return run

    def pass_on(x: Tensor) -> Tensor:
        # the activation serves the embedding of the timestep, too
        if any(x is y for y in made):
            made.clear()
            return x
        return nn.SiLU.forward(activation, x)

    return {
        **{norm: noted(_group_norm(norm, silu=True)) for norm in norms},
        activation: pass_on,
    }


def _fused(module: nn.Module) -> Forward | None:
    """What a module may call in place of its own function."""
    if type(module) is nn.GroupNorm:
        return _group_norm(module)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return _layer_norm(module)
    if type(module) is GEGLU:
        return _geglu(module)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        padding = module.padding
        return None if isinstance(padding, str) else _convolution(module, padding)
    # diffusers' attention of every family hands its tensors to a processor
    return None if getattr(module, "processor", None) is None else _attention(module)


def _pays(x: Tensor, at_least: int) -> bool:
    return x.is_cuda or x.numel() >= at_least


def _attention(module: nn.Module) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with FusedAttention(MATRIX) if TwiceDifferentiable.is_on() else nullcontext():
            return type(module).forward(module, *args, **kwargs)

    return forward


def _read(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """What a normalisation reads, as autocast hands it over; None where PyTorch's serves.

    On a GPU autocast normalises in float32; on the CPU PyTorch mixes types. Weights of a type of
    their own, such as shards, are PyTorch's.
    """
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    plain = weight is None or type(weight) in (Tensor, nn.Parameter)
    return x if plain and (weight is None or weight.dtype == x.dtype) else None


def _group_norm(module: nn.GroupNorm, silu: bool = False) -> Forward:
    def forward(x: Tensor) -> Tensor:
        given = _read(x, module.weight) if _pays(x, NORM) else None
        if given is None:
            y = nn.GroupNorm.forward(module, x)
            return nn.functional.silu(y) if silu else y
        weights = module.weight, module.bias
        return ops.group_norm(given, *weights, module.num_groups, module.eps, silu=silu)

    return forward


def _layer_norm(module: nn.LayerNorm) -> Forward:
    def forward(x: Tensor) -> Tensor:
        given = _read(x, module.weight) if _pays(x, ROWS) else None
        if given is None:
            return nn.LayerNorm.forward(module, x)
        return ops.layer_norm(given, module.weight, module.bias, module.eps)

    return forward


def _geglu(module: GEGLU) -> Forward:
    def forward(hidden_states: Tensor) -> Any:
        x = module.proj(hidden_states)
        if _pays(x, GATE):
            return ops.geglu(x)
        a, b = x.chunk(2, dim=-1)
        return a * module.gelu(b)

    return forward


def _convolution(module: nn.Conv2d, padding: tuple[int, ...]) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if not (TwiceDifferentiable.is_on() and _is_linear(x, weight, bias)):
            return nn.Conv2d.forward(module, x)
        places = module.stride, padding, module.dilation
        return convolution(x, weight, bias, *places, module.groups)

    return forward


def _is_linear(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a graph is recorded by the pictures alone, and nothing else of PyTorch's watches.

    Weights of a type of their own, such as shards, are PyTorch's.
    """
    return (
        x.requires_grad
        and x.ndim == 4
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and all(
            w is None or (type(w) in (Tensor, nn.Parameter, Upcast) and not w.requires_grad)
            for w in weights
        )
    )
