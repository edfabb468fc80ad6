"""Runs of `immunize`: precision, memory savers, reports, listeners, what it leaves alone."""

import io
import json
import logging
import math
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from support import builders, tiny
from support.immunizing import assert_same, concepts, problem_of, settings, weights

from mima.adaptation import TextualInversion
from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.bilevel.outer import naive_outer_gradient, upper_gradient
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.families.pipelines import networks
from mima.families.recomputed import recomputed_blocks
from mima.immunization.algorithm import immunize
from mima.immunization.checks import check_model
from mima.immunization.config import ImmunizeConfig
from mima.immunization.encoding import ConceptData, encode_concepts
from mima.immunization.levels import Problem
from mima.immunization.merge import concept_tokens, merge_layer
from mima.immunization.outer_loop import cosine
from mima.immunization.own_model import own_copy
from mima.immunization.progress import ProgressBar, StepReport, Tracker, open_trackers
from mima.immunization.recipes import default
from mima.merging import MergeLayer, MergePlan
from mima.training.batches import Encoded, seeded
from mima.training.class_images import ClassPictures

MODES = ("exact", "finite_difference", "first_order")


def gradient(model, config):
    problem = problem_of(model, config)
    levels = problem.lower_levels(0), problem.upper_levels(0)
    with recomputed_blocks(problem.family.denoiser, config.gradient_checkpointing):
        return problem.hypergradient(problem.theta(), *levels).gradient


def flat(gradient):
    return torch.cat([value.flatten() for value in gradient.values()])


