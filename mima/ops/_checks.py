"""Checks of arguments that several operators share.

Each raises ValueError or TypeError naming operator, argument, what was expected and what it got.
They look at metadata only, except `require_finite` and `require_in_range`, which run inside the raw
operators: under torch.compile a value is visible nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# tensor -> the version and limit it was last found good at. Reading values back from a GPU waits
# for it, and one index serves every layer of a model.
_known_good: WeakIdKeyDictionary = WeakIdKeyDictionary()


def describe(x: object) -> str:
    """Return what an error message says of an argument."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"[:80]


def require_sequence(op: str, name: str, value: object, of: str = "tensors") -> None:
    """Refuse what cannot be indexed, and a tensor, whose rows would pass for its elements."""
    # a tuple: torch 2.9 does not compile X | Y
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {name} must be a sequence of {of}, got {describe(value)}")


def require_length(op: str, name: str, value: Sequence[object], length: int, why: str) -> None:
    """Refuse a sequence of another length."""
    if len(value) != length:
        raise ValueError(f"{op}: {name} must have length {length}, {why}, got {len(value)}")


def require_floating(op: str, name: str, x: object) -> None:
    """Refuse what is not a floating-point tensor that every backend knows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {describe(x)}"
        )
    _require_strided(op, name, x)


def _require_strided(op: str, name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got {x.layout}")


def require_like(
    op: str, name: str, x: object, like: Tensor, like_name: str, shape: Sequence[int | str]
) -> None:
    """Refuse a tensor of another dtype, device or shape. Letters in `shape` match any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {describe(x)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(
            f"{op}: {name} must be {like.dtype} on {like.device} like {like_name}, "
            f"got {describe(x)}"
        )
    _require_strided(op, name, x)
    if x.ndim != len(shape) or any(
        size != wanted
        for size, wanted in zip(x.shape, shape, strict=True)
        if type(wanted) is not str
    ):
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(
            f"{op}: {name} must be [{expected}] to match {like_name} {list(like.shape)}, "
            f"got {list(x.shape)}"
        )


def require_lists(op: str, names: Sequence[str], lists: Sequence[Sequence[Tensor]]) -> None:
    """Refuse lists that are not of P tensors each, all of one dtype and device, alike in shape."""
    for name, values in zip(names, lists, strict=True):
        require_sequence(op, name, values)
        require_length(op, name, values, len(lists[0]), f"one per tensor of {names[0]}")
    if not lists[0]:
        return
    like = lists[0][0]
    require_floating(op, f"{names[0]}[0]", like)
    dtype, device = like.dtype, like.device
    shapes: list[torch.Size] = []
    for name, values in zip(names, lists, strict=True):
        for p, x in enumerate(values):
            # Many tensors come here: compare, and leave the message to the slow path.
            if (
                not isinstance(x, Tensor)
                or x.dtype is not dtype
                or x.device != device
                or x.layout is not torch.strided
            ):
                if values is lists[0]:
                    require_like(op, f"{name}[{p}]", x, like, f"{name}[0]", ("...",))
                first = lists[0][p]
                require_like(op, f"{name}[{p}]", x, first, f"{names[0]}[{p}]", first.shape)
        found = [x.shape for x in values]
        shapes = shapes or found
        for p, (shape, wanted) in enumerate(zip(found, shapes, strict=True)):
            if shape != wanted:
                first = lists[0][p]
                require_like(op, f"{name}[{p}]", values[p], first, f"{names[0]}[{p}]", wanted)


def require_matrices(op: str, name: str, values: Sequence[Tensor]) -> None:
    """Refuse a list, not empty, but of matrices [o, d], all of one d, dtype and device."""
    like = values[0]
    require_floating(op, f"{name}[0]", like)
    if like.ndim != 2:
        raise ValueError(f"{op}: {name}[0] must be [o, d], got {list(like.shape)}")
    d, dtype, device = like.shape[1], like.dtype, like.device
    for i, x in enumerate(values):
        # Every layer of a model comes here: compare, and leave the message to the slow path.
        if (
            not isinstance(x, Tensor)
            or x.dtype is not dtype
            or x.device != device
            or x.layout is not torch.strided
            or len(x.shape) != 2
            or x.shape[1] != d
        ):
            require_like(op, f"{name}[{i}]", x, like, f"{name}[0]", ("o", d))


def require_adapters(op: str, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor) -> None:
    """Refuse low-rank factors that do not fit a weight [o, d]: A_n [r_n, d] and B_n [o, r_n]."""
    require_sequence(op, "A", A)
    require_sequence(op, "B", B)
    require_length(op, "B", B, len(A), "one per tensor of A")
    o, d = weight.shape
    dtype, device = weight.dtype, weight.device
    for n, (A_n, B_n) in enumerate(zip(A, B, strict=True)):
        # Every layer of a model comes here: compare, and leave the message to the slow path.
        if (
            isinstance(A_n, Tensor)
            and isinstance(B_n, Tensor)
            and len(shape := A_n.shape) == 2
            and shape[1] == d
            and B_n.shape == (o, shape[0])
            and A_n.dtype == B_n.dtype == dtype
            and A_n.device == B_n.device == device
        ):
            continue
        require_like(op, f"A[{n}]", A_n, weight, "weight", ("r", d))
        require_like(op, f"B[{n}]", B_n, A_n, f"A[{n}]", (o, A_n.shape[0]))


def as_vector(op: str, name: str, value: object, length: int, like: Tensor) -> Tensor:
    """Return weights or scales as the backends take them: 1-D, float32 or float64, on the device.

    Args:
        op: operator.
        name: argument.
        value: a floating-point tensor [length] or a sequence of numbers, tensors among them.
        length: N.
        like: float64 gives float64; its device is used.
    """
    if not isinstance(value, Tensor):
        require_sequence(op, name, value, of="numbers")
        value = _stacked(op, name, cast("Sequence[object]", value))
    elif not value.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point, got {describe(value)}")
    _require_strided(op, name, value)
    if value.shape != (length,):
        raise ValueError(
            f"{op}: {name} must be [{length}], one per concept, got {list(value.shape)}"
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(like.device, dtype)


def _stacked(op: str, name: str, values: Sequence[object]) -> Tensor:
    """Return numbers as a vector; through tensors among them gradients flow."""
    for i, x in enumerate(values):
        if not (isinstance(x, Real) or (isinstance(x, Tensor) and x.ndim == 0)):
            raise TypeError(f"{op}: {name}[{i}] must be a number, got {describe(x)}")
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in values])


