"""What a plan says before a run is what the run then trains, holds, computes and writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import builders
from support.immunizing import captions, concepts, settings

from mima.bilevel import lower
from mima.bilevel.optimizers import SGD, Adam
from mima.bilevel.outer import kept_paths, outer_gradient
from mima.bilevel.tasks import FullWeights
from mima.bilevel.upper import UpperLevel, UpperTerm
from mima.errors import MimaError
from mima.families import ModelSource, family_of, frozen, load_pipeline
from mima.families.frozen import Upcast, hold_frozen
from mima.families.skeleton import open_skeleton
from mima.immunization import levels, recipes
from mima.immunization.algorithm import ascend, immunize
from mima.immunization.config import LowerConfig
from mima.immunization.encoding import encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.planning import devices, outer_step, refusal
from mima.immunization.planning import plan as planning
from mima.immunization.planning.devices import device_memory, free_memory
from mima.immunization.planning.meta_memory import LiveBytes
from mima.immunization.planning.plan import plan
from mima.immunization.planning.work import pictures_of_a_step
from mima.merging import MergeLayer

KINDS = ("sdxl", "pixart", "sd3", "flux", "sana", "lumina2", "qwen_image")
DTYPES = (torch.bfloat16, torch.float32)
FAST = ("lumina2-torch.bfloat16", "qwen_image-torch.float32")
LORA = {"parameters": "lora", "rank": 4}
BALANCED = {"ascent_ratio": 0.3, "retain": "distill"}


def each(cases, fast):
    """Parameters of a test by name, the others of which take long."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=name,
            marks=() if name in fast else pytest.mark.slow,
        )
        for name, value in cases.items()
    ]


OWN = ("attacks, their gradients and merge", "further states of the path", "activations")
"""Parts of an outer step's memory that are its own."""


def make(model, config, count=2, benign=1):
    """A problem as the plan takes it: with a merge by the mean."""
    family = family_of(load_pipeline(str(model)))
    data = encode_concepts(family, concepts(count), config)
    others = encode_concepts(family, harmless(benign), config, benign=True)
    hold_frozen(family.denoiser)
    merge = MergeLayer(torch.full((count,), 1 / count)) if config.method == "mima" else None
    return Problem(family, data, config, merge, benign=others)


def measured(problem):
    """Most bytes of one outer step on the CPU, and those of the trained weights' shapes then."""
    theta, denoiser = problem.theta(), problem.family.denoiser
    held = [*denoiser.parameters(), *denoiser.buffers(), *problem._start.values()]
    held += [x for d in problem.data + problem.benign for e in (d.images, d.class_images)
             if e is not None for x in (e.latents, *e.prompts.values())]  # fmt: skip
    live = LiveBytes(held, [value.shape for value in theta.values()], "cpu")
    peak, weights = 0, 0
    with live:
        for _ in outer_step.follow(problem, theta):
            if live.peak > peak:
                peak, weights = live.peak, live.parts["weights"]
            live.restart()
    return peak, weights


def harmless(count):
    return concepts(5)[5 - count :]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    each({f"{kind}-{dtype}": (kind, dtype) for kind in KINDS for dtype in DTYPES}, FAST),
)
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

    found = plan(ModelSource(tmp_path / "model"), concepts(), settings(tmp_path), device="h100")
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
    assert parts["the optimizer's moments"] == 2 * held["trained"]
    assert parts["activations"] > 0
    assert found.refusal is None