def gap(a, b):
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def test_two_passes_equal_holding_every_graph_on_a_unet(model, tmp_path):
    problem = problem_of(model, settings(tmp_path, hypergradient="exact", lower={"lr": 1e-3}))
    theta, lower, upper = problem.theta(), problem.lower_levels(0), problem.upper_levels(0)
    ours = problem.hypergradient(theta, lower, upper)
    with twice_differentiable_attention():
        naive = naive_outer_gradient(
            theta, list(lower), problem.merge, list(upper), wrt=problem.upper_names
        )
    assert gap(ours.gradient, naive.gradient) < 1e-5
    assert ours.losses == pytest.approx(naive.losses, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_differentiated_twice_gives_up_fused_attention(
    model, tmp_path, monkeypatch, mode
):
    problem = problem_of(
        model, settings(tmp_path, hypergradient=mode, lower={"optimizer": "sgd"}), 2
    )
    predictions_of, fused = problem.predictions, []

    def predictions(batches, params):
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return predictions_of(batches, params)

    monkeypatch.setattr(problem, "predictions", predictions)
    problem.hypergradient(problem.theta(), problem.lower_levels(0), problem.upper_levels(0))
    # each concept's lower and upper level; then, of two concepts, what the mode asks for
    again = {"exact": [False] * 2, "finite_difference": [True] * 4, "first_order": []}[mode]
    assert fused == [True] * 4 + again
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("per_forward", [1, 2, 3])
def test_losses_computed_in_one_forward_are_those_of_one_each(
    model, tmp_path, per_forward, monkeypatch
):
    upper = {"batch_size": 2, "prior_batch_size": 3, "concepts_per_forward": per_forward}
    free = problem_of(model, settings(tmp_path, upper=upper), 3)
    theta = free.theta()
    _, _, losses = upper_gradient(theta, free.upper_levels(0))
    own = [x for name, x in losses.items() if name.kind == "concept"]
    # a cap for some of them, whatever weights this version of diffusers draws
    cap = (min(own) + max(own)) / 2
    problem = problem_of(model, settings(tmp_path, upper=upper | {"loss_cap": cap}), 3)
    losses_of, drawn = problem.losses, []
    monkeypatch.setattr(
        problem,
        "losses",
        lambda batches, params: drawn.append(batches) or losses_of(batches, params),
    )
    ours, _, losses = upper_gradient(theta, problem.upper_levels(0))
    one_each = [[batch] for batches in drawn for batch in batches]
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    terms = [term for part in problem.upper_levels(0) for term in part.terms]
    for term, batches in zip(terms, one_each, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        (loss,) = losses_of(batches, leaves)
        assert losses[term.name] == pytest.approx(loss.item(), rel=1e-5)
        grads = torch.autograd.grad(term.objective(loss), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            total[name] += grad
    capped = [x > cap for name, x in losses.items() if name.kind == "concept"]
    assert any(capped)
    assert not all(capped)
    assert gap(ours, total) < 1e-5


@pytest.mark.parametrize(("mode", "per_forward"), [("first_order", 2), ("exact", 3)])
def test_attacks_in_one_forward_are_those_of_one_each(
    model, tmp_path, mode, per_forward, monkeypatch
):
    below = {"parameters": "lora", "steps": 2, "optimizer": "sgd", "lr": 0.1, "prior_weight": 0.5}
    # each concept draws a rank of its own
    below |= {"batch_size": 2, "rank": [1, 6]}
    found, forwards = {}, {}
    for size in (1, per_forward):
        config = settings(
            tmp_path, hypergradient=mode, lower=below | {"concepts_per_forward": size}
        )
        problem = problem_of(model, config, 3)
        losses_of, sizes = problem.losses, []
        monkeypatch.setattr(
            problem,
            "losses",
            lambda batches, params, losses_of=losses_of, sizes=sizes: (
                sizes.append(len(batches)) or losses_of(batches, params)
            ),
        )
        levels = problem.lower_levels(0), problem.upper_levels(0)
        assert len({problem.attacker(n, 0, {}).rank for n in range(3)}) > 1
        found[size], forwards[size] = problem.hypergradient(problem.theta(), *levels), sizes
    alone, together = found[1], found[per_forward]
    assert gap(together.gradient, alone.gradient) < 1e-5
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    # two steps of each: own and class pictures of two concepts and then of one, or of all three
    first = {2: [4, 4, 2, 2], 3: [6, 6]}[per_forward]
    assert forwards[per_forward][: len(first)] == first
    assert forwards[1][:6] == [2] * 6


@pytest.mark.parametrize(
    ("parameters", "lr", "steps"),
    [("cross_attention", 1e-3, 1), ("denoiser", 1e-3, 1), ("lora", 0.1, 2)],
)
def test_finite_differences_find_their_step_in_a_trained_network(parameters, lr, steps):
    """The second-order part in float32, where a gradient's direction is the most curved one."""
    family = family_of(load_pipeline("embedded"))
    draws = torch.Generator().manual_seed(0)
    side = family.resolution // family.pipeline.vae_scale_factor
    latents = torch.randn(4, family.denoiser.config.in_channels, side, side, generator=draws)
    data = [
        ConceptData(name, *(Encoded.of(family, latents, [text] * 4) for text in (name, "a photo")))
        for name in ("a cat", "a dog")
    ]
    lower = {"parameters": parameters, "lr": lr, "steps": steps, "optimizer": "sgd"}
    found = {}
    for mode in MODES:
        config = ImmunizeConfig(hypergradient=mode, merge="average", lower=lower)
        problem = Problem(family, data, config, MergeLayer(torch.full((2,), 0.5)))
        levels = problem.lower_levels(0), problem.upper_levels(0)
        found[mode] = flat(problem.hypergradient(problem.theta(), *levels).gradient)
    second = found["exact"] - found["first_order"]
    estimate = found["finite_difference"] - found["first_order"]
    error = float((estimate - second).norm() / second.norm())
    assert error <= 1.5e-3


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_activations_changes_no_gradient(model, tmp_path, mode):
    # SGD: Adam's first step is the gradient's sign, which magnifies rounding
    common = {"hypergradient": mode, "lower": {"lr": 1e-2, "optimizer": "sgd"}}
    plain = gradient(model, settings(tmp_path, **common))
    saving = gradient(model, settings(tmp_path, gradient_checkpointing=True, **common))
    assert gap(saving, plain) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_bfloat16_is_near_float32(model, tmp_path, mode, checkpointing):
    common = {"hypergradient": mode, "lower": {"lr": 1e-2, "optimizer": "sgd"}}
    plain = gradient(model, settings(tmp_path, **common))
    half = gradient(
        model,
        settings(tmp_path, precision="bfloat16", gradient_checkpointing=checkpointing, **common),
    )
    # 8 bits of mantissa, and a few dozen layers whose roundings add up
    assert gap(half, plain) < 0.1
    assert all(value.dtype == torch.float32 for value in half.values())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "float16"}, "float16 gradients underflow"),
        ({"precision": "bfloat16", "hypergradient": "finite_difference"}, "more coarsely"),
        ({"merge": "none"}, "write method: joint"),
        ({"hypergradient": "alternating"}, "write method: alternating"),
        ({"method": "joint", "upper": {"concepts_per_forward": 2}}, "only merged weights"),
        ({"lower": {"concepts_per_forward": 2}}, "only LoRA's factors"),
        ({"lower": {"train_token": True}}, "no new words without new_words"),
        ({"lower": {"token_lr": 1e-3}}, "no new word is trained"),
        ({"lower": {"parameters": None}}, "leaves nothing to train"),
        ({"lower": {"parameters": "lora+token"}}, "train_token: true, with parameters: 'lora'"),
        ({"lower": {"parameters": "token"}}, "train_token: true, with parameters: null"),
        (
            {
                "new_words": True,
                "lower": {"train_token": True},
                "upper": {"concepts_per_forward": 2},
            },
            "encoded with its own",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ImmunizeConfig(**settings)


def test_a_run_reports_what_it_does(model, tmp_path):
    seen = []
    config = settings(tmp_path, steps=2)
    result = immunize(model, concepts(), config, output=tmp_path / "out", callbacks=[seen.append])
    assert seen == result.history
    last = seen[-1]
    assert (last.step, last.steps, last.eta) == (2, 2, 0)
    assert sorted(last.losses) == sorted(last.prior_losses) == ["cat", "dog"]
    assert last.prior_loss == pytest.approx(sum(last.prior_losses.values()) / 2)
    assert last.seconds > 0
    assert last.memory > 2**20
    assert 0 < last.residual < 1
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    lasting = [replace(report, seconds=0.0, eta=0.0, memory=0) for report in seen]
    assert [StepReport.from_dict(json.loads(line)) for line in lines] == lasting
    saved = json.loads((tmp_path / "out" / "mima.json").read_text())
    assert ImmunizeConfig.model_validate(saved["config"]) == config
    # an ordinary diffusers folder
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert_same(opened.unet.state_dict(), result.pipeline.unet.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.txt", "out"]


def test_a_cosine_schedule_warms_up_and_falls_to_a_tenth(model, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = settings(tmp_path, steps=4, upper={"lr": 1e-5, "lr_schedule": "cosine"})
    immunize(model, concepts(), config)
    expected = [
        1e-5 * (k + 1) / 10 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4)
    ]
    assert rates == pytest.approx(expected)
    assert cosine(99, 100) == pytest.approx(0.1, rel=1e-2)


def test_a_callback_stops_the_run(model, tmp_path, caplog):
    called = []
    callbacks = [lambda report: "stop" if report.step == 2 else None, called.append]
    with caplog.at_level(logging.INFO, "mima"):
        result = immunize(model, concepts(), settings(tmp_path, steps=9), callbacks=callbacks)
    assert len(result.history) == len(called) == 2
    assert caplog.messages.count("a callback ended the run after step 2 of 9") == 1


def test_what_else_a_callback_returns_stops_nothing(model, tmp_path):
    """tqdm's ``update`` returns True, a file's ``write`` a number."""
    callbacks = [lambda _, told=told: told for told in (True, 1, torch.ones(2), "stopped")]
    result = immunize(model, concepts(1), settings(tmp_path, steps=2), callbacks=callbacks)
    assert len(result.history) == 2


def test_a_pipeline_in_memory_stays_where_and_how_it_is(model):
    pipeline = load_pipeline(str(model))
    pipeline.text_encoder.train()
    # the only other device of every machine
    own = own_copy(pipeline, "meta")
    for name, network in networks(own).items():
        theirs = networks(pipeline)[name]
        assert {value.device.type for value in network.parameters()} == {"meta"}
        assert {value.device.type for value in theirs.parameters()} == {"cpu"}
        assert not network.training
        assert theirs.training == (name == "text_encoder")
    # what is there already is not copied
    own = own_copy(pipeline, None)
    assert own.vae.quant_conv.weight.data_ptr() == pipeline.vae.quant_conv.weight.data_ptr()


def test_a_pipeline_in_memory_stays_as_it_is(model, tmp_path):
    pipeline = load_pipeline(str(model))
    pipeline.unet.half()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    result = immunize(pipeline, concepts(), settings(tmp_path, steps=1), output=tmp_path / "out")
    assert_same(pipeline.unet.state_dict(), before)
    assert result.pipeline.unet.dtype == torch.float32
    assert weights(tmp_path / "out").keys() == before.keys()


def test_the_output_folder_is_checked_first(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(MimaError, match="not empty"):
        immunize("no such model", concepts(), settings(tmp_path), output=tmp_path / "out")


def test_trackers_get_the_same_numbers(model, tmp_path):
    class Recorder:
        def __init__(self):
            self.logged, self.config, self.open = [], None, False

        def start(self):
            self.open = True

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.open = False

    recorder = Recorder()
    config = settings(tmp_path)
    tracker = Tracker(recorder, config.model_dump(mode="json"))
    result = immunize(model, concepts(), config, callbacks=[tracker])
    assert recorder.open
    tracker.finish()
    assert not recorder.open
    assert recorder.config["lower.lr"] == 1e-3
    # text, where it is neither a number nor text
    assert (recorder.config["trackers"], recorder.config["lower.alpha"]) == ("[]", "None")
    assert [step for step, _ in recorder.logged] == [1, 2]
    assert recorder.logged[-1][1]["loss/cat"] == result.history[-1].losses["cat"]
    with pytest.raises(MimaError, match=r"trackers: 'tensorbord' is unknown.*tensorboard"):
        open_trackers(["tensorbord"], tmp_path, {})


@pytest.mark.parametrize(("argument", "logs"), [("checkpoint", "out"), ("output", "out.logs")])
def test_tensorboard_gets_the_same_numbers_and_keeps_them(model, tmp_path, argument, logs):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    config = settings(tmp_path, trackers=("tensorboard",))
    result = immunize(model, concepts(), config, **{argument: tmp_path / "out"})
    # a record: length, its checksum, the event, its checksum
    shown = {}
    for file in (tmp_path / logs).rglob("events.*"):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    for report in result.history:
        losses = {f"loss/{name}": loss for name, loss in report.losses.items()}
        losses |= {f"prior_loss/{name}": loss for name, loss in report.prior_losses.items()}
        assert len(losses) == 4
        for name, loss in losses.items():
            # TensorBoard's names have neither blanks nor brackets
            tag = re.sub(r"[^-/.\w]", "_", name)
            assert shown[tag, report.step] == pytest.approx(loss, rel=1e-6)


def with_new_words():
    return [
        Concept(
            word, f"a {token} emoji", [tiny.picture("red", "round", seed=n)], "an emoji",
            token=token, initializer=word, class_images=[tiny.picture("blue", "round", seed=n)],
        )
        for n, (word, token) in enumerate((("cat", "<new1>"), ("castle", "<new2>")))
    ]  # fmt: skip


@pytest.mark.skipif(
    version("transformers").startswith("4."), reason="its text encoder cannot mask in float64"
)
@pytest.mark.parametrize(
    ("parameters", "method"),
    [(None, "mima"), ("cross_attention_kv", "mima"), ("lora", "mima"), ("lora", "joint")],
)
def test_trained_words_agree_with_central_differences(tmp_path, monkeypatch, parameters, method):
    """The gradient that a run takes, through text encoder, plan and steps, in float64."""
    module = sys.modules["mima.immunization.algorithm"]
    problems = []

    def keep(problem, *_, **__):
        problems.append(problem)
        return []

    monkeypatch.setattr(module, "ascend", keep)
    config = settings(
        tmp_path,
        hypergradient="exact",
        method=method,
        new_words=True,
        lower={
            "lr": 0.05, "token_lr": 0.3, "steps": 2, "optimizer": "sgd", "parameters": parameters,
            "train_token": True,
        },
        upper={"parameters": "cross_attention_kv"},
    )  # fmt: skip
    monkeypatch.setattr(module, "own_copy", lambda pipeline, _: pipeline.to(torch.float64))
    immunize(tiny.tiny_stable_diffusion(tmp_path / "tokenizer"), with_new_words(), config)
    (problem,) = problems
    theta = problem.theta()
    levels = problem.lower_levels(0), problem.upper_levels(0)

    def objective(theta):
        losses = problem.hypergradient(theta, *levels).losses
        return sum((1 if name.kind == "prior" else -1) * x for name, x in losses.items())

    outer = problem.hypergradient(theta, *levels)
    draws = torch.Generator().manual_seed(0)
    along = {n: torch.randn(v.shape, generator=draws).to(v) for n, v in outer.gradient.items()}
    h = 1e-4
    monkeypatch.setattr(
        problem, "config", config.model_copy(update={"hypergradient": "first_order"})
    )
    ahead, behind = (
        objective(theta | {n: theta[n] + sign * h * v for n, v in along.items()})
        for sign in (1, -1)
    )
    slope = sum(float((outer.gradient[n] * v).sum()) for n, v in along.items())
    first = problem.hypergradient(theta, *levels)
    without = sum(float((first.gradient[n] * v).sum()) for n, v in along.items())
    assert abs(slope - (ahead - behind) / (2 * h)) <= 1e-5 * abs(slope)
    # and the steps matter
    assert abs(slope - without) > 1e-3 * abs(slope)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_a_run_trains_new_words_in_its_lower_level(tmp_path, mode):
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    lower = {"parameters": "lora", "lr": 1e-3, "prior_weight": 0.5}
    lower |= {"train_token": True, "token_lr": 1e-2}
    config = settings(tmp_path, hypergradient=mode, new_words=True, lower=lower)
    result = immunize(pipeline, with_new_words(), config)
    assert all(math.isfinite(report.gradient_norm) for report in result.history)
    assert 0 < result.history[-1].residual < 1
    assert result.pipeline.text_encoder is pipeline.text_encoder
    with pytest.raises(MimaError, match="no token: cat, dog"):
        immunize(pipeline, concepts(), config)


def report_of(count, step=3, steps=10):
    losses = {f"concept {n}": 1.25 for n in range(count)}
    return StepReport(
        step, steps, losses, 1e-3, 0.7, 0.02, 1.5, 3661.0, 2**30, 2, prior_losses={"x": 0.5}
    )


def test_the_progress_bar_says_what_matters():
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=True, width=200)) as bar:
        bar(report_of(2))
    shown = out.getvalue()
    for part in (
        *("3/10", "loss 1.250", "prior 0.500", "drift 1.0e-03", "residual 2.0e-02"),
        *("2 skipped", "1.50 s/step", "1.0 GiB", "1:01:01 left"),
    ):
        assert part in shown


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("stage", ["", "a concept of a very long name [red]"])
def test_progress_has_room_in_80_columns(count, stage):
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=True, width=80, color_system=None)) as bar:
        bar(replace(report_of(count, 999, 1000), stage=stage))
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text) if line.strip()]
    assert max(map(len, lines)) <= 80
    line = lines[-1]
    for part in (" 999/1000 ", "1.50 s/step", "1:01:01 left"):
        assert part in line


