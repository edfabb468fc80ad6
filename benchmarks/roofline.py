"""A model of the GPU: what an outer step launches, computes and moves, counted without one.

    python -m benchmarks.roofline --model sd14 --device h100 --mode exact

runs the engine itself on the meta device, with the published architecture and no weights, and
counts every operation that would be a kernel: its FLOPs, and the bytes of the tensors that it reads
and writes. A kernel takes the larger of what its FLOPs and its bytes ask for at the rates below,
and two microseconds at least; the host takes its time for each launch, and the device waits for it
where it is late. Nothing here was measured on a GPU: these are predictions.
"""

# N = concepts, K = lower-level steps

from __future__ import annotations

import argparse
import json
import math
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mima.bilevel.lower import Params
from mima.bilevel.optimizers import Adam
from mima.bilevel.outer import UpperLevel, UpperTerm, outer_gradient
from mima.bilevel.tasks import FullWeights
from mima.families.fused_layers import FusedLayers
from mima.merging import MergeLayer

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

Inputs = Callable[[int, torch.dtype], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A published denoiser and what it is called with."""

    build: Callable[..., torch.nn.Module]
    """Numbers of layers -> the denoiser."""
    inputs: Inputs
    """(batch, dtype) -> arguments of a forward."""
    trained: str
    """Pattern of the names that both levels train: the attention that reads text."""
    layers: tuple[int, ...] = ()
    """How many there are of each kind of layer whose like follow each other: a few are counted."""


def _unet(**config: Any) -> Callable[..., torch.nn.Module]:
    return lambda: UNet2DConditionModel(**config)


def _sdxl(layers: int) -> torch.nn.Module:
    """SDXL's UNet with so many transformer layers in its lowest blocks."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, layers),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _unet_inputs(side: int, tokens: int, width: int, *, is_xl: bool = False) -> Inputs:
    def inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        call: dict[str, Any] = {
            "sample": torch.empty(batch, 4, side, side, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(batch, tokens, width, dtype=dtype),
        }
        if is_xl:
            call["added_cond_kwargs"] = {
                "text_embeds": torch.empty(batch, 1280, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            }
        return call

    return inputs


def _sd3_inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    # 77 tokens of CLIP and 256 of T5
    return {
        "hidden_states": torch.empty(batch, 16, 128, 128, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, 333, 4096, dtype=dtype),
        "pooled_projections": torch.empty(batch, 2048, dtype=dtype),
    }


def _flux_inputs(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(batch, 4096, 64, dtype=dtype),
        "timestep": torch.empty(batch, dtype=dtype),
        "guidance": torch.empty(batch, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, 512, 4096, dtype=dtype),
        "pooled_projections": torch.empty(batch, 768, dtype=dtype),
        "img_ids": torch.empty(4096, 3, dtype=dtype),
        "txt_ids": torch.empty(512, 3, dtype=dtype),
    }


ARCHITECTURES = {
    # 860 M parameters, 512 pixels
    "sd14": Architecture(
        build=_unet(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
        ),
        inputs=_unet_inputs(64, 77, 768),
        trained=r"\.attn2\.",
    ),
    # 2.6 G parameters, 1024 pixels
    "sdxl": Architecture(
        build=_sdxl,
        layers=(10,),
        inputs=_unet_inputs(128, 77, 2048, is_xl=True),
        trained=r"\.attn2\.",
    ),
    # medium: 2.0 G parameters, 1024 pixels
    "sd3": Architecture(
        build=lambda layers: SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        layers=(24,),
        inputs=_sd3_inputs,
        trained=r"\.attn\.add_[kv]_proj\.",
    ),
    # dev: 11.9 G parameters, 1024 pixels
    "flux": Architecture(
        build=lambda both, single: FluxTransformer2DModel(
            num_layers=both, num_single_layers=single, guidance_embeds=True
        ),
        layers=(19, 38),
        inputs=_flux_inputs,
        trained=r"\.attn\.add_[kv]_proj\.",
    ),
    # for tests: the same blocks in small
    "tiny": Architecture(
        build=lambda layers: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=layers,
            attention_head_dim=4,
            norm_num_groups=8,
            cross_attention_dim=32,
        ),
        layers=(1,),
        inputs=_unet_inputs(16, 7, 32),
        trained=r"\.attn2\.",
    ),
}

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


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as a GPU would compute it where no second derivative is asked for.

    PyTorch chooses by the device, and has no fused kernel for the meta device.
    """
    plain = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.backends.cuda.mem_efficient_sdp_enabled() or kwargs.get("enable_gqa"):
            return plain(query, key, value, *args, **kwargs)
        out: Tensor = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", fused):
        yield


FEW = 2
"""Layers of a kind that are counted; one more tells what each further one adds."""


def count(
    model: str,
    *,
    device: str = "h100",
    mode: str = "exact",
    precision: str = "bfloat16",
    concepts: int = 3,
    steps: int = 4,
    batch: int = 1,
) -> Counts:
    """Count one outer step: N concepts, K steps of Adam each, averaged; then the upper level.

    Layers that follow each other are of the same sizes: two of a kind and three are counted, and
    each further one adds the difference. So do further concepts and steps, where paths are too
    large to be kept (`mima.bilevel.outer.KEPT`), as those of these models are: one and two are
    counted.

    Args:
        model: a key of `ARCHITECTURES`.
        device: a key of `GPUS`.
        mode: of the hypergradient.
        precision: float32, tf32 or bfloat16; of weights and activations alike.
        concepts: N.
        steps: K.
        batch: pictures of a lower-level step; the upper level reads as many of the concept and as
            many that are to be kept.
    """

    def counted(concepts: int, steps: int) -> Counts:
        return _count_layers(model, device, mode, precision, concepts, steps, batch)

    counts = one = counted(1, 1)
    if steps > 1:
        # of each concept, but one concept's lie in memory
        further = concepts * (steps - 1)
        counts = counts.and_more(one, counted(1, 2), further, at_peak=steps - 1)
    if concepts > 1:
        counts = counts.and_more(one, counted(2, 1), concepts - 1)
    return counts


def _count_layers(
    model: str,
    device: str,
    mode: str,
    precision: str,
    concepts: int,
    steps: int,
    batch: int,
) -> Counts:
    """Count one outer step of a model with all its layers, of which a few are followed."""
    layers = ARCHITECTURES[model].layers
    settings = device, mode, precision, concepts, steps, batch
    few = tuple(min(FEW, n) for n in layers)
    counts = base = _count(model, few, *settings)
    for i, n in enumerate(layers):
        if n > FEW:
            one_more = (*few[:i], FEW + 1, *few[i + 1 :])
            counts = counts.and_more(base, _count(model, one_more, *settings), n - FEW)
    return counts


def _count(
    model: str,
    layers: tuple[int, ...],
    device: str,
    mode: str,
    precision: str,
    concepts: int,
    steps: int,
    batch: int,
) -> Counts:
    """Count one outer step of a model with so many layers."""
    architecture = ARCHITECTURES[model]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.device("meta"):
        denoiser = architecture.build(*layers).to(dtype).eval().requires_grad_(False)
        below, above = (architecture.inputs(size, dtype) for size in (batch, 2 * batch))
        shares = torch.full((concepts,), 1 / concepts)
    theta = {
        name: value
        for name, value in denoiser.named_parameters()
        if re.search(architecture.trained, name)
    }

    def loss(call: Mapping[str, Any], params: Params, k: int = 0) -> Tensor:
        predicted = functional_call(denoiser, dict(params), (), {**call, "return_dict": False})[0]
        return F.mse_loss(predicted.float(), torch.empty_like(predicted, dtype=torch.float32))

    task = FullWeights(partial(loss, below), tuple(theta), steps=steps, optimizer=Adam(lr=1e-5))
    upper = UpperLevel([UpperTerm("both", -1.0)], lambda phi: [loss(above, phi)])
    counter = Counter(
        GPUS[device],
        precision,
        (value.shape for value in theta.values()),
        _token_counts(denoiser, below),
        [heads * size for heads in _heads(denoiser) for size in (batch, 2 * batch)],
    )
    with FusedLayers(denoiser), _fused_attention(), counter:
        outer_gradient(
            theta,
            [task] * concepts,
            MergeLayer(shares),
            [upper] * concepts,
            mode=mode,
            wrt=tuple(theta),
        )
    return counter.counts


def _token_counts(denoiser: torch.nn.Module, call: Mapping[str, Any]) -> set[int]:
    """Numbers of tokens, of text and of pictures, that the layers of attention see."""
    text = call["encoder_hidden_states"].shape[1]
    counts = {text}
    if isinstance(denoiser, UNet2DConditionModel):
        side = call["sample"].shape[-1]
        depth = len(denoiser.config.block_out_channels)
        return counts | {(side >> level) ** 2 for level in range(depth)}
    states = call["hidden_states"]
    patch = denoiser.config.patch_size
    image = states.shape[1] if states.ndim == 3 else states.shape[-1] ** 2 // patch**2
    return counts | {image, image + text}


def _heads(denoiser: torch.nn.Module) -> tuple[int, ...]:
    config: Any = denoiser.config
    if not isinstance(denoiser, UNet2DConditionModel):
        return (config.num_attention_heads,)
    # diffusers' configurations of UNets call the number of heads so
    heads = config.attention_head_dim
    return (heads,) if isinstance(heads, int) else tuple(heads)


def table(counts: Counts) -> str:
    """A line per part, and what they come to together."""
    lines = [
        "| part | launches | TFLOP | GB | GPU ms | share | GB at the peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    whole = counts.total
    for name, part in [*((n, counts.parts[n]) for n in PARTS if n in counts.parts), ("", whole)]:
        peak = counts.peak_parts.get(name, 0) if name else counts.peak_bytes
        lines.append(
            f"| {name or 'all'} | {part.launches} | {part.flops / 1e12:.2f} "
            f"| {part.num_bytes / 1e9:.1f} | {part.seconds * 1e3:.1f} "
            f"| {part.seconds / whole.seconds:.0%} | {peak / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of one outer step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = [name for name in ARCHITECTURES if name != "tiny"]
    parser.add_argument("--model", choices=[*models, "tiny"], default="sd14")
    parser.add_argument("--device", choices=GPUS, default="h100")
    modes = ("exact", "finite_difference", "first_order")
    parser.add_argument("--mode", choices=modes, default="exact")
    precisions = ("float32", "tf32", "bfloat16")
    parser.add_argument("--precision", choices=precisions, default="bfloat16")
    parser.add_argument("--concepts", type=int, default=3, help="N")
    parser.add_argument("--steps", type=int, default=4, help="K")
    parser.add_argument("--batch", type=int, default=1, help="pictures of a lower-level step")
    parser.add_argument("--json", type=Path, help="file that the counts are written to")
    options = vars(parser.parse_args(argv))
    path = options.pop("json")
    counts = count(**options)
    if path is not None:
        parts = {name: asdict(part) for name, part in counts.parts.items()}
        told = {**options, **vars(counts), "parts": parts, "total": asdict(counts.total)}
        path.write_text(json.dumps(told, indent=1) + "\n")
    print(table(counts))
    print(
        f"\npredicted: {counts.seconds * 1e3:.0f} ms an outer step, "
        f"{counts.total.seconds * 1e3:.0f} of them on the device; "
        f"the host waits {counts.reads} times; {counts.peak_bytes / 1e9:.1f} GB beside the weights"
    )


if __name__ == "__main__":
    main()