@pytest.mark.parametrize(
    "changes",
    each(
        {
            "first_order": {},
            "exact": {"hypergradient": "exact"},
            "finite_difference": {
                "hypergradient": "finite_difference",
                "lower": {"optimizer": "sgd"},
            },
            "distill": {"upper": BALANCED},
            "lora": {"method": "joint", "lower": LORA},
            "attackers": {"merge": "sum", "lower": [LORA, {"batch_size": 2}]},
            "serves again": {
                "attack_every": 3,
                "lower": {"steps": 2},
                "upper": {**BALANCED, "path_every": 1},
            },
            "benign": {"upper": {**BALANCED, "benign": {"lower": LORA}}},
            "benign start": {"lower": {"benign_start": [2, 2], "steps": 2}},
        },
        ("attackers", "serves again", "benign"),
    ),
)
def test_the_memory_of_a_step_is_what_the_step_holds(model, tmp_path, monkeypatch, changes):
    config = settings(tmp_path, **changes)
    found = plan(ModelSource(model), concepts(), config, benign=harmless(1), device="cpu")
    parts = found.memory["outer steps"]
    monkeypatch.setattr(levels, "choose", lambda attackers, seed, n, step: attackers[n % 2 - 1])
    peak, weights = measured(make(model, config))
    own = parts["attacks, their gradients and merge"] + parts["further states of the path"]
    # what shares its shape with a trained weight is counted as one
    assert 0.8 < own / weights < 1.25
    # a CPU keeps other things of fused attention and normalisation than the meta device
    assert 0.7 < (own + parts["activations"]) / peak < 1.4


def test_attackers_that_live_on_are_what_the_run_keeps(model, tmp_path):
    lower = [{**LORA, "age": [9, 9]}, {"optimizer": "momentum", "age": [9, 9]}]
    config = settings(tmp_path, method="joint", concepts_per_step=1, lower=lower)
    parts = plan(ModelSource(model), concepts(3), config).memory["outer steps"]
    problem, sizes = make(model, config, 3), set()
    for step in range(6):
        outer = problem.hypergradient(
            problem.theta(), problem.lower_levels(step), problem.upper_path(step)
        )
        (carried,) = outer.ends.values()
        kept = [carried.moved, *(dict(enumerate(m)) for m in carried.memory.values())]
        sizes.add(sum(x.nbytes for tensors in kept for x in tensors.values()))
    assert len(sizes) == 2
    # one of the step's concepts, before and after
    assert parts["attackers that live on"] == 2 * max(sizes)


@pytest.mark.parametrize(
    ("mode", "every"),
    each(
        {
            f"{mode}-{every}": (mode, every)
            for mode in ("exact", "finite_difference", "first_order")
            for every in (None, 1, 2)
        },
        (),
    ),
)
def test_what_grows_with_the_path_is_added_without_being_followed(
    model, tmp_path, monkeypatch, mode, every
):
    lower = {"steps": 3 * (every or 2), "optimizer": "adam"}
    upper = {"path_every": every}
    if mode == "first_order":
        upper |= {**BALANCED, "benign": {"path_every": every}}
    config = settings(tmp_path, hypergradient=mode, lower=lower, upper=upper)

    def own():
        found = plan(ModelSource(model), concepts(), config, benign=harmless(1))
        parts = found.memory["outer steps"]
        return [sum(parts[name] for name in OWN), parts["further states of the path"]]

    short, further = own()
    assert further > 0 or (mode, every) == ("first_order", None)
    monkeypatch.setattr(outer_step, "FOLLOWED", 6)
    whole, none = own()
    assert none == 0
    assert short == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize(
    ("mode", "rule", "every", "replayed"),
    [
        ("exact", SGD(lr=0.1), None, False),
        ("exact", Adam(lr=0.1), 1, False),
        ("exact", SGD(lr=0.1), 1, True),
        ("finite_difference", Adam(lr=0.1), None, False),
        ("first_order", SGD(lr=0.1), 1, True),
    ],
    ids=str,
)
def test_a_path_holds_what_is_added_for_it(monkeypatch, mode, rule, every, replayed, kept):
    """Three concepts of six steps each, above two of two."""
    theta = {f"w{i}": torch.randn(32, 32) for i in range(3)}
    whole = sum(value.nbytes for value in theta.values())

    def loss(params, k=0):
        return sum((params[name] @ value).square().sum() for name, value in theta.items())

    def task(steps):
        return FullWeights(loss, tuple(theta), steps=steps, optimizer=rule)

    gradients = mode != "exact" and rule.reads_gradient
    one = lower.path_bytes(task(6), theta, with_gradients=gradients)
    monkeypatch.setattr("mima.bilevel.outer.KEPT", kept * one)

    def peak(count, steps):
        parts = [UpperLevel([UpperTerm("one", -1.0)], lambda phi: [loss(phi)])] * count
        upper = dict.fromkeys(range(1, steps + 1), parts) if every else parts
        merge = MergeLayer(torch.full((count,), 1 / count))
        with LiveBytes(theta.values(), [], "cpu") as live:
            outer_gradient(
                *(theta, [task(steps)] * count, merge, upper),
                mode=mode,
                wrt=tuple(theta),
                keep=replayed,
            )
        return live.peak

    low = LowerConfig(steps=6, optimizer=type(rule).__name__.lower())
    found = outer_step._further(low, every, mode, whole, whole, (3, 2), replayed)
    # of two steps, other tensors may be there at the peak
    assert found == pytest.approx(peak(3, 6) - peak(2, 2), abs=1.5 * whole)


