"""What a plan says before a run is what the run then trains, holds, computes and writes."""

from __future__ import annotations

import pytest
import torch
from support import builders, tiny
from support.immunizing import concepts, settings

from mima.errors import MimaError
from mima.families import ModelSource, family_of, frozen, load_pipeline
from mima.families.frozen import Upcast, hold_frozen
from mima.families.skeleton import open_skeleton
from mima.immunization import plan as planning
from mima.immunization.algorithm import immunize
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.meta_memory import LiveBytes
from mima.immunization.plan import device_memory, pictures_of_a_step, plan
from mima.merging import MergeLayer

KINDS = ("sdxl", "pixart", "sd3", "flux")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("model"))


def make(model, config, count=2):
    """A problem as the plan takes it: with a merge by the mean."""
    family = family_of(load_pipeline(str(model)))
    data = encode_concepts(family, concepts(count), config)
    hold_frozen(family.denoiser)
    merge = MergeLayer(torch.full((count,), 1 / count)) if config.method == "mima" else None
    return Problem(family, data, config, merge)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_is_planned_from_headers_alone(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(frozen, "LARGE", 0)
    folder = builders.save(getattr(builders, kind), tmp_path / "whole")
    load_pipeline(folder, dtype=dtype).save_pretrained(tmp_path / "model")
    opened = load_pipeline(tmp_path / "model", dtype=None)
    skeleton = open_skeleton(ModelSource(tmp_path / "model"))
    for name, module in opened.components.items():
        if isinstance(module, torch.nn.Module):
            empty = getattr(skeleton, name).state_dict()
            assert all(value.is_meta for value in empty.values())
            shapes = {key: (value.shape, value.dtype) for key, value in empty.items()}
            assert shapes == {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}

    config = settings(tmp_path, hypergradient="exact")
    found = plan(ModelSource(tmp_path / "model"), concepts(), config, device="h100")
    family = family_of(opened)
    names = family.parameter_names("cross_attention")
    assert [*found.numels] == names
    hold_frozen(family.denoiser, names)
    held = {"trained": 0, "frozen": 0}
    for name, value in family.denoiser.named_parameters():
        stored = value.stored if isinstance(value, Upcast) else value
        held["trained" if name in names else "frozen"] += stored.nbytes
    parts = found.memory["outer steps"]
    assert parts["trained weights, float32"] == held["trained"]
    assert parts[f"frozen weights, {str(dtype).removeprefix('torch.')}"] == held["frozen"]
    assert parts["AdamW's moments"] == 2 * held["trained"]
    assert parts["activations"] > 0
    assert found.refusal is None


@pytest.mark.parametrize(
    "changes",
    [
        {"hypergradient": "first_order"},
        {"hypergradient": "exact"},
        {"hypergradient": "finite_difference", "lower": {"optimizer": "sgd"}},
        {"hypergradient": "first_order", "upper": {"ascent_ratio": 0.3, "retain": "distill"}},
        {"method": "joint", "hypergradient": "first_order", "lower": {"parameters": "lora"}},
    ],
    ids=["first_order", "exact", "finite_difference", "distill", "lora"],
)
def test_the_memory_of_a_step_is_what_the_step_holds(model, tmp_path, changes):
    config = settings(tmp_path, **changes)
    parts = plan(ModelSource(model), concepts(), config, device="cpu").memory["outer steps"]
    problem = make(model, config)
    theta, denoiser = problem.theta(), problem.family.denoiser
    held = [*denoiser.parameters(), *denoiser.buffers(), *problem._start.values()]
    held += [x for d in problem.data for e in (d.images, d.class_images) for x in
             (e.latents, *e.prompts.values())]  # fmt: skip
    live = LiveBytes(held, [value.shape for value in theta.values()], "cpu")
    with live:
        planning._follow(problem, theta)
    own = parts["attacks, their gradients and merge"]
    # what shares its shape with a trained weight is counted as one
    assert 0.8 < own / live.parts["weights"] < 1.25
    # a CPU keeps other things of fused attention and normalisation than the meta device
    assert 0.7 < (own + parts["activations"]) / live.peak < 1.4


@pytest.mark.parametrize("mode", ["exact", "finite_difference", "first_order"])
@pytest.mark.parametrize("every", [None, 2])
def test_what_grows_with_the_path_is_added_without_being_followed(
    model, tmp_path, monkeypatch, mode, every
):
    lower = {"steps": 6, "optimizer": "adam"}
    config = settings(tmp_path, hypergradient=mode, lower=lower, upper={"path_every": every})

    def own():
        parts = plan(ModelSource(model), concepts(), config).memory["outer steps"]
        names = ("attacks, their gradients and merge", "further states of the path", "activations")
        return sum(parts[name] for name in names)

    short = own()
    monkeypatch.setattr(planning, "FOLLOWED", 6)
    monkeypatch.setattr(planning.Problem, "states", property(lambda self: (6,) if every is None
                        else (2, 4, 6)))  # fmt: skip
    assert short == pytest.approx(own(), rel=0.15)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"hypergradient": "exact", "lower": {"steps": 3}}, 2),
        ({"hypergradient": "finite_difference", "lower": {"steps": 3, "optimizer": "adam"}}, 2),
        ({"hypergradient": "finite_difference", "lower": {"steps": 1, "optimizer": "sgd"}}, 1),
        ({"hypergradient": "first_order", "lower": {"batch_size": 2, "prior_weight": 1.0}}, 2),
        ({"method": "joint", "concepts_per_step": 1, "upper": {"ascent_ratio": 1.0}}, 2),
        ({"upper": {"objective": "anchor", "path_every": 2}, "lower": {"steps": 4}}, 1),
    ],
    ids=["exact", "adam", "sgd", "prior", "one of two", "path"],
)
def test_pictures_of_a_step_are_those_that_go_through_the_network(
    model, tmp_path, monkeypatch, changes, count
):
    config = settings(tmp_path, **changes)
    problem = make(model, config, count)
    seen = []
    original = type(problem.family).predict

    def predict(family, noisy, *args):
        seen.append(len(noisy))
        return original(family, noisy, *args)

    monkeypatch.setattr(type(problem.family), "predict", predict)
    planning._follow(problem, problem.theta())
    assert sum(seen) == pictures_of_a_step(config, count)["forward"]


