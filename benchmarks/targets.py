"""The speed targets, each a ratio within one comparison of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Samples = Mapping[str, Sequence[float]]
"""Seconds of each variant, round by round."""

PLAIN_PRODUCTS = ("plain", "plain differences", "compile")
BATCHED_PRODUCTS = ("bmm", "bmm in place", "compile")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One target in one comparison."""

    group: str
    text: str
    value: float
    bar: float
    at_most: bool = True
    """Whether the value is to stay under the bar, or to reach it."""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def ratio(samples: Samples, a: str, *others: str) -> float | None:
    """Time of `a` over the fastest of the others: the median of the ratios of each round.

    Variants are measured in turns, so that those of one round saw the same machine. None where
    nothing was measured to compare with.
    """
    present = [samples[b] for b in others if b in samples]
    if a not in samples or not present:
        return None
    return max(
        statistics.median(x / y for x, y in zip(samples[a], b, strict=False)) for b in present
    )


def above_base(samples: Samples, a: str, b: str) -> float | None:
    """Time above the base layer alone, of `a` over that of `b`."""
    if not {a, b, "base layer"} <= samples.keys():
        return None
    rounds = zip(samples[a], samples[b], samples["base layer"], strict=False)
    return statistics.median((x - base) / (y - base) for x, y, base in rounds)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio of the serving kernel's time, and its bar."""

    group: str
    """How the comparison's name begins."""
    text: str
    value: Callable[[Samples, str], float | None]
    bar: float
    ours: str = "native"
    """The variant that serves: native on the CPU, triton on CUDA."""


def _over(*others: str) -> Callable[[Samples, str], float | None]:
    return lambda samples, ours: ratio(samples, ours, *others)


CPU = [
    Target(group="weighted_merge forward N", text="over eager", value=_over("eager"), bar=0.25),
    Target(
        group="weighted_merge forward N",
        text="over the better of foreach and torch.compile",
        value=_over("foreach", "compile"),
        bar=1,
    ),
    Target(
        group="weighted_merge forward+backward",
        text="over eager",
        value=_over("eager"),
        bar=0.35,
    ),
    Target(
        group="adam_step pullback",
        text="over autograd through the step",
        value=_over("autograd"),
        bar=0.4,
    ),
    Target(
        group="projected_merge forward N",
        text="a ready plan over the published routine",
        value=_over("published"),
        bar=1 / 20,
    ),
    Target(
        group="projected_merge forward N",
        text="over the best plain expression",
        value=_over(*PLAIN_PRODUCTS),
        bar=0.8,
    ),
    Target(
        group="projected_merge forward N",
        text="building the plan over the published routine",
        value=lambda samples, _: ratio(samples, "plan", "published"),
        bar=1,
    ),
    Target(
        group="batched_lora forward d",
        text="over the best of peft, separate passes and batched products",
        value=_over("peft mixed batch", "separate passes", *BATCHED_PRODUCTS),
        bar=1,
    ),
    Target(
        group="batched_lora forward d",
        text="time above the base layer, over peft's",
        value=lambda samples, ours: above_base(samples, ours, "peft mixed batch"),
        bar=0.5,
    ),
    Target(
        group="batched_lora forward d",
        text="N=8 over N=1",
        value=lambda samples, ours: ratio(samples, ours, f"{ours} N=1"),
        bar=1.15,
    ),
    Target(
        group="batched_lora forward+backward",
        text="over separate passes",
        value=_over("separate passes"),
        bar=0.7,
    ),
    Target(
        group="batched_lora forward+backward",
        text="over the better of peft and batched products",
        value=_over("peft mixed batch", *BATCHED_PRODUCTS),
        bar=1,
    ),
    Target(
        group="merge adapters",
        text="weighted, over the better of peft and diffusers",
        value=_over("peft cat", "fuse_lora"),
        bar=1,
        ours="mima weighted",
    ),
    Target(
        group="merge adapters",
        text="projected with its plan, over peft's weighted",
        value=_over("peft cat"),
        bar=1,
        ours="mima projected",
    ),
    Target(
        group="compose keys and values",
        text="projected, over the composition layer by layer",
        value=_over("layer by layer"),
        bar=1,
        ours="mima projected",
    ),
    Target(
        group="a training step of",
        text="one forward for all, over a pass for each",
        value=_over("one by one"),
        bar=1,
        ours="together",
    ),
    Target(
        group="sampling",
        text="over a plain loop",
        value=_over("plain loop"),
        bar=0.5,
        ours="batch 24",
    ),
]

GPU = [
    Target(
        group="batched_lora forward+backward",
        text="over peft",
        value=_over("peft mixed batch"),
        bar=0.5,
        ours="triton",
    ),
    # The base layer moves x, y, ȳ and x̄; Ā and B̄ read x and ȳ once more: 1.5 at least. Three is an
    # estimate from the launches' occupancy, to be confirmed or refuted by the first run.
    Target(
        group="batched_lora forward+backward",
        text="over the base layer alone, r ≤ 16",
        value=_over("base layer"),
        bar=3,
        ours="triton",
    ),
]

# Of Stable Diffusion 1.x's keys and values in float32, N = 3, `projected_merge` has instructions
# for 140 µs of 132 multiprocessors at 1.98 GHz (compiled for sm_90 with Triton 3.8): on an H200,
# whose floor is 91, the bar is predicted to be missed.
GPU_BANDWIDTH = {"weighted_merge": 0.9, "projected_merge": 0.8}
"""Share of the measured copy bandwidth, forward and backward."""


def verdicts(
    samples: Mapping[str, Samples], floors: Mapping[tuple[str, str], float]
) -> list[Verdict]:
    """Judge what was measured.

    Args:
        samples: by comparison, then variant.
        floors: floor over median time, by comparison and variant.
    """
    on_gpu = any("triton" in variants for variants in samples.values())
    decided = []
    for group, variants in samples.items():
        for target in GPU if on_gpu else CPU:
            if not group.startswith(target.group):
                continue
            if "r ≤ 16" in target.text and group.endswith("r=64"):
                continue
            value = target.value(variants, target.ours)
            if value is not None:
                decided.append(Verdict(group=group, text=target.text, value=value, bar=target.bar))
        operator = group.split()[0]
        if on_gpu and operator in GPU_BANDWIDTH and (group, "triton") in floors:
            decided.append(
                Verdict(
                    group=group,
                    text="share of the copy bandwidth",
                    value=floors[group, "triton"],
                    bar=GPU_BANDWIDTH[operator],
                    at_most=False,
                )
            )
    return decided