@pytest.mark.parametrize(("room", "kept"), [(50, 5), (49, 4), (39, 3), (19, 1), (9, 0)])
def test_paths_that_share_their_forwards_are_kept_together(monkeypatch, room, kept):
    monkeypatch.setattr("mima.bilevel.outer.KEPT", room)
    # two, two and one, of ten bytes each
    assert kept_paths(10, 5, 2) == kept


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "kept"), [({}, 3), ({}, 1), (LORA, 3)], ids=str)
def test_paths_are_planned_as_they_are_held(tmp_path, monkeypatch, changes, kept):
    """The embedded model's, of which all or one are kept between the passes."""
    config = settings(tmp_path, hypergradient="exact", lower={"steps": 4, **changes})
    problem = make("embedded", config, 3, benign=0)
    one = lower.path_bytes(problem.lower_levels(0)[0], problem.theta())
    monkeypatch.setattr("mima.bilevel.outer.KEPT", kept * one)
    parts = plan(ModelSource("embedded"), concepts(3), config, device="cpu").memory["outer steps"]
    peak, _ = measured(problem)
    assert sum(parts[name] for name in OWN) == pytest.approx(peak, rel=0.15)


def balanced(**changes):
    return {**BALANCED, "benign": {"paths": 1, "every": 2, **changes}}


@pytest.mark.parametrize(
    ("changes", "count"),
    each(
        {
            "exact": ({"hypergradient": "exact", "lower": {"steps": 3}}, 2),
            "adam": ({"hypergradient": "finite_difference", "lower": {"steps": 3}}, 2),
            "sgd": (
                {"hypergradient": "finite_difference", "lower": {"optimizer": "sgd"}},
                1,
            ),
            "prior": ({"lower": {"batch_size": 2, "prior_weight": 1.0}}, 2),
            "one of two": (
                {"method": "joint", "concepts_per_step": 1, "upper": {"ascent_ratio": 1.0}},
                2,
            ),
            "path": ({"upper": {"objective": "anchor", "path_every": 2}, "lower": {"steps": 4}}, 1),
            "pair": ({"method": "joint", "upper": {"objective": "pair"}}, 1),
            "serves again": (
                {"attack_every": 2, "lower": {"steps": 3}, "upper": {"path_every": 1}},
                2,
            ),
            "attackers": ({"merge": "sum", "lower": [{"batch_size": 3}, {}]}, 2),
            "match": ({"upper": balanced(path_every=1), "lower": {"steps": 2}}, 2),
            "held out": (
                {"upper": balanced(target="held_out"), "hypergradient": "exact"},
                1,
            ),
            "benign start": ({"lower": {"benign_start": [3, 3]}}, 2),
            "benign start, twice": (
                {"hypergradient": "exact", "lower": {"benign_start": [3, 3]}},
                2,
            ),
            "benign start, joint": (
                {"method": "joint", "lower": {"benign_start": [3, 3], "age": [2, 2]}},
                2,
            ),
        },
        ("adam", "serves again", "attackers", "match", "benign start, joint"),
    ),
)
def test_pictures_of_a_step_are_those_that_go_through_the_network(
    small_model, tmp_path, monkeypatch, changes, count
):
    # a plan counts paths that are too large to be kept
    monkeypatch.setattr("mima.bilevel.outer.KEPT", 0)
    config = settings(tmp_path, steps=4, **changes)
    problem = make(small_model, config, count)
    seen = []
    original = type(problem.family).predict

    def predict(family, noisy, *args):
        seen.append(len(noisy))
        return original(family, noisy, *args)

    monkeypatch.setattr(type(problem.family), "predict", predict)
    monkeypatch.setattr(levels, "choose", lambda attackers, seed, n, step: attackers[n % 2 - 1])
    ascend(problem)
    found = pictures_of_a_step(config, count, 1)["forward"]
    assert sum(seen) == pytest.approx(4 * found)


