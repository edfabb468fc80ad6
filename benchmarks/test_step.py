"""One outer step, three concepts, K = 1: each mode of the hypergradient beside the naive engine.

A forward is 1 unit, a backward 2, a backward through a backward about 6. Per concept and step:

    naive exact            3 + 3 + 6                    12
    two-pass exact         3 + 3 + (3 + 6)              15
    finite_difference      3 + 3 + 2 · 3                12
    first_order            3 + 3                         6
    published pair         3 + 3                         6
    TorchOpt               as naive                     12

``first_order, all concepts at once`` computes the upper level of all concepts in one forward
(``upper.concepts_per_forward``).

On the embedded model; on a GPU also at Stable Diffusion 1.x's size, with random weights, where the
naive engine, which keeps every concept's graph, is left out. MIMA_BENCH_SD1=sd1-tiny runs that part
anywhere, at a small size.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import commits
from benchmarks.harness import Comparison, Machine, replay
from benchmarks.outer_step import make_problem, naive, two_pass
from benchmarks.test_adam_step import eager as eager_adam
from benchmarks.test_projected_merge import published as published_merge
from mima import ops
from mima.bilevel import lower, upper
from mima.bilevel.hypergradient import twice_differentiable_attention
from mima.bilevel.lower import LowerLevel
from mima.bilevel.optimizers import Adam
from mima.families import Family
from mima.immunization.levels import Problem
from mima.merging import MergeLayer
from mima.ops import _autograd, _layers
from mima.training.batches import Batch, seeded
from mima.training.captions import ordinary_captions

CONCEPTS = 3
AT_ONCE = "first_order, all concepts at once"
WATCHING = _autograd, _layers, sys.modules[ops.adam_step.__module__]
"""Modules that ask `is_watched`, each by a name of its own, and go through the dispatcher if so."""
SHARED = 4
"""Tokens that all concepts' prompts begin with."""
HYPERGRADIENTS = {
    "naive": "exact",
    "TorchOpt": "exact",
    AT_ONCE: "first_order",
}
UNITS = {
    "naive": 12,
    "TorchOpt": 12,
    "exact": 15,
    "finite_difference": 12,
    "first_order": 6,
    AT_ONCE: 6,
    "published": 6,
}


def published_pair(problem: Problem) -> dict[str, torch.Tensor]:
    """A pair of steps of the published loop from its description, with none of the engine.

    Even: every concept's gradient, a plain step on keys and values, the merge as it was published,
    committed. Odd: the gradient of −L + prior at those weights, a concept's pictures and its class
    pictures in one forward. Without AdamW's steps, as for the others; the weights are put back.
    """
    family, lr = problem.family, problem.config.lower.lr
    network = family.denoiser
    parameters = {n: p for n, p in network.named_parameters() if n in set(problem.names)}
    keys_values = [n for n in parameters if n in problem.merge.projected]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    W0 = [parameters[n].detach().clone() for n in keys_values]
    adapted = []
    for n, data in enumerate(problem.data):
        network.zero_grad()
        diffusion_losses(family, [Batch.draw(family, data.images, 1, seeded(n, "lower"))])[
            0
        ].backward()
        adapted.append([parameters[k].detach() - lr * parameters[k].grad for k in keys_values])
    with torch.no_grad():
        # not the words that all prompts begin with, on which a hard constraint contradicts itself
        C = [C_SD[SHARED:] for C_SD in problem.merge.plan.C]
        merged = published_merge(W0, adapted, C, captions_of(problem))
        for name, value in zip(keys_values, merged, strict=True):
            parameters[name].copy_(value)
    network.zero_grad()
    for n, data in enumerate(problem.data):
        draws = seeded(n, "upper")
        own, prior = (
            Batch.draw(family, pictures, 1, draws) for pictures in (data.images, data.class_images)
        )
        loss, prior_loss = diffusion_losses(family, [own, prior])
        (prior_loss - loss).backward()
    gradient = {n: p.grad for n, p in parameters.items() if n in set(problem.upper_names)}
    with torch.no_grad():
        for name, value in zip(keys_values, W0, strict=True):
            parameters[name].copy_(value)
    for parameter in parameters.values():
        parameter.grad = None
        parameter.requires_grad_(False)
    return gradient


def diffusion_losses(family: Family, batches: list[Batch]) -> list[torch.Tensor]:
    """The training losses of batches of one picture, from one forward of the network itself."""
    latents, times, noise = (
        torch.cat([getattr(b, part) for b in batches]) for part in ("latents", "timesteps", "noise")
    )
    text = torch.cat([b.conditioning["encoder_hidden_states"] for b in batches])
    noisy = family.add_noise(latents, noise, times)
    prediction = family.denoiser(noisy, times, encoder_hidden_states=text, return_dict=False)[0]
    target = family.target(latents, noise, times)
    return [F.mse_loss(*pair) for pair in zip(prediction.split(1), target.split(1), strict=True)]


