"""Variants are compared on the same work, and their times are their own; none is judged here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_a_failed_variant_costs_its_own_figure_only():
    from benchmarks.harness import Comparison

    def broken():
        raise RuntimeError("no such kernel")

    right = torch.ones(3)
    comparison = Comparison(
        group="g",
        variants={
            "broken": broken,
            "plain": lambda: right,
            "wrong": lambda: right + 1,
            "ours": lambda: right.clone(),
        },
        baseline="plain",
        rounds=2,
        slow=("plain", "ours"),
    )
    comparison.measure(torch.device("cpu"))
    assert {name: len(times) for name, times in comparison.samples.items()} == {
        "plain": 2,
        "ours": 2,
    }
    assert isinstance(comparison.failed["broken"], RuntimeError)
    assert "wrong differs by 1.00e+00" in str(comparison.failed["wrong"])


def test_without_a_baseline_nothing_is_taken_for_right():
    from benchmarks.harness import Comparison

    variants = {"plain": lambda: torch.ones(3)[7], "ours": lambda: torch.ones(3)}
    comparison = Comparison(group="g", variants=variants, baseline="plain", rounds=1)
    comparison.measure(torch.device("cpu"))
    assert not comparison.samples
    assert isinstance(comparison.failed["plain"], IndexError)
    assert "the baseline, plain, failed" in str(comparison.failed["ours"])


def test_floors_are_of_the_products_dtype():
    from benchmarks.harness import Machine

    rates = {torch.float32: 1e12, torch.bfloat16: 4e12}
    machine = Machine(device=torch.device("cpu"), bytes_per_second=1e12, flops_per_second=rates)
    assert machine.floor(1e9, 8e9) == 8e-3
    assert machine.floor(1e9, 8e9, torch.bfloat16) == 2e-3
    assert machine.floor(5e9, 8e9, torch.bfloat16) == 5e-3


def test_inputs_take_turns_past_a_cache():
    """No call, of any variant, finds what one of the last ones left in the cache."""
    from benchmarks.harness import Comparison, rotating

    taken = []

    def build():
        x = torch.ones(1000)

        def sum_(take):
            taken.append(x.data_ptr())
            return take(x)

        return Comparison(
            group="sum",
            variants={"sum": lambda: sum_(torch.sum), "dot": lambda: sum_(lambda x: x @ x)},
            baseline="sum",
            num_bytes=4 * 1000,
            rounds=9,
        )

    device = torch.device("cpu")
    rotating(build, device, cache_bytes=5 * 1000).measure(device)
    # 10,000 bytes lie between two uses of the same 4,000: three others
    assert len(set(taken)) == 4
    assert taken == (taken[:4] * len(taken))[: len(taken)]

    taken.clear()
    rotating(build, device).measure(device)
    assert len(set(taken)) == 1


def test_a_variant_meets_all_copies_of_its_inputs_before_it_is_timed():
    from benchmarks.harness import Comparison, rotating

    met = {}

    def build():
        x = torch.ones(1000)
        variants = {
            name: lambda name=name: met.setdefault(name, []).append(x.data_ptr()) or x.sum()
            for name in ("a", "b", "c", "d")
        }
        return Comparison(group="sum", variants=variants, baseline="a", num_bytes=4000, rounds=1)

    # four copies, and as many variants: each would meet the same ones again and again
    comparison = rotating(build, torch.device("cpu"), cache_bytes=5 * 1000)
    comparison.measure(torch.device("cpu"))
    assert {len(set(calls[:4])) for calls in met.values()} == {4}


class OneGpu:
    """A clock, and a GPU that works on what it was asked for while the host goes on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0

    def launch(self, host, kernel):
        """Return a call that takes the host so long, and the GPU after that."""

        def run():
            self.now += host
            self.busy_until = max(self.now, self.busy_until) + kernel
            return torch.ones(1)

        return run

    def wait(self, *device):
        self.now = max(self.now, self.busy_until)

    def stand_in(self, monkeypatch):
        from benchmarks import harness

        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.busy_until)

            def query(self):
                return gpu.now >= self.at

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0, cycles / 1e9)())
        monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(harness, "_cycles_per_second", harness._cycles_per_second.__wrapped__)


