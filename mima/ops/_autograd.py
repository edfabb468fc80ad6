"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

_functions: dict[CustomOpDef, Callable[..., Any]] = {}
_TAGS = (torch.Tag.cudagraph_unsafe,)
_PLAIN = {Tensor, torch.nn.Parameter}


class Operator(torch.autograd.Function):
    """A differentiable operator: `forward(*args)` takes tensors, and returns a tuple of them.

    PyTorch inspects the signature of `forward` at each call, and binds it, which costs microseconds
    per named parameter: there is one, and it is inspected here.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def raw_operator(name: str, *, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as an operator of torch.library that changes none of its arguments.

    A backend may copy tables of addresses to the device, which a CUDA graph cannot repeat.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        function = _without_autocast(function)
        op = torch.library.custom_op(name, function, mutates_args=(), schema=schema, tags=_TAGS)
        _functions[op] = function
        return op

    return register


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from changing the precision, and the type, of what an operator computes."""

    @functools.wraps(function)
    def run(*args: Any, **directly: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **directly)
        with torch.autocast(_first(args).device.type, enabled=False):
            return function(*args, **directly)

    return run


def _first(args: Sequence[Any]) -> Tensor:
    """Return the first tensor of an operator's arguments, which begin with one or a list."""
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first


def call(op: CustomOpDef, *args: object, **directly: object) -> Any:
    """Call a raw operator, past the dispatcher where nothing there would see the call.

    Passing through it takes tens of microseconds, more than computing a small layer. Tensors
    without data must, for their shapes. `directly` is for the function alone: the schema of the
    operator has no such arguments.
    """
    if _first(args).is_meta or _is_watched(args, requires_grad=False):
        return op(*args)
    return _functions[op](*args, **directly)


def apply(function: type[Operator], *args: object) -> tuple[Any, ...]:
    """Apply an operator; without a graph where none is needed."""
    with_graph = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # where no graph is needed, torch.compile hands a context to a forward of this signature
        plain = not (with_graph and any(isinstance(x, Tensor) and x.requires_grad for x in args))
    else:
        plain = not _is_watched(args, requires_grad=with_graph)
    if plain:
        outputs: tuple[Any, ...] = function.forward(*args)
        return outputs
    outputs = function.apply(*args)
    return outputs


def _is_watched(args: Sequence[object], *, requires_grad: bool) -> bool:
    """Whether anything of PyTorch's would notice a call: modes, transforms, tracers, subclasses."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
        or not _are_plain(args, requires_grad)
    )


def _are_plain(args: Iterable[object], requires_grad: bool) -> bool:
    for x in args:
        if x.__class__ in _PLAIN:
            # a view that negates is resolved by the dispatcher, which `call` decides about
            if x.requires_grad if requires_grad else x.is_neg():
                return False
        elif isinstance(x, Tensor) or (
            x.__class__ in (list, tuple) and not _are_plain(x, requires_grad)
        ):
            return False
    return True


def apply_backward(function: type[Operator], *args: object) -> tuple[Any, ...]:
    """Apply an operator that is the backward of another.

    Inside torch.compile, which neither traces a Function within the backward of another nor
    differentiates that backward, it runs as a plain function.
    """
    if torch.compiler.is_compiling():
        outputs: tuple[Any, ...] = function.forward(*args)
        return outputs
    return apply(function, *args)


def filled(d: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients, with zeros for those that autograd left out."""
    return [torch.zeros_like(x) if d_x is None else d_x for d_x, x in zip(d, like, strict=True)]


def total(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the terms there are."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def vmap_formula(
    formula: Callable[..., Sequence[Tensor]], info: Any, in_dims: Any, args: Sequence[object]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Batch an operator by batching its plain PyTorch formula, which takes the same arguments.

    The kernels have no batch dimension; under torch.func.vmap the reference is what runs.
    """
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.autocast(device.type, enabled=False):
        outputs = torch.vmap(
            lambda *unbatched: tuple(formula(*unbatched)),
            in_dims=tuple(in_dims),
            randomness=info.randomness,
        )(*args)
    return outputs, (0,) * len(outputs)
