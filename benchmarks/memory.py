"""Peak memory and time of one outer step for N concepts, each measured in a fresh process.

    python benchmarks/memory.py [--concepts 1 2 4 8 16] [--batch 2] [--devices cpu cuda]

On the CPU and, where there is one, on the GPU. On a CPU the peak is the process's resident set, on
a GPU what its allocator gave out; what was held before the step is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path


def measure(engine: str, concepts: int, batch: int, device: str) -> dict[str, float]:
    """Run in this process; sizes in MiB."""
    import torch
    from outer_step import forget_peak_memory, make_problem, naive, two_pass

    from mima.immunization.progress import peak_memory

    torch.set_num_threads(1)
    problem = make_problem(concepts, batch=batch, device=device)
    if device != "cpu":
        # memory for the first products
        torch.zeros(8, 8, device=device).square().mm(torch.ones(8, 8, device=device))
    before = forget_peak_memory(problem.family.device)
    started = time.perf_counter()
    outer = {"two-pass": two_pass, "naive": naive}[engine](problem)
    # reading it waits for the device
    norm = outer.norm
    seconds = time.perf_counter() - started
    peak = peak_memory(problem.family.device)
    return {"before": before / 2**20, "peak": peak / 2**20, "seconds": seconds, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--engines", nargs="+", default=["two-pass", "naive"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--devices", nargs="+", default=None)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        engine, concepts, device = args.one
        print(json.dumps(measure(engine, int(concepts), args.batch, device)))
        return
    for device in args.devices or available():
        table(device, args)


def available() -> list[str]:
    """The CPU, and a GPU where there is one."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def table(device: str, args: argparse.Namespace) -> None:
    """Measure and print every engine and number of concepts on one device."""
    import torch

    chip = platform.processor() or platform.machine()
    print(chip if device == "cpu" else torch.cuda.get_device_name(device), end=", ")
    print(f"{device}, batch {args.batch}")
    print(f"{'engine':10} {'N':>3} {'before MiB':>11} {'peak MiB':>9} {'of N=1':>7} {'s':>7}  ‖g‖")
    for engine in args.engines:
        first = None
        for concepts in args.concepts:
            command = [sys.executable, __file__, "--one", engine, str(concepts), device]
            command += ["--batch", str(args.batch)]
            # what it says where it fails goes to the terminal
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
            )
            row = json.loads(done.stdout.splitlines()[-1])
            first = first or row["peak"]
            print(
                f"{engine:10} {concepts:3} {row['before']:11.0f} {row['peak']:9.0f} "
                f"{row['peak'] / first:7.2f} {row['seconds']:7.2f}  {row['norm']:.6g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
