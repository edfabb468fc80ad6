"""Several ways to compute one thing, checked against each other, then timed in turns.

Taking turns, round after round, is what makes ratios hold on a machine that other work shares: all
variants see the same interruptions. pytest-benchmark keeps the statistics; it reads them from a
clock that only the timed calls advance.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mima.ops.backends import choice

Thunk = Callable[[], Any]

SHORTEST_SAMPLE = 4e-3
"""Seconds; a shorter call is repeated within one sample, on a CPU."""
SHORTEST_LEAD = 2e-3
"""Seconds that a GPU waits before a timed call, or more: the host prepares the launches meanwhile,
so that events enclose the kernels alone."""
LEADS = 2, 4, 8
"""Times what the call takes the host that the GPU waits: the first at which the host is done while
the GPU still waits."""
LONGEST_LEAD = 0.1
"""Seconds; a call that would need more launches more kernels than a waiting GPU takes in, about a
thousand: the host would wait with it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this device reaches, measured: what floors are computed from."""

    device: torch.device
    bytes_per_second: float
    """Bytes read and written by a large copy."""
    flops_per_second: Mapping[torch.dtype, float]
    """Of a large matrix product, by its dtype."""

    def floor(self, num_bytes: float, flops: float, dtype: torch.dtype = torch.float32) -> float:
        """Return the seconds below which moving and computing this much cannot take."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second[dtype])


