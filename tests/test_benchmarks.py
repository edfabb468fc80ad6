"""The benchmarks run, and their results become a report; their timings are judged nowhere here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mima.families import ModelSource
from mima.immunization.planning.plan import plan

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    # a folder beside the package, not a part of it
    monkeypatch.syspath_prepend(ROOT)


def entry(group, variant, milliseconds, **info):
    """One result as pytest-benchmark writes it."""
    return {
        "group": group,
        "name": f"test[{variant}]",
        "stats": {"data": [x / 1e3 for x in milliseconds]},
        "extra_info": {
            "variant": variant,
            "device": "a device",
            "threads": 2,
            "copy_GBps": 20.0,
            "matmul_GFLOPS": 100.0,
            **info,
        },
    }


def results_file(path, entries, *, commit="0123456789abcdef", dirty=False):
    content = {
        "commit_info": {"id": commit, "dirty": dirty},
        "datetime": "2025-01-02T03:04:05",
        "benchmarks": entries,
    }
    path.write_text(json.dumps(content))
    return path


WEIGHTED = "weighted_merge forward N=3"


@pytest.fixture
def merges(tmp_path):
    floor = {"baseline": "eager", "bytes": 8e6, "flops": 1e6, "floor_ms": 0.4}
    return results_file(
        tmp_path / "merges.json",
        [
            entry(WEIGHTED, "eager", [10, 10, 16], achieved_over_floor=0.04, **floor),
            # the third round was slow for all
            entry(WEIGHTED, "native", [2, 2, 4], achieved_over_floor=0.2, **floor),
            entry(WEIGHTED, "foreach", [1, 4, 8], achieved_over_floor=0.1, **floor),
        ],
    )


def test_table_has_a_line_per_variant(merges):
    from benchmarks import report

    header, rule, *lines = report.table(report.read([merges])).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rule.split("|")) == len(header.split("|"))
    assert cells[0] == [WEIGHTED, "eager", "10", "15", "1", "", "0.8", "0.1", "0.4", "4%"]
    assert cells[1] == ["", "native", "2", "25", "0.2", "", "4", "0.5", "0.4", "20%"]
    assert cells[2][:5] == ["", "foreach", "4", "44", "0.4"]


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


def test_a_roofline_counts_what_an_outer_step_launches():
    from benchmarks import roofline

    first, double = (
        roofline._count("tiny", (1,), "h100", "first_order", "bfloat16", n, 1, 1) for n in (1, 2)
    )
    # each concept has its own lower and upper level, and the weights are merged
    assert double.parts["products"].launches == 2 * first.parts["products"].launches
    assert double.parts["products"].flops == 2 * first.parts["products"].flops
    # first_order keeps the fused attention, exact the matrices
    assert "attention matrices" not in first.parts
    exact = roofline.count("tiny", mode="exact", concepts=1, steps=1, precision="float32")
    assert exact.parts["attention matrices"].launches > 0
    assert exact.total.launches > 3 * first.total.launches
    assert exact.peak_bytes > first.peak_bytes
    # the device cannot be done before it has worked, nor before the host has asked
    assert first.seconds >= first.total.seconds
    assert first.seconds >= first.total.launches * roofline.HOST_BACKWARD


def test_a_roofline_counts_a_few_layers_of_a_kind(monkeypatch):
    from benchmarks import roofline

    settings = "h100", "first_order", "bfloat16", 1, 1, 1
    every = roofline._count("tiny", (5,), *settings)
    deep = replace(roofline.ARCHITECTURES["tiny"], layers=(5,))
    monkeypatch.setitem(roofline.ARCHITECTURES, "tiny", deep)
    few = roofline.count("tiny", mode="first_order", concepts=1, steps=1)
    assert few.parts.keys() == every.parts.keys()
    for name, part in every.parts.items():
        assert few.parts[name].launches == part.launches
        assert few.parts[name].flops == pytest.approx(part.flops)
        assert few.parts[name].num_bytes == pytest.approx(part.num_bytes)
        assert few.parts[name].seconds == pytest.approx(part.seconds)
    assert few.seconds == pytest.approx(every.seconds)
    assert few.reads == every.reads
    assert few.peak_bytes == pytest.approx(every.peak_bytes, rel=1e-3)


def test_a_roofline_counts_a_few_concepts_and_steps(monkeypatch):
    from benchmarks import roofline

    # as of the models that it is for
    monkeypatch.setattr("mima.bilevel.outer.KEPT", 0)
    every = roofline._count("tiny", (1,), "h100", "finite_difference", "bfloat16", 2, 3, 1)
    few = roofline.count("tiny", mode="finite_difference", concepts=2, steps=3)
    assert few.parts.keys() == every.parts.keys()
    for name, part in every.parts.items():
        # the first of several sums is none
        assert few.parts[name].launches == pytest.approx(part.launches, rel=2e-2)
        assert few.parts[name].flops == pytest.approx(part.flops)
        assert few.parts[name].num_bytes == pytest.approx(part.num_bytes, rel=2e-2)
    assert few.seconds == pytest.approx(every.seconds, rel=2e-2)
    assert few.reads == every.reads
    assert few.peak_bytes == pytest.approx(every.peak_bytes, rel=2e-2)


def test_a_roofline_knows_a_product():
    from benchmarks import roofline

    counter = roofline.Counter(roofline.GPUS["h100"], "bfloat16", [torch.Size([64, 32])], [49], [2])
    x, weight = (torch.empty(s, device="meta") for s in ((48, 32), (64, 32)))
    with counter:
        y = x @ weight.mT
        weight * 2
        y.relu()
        torch.empty(2, 49, 49, device="meta").exp()
        torch.empty(3, 49, 49, device="meta").exp()
    parts = counter.counts.parts
    assert parts["products"].flops == 2 * 48 * 64 * 32
    assert parts["products"].num_bytes == 4 * (48 * 32 + 64 * 32 + 48 * 64)
    assert {name: part.launches for name, part in parts.items()} == {
        "products": 1,
        "weights": 1,
        "norms, activations": 2,
        "attention matrices": 1,
    }
    assert parts["weights"].num_bytes == 2 * 4 * 64 * 32


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("width", [40, 64, 128, 160, 512])
def test_a_roofline_has_attention_reach_no_more_than_its_kernels_can(width, precision):
    from benchmarks import roofline

    gpu = roofline.GPUS["h100"]
    q = torch.empty(8, 4096, width, device="meta")
    pairs, padded = 8 * 4096**2, max(16, 2 ** (width - 1).bit_length())
    names = "attention", "attention_backward", "attention_double_backward"
    for (name, products), first in zip(zip(names, (2, 9, 22), strict=True), (0, 1, 4), strict=True):
        passes = roofline._ATTENTION[getattr(torch.ops.mima, name)]
        args = (*[None] * first, q, q, q)
        flops, seconds = roofline._attention_cost(passes, args, gpu, precision)
        assert flops == 2 * products * pairs * padded
        assert seconds >= flops / gpu.flops_per_second[precision]
        # probabilities are multiplied in TF32 at best
        assert seconds >= passes.in_float32 / products * flops / gpu.flops_per_second["tf32"]
        if precision == "bfloat16":
            least = min(passes.cycles.values())
            assert seconds >= pairs * least / (132 * 1.98e9)


@pytest.mark.parametrize("model", ["sd14", "sdxl", "sd3", "flux"])
def test_a_roofline_builds_the_published_architectures(model):
    from benchmarks import roofline

    with torch.device("meta"):
        architecture = roofline.ARCHITECTURES[model]
        denoiser = architecture.build(*architecture.layers)
    millions = sum(x.numel() for x in denoiser.parameters()) / 1e6
    published = {"sd14": 859.5, "sdxl": 2567.5, "sd3": 2028.3, "flux": 11901.4}
    assert millions == pytest.approx(published[model], rel=0.03)
    assert any(re.search(roofline.ARCHITECTURES[model].trained, n) for n in denoiser.state_dict())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_step_is_not_that_of_loading_nor_of_the_process_that_started_this_one():
    from benchmarks.outer_step import forget_peak_memory
    from mima.immunization.progress import peak_memory

    cpu, most = torch.device("cpu"), 2**28
    loaded = torch.ones(most // 4)
    assert peak_memory(cpu) >= most
    del loaded
    held = forget_peak_memory(cpu)
    taken = torch.ones(most // 16)
    # pages of others come and go
    assert most / 8 <= peak_memory(cpu) - held < most / 2
    del taken


def test_weights_are_cast_once_in_a_run_of_half_precision():
    from benchmarks.outer_step import make_problem

    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten._to_copy:
                casts.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    problem = make_problem(1, model="sd1-tiny", precision="bfloat16")
    level, theta = problem.lower_levels(0)[0], problem.theta()
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    trained = {value.data_ptr() for value in theta.values()}
    frozen = {
        x.data_ptr()
        for layer in problem.family.denoiser.modules()
        if isinstance(layer, layers)
        for x in layer.parameters()
    } - trained
    assert frozen
    with torch.no_grad(), Casts():
        first = level.loss(level.start(theta), theta, 0)
        assert frozen <= set(casts)
        casts.clear()
        again = level.loss(level.start(theta), theta, 0)
    assert not frozen & set(casts)
    assert trained & set(casts)
    assert torch.equal(first, again)
    # what autocast computes from the weights themselves
    problem.__dict__["_frozen"] = {}
    with torch.no_grad():
        assert torch.equal(first, level.loss(level.start(theta), theta, 0))


def test_targets_compare_round_by_round(merges):
    from benchmarks import report

    text = report.document(report.read([merges]), "report.png")
    assert "a device; 2 threads; commit 0123456789ab; 2025-01-02; copy 20 GB/s" in text
    assert "Targets: 2 of 2 met." in text
    # rounds: 0.2, 0.2, 0.25
    assert f"- met: {WEIGHTED}: over eager: 0.2 (≤ 0.25)" in text
    # rounds: 2, 0.5, 0.5
    assert "foreach and torch.compile: 0.5 (≤ 1)" in text


def test_a_missed_target_is_said(tmp_path):
    from benchmarks import report

    group = "batched_lora forward d,o,t=(4, 4, 4) r=4"
    file = results_file(
        tmp_path / "lora.json",
        [
            entry(group, "base layer", [10]),
            entry(group, "peft mixed batch", [18]),
            entry(group, "bmm", [14]),
            entry(group, "native", [15]),
            entry(group, "native N=1", [14]),
        ],
    )
    text = report.document(report.read([file]), "report.png")
    assert "MISSED: " + group + ": over the best of peft" in text
    assert "time above the base layer, over peft's: 0.625 (≤ 0.5)" in text
    assert "N=8 over N=1: 1.07 (≤ 1.15)" in text
    assert "Targets: 1 of 3 met." in text


def test_targets_of_a_gpu(tmp_path):
    from benchmarks import report

    at_floor = {"floor_ms": 9.0, "bytes": 1.0, "flops": 1.0}
    lora = "batched_lora forward+backward d,o,t=(4, 4, 4) r="
    file = results_file(
        tmp_path / "gpu.json",
        [
            entry(WEIGHTED, "triton", [10], achieved_over_floor=0.89, **at_floor),
            *(entry(lora + r, "base layer", [10]) for r in ("16", "64")),
            *(entry(lora + r, "triton", [31]) for r in ("16", "64")),
        ],
    )
    text = report.document(report.read([file]), "report.png")
    assert f"MISSED: {WEIGHTED}: share of the copy bandwidth: 0.89 (≥ 0.9)" in text
    assert f"MISSED: {lora}16: over the base layer alone, r ≤ 16: 3.1 (≤ 3)" in text
    assert "Targets: 0 of 2 met." in text


def test_several_files_become_one_report(merges, tmp_path, capsys):
    from benchmarks import report

    other = results_file(tmp_path / "step.json", [entry("step", "exact", [700])])
    report.main([str(merges), str(other), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| step | exact | 700 | 0 |" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"commit": "fedcba9876543210"}, "several commits: 0123456789ab, fedcba987654"),
        ({"dirty": True}, "several commits: 0123456789ab, 0123456789ab with changes"),
    ],
)
def test_refuses_to_mix_commits(merges, tmp_path, second, message):
    from benchmarks import report

    other = results_file(tmp_path / "other.json", [entry("g", "v", [1])], **second)
    with pytest.raises(ValueError, match=message):
        report.read([merges, other])


def test_refuses_empty_results(tmp_path):
    from benchmarks import report

    with pytest.raises(ValueError, match="no results"):
        report.read([results_file(tmp_path / "empty.json", [])])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_the_gpu_run_goes_through_its_stages_without_a_gpu(tmp_path):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("mima._native", reason="it measures native kernels")
    # children of a pytest-xdist worker count as workers, in which pytest-benchmark measures nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"PYTHON": sys.executable, "MIMA_BENCH_THREADS": "1"}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out", "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    log = tmp_path / "out" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
    summary = (tmp_path / "out" / "summary.md").read_text()
    for stage in ("install", "machine", "tests", "benchmark_merge_lora", "memory"):
        assert f"| {stage} | ok |" in summary
    assert re.search(r"^    two-pass +2 +\d+ +\d+ +1\.\d\d ", summary, flags=re.MULTILINE)
    assert re.search(r"2 passed, .*\n", summary)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| merge_lora forward o,d=(320, 768) r=4 | eager |" in report
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert "merge_lora.json" in names


# Python on a GPU machine where nothing can be compiled; it runs nothing
WITHOUT_COMPILER = """#!/usr/bin/env bash
echo "$* [native $MIMA_BUILD_NATIVE, device $MIMA_BENCH_DEVICE]" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90 ;;
  "-m pip install"*)
    [[ $MIMA_BUILD_NATIVE == "$PIP_BUILDS" ]] || exit 1
    mkdir -p "${@: -2:1}/mima" ;;
  "-m mima doctor") cp -r "$PYTHONPATH" "$SITE" ;;
  *--benchmark-json=*) file=${@: -1}; echo "{}" >"${file#*=}" ;;
  "-m benchmarks.report"*) echo "a report" >"${@: -1}/report.md" ;;