def test_where_output_is_no_terminal_there_is_a_line_for_each_tenth():
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=80)) as bar:
        for step in range(1, 41):
            bar(report_of(3, step, 40))
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        f"immunizing: {step} of 40" for step in range(4, 41, 4)
    ]
    assert all("1.50 s/step · 1:01:01 left" in line for line in lines)


def test_new_words_are_words_while_the_model_is_immunized(tmp_path, monkeypatch):
    """Each is one token, its row alone was trained, and the result's vocabulary is the old one."""
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    seen = []
    # the package's attribute of that name is the function
    module = sys.modules["mima.immunization.algorithm"]
    encode = module.encode_concepts

    def spy(family, *args, **keywords):
        seen.append(family.pipeline)
        return encode(family, *args, **keywords)

    monkeypatch.setattr(module, "encode_concepts", spy)
    config = settings(tmp_path, steps=1, new_words=True, token_steps=2)
    result = immunize(pipeline, with_new_words(), config)
    # of the concepts, and of no benign ones
    inner, _ = seen
    old = pipeline.text_encoder.get_input_embeddings().weight
    new = inner.text_encoder.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    assert len(new) == len(old) + 2
    for row, word, token in ((-2, "cat", "<new1>"), (-1, "castle", "<new2>")):
        assert inner.tokenizer.convert_tokens_to_ids(token) == len(new) + row
        start = old[pipeline.tokenizer.encode(word, add_special_tokens=False)[0]]
        # two steps of AdamW at 5e-4
        assert 1e-4 < (new[row] - start).abs().max() < 2e-3
    assert result.pipeline.tokenizer is pipeline.tokenizer
    assert result.pipeline.text_encoder is pipeline.text_encoder