@functools.lru_cache(maxsize=1)
def captions_of(problem: Problem) -> torch.Tensor:
    """C_reg of 200 captions, encoded once."""
    lines = ordinary_captions(None)[:200]
    return torch.cat([problem.family.token_embeddings(line) for line in lines])


def torchopt_gradient(problem: Problem) -> dict[str, torch.Tensor]:
    """The bi-level problem as one writes it with TorchOpt: every concept's graph is held."""
    import torchopt

    leaves = {name: value.requires_grad_() for name, value in problem.theta().items()}
    with twice_differentiable_attention():
        adapted = []
        for task in problem.lower_levels(0):
            rule = torchopt.sgd(lr=problem.config.lower.lr)
            z = task.start(leaves)
            state = rule.init(z)
            for k in range(task.steps):
                grads = torch.autograd.grad(
                    task.loss(z, leaves, k), list(z.values()), create_graph=True
                )
                updates, state = rule.update(dict(zip(z, grads, strict=True)), state, inplace=False)
                z = torchopt.apply_updates(z, updates, inplace=False)
            adapted.append({**leaves, **z})
        phi = problem.merge(leaves, adapted)
        objective = sum(part(phi)[0] for part in problem.upper_levels(0))
        grads = torch.autograd.grad(objective, [leaves[n] for n in problem.upper_names])
    return dict(zip(problem.upper_names, grads, strict=True))


def step_of(mode: str, model: str, device: torch.device):
    if mode == "published":
        settings = {"method": "alternating"}
    else:
        settings = {"hypergradient": HYPERGRADIENTS.get(mode, mode)}
    problem = make_problem(CONCEPTS, batch=1, device=device, model=model, **settings)
    if mode == AT_ONCE:
        upper = problem.config.upper.model_copy(update={"concepts_per_forward": CONCEPTS})
        problem.config = problem.config.model_copy(update={"upper": upper})
    solve = {
        "naive": lambda problem: naive(problem).gradient,
        "TorchOpt": torchopt_gradient,
        "published": published_pair,
    }.get(mode, lambda problem: two_pass(problem).gradient)

    def step() -> torch.Tensor:
        gradient = solve(problem)
        return torch.cat([gradient[name].flatten() for name in sorted(gradient)])

    return step


@functools.lru_cache(maxsize=1)
def comparison(model: str, device: torch.device) -> Comparison:
    # those that hold every graph are too large at the other size
    modes = [mode for mode in UNITS if mode not in ("naive", "TorchOpt") or model == "embedded"]
    if importlib.util.find_spec("torchopt") is None and "TorchOpt" in modes:
        modes.remove("TorchOpt")
    return Comparison(
        group=f"outer step of {model}, N={CONCEPTS}, K=1, batch 1",
        variants={mode: step_of(mode, model, device) for mode in modes},
        baseline=modes[0],
        # approximations, whose errors the tests of the engine judge
        unchecked=("finite_difference", "first_order", AT_ONCE, "published"),
        tolerance=1e-3,
        rounds=5,
    )


@pytest.mark.parametrize("mode", UNITS)
@pytest.mark.parametrize("size", ["embedded", "sd1"])
def test_step(benchmark, size, mode, machine: Machine):
    model = size
    if size == "sd1" and machine.device.type != "cuda":
        model = os.environ.get("MIMA_BENCH_SD1", "")
        if not model:
            pytest.skip("minutes and tens of gigabytes without a GPU; MIMA_BENCH_SD1=sd1-tiny")
    replay(benchmark, comparison(model, machine.device), mode, machine)
    benchmark.extra_info["units"] = UNITS[mode] * CONCEPTS


class EagerAdam(Adam):
    """Adam as operations that autograd differentiates, a tensor at a time."""

    def step(self, z, g, state, k, *, overwrite=False):
        rule = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "step": k}
        stepped = [eager_adam(*one, *own, **rule) for *one, own in zip(z, g, state, strict=True)]
        return [z for z, _, _ in stepped], [(m, v) for _, m, v in stepped]

    def pullback(self, z_bar, state_bar, g, state, k):
        lists = g, g, [m for m, _ in state], [v for _, v in state]  # z's value does not matter
        z, g, m, v = ([x.detach().requires_grad_() for x in values] for values in lists)
        with torch.enable_grad():
            moved, after = self.step(z, g, list(zip(m, v, strict=True)), k)
        bars = [*z_bar, *(x for own in state_bar for x in own)]
        outputs = [*moved, *(x for own in after for x in own)]
        grads = torch.autograd.grad(outputs, [*z, *g, *m, *v], bars)
        z, g, m, v = (list(grads[i : i + len(g)]) for i in range(0, len(grads), len(g)))
        return z, g, list(zip(m, v, strict=True))