class Clock:
    """Seconds spent in timed calls: pytest-benchmark's timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(kw_only=True)
class Comparison:
    """Variants of one computation on the same inputs."""

    group: str
    variants: dict[str, Thunk]
    baseline: str
    """The variant that the others' answers are compared with."""
    num_bytes: float = 0.0
    """That must be read and written: the formula is a comment where it is computed."""
    flops: float = 0.0
    """0 like `num_bytes`: no floor is known."""
    dtype: torch.dtype = torch.float32
    """Of the products that `flops` counts."""
    rounds: int = 9
    tolerance: float = 1e-4
    """Largest difference of any answer, relative to the largest number in it."""
    unchecked: tuple[str, ...] = ()
    """Variants that compute something else on purpose: a part, or the same at another size."""
    slow: tuple[str, ...] = ()
    """Variants that take seconds: three rounds."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    copies: int = 1
    """Of the inputs, which calls take in turns: see `rotating`."""
    wall: dict[str, float] = field(default_factory=dict)
    """On a GPU, seconds from call to result of a call that finds the device idle."""
    lead: dict[str, float] = field(default_factory=dict)
    """On a GPU, seconds that it waits before a variant's timed calls."""
    with_host: set[str] = field(default_factory=set)
    """Variants whose samples have, on a GPU, the host's part in them: those that wait for the GPU,
    or launch more kernels than a waiting GPU takes in."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """What kept a variant from being measured; its own benchmark raises it."""

    def measure(self, device: torch.device) -> None:
        """Check answers, then fill `samples`, all variants that computed the right one in turns."""
        if self.samples or self.failed:
            return
        expected: list[Tensor] | None = None
        repeats = {}
        # the baseline first, for the others to be compared with
        for name in sorted(self.variants, key=lambda name: name != self.baseline):
            run = self.variants[name]
            try:
                answer = _tensors(run())  # also the warm-up, and the compilation
                if name == self.baseline:
                    expected = answer
                elif name not in self.unchecked:
                    self._check(name, answer, expected)
                del answer
                # tables of addresses, which each copy has its own of, are there from here on
                for _ in range(self.copies - 1):
                    run()
                repeats[name] = 1
                if device.type != "cuda" and name not in self.slow:
                    once = _cpu_seconds(run, 1)
                    repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7)))
                elif device.type == "cuda":
                    calls = [_host_and_wall_seconds(run, device) for _ in range(3)]
                    self.wall[name] = min(wall for _, wall in calls)
                    self.lead[name] = _lead(run, max(host for host, _ in calls), device)
            # of any kind: it is raised where this variant is asked for, and costs no other's figure
            except Exception as error:
                self.failed[name] = error
                continue
            self.samples[name] = []
        del expected
        with _without_collector():
            for round_ in range(self.rounds):
                for name in self.samples:
                    if name not in self.slow or round_ < 3:
                        self._sample(name, repeats[name], device)

    def _sample(self, name: str, repeat: int, device: torch.device) -> None:
        run = self.variants[name]
        if device.type == "cuda":
            seconds, ahead = _gpu_seconds(run, self.lead[name], device)
            if not ahead:
                self.with_host.add(name)
        else:
            seconds = _cpu_seconds(run, repeat)
        self.samples[name].append(seconds)

    def _check(
        self, name: str, answer: Sequence[Tensor], expected: Sequence[Tensor] | None
    ) -> None:
        assert expected is not None, f"{self.group}: the baseline, {self.baseline}, failed"
        assert len(answer) == len(expected), f"{self.group}: {name} returns {len(answer)} tensors"
        for got, want in zip(answer, expected, strict=True):
            if not want.numel():
                continue
            largest = want.abs().max().item()
            error = (got.float() - want.float()).abs().max().item()
            assert error <= self.tolerance * max(largest, 1e-6), (
                f"{self.group}: {name} differs by {error:.2e} where the largest is {largest:.2e}"
            )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Time, as timeit does, without Python's garbage collector, whose turn comes by chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rotating(
    build: Callable[[], Comparison], device: torch.device, *, cache_bytes: int | None = None
) -> Comparison:
    """Build a comparison whose calls find their inputs in memory, as in a step of training.

    On a GPU it is built as often as the second-level cache holds its bytes, twice over, and each
    call, of whichever variant, takes the inputs whose turn it is. Every variant is called on all of
    them before any is timed. On a CPU it is built once: inputs that a layer's caches hold are there
    in training, too.

    Args:
        build: gives the same values, in memory of their own, each time.
        device: of the inputs.
        cache_bytes: what the cache holds; None asks the device.
    """
    first = build()
    if cache_bytes is None:
        is_gpu = device.type == "cuda"
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if is_gpu else 0
    others = math.ceil(2 * cache_bytes / first.num_bytes)
    turns = itertools.cycle([first, *(build() for _ in range(others))])

    def in_turn(name: str) -> Thunk:
        return lambda: next(turns).variants[name]()

    variants = {name: in_turn(name) for name in first.variants}
    return replace(first, variants=variants, copies=1 + others)


def _tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer.detach()]
    return [x.detach() for x in answer if x is not None]


def _cpu_seconds(run: Thunk, repeat: int) -> float:
    """Seconds of one call."""
    if repeat > 1:
        # a short call pays, in caches, for the variant before it: not in its own time
        result = run()
    start = time.perf_counter()
    for _ in range(repeat):
        result = run()
    seconds = time.perf_counter() - start
    del result  # freeing is not part of computing
    return seconds / repeat


def _gpu_seconds(run: Thunk, lead: float, device: torch.device) -> tuple[float, bool]:
    """Seconds of one call's kernels, and whether the host was done while the GPU still waited.

    Where it was not, the seconds have a part of the host's in them.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(math.ceil(lead * _cycles_per_second(device)))
    start.record()
    result = run()
    end.record()
    ahead = not start.query()
    torch.cuda.synchronize(device)
    del result
    return start.elapsed_time(end) / 1e3, ahead


def _lead(run: Thunk, host: float, device: torch.device) -> float:
    """Return the seconds for which a GPU must wait for a call that takes the host so long."""
    for times in LEADS:
        lead = max(times * host, SHORTEST_LEAD)
        if lead > LONGEST_LEAD:
            break
        if _gpu_seconds(run, lead, device)[1]:
            return lead
    return SHORTEST_LEAD  # no wait is long enough: its samples will say so


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """Return the rate of the clock that `torch.cuda._sleep` counts: the highest of a few."""
    cycles, rates = 20_000_000, []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(device)
        rates.append(cycles / (start.elapsed_time(end) / 1e3))
    return max(rates)