def test_the_default_recipe_is_planned_with_benign_concepts(small_model, tmp_path):
    upper = {"benign": {"every": 4}}
    config = recipes.default(captions=captions(tmp_path), num_class_images=8, upper=upper)
    found = plan(ModelSource(small_model), concepts(3), config, benign=harmless(2), device="h100")
    assert found.refusal is None
    denoiser = sum(found.numels.values()) * 4
    parts = found.memory["outer steps"]
    assert parts["weights as they were before"] == denoiser
    # five states of the path, of which two are followed
    assert parts["further states of the path"] >= 3 * denoiser
    assert found.pictures["forward"] > 20 * 4 / 3 + 5 * 4 + 2 * 12


def test_a_plan_names_settings_with_which_a_run_would_fit(model, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "GPU_CONTEXT", 0)
    config = settings(tmp_path, upper={"batch_size": 4})
    source = ModelSource(model)
    large = plan(source, concepts(), config, device="h100")
    assert large.refusal is None
    saving = refusal.with_settings(config, {"gradient_checkpointing": True})
    small = plan(source, concepts(), saving, device="h100")
    assert small.peak < large.peak
    size = (small.peak + large.peak) / 2 / 2**20
    refused = plan(source, concepts(), config, device=f"{size:.3f}mib")
    assert "gradient_checkpointing: true it needs" in refused.refusal
    hopeless = plan(source, concepts(), config, device="1mib").refusal
    assert "preparing alone takes" in hopeless


def test_a_run_that_cannot_fit_is_refused_before_weights_are_loaded(model, tmp_path, monkeypatch):
    module = immunize.__globals__
    monkeypatch.setitem(module, "own_copy", None)
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


def test_compose_keeps_checkpoints_of_every_concept(model, tmp_path):
    """Two of each, and one that is being written."""

    def checkpoints(number):
        config = settings(tmp_path, method="compose")
        found = immunize(model, concepts(number), config, output=tmp_path / "out", dry_run=True)
        (size,) = (size for name, size in found.disk.items() if name.startswith("checkpoints"))
        return size

    assert checkpoints(3) / checkpoints(1) == pytest.approx(7 / 3)