def require_finite(op: str, weights: Tensor) -> None:
    """Refuse NaN and infinities."""
    if _is_known_good(weights, None):
        return
    if not bool(weights.isfinite().all()):
        raise ValueError(f"{op}: weights must be finite, got {weights.tolist()}")
    _remember(weights, None)


def require_in_range(op: str, index: Tensor, num_adapters: int) -> None:
    """Refuse an index outside [−1, N)."""
    if _is_known_good(index, num_adapters) or index.numel() == 0:
        return
    low, high = (int(x) for x in torch.stack(torch.aminmax(index)).tolist())
    if low < -1 or high >= num_adapters:
        raise ValueError(
            f"{op}: index must be in [-1, {num_adapters}), −1 for no adapter, "
            f"got values from {low} to {high}"
        )
    _remember(index, num_adapters)


def known_in_range(index: Tensor, num_adapters: int) -> None:
    """Spare `require_in_range` an index whose values the caller knows: no read from the device."""
    _remember(index, num_adapters)


def _is_known_good(x: Tensor, limit: int | None) -> bool:
    # tensors of inference mode do not count their changes
    return not x.is_inference() and _known_good.get(x) == (x._version, limit)


def _remember(x: Tensor, limit: int | None) -> None:
    if not x.is_inference():
        _known_good[x] = (x._version, limit)
