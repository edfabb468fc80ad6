"""Whole outer steps of another commit and of this tree in turns, and with every graph held.

    python -m benchmarks.commits 58e5962

One attack for each of three concepts: four steps of Adam on LoRA beside all attention of the
embedded model, batch 1, merged by the text; cross-attention is what the defender changes. The other
commit is checked out beside this one and imported from there, without its native code, which no
outer step of commit 58e5962 called. Each tree computes in a process of its own, a step of either at
a time, so that both see the same machine, on one thread. Printed are seconds of the processor, the
best of a few rounds, and by how much the process grew at most in a step. ``exact, 16 times the
latents`` is one concept and one step of SGD on the whole of cross-attention, on pictures of four
times the side that the model was trained on.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch
from torch import Tensor

CONCEPTS, STEPS = 3, 4
BELOW = {"parameters": "lora", "optimizer": "adam", "lr": 1e-4, "steps": STEPS, "rank": 8}
TOGETHER = ", concepts in one forward"
"""On both levels, where the tree has a setting for it."""
MODES = ("first_order", "exact")
WIDE, SIDES = "exact, 16 times the latents", 4
HERE = (*MODES, *(mode + TOGETHER for mode in MODES), WIDE, "naive", "TorchOpt")
Gradient = dict[str, Tensor]


def problem_of(variant: str) -> Any:
    """The problem of one variant, from whichever tree ``benchmarks`` is imported."""
    from benchmarks import outer_step
    from benchmarks.outer_step import make_problem

    if variant == WIDE:
        family_of = outer_step.family_of

        def wide(pipeline: Any) -> Any:
            family = family_of(pipeline)
            family.resolution *= SIDES
            return family

        # the other tree has no setting for it
        with mock.patch.object(outer_step, "family_of", wide):
            problem = make_problem(1, batch=1, hypergradient="exact")
        problem.family.denoiser.requires_grad_(False)
        return problem
    mode = variant.removesuffix(TOGETHER)
    problem = make_problem(CONCEPTS, batch=1, hypergradient=mode if mode in MODES else "exact")
    # as a run has it, in either tree
    problem.family.denoiser.requires_grad_(False)
    lower, upper = problem.config.lower, problem.config.upper
    together = {"concepts_per_forward": CONCEPTS} if variant != mode else {}
    below = BELOW | {n: v for n, v in together.items() if n in type(lower).model_fields}
    levels = {
        "lower": lower.model_copy(update=below),
        "upper": upper.model_copy(update=together),
    }
    config = problem.config.model_copy(update=levels)
    return type(problem)(problem.family, problem.data, config, problem.merge)


def torchopt_gradient(problem: Any) -> Gradient:
    """The bi-level problem as one writes it with TorchOpt: every concept's graph is held."""
    import torchopt

    from mima.bilevel.hypergradient import twice_differentiable_attention

    leaves = {name: value.requires_grad_() for name, value in problem.theta().items()}
    with twice_differentiable_attention():
        adapted = []
        for task in problem.lower_levels(0):
            # as the engine's Adam: the root of a moment of 0 has slope 0
            rule = torchopt.adam(lr=BELOW["lr"], eps_root=1e-16)
            z = {n: v.detach().requires_grad_() for n, v in task.start(leaves).items()}
            state = rule.init(z)
            for k in range(task.steps):
                loss = task.loss(z, leaves, k)
                grads = torch.autograd.grad(loss, list(z.values()), create_graph=True)
                updates, state = rule.update(dict(zip(z, grads, strict=True)), state, inplace=False)
                z = torchopt.apply_updates(z, updates, inplace=False)
            change = task.change(z, leaves)
            adapted.append({n: v + change[n] if n in change else v for n, v in leaves.items()})
        phi = problem.merge(leaves, adapted)
        objective = sum(part(phi)[0] for part in problem.upper_levels(0))
        grads = torch.autograd.grad(objective, [leaves[n] for n in problem.upper_names])
    return dict(zip(problem.upper_names, grads, strict=True))


