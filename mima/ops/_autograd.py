"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from mima.ops.backends import choice
from mima.ops.backends.arguments import schema

_functions: dict[CustomOpDef, Callable[..., Any]] = {}
_TAGS = (torch.Tag.cudagraph_unsafe,)
_PLAIN = {Tensor, torch.nn.Parameter}
_requires_grad = attrgetter("requires_grad")
_VMAP_KEY = torch._C._dispatch_key_parse("VmapMode")


class Operator(torch.autograd.Function):
    """A differentiable operator: `forward(*args)` takes tensors, and returns a tuple of them.

    The kernels have no batch dimension: under torch.func.vmap, and where gradients are batched,
    `formula` is what runs, which takes the same arguments and is plain PyTorch.

    PyTorch inspects the signature of `forward` at each call, and binds it, which costs microseconds
    per named parameter: there is one, and it is inspected here.
    """

    formula: Callable[..., Sequence[Tensor]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        outputs = torch.vmap(cls.plainly, in_dims=tuple(in_dims), randomness=info.randomness)(*args)
        return outputs, (0,) * len(outputs)

    @classmethod
    def plainly(cls, *args: Any) -> tuple[Tensor, ...]:
        """What `forward` computes, by the formula."""
        with no_autocast(next(x for x in args if isinstance(x, Tensor))):
            return tuple(cls.formula(*args))


def raw_operators(
    name: str,
    inputs: type[Any],
    output: str,
    *,
    fake: Callable[[Any], Any],
    like: Callable[[Tensor, Any], Sequence[Any]],
    saved: type[Any] | None = None,
    check: Callable[[Any], None] | None = None,
) -> tuple[CustomOpDef, CustomOpDef]:
    """Register an operator and its backward with torch.library.

    Args:
        name: one of `choice.OPERATORS`.
        inputs: its arguments, a tuple of `mima.ops.backends.arguments`, where it says what serves.
        output: ``"Tensor"`` or ``"Tensor[]"``.
        fake: inputs -> tensors like the output.
        like: (d_out, saved) -> for each gradient a tensor, or a list of them, of its shape.
        saved: what the backward reads; by default `inputs`.
        check: refuses values of the inputs that only a running operator can see.

    Returns:
        The operator ``(*inputs, backend)`` and its backward ``(d_out, *saved, needs, backend)``,
        which gives the gradients that `needs` names, one after the other.
    """
    read = saved or inputs

    def forward(*args: Any, **directly: Any) -> Any:
        *values, backend = args
        given = inputs(*values)
        if check is not None:
            check(given)
        module = choice.resolve(name, _first(values), backend, getattr(given, "width", None))
        made = getattr(module, f"{name}_forward")(given, **directly)
        if directly:
            return made
        # without gaps, as the fake promises; plain PyTorch keeps those of what it reads
        return made.contiguous() if output == "Tensor" else [x.contiguous() for x in made]

    def backward(d_out: Any, *args: Any) -> list[Tensor]:
        *given, needs, backend = args
        kept = read(*given)
        module = choice.resolve(name, _first([d_out]), backend, getattr(kept, "width", None))
        grads = getattr(module, f"{name}_backward")(d_out, kept, needs)
        return [x.contiguous() for x in flat(grads, needs)]

    def fake_backward(d_out: Any, *args: Any) -> list[Tensor]:
        *given, needs, _ = args
        return [x.new_empty(x.shape) for x in flat(like(d_out, read(*given)), needs)]

    given, kept = (", ".join(schema(arguments)) for arguments in (inputs, read))
    ops = (
        _register(f"mima::{name}", forward, f"({given}, str backend) -> {output}"),
        _register(
            f"mima::{name}_backward",
            backward,
            f"({output} d_out, {kept}, bool[] needs, str backend) -> Tensor[]",
        ),
    )
    ops[0].register_fake(lambda *args: fake(inputs(*args[:-1])))
    ops[1].register_fake(fake_backward)
    return ops


def raw_operator(
    name: str,
    schema: str,
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    writes: Sequence[str] = (),
) -> CustomOpDef:
    """Register an operator that has no backward of its own with torch.library.

    Args:
        name: of the operator.
        schema: its arguments, the first a tensor or a list of them, and its results.
        function: computes it.
        fake: arguments -> tensors like the results.
        writes: the arguments that it writes into.
    """
    op = _register(f"mima::{name}", function, schema, writes)
    op.register_fake(fake)
    return op


def refuse_graph(op: str, wanted: str, tensors: Iterable[Tensor]) -> None:
    """Refuse, with what is wanted instead, what is written in place where a graph is recorded."""
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        raise ValueError(f"{op}: {wanted} where a gradient is asked for")


def _register(
    name: str, function: Callable[..., Any], schema: str, writes: Sequence[str] = ()
) -> CustomOpDef:
    # the tag: a backend may copy tables of addresses to the device, which a graph cannot repeat
    function = without_autocast(function)
    op = torch.library.custom_op(name, function, mutates_args=writes, schema=schema, tags=_TAGS)
    _functions[op] = function
    return op


def flat(groups: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    """List the needed ones of some tensors and lists of tensors."""
    out: list[Tensor] = []
    for group, need in zip(groups, needs, strict=True):
        if need:
            out += [group] if isinstance(group, Tensor) else group
    return out


def split(tensors: Sequence[Any], sizes: Sequence[int | None], needs: Sequence[bool]) -> list[Any]:
    """Undo `flat`: a list of each size, or one tensor for None; filled with None if not needed."""
    rest = list(tensors)
    out: list[Any] = []
    for size, need in zip(sizes, needs, strict=True):
        count = 1 if size is None else size
        group = rest[:count] if need else [None] * count
        rest = rest[count:] if need else rest
        out.append(group[0] if size is None else group)
    return out


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from changing the precision, and the type, of what an operator computes."""

    @functools.wraps(function)
    def run(*args: Any, **directly: Any) -> Any:
        with no_autocast(_first(args)):
            return function(*args, **directly)

    return run


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """`without_autocast`, of what is computed on the device of a tensor while it lasts."""
    device = x.device.type
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _first(args: Sequence[Any]) -> Tensor:
    """Return the first tensor of an operator's arguments, which begin with one or a list."""
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first


def call(op: CustomOpDef, *args: object, **directly: object) -> Any:
    """Call a raw operator, past the dispatcher where nothing there would see the call.

    Passing through it takes 46 µs of 330, and 110 of 830 with the backward, of a small adapted
    layer, (8, 64, 128) -> 160 with three adapters on one core (Intel Xeon, commit 61b912c). Batches
    that share adapters call as many as a network has: of a whole outer step whose LoRA attacks
    share their forwards it is 12 % (`kernels/README.md`); of one with a few calls of whole lists,
    nothing. Tensors without data must, for their shapes. `directly` is for the function alone: the
    schema of the operator has no such arguments.
    """
    if _first(args).is_meta or is_watched(args, Tensor.is_neg):
        return op(*args)
    return _functions[op](*args, **directly)


def call_in_place(op: CustomOpDef, written: Sequence[Tensor], *args: object) -> None:
    """`call` of an operator that writes into its first argument, a list, and returns nothing."""
    if written[0].is_meta or is_watched([written, *args], Tensor.is_neg):
        op(written, *args)
        return
    _functions[op](written, *args)
    # as the dispatcher does, but for all at once: autograd is to see that they changed
    torch.autograd.graph.increment_version(written)


def apply(function: type[Operator], *args: object) -> tuple[Any, ...]:
    """Apply an operator; without a graph where none is needed."""
    with_graph = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # where no graph is needed, torch.compile hands a context to a forward of this signature
        plain = not (with_graph and any(isinstance(x, Tensor) and x.requires_grad for x in args))
    elif is_in_legacy_vmap():
        return function.plainly(*args)
    else:
        plain = not is_watched(args, _requires_grad if with_graph else None)
    if plain:
        outputs: tuple[Any, ...] = function.forward(*args)
        return outputs
    outputs = function.apply(*args)
    return outputs


def is_in_legacy_vmap() -> bool:
    """Whether gradients are batched, `is_grads_batched=True`, which no Function hears of."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_KEY)


def is_watched(args: Sequence[object], refused: Callable[[Tensor], bool] | None) -> bool:
    """Whether anything of PyTorch's would notice a call: modes, transforms, tracers, subclasses.

    Args:
        args: of an operator.
        refused: what is noticed of a tensor of no subclass; None for nothing. A view that negates
            is resolved by the dispatcher, which `call` decides about.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_in_legacy_vmap()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
        or not _are_plain(args, refused)
    )


def _are_plain(args: Sequence[Any], refused: Callable[[Tensor], bool] | None) -> bool:
    # sets and map: a model has hundreds of tensors, and a line of Python for each of them takes
    # as long as the kernel
    kinds = set(map(type, args))
    if any(issubclass(kind, Tensor) for kind in kinds - _PLAIN):
        return False
    if kinds <= _PLAIN:
        return refused is None or not any(map(refused, args))
    for x in args:
        if type(x) in _PLAIN:
            if refused is not None and refused(x):
                return False
        elif type(x) in (list, tuple) and not _are_plain(x, refused):
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