def _host_and_wall_seconds(run: Thunk, device: torch.device) -> tuple[float, float]:
    """Seconds until a call returns, and until its result is there, of a call that finds it idle."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    wall = time.perf_counter() - start
    del result
    return host, wall


@functools.cache
def measure_machine(device: torch.device) -> Machine:
    """Measure the bandwidth of a copy and the rate of a product, medians of a few."""

    def median(run: Thunk, rounds: int) -> float:
        run()
        if device.type == "cuda":
            samples = [_gpu_seconds(run, SHORTEST_LEAD, device)[0] for _ in range(rounds)]
        else:
            samples = [_cpu_seconds(run, 1) for _ in range(rounds)]
        return sorted(samples)[rounds // 2]

    size = 1 << (28 if device.type == "cuda" else 26)
    source, target = (torch.zeros(size, device=device) for _ in range(2))
    copy = median(lambda: target.copy_(source), 9)
    n = 4096 if device.type == "cuda" else 1536

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return median(lambda: a @ b, 9)

    # the CPU's benchmarks are float32's
    dtypes = (torch.float32, *((torch.bfloat16,) if device.type == "cuda" else ()))
    return Machine(
        device=device,
        # a read and a write of float32
        bytes_per_second=2 * 4 * size / copy,
        flops_per_second={dtype: 2 * n**3 / product(dtype) for dtype in dtypes},
    )


def serves(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend can serve: Triton's interpreter, on the CPU, is not worth a timing."""
    if backend == "triton" and device.type != "cuda":
        return False
    rows = choice.report(device, dtype)
    return any(r.operator == op and r.backend == backend and r.available for r in rows)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any] | None:
    """Return torch.compile of a function.

    None on a CPU-only machine without a C++ compiler, and where MIMA_BENCH_COMPILE=0 leaves it out.
    """
    if os.environ.get("MIMA_BENCH_COMPILE") == "0":
        return None
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        return None
    return torch.compile(function, **options)


def replay(benchmark: Any, comparison: Comparison, variant: str, machine: Machine) -> None:
    """Hand a variant's samples to pytest-benchmark, with what they are to be judged by."""
    if variant not in comparison.variants:
        pytest.skip(f"{variant} cannot run here")
    comparison.measure(machine.device)
    if variant in comparison.failed:
        raise comparison.failed[variant]
    samples = comparison.samples[variant]
    clock = Clock()
    remaining = iter(samples)

    def advance() -> None:
        clock.seconds += next(remaining)

    benchmark._timer = clock
    benchmark.group = comparison.group
    floor = machine.floor(comparison.num_bytes, comparison.flops, comparison.dtype)
    median = sorted(samples)[len(samples) // 2]
    benchmark.extra_info.update(
        variant=variant,
        baseline=comparison.baseline,
        bytes=comparison.num_bytes,
        flops=comparison.flops,
        floor_ms=floor * 1e3,
        achieved_over_floor=floor / median,
        torch=torch.__version__,
        device=_name(machine.device),
        threads=torch.get_num_threads(),
        copy_GBps=machine.bytes_per_second / 1e9,
        matmul_GFLOPS=machine.flops_per_second[comparison.dtype] / 1e9,
        matmul_dtype=str(comparison.dtype).removeprefix("torch."),
    )
    if machine.device.type == "cuda":
        benchmark.extra_info["wall_ms"] = comparison.wall[variant] * 1e3
        benchmark.extra_info["with_host"] = variant in comparison.with_host
        benchmark.extra_info["peak_MB"] = _peak_memory(comparison.variants[variant]) / 1e6
    benchmark.pedantic(advance, rounds=len(samples), iterations=1, warmup_rounds=0)


def _peak_memory(run: Thunk) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return models[0] if models else "CPU"
