"""What a computation on the meta device would launch, compute and move on a GPU."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What kernels reach on a device.

    About nine tenths of its memory's rate, and two thirds of its matrix units'.
    """

    bytes_per_second: float
    flops_per_second: Mapping[str, float]
    """By precision."""
    issue_cycles_per_second: float
    """Multiprocessors times their highest clock."""


GPUS = {
    "a100": Gpu(
        bytes_per_second=1.8e12,
        flops_per_second={"float32": 18e12, "tf32": 110e12, "bfloat16": 220e12},
        issue_cycles_per_second=108 * 1.41e9,
    ),
    "h100": Gpu(
        bytes_per_second=2.7e12,
        flops_per_second={"float32": 50e12, "tf32": 350e12, "bfloat16": 650e12},
        issue_cycles_per_second=132 * 1.98e9,
    ),
    "h200": Gpu(
        bytes_per_second=4.2e12,
        flops_per_second={"float32": 50e12, "tf32": 350e12, "bfloat16": 650e12},
        issue_cycles_per_second=132 * 1.98e9,
    ),
}
SHORTEST_KERNEL = 2e-6
"""Seconds."""
HOST_FORWARD, HOST_BACKWARD = 15e-6, 6e-6
"""Seconds of the host for a launch: through modules, and in autograd's engine."""

PARTS = ("attention matrices", "fused attention", "products", "norms, activations", "weights")
"""What kernels work on: matrices [tokens, tokens]; attention without them; convolutions and linear
layers; other tensors of activations; tensors of the trained weights' shapes: optimizer, merge."""


@dataclass
class Part:
    """What the kernels of one part come to."""

    launches: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0
    seconds: float = 0.0
    """Of the device."""


@dataclass
class Counts:
    """What was counted of a step."""

    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    seconds: float = 0.0
    """From the first launch to the last result, waiting for the host included."""
    reads: int = 0
    """Values that the host waited for."""
    peak_bytes: int = 0
    """Of the tensors that lived at once beside the weights."""
    peak_parts: dict[str, int] = field(default_factory=dict)
    """Whose they were."""

    def and_more(
        self, fewer: Counts, more: Counts, times: int, *, at_peak: int | None = None
    ) -> Counts:
        """These counts, and so many times what ``more`` has beyond ``fewer``.

        Args:
            fewer: counts of a smaller step.
            more: counts of a larger one.
            times: how often the difference is added.
            at_peak: how many of those live at once; None for all.
        """
        living = times if at_peak is None else at_peak
        counts = Counts(
            seconds=self.seconds + times * (more.seconds - fewer.seconds),
            reads=self.reads + times * (more.reads - fewer.reads),
            peak_bytes=self.peak_bytes + living * (more.peak_bytes - fewer.peak_bytes),
        )
        for name in {*self.parts, *more.parts}:
            mine, less, larger = (c.parts.get(name, Part()) for c in (self, fewer, more))
            counts.parts[name] = Part(
                *(
                    a + times * (c - b)
                    for a, b, c in zip(*map(astuple, (mine, less, larger)), strict=True)
                )
            )
        for name in {*self.peak_parts, *more.peak_parts}:
            a, b, c = (peaks.peak_parts.get(name, 0) for peaks in (self, fewer, more))
            # what shrank where the peak is at another moment would fall below nothing
            counts.peak_parts[name] = max(a + living * (c - b), 0)
        return counts

    @property
    def total(self) -> Part:
        """All parts together."""
        parts = self.parts.values()
        return Part(
            sum(p.launches for p in parts),
            sum(p.flops for p in parts),
            sum(p.num_bytes for p in parts),
            sum(p.seconds for p in parts),
        )


_PRODUCTS = (
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm),
    *(aten.convolution, aten.convolution_backward),
)
_FUSED = (
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
)
_OPERATORS = torch.ops.mima


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """What an operator's passes over tiles multiply (`kernels/triton/attention.py`)."""

    of_inputs: int
    """Products of two inputs for each pair of query and key, in the inputs' precision."""
    in_float32: int
    """Others; in TF32 where inputs are of 16 bits."""
    cycles: Mapping[int, float]
    """Issue cycles of a multiprocessor for each pair, by the padded width of a head: what Triton
    3.8 makes of the kernels for sm_90 and bfloat16, instructions of the largest loop times warps,
    over four schedulers."""
    first: int
    """Where q, k and v stand among the arguments."""


_ATTENTION = {
    _OPERATORS.attention: _Attention(
        of_inputs=1, in_float32=1, cycles={64: 0.18, 128: 0.52, 256: 1.10}, first=0
    ),
    _OPERATORS.attention_backward: _Attention(
        of_inputs=6, in_float32=3, cycles={64: 1.03, 128: 1.86, 256: 3.19}, first=1
    ),
    _OPERATORS.attention_double_backward: _Attention(
        of_inputs=15, in_float32=7, cycles={64: 2.22, 128: 3.38, 256: 8.63}, first=4
    ),
}