def test_devices_by_name_and_by_size():
    assert device_memory("h100") == ("h100", int(79.1 * 2**30))
    assert device_memory("24GiB") == ("a GPU of 24gib", 24 * 2**30)
    assert device_memory("1.5 GB")[1] == 15 * 10**8
    name, size = device_memory("cpu")
    assert name == "cpu"
    assert size > 2**28
    with pytest.raises(MimaError, match=r"device 'abacus' is unknown; a plan takes cpu, cuda"):
        device_memory("abacus")


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "5"}, 64 * 1024),
        # a container, which sees its own group as the root
        ("0::/", {"memory.max": "9000", "memory.current": "5000"}, 4700),
        # a job, whose step has no limit of its own
        (
            "0::/job/step",
            {
                **{"job/memory.max": "9000", "job/memory.current": "5000"},
                **{"job/step/memory.max": "max", "job/step/memory.current": "10"},
            },
            4700,
        ),
        (
            "4:cpu,memory:/docker/12\n1:name=systemd:/\n0::/",
            {
                **{"memory/memory.limit_in_bytes": "9000", "memory/memory.usage_in_bytes": "5000"},
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            4500,
        ),
    ],
    ids=["no limit", "container", "job", "first version"],
)
def test_memory_is_that_of_the_container_or_the_job(tmp_path, groups, files, wanted):
    texts = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 64 kB\n", "proc/self/cgroup": groups}
    for folder in ("", "job/", "job/step/"):
        texts[f"cgroup/{folder}memory.stat"] = "anon 4\ninactive_file 700\n"
    for name, text in (texts | {f"cgroup/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path / "proc", tmp_path / "cgroup") == wanted
    assert free_memory(tmp_path / "none", tmp_path / "cgroup") is None


def test_processes_of_a_machine_share_its_memory_and_each_has_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda: 2**40)
    monkeypatch.setattr(devices, "resident", lambda: 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory("cpu") == ("cpu", 2**38 + 7)
    # as `ulimit -v` sets it
    own = devices._own_memory("size")
    monkeypatch.setattr(devices, "_own_memory", lambda what: own)
    monkeypatch.setattr("resource.getrlimit", lambda which: (own + 2**30, 2**62))
    assert device_memory("cpu") == ("cpu", 2**30 + 7)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "mem_get_info": {"cuda:3": (5, 9)}.get,
        "memory_reserved": {"cuda:3": 2}.get,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_memory(None) == device_memory("cuda") == ("cuda:3", 7)


def test_a_plan_reads_how_the_family_is_trained(tmp_path):
    folder = builders.save(builders.sd3, tmp_path / "sd3")

    def planned(**training):
        config = settings(tmp_path, steps=1, training=training)
        return immunize(ModelSource(str(folder)), concepts(), config, dry_run=True, device="h100")

    def activations(found):
        return found.memory["outer steps"]["activations"]

    assert activations(planned(max_sequence_length=4)) < activations(planned())
    with pytest.raises(MimaError, match="has no snr_gamma"):
        planned(snr_gamma=5.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_of_several_concepts_are_planned_in_one_forward(model, tmp_path, precision):
    lower = {**LORA, "concepts_per_forward": 2}
    config = settings(tmp_path, merge="average", lower=lower, precision=precision)
    assert plan(ModelSource(model), concepts(), config, device="cpu").memory["outer steps"]


def without_a_name():
    return [replace(concept, prompt="a photo") for concept in concepts()]


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        (concepts, {"lower": {"captions": "rare_token"}}, "lower.captions: of keys"),
        (
            without_a_name,
            {"merge": "average", "lower": {"captions": "without_name"}},
            "needs a name to replace",
        ),
    ],
    ids=["captions", "name"],
)
def test_what_a_run_refuses_a_plan_refuses(model, tmp_path, made, changes, message):
    config = settings(tmp_path, **changes)
    for dry_run in (True, False):
        with pytest.raises(MimaError, match=message):
            immunize(model, made(), config, dry_run=dry_run)


def test_a_delta_of_nothing_is_refused_before_any_work(model, tmp_path):
    config = settings(tmp_path, method="none")
    for dry_run in (True, False):
        with pytest.raises(MimaError, match="method none changes nothing"):
            immunize(model, concepts(), config, output=tmp_path / "o", delta=True, dry_run=dry_run)
    assert not (tmp_path / "o.checkpoint").exists()