esac
"""
LOOK = """
import torch, mima.kernels
from mima.ops.backends import choice
print("found", mima.__file__, mima.kernels.__file__)
for row in choice.report("cpu"):
    print(row.operator, row.backend, *row.reasons)
"""


@pytest.mark.parametrize(
    ("builds", "installed"),
    [
        ("0", "mima was installed without native code, which could not be built"),
        ("nothing", "mima was copied, not installed"),
    ],
)
def test_the_gpu_run_goes_on_without_native_code(tmp_path, builds, installed):
    pytest.importorskip("triton")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(WITHOUT_COMPILER)
    python.chmod(0o755)
    site = tmp_path / "site"
    environment = {"PYTHON": python, "CALLS": calls, "SITE": site, "PIP_BUILDS": builds}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert installed in summary
    stages = re.findall(r"^\| (\w+) \| ok \| \d+ \|$", summary, flags=re.MULTILINE)
    operators = "batched_lora", "adam_step", "weighted_merge", "projected_merge", "merge_lora"
    benchmarks = [f"benchmark_{name}" for name in ("step", *operators)]
    assert stages == ["install", "machine", "tests", *benchmarks, "memory", "benchmark_sampling"]
    lines = calls.read_text().splitlines()
    built = [line for line in lines if line.startswith("-m pip install")]
    assert ["[native 1" in line for line in built] == [True, False]
    (tests,) = (line for line in lines if "cuda and not slow" in line)
    assert "tests/ops tests/native" in tests
    measured = [line for line in lines if "--benchmark-json" in line]
    assert len(measured) == len(benchmarks) + 1
    assert all("device cuda]" in line for line in measured)
    if builds == "0":
        return
    # what was copied has Triton's kernels, and no native code
    found = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"found {site}/mima/__init__.py {site}/mima/kernels/__init__.py" in found
    assert "combine triton on the CPU only in Triton's interpreter" in found
    assert "combine native No module named 'mima._native'" in found


# pip that has one wheel it cannot install
ONE_DOES_NOT_FIT = """#!/usr/bin/env bash
case "$*" in
  "-m pip install"*)
    [[ $* != *" ."* && $* != *other-python* ]] || exit 1
    while [[ $1 != --target ]]; do shift; done
    mkdir -p "$2/shared"
    for wheel in "${@:3}"; do touch "$2/shared/$(basename "$wheel")"; done ;;
  "-m mima doctor") cp -r "$PYTHONPATH" "$SITE" ;;