def _attention_cost(
    passes: _Attention, args: Sequence[Any], gpu: Gpu, precision: str
) -> tuple[float, float]:
    """Return the FLOPs that the passes make, and the seconds below which they cannot take them.

    Rows are padded to powers of two. Either the matrix units take longest, or the schedulers to
    issue the instructions, which is known of 16 bits alone.
    """
    q, k, v = args[passes.first : passes.first + 3]
    n, T, d = q.shape
    pairs = n * T * k.shape[1]
    padded = [max(16, 1 << (width - 1).bit_length()) for width in (d, v.shape[2])]
    # two FLOPs of each column, of q's and k's width in one half of the products
    product = float(pairs * sum(padded))
    rates = gpu.flops_per_second
    wide = "tf32" if precision == "bfloat16" else precision
    seconds = product * (passes.of_inputs / rates[precision] + passes.in_float32 / rates[wide])
    if precision == "bfloat16":
        widest = max(passes.cycles)
        # heads that are wider take at least in proportion
        width = max(padded)
        known = min((w for w in passes.cycles if w >= width), default=widest)
        cycles = passes.cycles[known] * max(1.0, width / known)
        seconds = max(seconds, pairs * cycles / gpu.issue_cycles_per_second)
    return product * (passes.of_inputs + passes.in_float32), seconds


# no kernel: a new name for memory, or memory alone
_FREE = (aten.detach, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.alias)


class Counter(TorchDispatchMode):
    """Count what happens on the meta device, and let a model of a GPU take its time.

    Args:
        gpu: the device.
        precision: the rate of products.
        weights: shapes of the trained tensors.
        tokens: numbers of tokens that attend to others.
        matrices: numbers of heads, times pictures: a tensor of as many matrices, both sizes of
            which are numbers of tokens, is one of attention matrices.
    """

    def __init__(
        self,
        gpu: Gpu,
        precision: str,
        weights: Iterable[torch.Size],
        tokens: Iterable[int],
        matrices: Iterable[int],
    ) -> None:
        super().__init__()
        self.counts = Counts()
        self._gpu = gpu
        self._precision = precision
        self._weights = set(weights)
        self._tokens = set(tokens)
        self._matrices = set(matrices)
        self._host = 0.0
        self._living: dict[str, int] = defaultdict(int)
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            # a number of no consequence, where the engine reads one
            self.counts.reads += 1
            self._host = self.counts.seconds = max(self._host, self.counts.seconds)
            return 1.0
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        part = self._part(packet, [*results, *tensors])
        self._remember(results, part)
        if func.is_view or packet in _FREE or not results:
            return out
        formula = flop_registry.get(packet)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        seconds = flops / self._gpu.flops_per_second[self._precision]
        if packet in _ATTENTION:
            flops, seconds = _attention_cost(_ATTENTION[packet], args, self._gpu, self._precision)
        num_bytes = sum(_bytes(x) for x in (*tensors, *results))
        self._launch(self.counts.parts[part], flops, seconds, num_bytes)
        return out

    def _part(self, packet: Any, tensors: Sequence[Tensor]) -> str:
        if packet in _FUSED or packet in _ATTENTION:
            return "fused attention"
        if any(
            set(x.shape[-2:]) <= self._tokens and math.prod(x.shape[:-2]) in self._matrices
            for x in tensors
            if x.ndim >= 3
        ):
            return "attention matrices"
        if packet in _PRODUCTS:
            return "products"
        if tensors and all(x.shape in self._weights or x.ndim == 0 for x in tensors):
            return "weights"
        return "norms, activations"

    def _launch(self, part: Part, flops: float, computing: float, num_bytes: float) -> None:
        seconds = max(computing, num_bytes / self._gpu.bytes_per_second, SHORTEST_KERNEL)
        part.launches += 1
        part.flops += flops
        part.num_bytes += num_bytes
        part.seconds += seconds
        in_engine = torch._C._current_graph_task_id() != -1
        self._host += HOST_BACKWARD if in_engine else HOST_FORWARD
        self.counts.seconds = max(self.counts.seconds, self._host) + seconds

    def _remember(self, results: Sequence[Tensor], part: str) -> None:
        for x in results:
            storage = x.untyped_storage()
            if storage in self._seen:
                continue
            self._seen.add(storage)
            self._living[part] += storage.nbytes()
            weakref.finalize(storage, self._forget, part, storage.nbytes())
        total = sum(self._living.values())
        if total > self.counts.peak_bytes:
            self.counts.peak_bytes = total
            self.counts.peak_parts = dict(self._living)

    def _forget(self, part: str, num_bytes: int) -> None:
        self._living[part] -= num_bytes


def _bytes(x: Tensor) -> int:
    """Bytes that a kernel moves for a tensor: of an expanded one, those that are there."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