def test_new_words_are_trained_on_the_runs_resolution_with_its_losses(tmp_path, monkeypatch):
    asked = []

    def spy(**options):
        asked.append(options)
        return TextualInversion(**options)

    monkeypatch.setattr("mima.immunization.own_model.TextualInversion", spy)
    pipeline = tiny.tiny_stable_diffusion(tmp_path / "tokenizer")
    training = {"snr_gamma": 5.0}
    config = settings(
        tmp_path, steps=1, new_words=True, token_steps=1, resolution=16, training=training
    )
    immunize(pipeline, with_new_words(), config)
    told = {"seed": config.seed, "resolution": 16, "training": config.training}
    told |= {"gradient_checkpointing": False}
    assert asked == [told, told]
    assert config.training.snr_gamma == 5.0


def test_what_a_run_cannot_use_is_said_before_class_pictures_are_drawn(
    model, tmp_path, monkeypatch
):
    def drawn(*args):
        raise AssertionError("class pictures were drawn")

    monkeypatch.setattr(ClassPictures, "latents", drawn)
    given = [replace(concept, class_images=(), prompt="a cat") for concept in concepts()]
    projected = {"merge": "projected", "lam": 0.0}
    for refused, options in (
        ({"trackers": ("tensorbord",)}, {}),
        ({"trackers": ("tensorboard",)}, {}),
        (projected, {}),
    ):
        with pytest.raises(MimaError, match=r"trackers: |merge: "):
            immunize(model, given, settings(tmp_path, **refused), **options)
    # nothing reads them
    result = immunize(model, given, settings(tmp_path, method="none", **projected))
    assert not result.history


