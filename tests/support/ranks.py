"""What the processes of the distributed tests run."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bilevel import test_new_words
from bilevel.test_hypergradient import problem, randn
from support import immunizing, tiny
from torch.distributed.tensor import DTensor

from mima import distributed, evaluation
from mima.bilevel.outer import outer_gradient, unmerged_gradient
from mima.distributed import ALONE, Ranks, join
from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.families.frozen import hold_frozen
from mima.families.sharded import ShardedDenoiser
from mima.immunization.alternating import merge_step
from mima.immunization.outer_loop import Ascent
from mima.immunization.progress import StepReport
from mima.immunization.sharded_state import ShardedState
from mima.merging import MergeLayer, MergePlan
from mima.storage import checkpoint
from mima.storage.checkpoint import Checkpoint, CheckpointFolder

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


def interrupt(rank: int, size: int, port: int, args: tuple[Any, ...], options: Any) -> None:
    """`immunize`, interrupted everywhere after two steps, with a checkpoint that takes long."""
    check, save = Ascent._check_divergence, checkpoint._save_whole

    def interrupted(run: Ascent) -> None:
        check(run)
        if len(run.history) == 2:
            distributed.PATIENCE, distributed.PERIOD = 1.0, 0.25
            raise KeyboardInterrupt

    def slowly(folder: Path, tensors: Any) -> dict[str, str]:
        # torchrun passes on the Ctrl-C that a terminal has sent to all
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(4)
        return save(folder, tensors)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Ascent, "_check_divergence", interrupted)
        patch.setattr(checkpoint, "_save_whole", slowly)
        immunize(rank, size, port, args, options)


def patience(rank: int, size: int, port: int, output: Path) -> None:
    """How long each group waits of processes that hold a model between them."""
    os.environ.update(_torchrun(rank, size, port))
    split = join().split(2, torch.device("cpu"))
    assert split.mesh is not None
    groups = [dist.group.WORLD, split.group, split.mesh.get_group("shard")]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    (output / str(rank)).write_text(str([backend.options._timeout for backend in backends]))
    # the main process holds the store that the others still read
    dist.barrier()


class Hold:
    """Stops a run within its second step, until somebody kills it."""

    def __call__(self, report: StepReport) -> None:
        if report.step == 2:
            time.sleep(3600)


class Told:
    """Writes down which process is told of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, report: StepReport) -> None:
        with self.path.open("a") as file:
            file.write(os.environ["RANK"])


class HeldBytes:
    """Writes down, after each step, how many bytes the tensors of this process hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, report: StepReport) -> None:
        gc.collect()
        with warnings.catch_warnings():
            # some modules warn of names that are looked at
            warnings.simplefilter("ignore")
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        locals_ = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        storages = [x.untyped_storage() for x in locals_ if not x.is_meta]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.path.write_text(str(sum(held.values())))


class ReceivedBytes:
    """Writes down what the main process receives of weights and gradients in the second step."""

    # what FSDP2 calls differs between versions of torch
    GATHERS = ("all_gather_single", "all_gather_into_tensor")
    SCATTERS = ("reduce_scatter_single", "reduce_scatter_tensor")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: dict[str, float] | None = None

    def __call__(self, report: StepReport) -> None:
        if self.received is None:
            self.received = {"within": 0, "between": 0}
            for names, output in ((self.GATHERS, True), (self.SCATTERS, False)):
                for name in names:
                    if hasattr(dist, name):
                        setattr(dist, name, self._in_a_group(getattr(dist, name), output))
            dist.all_reduce = self._between_groups(dist.all_reduce)
        elif not self.path.exists():
            self.path.write_text(json.dumps(self.received))

    def _in_a_group(self, call: Any, output: bool) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            # first the result, then what each process gives
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            whole = max(x.nbytes for x in tensors)
            assert (tensors[0].nbytes == whole) == output
            self._add("within", whole, kwargs["group"])
            return call(*args, **kwargs)

        return counted

    def _between_groups(self, call: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # norms and numbers of pictures are not counted
            if tensor.numel() > 16:
                self._add("between", 2 * tensor.nbytes, kwargs["group"])
            return call(tensor, *args, **kwargs)

        return counted

    def _add(self, where: str, size: int, group: Any) -> None:
        assert self.received is not None
        count = dist.get_world_size(group)
        self.received[where] += size * (count - 1) / count


def immunize_or_say(
    rank: int, size: int, port: int, log: Path, args: tuple[Any, ...], options: Any
) -> None:
    """`immunize`, as `_or_say`."""
    with _or_say(rank, log):
        immunize(rank, size, port, args, options)


def evaluate_or_say(rank: int, size: int, port: int, log: Path, *args: Any) -> None:
    """`evaluate`, as `_or_say`."""
    with _or_say(rank, log):
        evaluate(rank, size, port, *args)


@contextmanager
def _or_say(rank: int, log: Path) -> Iterator[None]:
    """Notice silence after seconds, and put this process' errors in a file."""
    distributed.PATIENCE, distributed.PERIOD = 10.0, 0.5
    logging.getLogger("mima").addHandler(logging.FileHandler(log / f"{rank}.txt"))
    try:
        yield
    except MimaError as error:
        logging.getLogger("mima").error("%s", error)
        sys.exit(1)


