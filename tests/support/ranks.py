"""What the processes of the distributed tests run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bilevel import test_new_words
from bilevel.test_hypergradient import problem, randn
from support import immunizing, tiny

from mima import evaluation
from mima.bilevel.outer import outer_gradient, unmerged_gradient
from mima.distributed import ALONE, Ranks
from mima.immunization.alternating import merge_step
from mima.merging import MergeLayer, MergePlan

MODES = (
    *("exact", "finite_difference", "first_order", "unmerged", "alternating"),
    *("one concept", "one concept alternating", "new words"),
)


def theta() -> dict[str, torch.Tensor]:
    return {"key": randn(4, 5, seed=1), "value": randn(3, 4, seed=2), "bias": randn(3, seed=3)}


def solve(mode: str, ranks: Ranks = ALONE) -> dict[str, Any]:
    """One outer gradient over three concepts, unless the mode says how many."""
    start = theta()
    tasks, layer, upper = problem(start)
    wrt = tuple(start)
    committed: dict[str, torch.Tensor] = {}
    if mode == "new words":
        tasks, layer, upper = test_new_words.problem(start, "lora", test_new_words.ADAM_RULE, 2)
        outer = outer_gradient(start, tasks, layer, upper, mode="exact", wrt=wrt, ranks=ranks)
    elif mode.startswith("one concept"):
        one = torch.ones(1, dtype=torch.float64)
        plan = MergePlan.from_embeddings(layer.plan.C[:1], randn(40, 5, seed=9), weights=one)
        tasks, layer, upper = tasks[:1], MergeLayer(one, plan, ["key"]), upper[:1]
        if mode.endswith("alternating"):
            outer, committed = merge_step(start, tasks, layer, ["a"], lr=0.1, ranks=ranks)
        else:
            outer = outer_gradient(start, tasks, layer, upper, mode="exact", wrt=wrt, ranks=ranks)
    elif mode == "unmerged":
        outer = unmerged_gradient(start, tasks, upper, mode="exact", wrt=wrt, ranks=ranks)
    elif mode == "alternating":
        names = ["a", "b", "c"]
        outer, committed = merge_step(start, tasks, layer, names, lr=0.1, ranks=ranks)
    else:
        outer = outer_gradient(start, tasks, layer, upper, mode=mode, wrt=wrt, ranks=ranks)
    numbers = {"losses": outer.losses, "drift": outer.drift, "residual": outer.residual}
    return numbers | {"tensors": {**outer.gradient, **{f"+{n}": v for n, v in committed.items()}}}


def gradients(rank: int, store: Path, output: Path) -> None:
    """As rank of three; groups of one, two and three of them solve the same problem."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    for size in (1, 2, 3):
        group = dist.new_group(list(range(size)))
        if rank < size:
            ranks = Ranks(rank, size, group)
            results = {mode: solve(mode, ranks) for mode in MODES}
            torch.save(results, output / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def evaluate(
    rank: int, size: int, port: int, models: Path, output: Path, grid: dict[str, Any]
) -> None:
    """A small evaluation as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(_torchrun(rank, size, port))
    evaluation.evaluate(
        models / "original",
        models / "immunized",
        [tiny.concept("red", "round")],
        output=output,
        others=[tiny.concept("blue", "square")],
        settings=grid,
        similarities=[models / "clip"],
        processes=None if size > 1 else 1,
    )


def immunize(rank: int, size: int, port: int, args: tuple[Any, ...], options: Any) -> None:
    """`immunizing.run` as torchrun would start it."""
    os.environ.update(_torchrun(rank, size, port))
    immunizing.run(*args, **options)


def _torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