def test_a_plan_names_settings_with_which_a_run_would_fit(model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "GPU_CONTEXT", 0)
    config = settings(tmp_path, hypergradient="exact", upper={"batch_size": 4})
    source = ModelSource(model)
    large = plan(source, concepts(), config, device="h100")
    assert large.refusal is None
    saving = planning._with(config, {"gradient_checkpointing": True})
    small = plan(source, concepts(), saving, device="h100")
    assert small.peak < large.peak
    size = (small.peak + large.peak) / 2 / 2**20
    refused = plan(source, concepts(), config, device=f"{size:.3f}mib")
    assert "gradient_checkpointing: true it needs" in refused.refusal
    hopeless = plan(source, concepts(), config, device="1mib").refusal
    assert "preparing alone takes" in hopeless


def test_a_run_that_cannot_fit_is_refused_before_weights_are_loaded(model, tmp_path, monkeypatch):
    module = immunize.__globals__
    monkeypatch.setitem(module, "_own_copy", None)
    monkeypatch.setattr(planning, "LARGE_MODEL", 0)
    monkeypatch.setattr(planning, "device_memory", lambda device: ("cpu", 2**20))
    with pytest.raises(MimaError, match=r"memory: the run needs .*, cpu has 1 MiB"):
        immunize(model, concepts(), settings(tmp_path))


def test_a_dry_run_writes_nothing_and_measures_a_forward(model, tmp_path):
    out = tmp_path / "out"
    config = settings(tmp_path, steps=5)
    pipeline = load_pipeline(str(model))
    for source in (model, pipeline):
        found = immunize(source, concepts(), config, output=out, dry_run=True, device="cpu")
        assert found.seconds > 0
        assert (found.steps, found.refusal) == (5, None)
        assert "2 × " in str(found) or "7 × attn2.to_k.weight" in str(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt"]
    assert not any(value.is_meta for value in pipeline.unet.parameters())
    # the result, as it is then written
    result = immunize(model, concepts(), config, output=out)
    written = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    assert written == pytest.approx(found.disk["the result"], rel=0.5)
    assert set(found.numels) == {name.removeprefix("unet.") for name in result.changed} | set(
        Problem(family_of(pipeline), [], config, None).lower_names
    )


def test_devices_by_name_and_by_size():
    assert device_memory("h100") == ("h100", int(79.1 * 2**30))
    assert device_memory("24GiB") == ("a GPU of 24gib", 24 * 2**30)
    assert device_memory("1.5 GB")[1] == 15 * 10**8
    name, size = device_memory("cpu")
    assert name == "cpu"
    assert size > 2**28
    with pytest.raises(MimaError, match=r"device 'abacus' is unknown; a plan takes cpu, cuda"):
        device_memory("abacus")