esac
"""


def test_a_wheel_that_does_not_fit_is_left_out_of_the_gpu_run(tmp_path):
    python, wheels, site = (tmp_path / name for name in ("python", "wheels", "site"))
    python.write_text(ONE_DOES_NOT_FIT)
    python.chmod(0o755)
    wheels.mkdir()
    for name in ("a", "other-python", "z"):
        (wheels / f"{name}.whl").touch()
    subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path / "out", "--wheels", wheels],
        env={**os.environ, "PYTHON": python, "SITE": site},
        capture_output=True,
        check=False,
    )
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| install | ok |" in summary
    assert "- other-python.whl could not be installed: see log.txt." in summary
    assert "mima was copied, not installed" in summary
    assert {path.name for path in (site / "shared").iterdir()} == {"a.whl", "z.whl"}
    assert (site / "mima" / "kernels" / "attention.py").exists()
    assert not list((site / "mima").glob("_native*"))


def test_the_gpu_run_lists_the_wheels_to_carry():
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", "--list-wheels"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split("==")[0] for line in done.stdout.split()}
    assert {"diffusers", "pydantic", "pydantic-core", "transformers"} <= names
    assert not {"torch", "triton", "numpy", "mima"} & names


def test_an_interrupted_gpu_run_leaves_what_it_has(tmp_path):
    run = subprocess.Popen(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path, "--dry-run"],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert "| install | ok |" in run.stdout.readline()
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == 1
    assert "| install | ok |" in (tmp_path / "summary.md").read_text()


def test_the_gpu_run_says_what_failed(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", tmp_path, "--dry-run", "--seconds", "0"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "| tests | not started, no time was left |" in done.stdout


def test_a_step_of_stable_diffusion_1s_structure():
    from benchmarks.outer_step import SD1, make_problem, naive, two_pass

    assert SD1["sd1"]["unet"]["block_out_channels"] == (320, 640, 1280, 1280)
    assert SD1["sd1"].keys() == SD1["sd1-tiny"].keys()
    problem = make_problem(2, batch=1, model="sd1-tiny", hypergradient="exact")
    keys = [name for name in problem.upper_names if "attn2.to_k" in name]
    # one per layer: 3 blocks of 1 down, one in the middle, 3 blocks of 2 up
    assert len(keys) == 3 + 1 + 6
    expected, actual = naive(problem).gradient, two_pass(problem).gradient
    assert expected.keys() == actual.keys()
    difference = sum((actual[n] - expected[n]).square().sum() for n in expected).sqrt()
    norm = sum(g.square().sum() for g in expected.values()).sqrt()
    assert torch.isfinite(norm)
    assert difference <= 1e-4 * norm


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


def test_every_module_that_looks_whether_it_is_watched_can_be_told_so():
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_step

    asking = {
        module
        for name, module in sys.modules.items()
        if name.startswith("mima.") and hasattr(module, "is_watched")
    }
    assert asking == set(test_step.WATCHING)


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


def test_a_report_says_which_times_have_the_hosts_part(tmp_path):
    from benchmarks import report

    entries = [entry("g", name, [1], wall_ms=2, with_host=name == "eager") for name in "ab"]
    said = "with a part of the host's"
    assert said not in report.document(report.read([results_file(tmp_path / "a", entries)]), "p")
    entries.append(entry("g", "eager", [3], wall_ms=4, with_host=True))
    text = report.document(report.read([results_file(tmp_path / "b", entries)]), "p")
    assert said in text
    assert "|  | eager | 3* |" in text
    assert "| g | a | 1 |" in text


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


SIZES = json.loads((ROOT / "benchmarks" / "results" / "sizes-intel-xeon.json").read_text())["rows"]
STEPS, RESULT = ("preparing", "outer steps"), "the result, in float32"


def size_of(memory, phases, *, libraries):
    """The largest phase, with what Python and its libraries took elsewhere."""
    own = [{**memory[phase], "Python and its libraries": libraries} for phase in phases]
    return max(sum(parts.values()) for parts in own)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id="-".join(named := (row["model"], row["row"], row["mode"])),
            # a plan of the others takes twice as long
            marks=() if named == ("sd14", "kv", "first_order") else pytest.mark.slow,
        )
        for row in SIZES
    ],
)
def test_models_of_real_size_are_planned_as_they_were_measured(tmp_path, row):
    from benchmarks import sizes

    # configurations and headers, and files with holes
    sizes.write_model(row["model"], tmp_path / "model", weights=False)
    config = sizes.settings(row["row"], row["mode"])
    found = plan(ModelSource(tmp_path / "model"), sizes.concepts(), config, device="cpu")
    assert found.memory.keys() == row["planned"].keys()
    libraries = row["planned"]["preparing"]["Python and its libraries"]
    planned = size_of(found.memory, STEPS, libraries=libraries)
    assert planned == pytest.approx(max(row["peak_after_step"]), rel=0.15)
    whole = max(planned, size_of(found.memory, [RESULT], libraries=libraries))
    assert whole == pytest.approx(row["peak_with_result"], rel=0.15)


def test_the_guide_shows_the_sizes_that_were_measured():
    from benchmarks import sizes

    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = "\n".join([sizes.HEADER, *map(sizes.line, SIZES)])
    assert table in guide