def test_what_a_call_takes_the_host_is_no_time_of_the_gpu(monkeypatch):
    from benchmarks import harness

    gpu = OneGpu()
    gpu.stand_in(monkeypatch)
    device = torch.device("cuda")
    assert harness._cycles_per_second(device) == pytest.approx(1e9)
    launch = gpu.launch(1e-3, 1e-3)

    def waits():
        launch()
        gpu.wait()
        return launch()

    comparison = harness.Comparison(
        group="g",
        variants={
            "short": gpu.launch(1e-5, 1e-4),
            "of many tensors": gpu.launch(30e-3, 2e-4),
            "waits": waits,
        },
        baseline="short",
        rounds=3,
    )
    comparison.measure(device)
    assert not comparison.failed
    assert comparison.samples["short"] == pytest.approx([1e-4] * 3)
    assert comparison.samples["of many tensors"] == pytest.approx([2e-4] * 3)
    assert comparison.wall["of many tensors"] == pytest.approx(30.2e-3)
    assert comparison.lead["of many tensors"] == pytest.approx(60e-3)
    # of what waits itself, the host's part cannot be left out: it is said
    assert comparison.with_host == {"waits"}
    assert comparison.samples["waits"] == pytest.approx([3e-3] * 3)


def test_a_call_that_fills_the_gpus_queue_is_not_waited_for(monkeypatch):
    from benchmarks import harness

    gpu = OneGpu()
    gpu.stand_in(monkeypatch)
    whole = gpu.launch(0.4, 0.5)

    def step():
        whole()
        gpu.wait()
        return whole()

    comparison = harness.Comparison(group="g", variants={"step": step}, baseline="step", rounds=3)
    comparison.measure(torch.device("cuda"))
    assert comparison.with_host == {"step"}
    assert comparison.samples["step"] == pytest.approx([1.8] * 3, abs=0.01)
    # one for its answer, three for its wall time, and the samples
    assert gpu.now == pytest.approx((1 + 3 + 3) * 1.8, abs=0.5)


def test_peft_builds_one_layer_for_all_copies_of_the_inputs(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    peft = pytest.importorskip("peft")
    from benchmarks import test_batched_lora as lora

    built = []
    original = peft.get_peft_model
    monkeypatch.setattr(
        peft, "get_peft_model", lambda *a, **k: built.append(1) or original(*a, **k)
    )
    lora.peft_layer.cache_clear()
    x, weight, A, B, scale, index = lora.inputs((8, 6, 5), 2, torch.device("cpu"), torch.float32)
    other = [2 * x for x in A]
    first, second = (lora.PeftMixedBatch(weight, factors, B) for factors in (A, other))
    assert len(built) == 1
    names = [str(n) for n in range(lora.N)]
    for model, factors in ((first, A), (second, other)):
        expected = lora.reference.batched_lora(x, weight, factors, B, scale, index)
        torch.testing.assert_close(model(x, names), expected)
    assert not {p.data_ptr() for p in first.parameters()} & {
        p.data_ptr() for p in second.parameters()
    }


def test_the_start_of_commands_is_timed_where_the_answer_is_right(capsys, monkeypatch):
    from benchmarks import start_up

    chosen = [answer for answer in start_up.ANSWERS if answer.arguments[0] in ("--version", "demo")]
    # no time is judged here
    monkeypatch.setattr(start_up, "ANSWERS", [replace(one, seconds=1e9) for one in chosen])
    assert start_up.main(["--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "`mima --version`",
        "`mima demo -o out`",
    ]
    monkeypatch.setattr(start_up, "ANSWERS", [replace(chosen[0], seconds=0.0)])
    assert start_up.main(["--runs", "1"]) == 1
    with pytest.raises(RuntimeError, match="mima --version: 0: mima"):
        start_up.seconds_of(replace(chosen[0], says="something else"))
