"""A model of the GPU: what an outer step launches, computes and moves, counted without one.

    python -m benchmarks.roofline --model sd14 --device h100 --mode exact

runs the engine itself on the meta device, with the published architecture and no weights, and
counts every operation that would be a kernel: its FLOPs, and the bytes of the tensors that it reads
and writes. A kernel takes the larger of what its FLOPs and its bytes ask for at the rates of
`benchmarks.kernel_counts`, and two microseconds at least; the host takes its time for each launch,
and the device waits for it where it is late. Nothing here was measured on a GPU: these are
predictions.
"""

# N = concepts, K = lower-level steps

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.func import functional_call

from benchmarks.architectures import ARCHITECTURES
from benchmarks.kernel_counts import GPUS, PARTS, Counter, Counts
from mima.bilevel.optimizers import Adam
from mima.bilevel.outer import outer_gradient
from mima.bilevel.tasks import FullWeights
from mima.bilevel.upper import UpperLevel, UpperTerm
from mima.families.fused_layers import FusedLayers
from mima.immunization.planning.meta_memory import fused_attention
from mima.merging import MergeLayer, Params

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
    with FusedLayers(denoiser), fused_attention(), counter:
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
