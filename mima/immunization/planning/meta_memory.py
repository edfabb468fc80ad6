"""The memory of a computation, counted on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mima.bilevel.low_rank import LowRankWeight
from mima.families.frozen import Upcast

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that live at once, and remember the most.

    Args:
        held: tensors that are there already and do not count, nor do views of them.
        weights: shapes of trained weights; tensors of these count as the part ``weights``, others
            as ``activations``.
        device: whose tensors count.

    Attributes:
        peak: of all parts together.
        parts: what each part had at that moment.
        largest_cast: of the frozen weights, each of which is float32 while an operator reads it.
    """

    def __init__(
        self, held: Iterable[torch.Tensor], weights: Iterable[torch.Size], device: str = "meta"
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.parts: dict[str, int] = {}
        self.largest_cast = 0
        self._weights = set(weights)
        self._device = device
        self._living: dict[str, int] = defaultdict(int)
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        # a storage's Python object lives as long as something refers to it
        self._held = [x.untyped_storage() for x in held if not isinstance(x, Upcast)]
        self._seen.update(self._held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            # a number of no consequence, where the engine reads one; or how much is padded
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for x in _flat(args):
            if isinstance(x, Upcast):
                self.largest_cast = max(self.largest_cast, x.numel() * 4)
        for x in _flat((out,)):
            if isinstance(x, torch.Tensor) and not isinstance(x, Upcast):
                self._remember(x)
        return out

    def _remember(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if x.device.type != self._device or storage in self._seen:
            return
        part = "weights" if x.shape in self._weights else "activations"
        self._seen.add(storage)
        self._living[part] += storage.nbytes()
        weakref.finalize(storage, self._forget, part, storage.nbytes())
        total = sum(self._living.values())
        if total > self.peak:
            self.peak, self.parts = total, dict(self._living)

    def restart(self) -> None:
        """Look for the most from now on."""
        self.parts = dict(self._living)
        self.peak = sum(self.parts.values())

    def _forget(self, part: str, num_bytes: int) -> None:
        self._living[part] -= num_bytes


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and those of lists and tuples among them: an operator's have no others."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as a GPU would compute it where no second derivative is asked for.

    PyTorch chooses by the device, and has no fused kernel for the meta device: attention there
    would keep its matrix.
    """
    plain = F.scaled_dot_product_attention

    def fused(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("enable_gqa") or not torch.backends.cuda.mem_efficient_sdp_enabled():
            return plain(query, key, value, *args, **kwargs)
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    with _replaced(F, "scaled_dot_product_attention", fused):
        yield


@contextmanager
def _as_on_a_device(*, bfloat16: bool) -> Iterator[None]:
    """Let PyTorch's functions do on the meta device what they do on one that computes.

    Attention is fused (``fused_attention``). Autocast does not know the device: products are cast
    as it casts them, and what asks for none gets none. The functions are replaced, since a
    ``TorchFunctionMode`` is not active within backward passes, where checkpointed blocks are
    computed again.

    Args:
        bfloat16: whether autocast is to be imitated.
    """
    autocast = torch.autocast

    def no_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    def halved(function: Any) -> Any:
        def product(*args: Any, **kwargs: Any) -> Any:
            return function(*map(_half, args), **{n: _half(x) for n, x in kwargs.items()})

        return product if bfloat16 else function

    attention = "scaled_dot_product_attention"
    products: list[tuple[Any, str]] = [(F, n) for n in ("linear", "conv1d", "conv2d", attention)]
    products += [(torch, name) for name in ("matmul", "bmm", "baddbmm")]
    with ExitStack() as stack:
        stack.enter_context(fused_attention())
        for place, name in products:
            stack.enter_context(_replaced(place, name, halved(getattr(place, name))))
        stack.enter_context(_replaced(torch, "autocast", no_autocast))
        yield


def _half(x: Any) -> Any:
    if isinstance(x, LowRankWeight):
        # its factors follow the input, and their sum is not formed
        return x
    is_float32 = isinstance(x, torch.Tensor) and x.dtype == torch.float32
    return x.to(torch.bfloat16) if is_float32 else x


@contextmanager
def _replaced(place: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def counted(
    held: Iterable[torch.Tensor], weights: Iterable[torch.Size] = (), *, bfloat16: bool = False
) -> Iterator[LiveBytes]:
    """Count what happens on the meta device: see ``LiveBytes``.

    Args:
        held: as there.
        weights: likewise.
        bfloat16: count as if products were under autocast.
    """
    live = LiveBytes(held, weights)
    with _as_on_a_device(bfloat16=bfloat16), live:
        yield live
