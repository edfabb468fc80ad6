"""Whole outer steps: their structure, their casts, their memory, and plans of real sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mima.families import ModelSource
from mima.immunization.planning.plan import plan

ROOT = Path(__file__).parents[2]


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


def test_every_module_that_looks_whether_it_is_watched_can_be_told_so():
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_step

    asking = {
        module
        for name, module in sys.modules.items()
        if name.startswith("mima.") and hasattr(module, "is_watched")
    }
    assert asking == set(test_step.WATCHING)


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
