"""What a run holds in memory: half-precision files as they are, idle encoders, moments."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from support import tiny
from support.immunizing import assert_same, concepts, settings

from mima.bilevel import lower
from mima.bilevel.optimizers import Adam
from mima.bilevel.outer import outer_gradient
from mima.bilevel.tasks import FullWeights
from mima.bilevel.upper import UpperLevel, UpperTerm, upper_gradient
from mima.errors import MimaError
from mima.families import frozen, load_pipeline
from mima.families.frozen import Upcast
from mima.immunization.algorithm import immunize
from mima.immunization.offload import MomentsOnDisk, idle_modules, out_of_memory_while
from mima.immunization.outer_loop import Ascent
from mima.immunization.planning.meta_memory import LiveBytes
from mima.merging import MergeLayer
from mima.storage.tensor_files import spill

SAVERS = [{}, {"hypergradient": "exact"}, {"method": "alternating"}, {"erase_first": True}]
IDS = ["first_order", "exact", "alternating", "erased"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model whose files are in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = load_pipeline(tiny.save_tiny_stable_diffusion(folder / "whole"))
    pipeline.to(torch.bfloat16).save_pretrained(folder / "half")
    return folder / "half"


def mapped_files() -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "spilled.safetensors" in line})


@pytest.mark.parametrize("changes", SAVERS, ids=IDS)
def test_weights_in_the_dtype_of_their_file_change_no_value(half, tmp_path, monkeypatch, changes):
    config = settings(tmp_path, steps=2, **{"hypergradient": "first_order", **changes})
    wanted = immunize(half, concepts(), config)
    monkeypatch.setattr(frozen, "LARGE", 0)
    mapped = []
    found = immunize(half, concepts(), config, callbacks=[lambda _: mapped.append(mapped_files())])
    # VAE and text encoder, which the published update needs for each merge's captions
    count = 1 if config.method == "alternating" else 2
    assert mapped == [count, count]
    assert mapped_files() == 0
    assert [r.losses for r in found.history] == [r.losses for r in wanted.history]
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(r.pipeline, name) for r in (found, wanted))
        assert_same(ours.state_dict(), theirs.state_dict())
        assert {(type(v), v.dtype) for v in ours.parameters()} == {
            (torch.nn.Parameter, torch.float32)
        }


def test_while_it_runs_only_what_is_trained_is_float32(half, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)
    pipeline = load_pipeline(half, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pointers = {value.data_ptr() for value in pipeline.unet.parameters()}
    seen = []
    original = immunize.__globals__["make_whole"]

    def look(made, device, **options):
        for name, value in made.unet.named_parameters():
            held = isinstance(value, Upcast)
            shared = held and value.stored.data_ptr() in pointers
            seen.append((".attn2." in name, held, shared))
        original(made, device, **options)

    monkeypatch.setitem(immunize.__globals__, "make_whole", look)
    result = immunize(pipeline, concepts(), settings(tmp_path, steps=1))
    # the frozen ones are the caller's own memory, the trained ones are not
    assert set(seen) == {(True, False, False), (False, True, True)}
    assert_same(pipeline.unet.state_dict(), before)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert result.pipeline.unet.dtype == torch.float32


def test_recomputing_ends_with_the_run(half, tmp_path):
    pipeline = load_pipeline(half)
    config = settings(tmp_path, steps=1, gradient_checkpointing=True)
    result = immunize(pipeline, concepts(), config)
    for unet in (pipeline.unet, result.pipeline.unet):
        assert not unet.is_gradient_checkpointing


def test_idle_encoders_go_on_working_and_come_back(half, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "LARGE", 0)
    pipeline = load_pipeline(half)
    tokens = torch.tensor([[1, 2, 3]])
    before = pipeline.text_encoder(tokens)[0]
    assert idle_modules(pipeline, reads_text=True) == [pipeline.vae]
    with out_of_memory_while(idle_modules(pipeline, reads_text=False), tmp_path):
        assert mapped_files() == 2
        assert torch.equal(pipeline.text_encoder(tokens)[0], before)
        assert list(tmp_path.iterdir()) == []
    assert mapped_files() == 0
    assert torch.equal(pipeline.text_encoder(tokens)[0], before)


@pytest.mark.parametrize("method", ["mima", "alternating"])
def test_offloaded_moments_change_nothing(half, tmp_path, method):
    config = settings(tmp_path, steps=3, method=method, hypergradient="first_order")
    plain, offloaded = (
        immunize(half, concepts(), config.model_copy(update={"offload_optimizer": on}))
        for on in (False, True)
    )
    unet, other = (result.pipeline.unet.state_dict() for result in (plain, offloaded))
    assert_same(unet, other)


def resident(x: torch.Tensor) -> int:
    """Kilobytes of the mapping around a tensor that are in this process' memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= x.data_ptr() < high
        elif inside and first == "Rss:":
            return int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_moments_on_disk_are_in_memory_while_a_step_lasts_alone(tmp_path):
    parameters = [torch.randn(256, 1024), torch.randn(3)]
    gradients = [torch.randn_like(p) for p in parameters]
    both = []
    for on_disk in (True, False):
        own = [p.clone() for p in parameters]
        optimizer = torch.optim.AdamW(own, lr=1e-3)
        moments = MomentsOnDisk(optimizer, tmp_path) if on_disk else None
        for _ in range(3):
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            if moments is not None:
                large = optimizer.state[own[0]]["exp_avg"]
                assert large.sum().isfinite()
                assert resident(large) >= 2 * parameters[0].nbytes // 1024
                moments.leave_memory()
                assert resident(large) == 0
        both.append((own, [optimizer.state[p]["exp_avg_sq"] for p in own]))
    for ours, theirs in zip(*both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_weights_leave_memory_as_they_become_float32(tmp_path, monkeypatch):
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() == "tmpfs":
        pytest.skip("files are in memory here")
    monkeypatch.setattr(frozen, "LARGE", 0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
    values = {name: value.detach().bfloat16() for name, value in layers.named_parameters()}
    mapped = spill(values, tmp_path)
    for name, value in layers.named_parameters():
        value.data = mapped[name]
    frozen.hold_frozen(layers)
    assert all(isinstance(value, Upcast) for value in layers.parameters())
    assert all(torch.equal(mapped[name], value) for name, value in values.items())
    # what little memory is left may have taken pages since
    assert all(value.sum().isfinite() for value in mapped.values())
    before = resident(mapped["0.weight"])
    assert before >= sum(value.nbytes for value in values.values()) // 1024
    frozen.make_dense(layers, own=True)
    # of each tensor, the pages that it shares with its neighbours stay
    assert resident(mapped["0.weight"]) < before / 2
    for name, value in layers.named_parameters():
        assert torch.equal(value, values[name].float())
        assert torch.equal(mapped[name], values[name])


def test_a_run_with_moments_on_disk_goes_on_bit_by_bit(half, tmp_path):
    config = settings(tmp_path, steps=4, checkpoint_every=2, offload_optimizer=True)
    whole = immunize(half, concepts(), config)
    options = {"checkpoint": tmp_path / "run"}

    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunize(half, concepts(), config, callbacks=[interrupt], **options)
    resumed = immunize(half, concepts(), config, resume=True, **options)
    assert [r.losses for r in resumed.history] == [r.losses for r in whole.history]
    assert_same(resumed.pipeline.unet.state_dict(), whole.pipeline.unet.state_dict())


def test_a_full_disk_is_told_before_the_moments_are_written(tmp_path):
    optimizer = torch.optim.AdamW([torch.empty(1, device="meta").expand(2**44)], lr=1e-3)
    with pytest.raises(MimaError, match="cannot write the optimizer's moments"):
        MomentsOnDisk(optimizer, tmp_path)


def test_a_concepts_path_is_out_of_memory_before_the_next_begins():
    """A second concept adds to the peak its share of the merge, not what an attack holds."""
    theta = {"w": torch.randn(256, 256)}

    def loss(params, k=0):
        return params["w"].square().sum()

    task = FullWeights(loss, ("w",), steps=1, optimizer=Adam(lr=1e-3))
    upper = UpperLevel([UpperTerm("one", -1.0)], lambda phi: [loss(phi)])

    def copies(count):
        merge = MergeLayer(torch.full((count,), 1 / count))
        with LiveBytes(theta.values(), [], "cpu") as live:
            outer_gradient(
                theta, [task] * count, merge, [upper] * count, mode="first_order", wrt=("w",)
            )
        return live.peak / theta["w"].nbytes

    assert copies(3) - copies(1) <= 1.1


@pytest.mark.parametrize("method", ["mima", "alternating"])
def test_no_step_begins_beside_the_gradient_of_the_one_before(half, tmp_path, monkeypatch, method):
    update, steps = Ascent.update, Ascent.steps
    gradients, begun = [], []

    def seen(run, outer, *args, **options):
        gradients.extend(weakref.ref(value) for value in outer.gradient.values())
        update(run, outer, *args, **options)

    def watched(run):
        for step in steps(run):
            begun.append(sum(gradient() is not None for gradient in gradients))
            yield step

    monkeypatch.setattr(Ascent, "update", seen)
    monkeypatch.setattr(Ascent, "steps", watched)
    immunize(half, concepts(), settings(tmp_path, steps=4, method=method))
    assert len(gradients) > 4
    assert begun == [0, 0, 0, 0]


def small_ones():
    return {f"w{i}": torch.randn(64, 64) for i in range(16)}


def squares(params, k=0):
    return sum(value.square().sum() for value in params.values())


@pytest.mark.parametrize(("steps", "copies"), [(1, 1), (3, 4)])
def test_each_step_of_a_path_frees_what_it_read(monkeypatch, steps, copies):
    """Of one step, a gradient that becomes θ'; of several, θ', its gradient and two moments."""
    monkeypatch.setattr(lower, "SHARE", 2**14)
    theta = small_ones()
    task = FullWeights(squares, tuple(theta), steps=steps, optimizer=Adam(lr=1e-3))
    wanted = lower.descend(task, theta, steps)
    with LiveBytes(theta.values(), [], "cpu") as live:
        for state, other in zip(lower.path(task, theta), wanted[1:], strict=True):
            assert_same(state.z, other.z)
    assert state.memory == {}
    whole = sum(value.nbytes for value in theta.values())
    # a share of the tensors, and what the loss computes, come on top
    assert live.peak / whole <= copies + 0.5


def test_parts_of_the_upper_level_have_no_gradients_of_their_own():
    theta = small_ones()
    part = UpperLevel([UpperTerm("one", -1.0)], lambda phi: [squares(phi)])
    peaks = []
    for count in (1, 3):
        with LiveBytes(theta.values(), [], "cpu") as live:
            gradient, _, _ = upper_gradient(theta, [part] * count)
        peaks.append(live.peak)
        assert_same(gradient, {name: -2 * count * value for name, value in theta.items()})
    assert peaks[1] <= 1.2 * peaks[0]
