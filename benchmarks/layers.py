"""An outer step with the denoiser's fused layers and with PyTorch's, in turns; and their memory.

    python -m benchmarks.layers [--mode exact first_order] [--times 1 4] [--rounds 5] [--threads 1]

On the embedded model, one concept, K = 1, batch 1, at so many times the side of the pictures that
it was trained on. Seconds are those of the process, on the CPU, so that other work on the machine
counts less; memory is the peak above what was held before the step, in a process of its own each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

from benchmarks.outer_step import forget_peak_memory, make_problem, two_pass
from mima.bilevel import hypergradient
from mima.immunization import levels
from mima.immunization.progress import peak_memory

VARIANTS = ("PyTorch's", "fused")


@contextmanager
def layers(variant: str) -> Iterator[None]:
    """Run the denoiser with its own layers, or leave the fused ones to the engine."""
    if variant == "fused":
        yield
        return
    with (
        mock.patch.object(levels, "FusedLayers", return_value=nullcontext()),
        mock.patch.object(hypergradient, "TwiceDifferentiable", nullcontext),
    ):
        yield


def step_of(mode: str, times: int, variant: str) -> Callable[[], torch.Tensor]:
    """An outer step, which returns its gradient."""
    problem = make_problem(1, batch=1, times=times, hypergradient=mode)

    def step() -> torch.Tensor:
        with layers(variant):
            gradient = two_pass(problem).gradient
        return torch.cat([gradient[name].flatten() for name in sorted(gradient)])

    return step


def seconds(mode: str, times: int, rounds: int) -> dict[str, float]:
    """The median of each variant's process time, once they agree."""
    steps = {variant: step_of(mode, times, variant) for variant in VARIANTS}
    expected, actual = (step() for step in steps.values())
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-4, f"the gradients differ by {error:.1e}"
    spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, step in steps.items():
            started = time.process_time()
            step()
            spent[variant].append(time.process_time() - started)
    return {variant: statistics.median(values) for variant, values in spent.items()}


def memory(mode: str, times: int, variant: str) -> float:
    """MiB that one step takes above what is there, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.layers", "--one", mode, str(times), variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measured(mode: str, times: int, variant: str) -> float:
    """The same, in this process."""
    step = step_of(mode, times, variant)
    before = forget_peak_memory(torch.device("cpu"))
    step()
    return (peak_memory(torch.device("cpu")) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", nargs="+", default=["exact", "first_order"])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        mode, times, variant = args.one
        print(measured(mode, int(times), variant))
        return
    print(f"{'mode':12} {'latents':>8} {'layers':10} {'s':>7} {'ratio':>6} {'MiB':>6} {'ratio':>6}")
    for mode in args.mode:
        for times in args.times:
            spent = seconds(mode, times, args.rounds)
            held = {variant: memory(mode, times, variant) for variant in VARIANTS}
            for variant in VARIANTS:
                ratios = [values[variant] / values[VARIANTS[0]] for values in (spent, held)]
                print(
                    f"{mode:12} {times**2:7}x {variant:10} {spent[variant]:7.3f} {ratios[0]:6.2f} "
                    f"{held[variant]:6.0f} {ratios[1]:6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
