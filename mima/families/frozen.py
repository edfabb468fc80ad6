"""Frozen weights in the dtype of their file, or quantized, computed with in float32."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch.utils._pytree import tree_map_only

from mima.families.pipelines import Pipeline, shared_copy, with_modules
from mima.storage.memory import page_out

aten = torch.ops.aten

LARGE = 256 * 2**20
"""Bytes that half precision must save in a module; below them its weights are made float32, which
spares every operator the cast."""

HALF = (torch.bfloat16, torch.float16)

# of the same elements: a saved view of a frozen weight must not become a float32 tensor
_VIEWS = (
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten.t.default),
    *(aten.transpose.int, aten.permute.default, aten.view.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int),
)


View = Callable[[torch.Tensor], torch.Tensor]


def is_quantized(x: torch.Tensor) -> bool:
    """Whether a tensor keeps its values in fewer bits and gives them back, as torchao's do."""
    return type(x).dequantize is not torch.Tensor.dequantize


class Upcast(torch.Tensor):
    """A float32 tensor that is stored in half precision and cast where an operator reads it.

    Or that is quantized, and given back there in float32, of which its operators read views.

    The cast is below autograd, so that a graph keeps the stored tensor, and the float32 values
    live as long as one operator. They are the stored values exactly: a network computes what it
    would compute if it had been opened in float32. It cannot be written to.

    Args:
        stored: bfloat16 or float16, or quantized; used as it is, not copied.
        views: of a quantized tensor's values, one after the other.
    """

    stored: torch.Tensor
    views: tuple[View, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: torch.Tensor, views: tuple[View, ...] = ()) -> Upcast:
        like = stored
        if views:
            like = torch.empty_strided(stored.shape, stored.stride(), device="meta")
        for view in views:
            like = view(like)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=torch.float32,
            device=stored.device,
            requires_grad=False,
        )

    def __init__(self, stored: torch.Tensor, views: tuple[View, ...] = ()) -> None:
        self.stored = stored
        self.views = views

    def dense(self) -> torch.Tensor:
        """The values in float32, for one operator."""
        stored = self.stored
        if is_quantized(stored):
            stored = stored.dequantize()
        full = stored.float()
        for view in self.views:
            full = view(full)
        return full

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Upcast({self.stored!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["stored"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: None, outer_size: Any, outer_stride: Any
    ) -> Upcast:
        return Upcast(inner["stored"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Upcast) and is_quantized(first.stored):
            if func in _VIEWS:
                return cls(first.stored, (*first.views, lambda x: func(x, *args[1:], **kwargs)))
            if func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32):
                return cls(first.stored.to(kwargs.get("device") or first.device), first.views)
        elif isinstance(first, Upcast):
            if func in _VIEWS:
                return cls(func(first.stored, *args[1:], **kwargs))
            if func is aten._to_copy.default:
                if kwargs.get("dtype") in (None, torch.float32):
                    return cls(func(first.stored, *args[1:], **{**kwargs, "dtype": None}))
                if (kwargs["dtype"], kwargs.get("device") or first.device) == (
                    first.stored.dtype,
                    first.device,
                ):
                    # autocast's own dtype: nothing is written to either, so there is no copy
                    return first.stored.detach()
                return func(first.stored, *args[1:], **kwargs)
            if func is aten.embedding.default:
                return func(first.stored, *args[1:], **kwargs).float()
        if isinstance(first, Upcast) and func._schema.is_mutable:
            raise TypeError(f"{func}: a frozen weight in {first.stored.dtype} is not written to")
        args, kwargs = tree_map_only(Upcast, Upcast.dense, (args, kwargs))
        return func(*args, **kwargs)


def hold_frozen(module: torch.nn.Module, trained: Collection[str] = ()) -> None:
    """Let a module compute in float32, its frozen weights in the dtype that they are in.

    Half-precision weights stay as they are where that saves ``LARGE``; trained ones become float32
    masters on memory of their own, and all else, buffers included, is made float32 at least. In
    place, but for the tensors themselves, which may be someone else's.

    Args:
        module: a denoiser, text encoder or VAE. Calling this again with other names is possible.
        trained: names of parameters that a run writes to.
    """
    masters = {id(value) for name, value in module.named_parameters() if name in trained}
    frozen = [value for value in module.parameters() if id(value) not in masters]
    saved = sum(value.numel() * 2 for value in frozen if value.dtype in HALF)

    def held(value: torch.Tensor) -> torch.Tensor:
        if id(value) in masters:
            return at_least_float32(value).clone()
        if is_quantized(value) or (value.dtype in HALF and saved >= LARGE):
            return Upcast(value.detach())
        return value if isinstance(value, Upcast) else at_least_float32(value)

    replace_parameters(module, held)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(owner, name, at_least_float32(buffer))


def make_dense(module: torch.nn.Module, *, own: bool = False) -> None:
    """Make plain float32 parameters of what ``hold_frozen`` keeps in half precision.

    Args:
        module: a network whose weights ``hold_frozen`` holds.
        own: nobody else reads its half-precision weights: those that are mapped from a file leave
            memory one after the other. A mapping lasts until the last of them is gone.
    """

    def dense(value: torch.Tensor) -> torch.Tensor:
        full = at_least_float32(value)
        if own and isinstance(value, Upcast) and not is_quantized(value.stored):
            page_out(value.stored)
        return full

    replace_parameters(module, dense, Upcast)


def at_least_float32(value: torch.Tensor) -> torch.Tensor:
    """The values of a weight, frozen in half precision or not, in float32 or float64."""
    plain = value.detach()
    if is_quantized(plain):
        plain = Upcast(plain)
    if isinstance(plain, Upcast):
        return plain.dense()
    return plain if plain.dtype == torch.float64 else plain.float()


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's floating point parameters and buffers in place.

    In float16, layers that the module's class declares to overflow there stay in float32: T5's
    feed-forward outputs, ``_keep_in_fp32_modules`` of transformers.
    """
    # diffusers' own .to(dtype) warns of such layers even where there are none
    declared = getattr(module, "_keep_in_fp32_modules", None) or ()
    kept = set(declared) if dtype == torch.float16 else set()
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            wanted = dtype if kept.isdisjoint(name.split(".")) else torch.float32
            tensor.data = tensor.data.to(wanted)


def replace_parameters(
    module: torch.nn.Module,
    change: Callable[[torch.Tensor], torch.Tensor],
    kind: type[torch.Tensor] = torch.Tensor,
) -> None:
    """Give every floating parameter of a kind new values, shared ones once, one at a time."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            if value.is_floating_point() and isinstance(value, kind):
                places.setdefault(id(value), []).append((owner, name))
    for shared in places.values():
        owner, name = shared[0]
        new = torch.nn.Parameter(change(getattr(owner, name)), requires_grad=False)
        for owner, name in shared:
            setattr(owner, name, new)


def stored_bytes(x: torch.Tensor) -> int:
    """Bytes of a tensor as it is stored."""
    stored = x.stored if isinstance(x, Upcast) else x
    if is_quantized(stored):
        inner, _ = stored.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(getattr(stored, name).nbytes for name in inner)
    return stored.numel() * stored.element_size()


def with_quantized_held(pipeline: Pipeline) -> Pipeline:
    """A pipeline in memory whose denoiser torchao has quantized, as one whose weights are frozen.

    Each operator reads the values in float32, so that they can be differentiated any number of
    times. The denoiser is a copy around the same tensors; what nothing has quantized, and what
    another library has, is left as it is.
    """
    found = {
        name: module
        for name in ("unet", "transformer")
        if isinstance(module := getattr(pipeline, name, None), torch.nn.Module)
        and any(map(is_quantized, module.parameters()))
    }
    copies: dict[str, Any] = {name: shared_copy(module).eval() for name, module in found.items()}
    for module in copies.values():
        hold_frozen(module)
        module.is_quantized = False
        module.hf_quantizer = None
        plain = {n: x for n, x in module.config.items() if n != "quantization_config"}
        module._internal_dict = FrozenDict(plain)
    return with_modules(pipeline, **copies) if copies else pipeline