def shards(rank: int, size: int, port: int, model: Path, folder: Path) -> None:
    """Checkpoints of a denoiser in shards, written and read by other numbers of processes."""
    torch.set_num_threads(1)
    os.environ.update(_torchrun(rank, size, port))
    everyone = join(torch.device("cpu"))

    def sharded(count: int) -> tuple[ShardedDenoiser, ShardedState]:
        family = family_of(load_pipeline(model, device="cpu"))
        hold_frozen(family.denoiser, family.parameter_names("attention"))
        ranks = everyone.split(count, torch.device("cpu"))
        denoiser = ShardedDenoiser(family, family.parameter_names("attention"), ranks.mesh)
        return denoiser, ShardedState(CheckpointFolder(folder / "c"), denoiser, ranks)

    def state(denoiser: ShardedDenoiser) -> dict[str, torch.Tensor]:
        rows = {f"theta.{name}": value for name, value in denoiser.theta.items()}
        rows |= {f"upper.exp_avg.{name}": 2 * value for name, value in denoiser.theta.items()}
        return rows | {"upper.step": torch.tensor(7.0)}

    def check(found: Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
        assert found.state == {"note": "shards"}
        immunizing.assert_same(found.tensors, wanted)

    two, kept = sharded(2)
    kept.write(Checkpoint(1, state(two), {"note": "shards"}))
    kept.write(Checkpoint(2, state(two), {"note": "shards"}))
    check(kept.latest(), state(two))
    four, kept = sharded(4)
    check(kept.latest(), state(four))
    if everyone.main:
        whole = CheckpointFolder(folder / "c").latest()
        unet = load_pipeline(model, device="cpu").unet.state_dict()
        for name in four.theta:
            assert torch.equal(whole.tensors[f"theta.{name}"], unet[name]), name
            assert torch.equal(whole.tensors[f"upper.exp_avg.{name}"], 2 * unet[name]), name
        one = CheckpointFolder(folder / "c")
        one.latest()
        one.write(Checkpoint(3, whole.tensors, whole.state))
    everyone.broadcast(None)
    found = kept.latest()
    assert found.step == 3
    check(found, state(four))
    if everyone.main:
        (folder / "c" / "step-00000003" / "state.json").write_text("{")
    everyone.broadcast(None)
    found = kept.latest()
    assert found.step == 2
    check(found, state(four))
    if everyone.main:
        file = folder / "c" / "step-00000002" / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:-9])
    everyone.broadcast(None)
    with pytest.raises(MimaError, match="step-00000003"):
        kept.latest()


def _torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