def gradient_of(variant: str) -> Callable[[], Gradient]:
    """A function that computes one outer step's gradient."""
    from benchmarks.outer_step import naive, two_pass

    problem = problem_of(variant)
    if variant == "TorchOpt":
        return lambda: torchopt_gradient(problem)
    solve = naive if variant == "naive" else two_pass
    return lambda: dict(solve(problem).gradient)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Compute the steps that are asked for, a variant a line.

    An answer has seconds, by how many MiB the process grew at most, and the gradient's norm.
    """
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], Gradient]] = {}
    for line in requests:
        variant = line.strip()
        if variant not in steps:
            steps[variant] = gradient_of(variant)
        # what the allocator keeps of earlier steps would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = peak_kib()
        # of the processor: other work on the machine does not count
        started = time.process_time()
        gradient = steps[variant]()
        seconds = time.process_time() - started
        grown = (peak_kib() - held) / 1024
        norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
        print(seconds, grown, norm, file=answers, flush=True)


def peak_kib() -> int:
    """The most memory that this process had since it was last asked to forget it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@contextmanager
def server(tree: Path) -> Iterator[Callable[[str], tuple[float, float, float]]]:
    """A process that computes steps with the code of a tree."""
    source = f"import sys; sys.path.insert(0, {str(tree)!r})\n{_SERVE}"
    command = [sys.executable, "-P", "-c", source, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(variant: str) -> tuple[float, float, float]:
            print(variant, file=process.stdin, flush=True)
            seconds, grown, norm = map(float, process.stdout.readline().split())
            return seconds, grown, norm

        try:
            yield ask
        finally:
            process.stdin.close()


# this file serves both trees: the other one need not have it
_SERVE = """
import importlib.util
spec = importlib.util.spec_from_file_location("commits", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.serve(sys.stdin, sys.stdout)
"""


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The tree of a commit, while it lasts."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=root, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=HERE, default=HERE, metavar="VARIANT")
    options = parser.parse_args()
    variants = [v for v in HERE if v in options.only]
    if importlib.util.find_spec("torchopt") is None and "TorchOpt" in variants:
        variants.remove("TorchOpt")
        print("TorchOpt is not installed")
    best: dict[tuple[str, str], float] = {}
    memory: dict[tuple[str, str], float] = {}
    norms: dict[tuple[str, str], float] = {}
    root = Path(__file__).parents[1]
    with checked_out(options.commit) as tree, server(tree) as before, server(root) as now:
        # the first round warms up
        for round_ in range(options.rounds + 1):
            for variant in variants:
                places = [("now", now)]
                if variant != "TorchOpt":
                    places.insert(0, (options.commit, before))
                for place, ask in places:
                    key = variant, place
                    seconds, grown, norms[key] = ask(variant)
                    if round_:
                        best[key] = min(best.get(key, seconds), seconds)
                        memory[key] = max(memory.get(key, grown), grown)
    columns = [options.commit, "now", f"now / {options.commit}"]
    print("|", " | ".join(["variant", *columns, *columns, "norm of the gradient"]), "|")
    print("| ---", "| ---: " * 6, "| --- |", sep="")
    for variant in variants:
        cells = [
            cell
            for numbers, unit, places in ((best, "s", 2), (memory, "MiB", 0))
            for cell in _cells(
                numbers.get((variant, options.commit)), numbers[variant, "now"], unit, places
            )
        ]
        print("|", " | ".join([variant, *cells, f"{norms[variant, 'now']:.4g}"]), "|")


def _cells(old: float | None, new: float, unit: str, places: int) -> tuple[str, str, str]:
    told = f"{new:.{places}f} {unit}"
    if old is None:
        return "", told, ""
    return f"{old:.{places}f} {unit}", told, f"{new / old:.2f}"


if __name__ == "__main__":
    main()