def test_class_pictures_of_a_concept_without_a_name_keep_their_captions(model, tmp_path, caplog):
    nameless = replace(concepts()[0], name="cat6", images=concepts()[0].images[:1])
    kinds = ("own", "without_name", "empty")
    upper = {"retain": "distill", "ascent_ratio": 1.0, "retain_captions": kinds}
    config = settings(tmp_path, steps=1, upper=upper)
    family = family_of(load_pipeline(str(model)))
    data, named = encode_concepts(family, [nameless, concepts()[1]], config)
    assert [*data.class_prompts] == ["empty"]
    assert [*named.class_prompts] == ["without_name", "empty"]
    own = data.class_images.prompt
    alone = data.class_pictures(("without_name",), seeded(0))
    assert torch.equal(alone.prompt, own)
    immunize(model, [nameless], config)
    assert "without_name needs a name to leave out" in caplog.text
    assert "cat6" in caplog.text


def test_a_merge_is_where_the_run_computes(small_model):
    family = family_of(load_pipeline(str(small_model)))
    elsewhere = torch.device("meta")
    stop = mock.patch.object(MergePlan, "from_embeddings", side_effect=ValueError("enough"))
    with stop as made, pytest.raises(MimaError, match="enough"):
        merge_layer(family, concepts(2), ImmunizeConfig(), elsewhere)
    C, regular = made.call_args.args
    assert {x.device for x in (*C, regular, made.call_args.kwargs["weights"])} == {elsewhere}