def without_operators(task: LowerLevel) -> LowerLevel:
    """A LoRA level as plain PyTorch computes it: Adam by tensors, W + s B A formed."""
    task.optimizer = EagerAdam(lr=task.optimizer.lr)

    def formed(z, theta, k):
        change = task.change(z, theta)
        return task._loss({**theta, **{n: theta[n] + change[n] for n in task.names}}, k)

    task.loss = formed
    return task


LORA_VARIANTS = [
    f"{mode}, {how}" for mode in ("exact", "first_order") for how in ("operators", "plain")
]


def lora_step_of(variant: str, device: torch.device):
    mode, how = variant.split(", ")
    problem = make_problem(CONCEPTS, batch=1, device=device, hypergradient=mode)
    below = {"parameters": "lora", "optimizer": "adam", "lr": 1e-4, "steps": 4, "rank": 8}
    lower_config = problem.config.lower.model_copy(update=below)
    config = problem.config.model_copy(update={"lower": lower_config})
    problem = Problem(problem.family, problem.data, config, problem.merge)

    def step() -> torch.Tensor:
        tasks = [problem.lower_level(n, 0) for n in range(CONCEPTS)]
        if how == "plain":
            tasks = [without_operators(task) for task in tasks]
        gradient = problem.hypergradient(problem.theta(), tasks, problem.upper_levels(0)).gradient
        return torch.cat([gradient[name].flatten() for name in sorted(gradient)])

    return step


@functools.lru_cache(maxsize=1)
def lora_comparison(device: torch.device) -> Comparison:
    return Comparison(
        group=f"LoRA outer step, N={CONCEPTS}, K=4",
        variants={variant: lora_step_of(variant, device) for variant in LORA_VARIANTS},
        baseline="exact, plain",
        unchecked=("first_order, operators", "first_order, plain"),
        # float32 through four steps of Adam, whose first are nearly signs
        tolerance=1e-2,
        rounds=3,
    )


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_lora_step(benchmark, variant, machine: Machine):
    """Adam on LoRA of all attention below, embedded model: the operators beside plain PyTorch."""
    replay(benchmark, lora_comparison(machine.device), variant, machine)


def test_ways_around_the_dispatcher(monkeypatch):
    """What it is worth that operators are called past PyTorch's dispatcher: printed, not judged.

    Of a `first_order` step with LoRA below, one by one and with all attacks in one forward, in
    seconds of the processor: the best of a few steps with and without, in turns.
    """
    pytest.importorskip("mima._native", reason="it computes on the CPU")
    torch.set_num_threads(1)
    for variant in ("first_order", "first_order" + commits.TOGETHER):
        step = commits.gradient_of(variant)
        step()
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for through in (True, False) * 4:
            with monkeypatch.context() as patch:
                for module in WATCHING if through else ():
                    patch.setattr(module, "is_watched", lambda *args, **kwargs: True)
                started = time.process_time()
                step()
                seconds[through].append(time.process_time() - started)
        best = {through: min(values) for through, values in seconds.items()}
        saved = 1 - best[False] / best[True]
        print(f"\n{variant}: {best[True]:.3f} s through it, {best[False]:.3f} past: {saved:.1%}")


def share_of_step(monkeypatch, machine: Machine, *functions: tuple[type, str]) -> float:
    """The share of twenty `first_order` steps that is spent in functions, as (owner, name)."""
    spent = []

    def now() -> float:
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(function):
        def run(*args, **options):
            started = now()
            out = function(*args, **options)
            spent.append(now() - started)
            return out

        return run

    for owner, name in functions:
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    model = "embedded" if machine.device.type != "cuda" else "sd1"
    step = step_of("first_order", model, machine.device)
    for _ in range(3):
        step()
    spent.clear()
    started = now()
    for _ in range(20):
        step()
    return sum(spent) / (now() - started)


def test_merge_share(monkeypatch, machine: Machine):
    """Merging, forwards and backwards, takes less than 2% of a `first_order` step."""
    merging = [(MergeLayer, name) for name in ("add_averaged", "asked", "spread", "missed")]
    share = share_of_step(monkeypatch, machine, *merging)
    print(f"merge share of a first_order step: {share:.2%}")
    assert share < 0.02


def test_host_overhead(monkeypatch, machine: Machine):
    """Less than 5% of a `first_order` step is spent outside the model's forwards and backwards.

    From a drawn batch to the loss's gradient, the release of its graph included: what a plain
    training loop spends, too. Beside it is printed what lies outside the network's calls and
    autograd's alone.
    """
    losses = [(lower, "losses_and_gradients"), (upper, "part_backward")]
    calls = [(Family, "predict"), (torch.autograd, "grad"), (torch.autograd, "backward")]
    with monkeypatch.context() as patch:
        outside_calls = 1 - share_of_step(patch, machine, *calls)
    share = 1 - share_of_step(monkeypatch, machine, *losses)
    print(f"of a first_order step, outside losses and their gradients: {share:.2%}")
    print(f"    outside the network's forwards and autograd's backwards: {outside_calls:.2%}")
    assert share < 0.05