def test_the_merge_is_made_of_what_the_erased_model_reads(tmp_path, monkeypatch):
    """Of transformers with joint attention, erasure edits what reads the text."""
    folder = builders.save(builders.sd3, tmp_path / "model")
    solved = []
    monkeypatch.setattr(
        "mima.immunization.algorithm._run", lambda problem, *_: solved.append(problem) or []
    )
    immunize(folder, concepts(1), settings(tmp_path, erase_first=True, steps=1))
    (problem,) = solved
    (concept,) = concepts(1)
    read = concept_tokens(problem.family, concept)
    assert torch.equal(problem.merge.plan.C[0], read)
    before = concept_tokens(family_of(load_pipeline(folder)), concept)
    assert (read - before).norm() > 1e-2 * before.norm()


def test_a_weight_of_two_names_is_trained_in_half_precision(model, tmp_path):
    pipeline = load_pipeline(model)
    kv = [m for n, m in pipeline.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    first, second = kv[:2]
    second.weight = first.weight
    assert immunize(
        pipeline, concepts(1), settings(tmp_path, steps=1, precision="bfloat16")
    ).history


def test_settings_that_are_none_are_refused_by_name(model):
    with pytest.raises(MimaError, match="config: expected an ImmunizeConfig, got a dict"):
        immunize(model, concepts(1), {"steps": 1})


def test_a_card_says_that_concepts_had_their_turns(model, tmp_path):
    config = settings(tmp_path, steps=2, merge="sum", concepts_per_step=1)
    text = str(immunize(model, concepts(2), config).card())
    assert "Immunized against 2 concepts in turn, 1 in each step, without a merge" in text
    # each concept's loss at its own last step
    assert {f"last loss: {name}" for name in ("cat", "dog")} <= set(
        re.findall("last loss: .{3}", text)
    )


@pytest.mark.parametrize(("rate", "warned"), [(5e-6, True), (1e-4, False)])
def test_a_rate_of_large_models_is_warned_of_on_a_small_one(rate, warned, caplog):
    config = default(rate=rate, steps=1, num_class_images=1)
    with caplog.at_level(logging.WARNING, "mima"):
        check_model(load_pipeline("embedded"), concepts(1), config)
    assert ("of the recipe default by rate: 0.0001" in caplog.text) == warned


def test_a_merge_of_prompts_is_not_of_what_other_captions_teach(model):
    pipeline = load_pipeline(str(model))
    attacker = {"captions": ["as_is", "rare_token"]}

    def check(lower=attacker, **changes):
        check_model(pipeline, concepts(1), ImmunizeConfig(lower=lower, **changes))

    with pytest.raises(MimaError, match=r"captions: .* learned under rare_token needs merge"):
        check()
    for other in ({"merge": "average"}, {"merge": "sum"}, {"method": "joint"}):
        check(**other)
    # of weights that nothing projects the mean is kept
    check(attacker | {"parameters": r"conv_in\.weight"})
