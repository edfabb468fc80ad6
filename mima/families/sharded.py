"""A denoiser whose weights several processes hold between them: FSDP2, seen as a function."""

# B = batch, P = pictures that one process computes, S = shards

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from mima.families.frozen import at_least_float32, replace_parameters
from mima.families.pipelines import shared_copy
from mima.families.text import Conditioning

if TYPE_CHECKING:
    from mima.families.base import Family
    from mima.merging import Params


class ShardedDenoiser:
    """``(pictures, θ) ↦ prediction`` of a denoiser that S processes hold between them.

    ``fully_shard`` cuts every weight into rows and keeps 1/S of them in each process. A block is
    whole only while it computes. Who trains sees tensors by name, as ever: this process' rows.
    ``torch.func.functional_call`` does not go with FSDP2's hooks; a call writes the rows that it
    is given into the module's shards instead.

    The S processes call at the same places of the same run, on the same batch. Each computes its
    part of the pictures, and all get the predictions of all, so that losses, and whatever depends
    on them, are the same.

    Args:
        family: the model, no weight of which goes by several names. Its denoiser is sharded in
            place; the whole weights are freed where nothing else holds them.
        trained: names of the weights that a run writes to.
        mesh: ``concept`` × ``shard``.
        dtype: what blocks are gathered and computed in; rows and gradients stay in float32.

    Attributes:
        theta: this process' rows of the trained weights, by name.
        shapes: the whole weights' shapes, by name.
    """

    def __init__(
        self,
        family: Family,
        trained: Collection[str],
        mesh: DeviceMesh,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        denoiser = family.denoiser
        assert not family.shares_weights
        self._family = family
        self._mesh = mesh
        self._group = mesh.get_group("shard")
        self._rank, self._size = mesh.get_local_rank("shard"), mesh["shard"].size()
        self._shell = _shell(denoiser)
        half = None if dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
        )
        for module in (*blocks(denoiser), denoiser):
            _make_whole(module)
            fully_shard(module, mesh=mesh["shard"], reshard_after_forward=True, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            # a batch's gradient is the sum over its pictures, which the processes share out
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._held: dict[str, DTensor] = {}
        for name, value in denoiser.named_parameters():
            assert isinstance(value, DTensor)
            self._held[name] = value
        self.shapes = {name: value.shape for name, value in self._held.items()}
        self.theta = {
            name: self._held[name].to_local().detach().clone()
            for name in self._held
            if name in trained
        }

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This process' rows of a whole weight, or of what has its shape."""
        parts = whole.chunk(self._size)
        return parts[self._rank] if self._rank < len(parts) else whole[:0]

    def distributed(self, name: str, rows: torch.Tensor) -> DTensor:
        """Rows of one weight as a part of the whole, the same for each of the mesh's concepts."""
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        places = [Replicate(), Shard(0)]
        return DTensor.from_local(
            rows, self._mesh, places, run_check=False, shape=shape, stride=stride
        )

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        params: Params | None = None,
    ) -> torch.Tensor:
        """`Family.predict` with rows for weights; differentiable once, in the trained ones."""
        values = {**self.theta, **(params or {})}
        assert values.keys() == self.theta.keys()
        prediction: torch.Tensor = _Call.apply(
            self, (noisy, timesteps, conditioning), tuple(values), *values.values()
        )
        return prediction

    def whole(self, where: torch.device | None) -> torch.nn.Module:
        """The denoiser as it was before, with θ as it is now.

        Args:
            where: the device for its weights; None in the processes that do without, whose module
                then has shapes alone. All S processes call at the same time.
        """
        self.write(self.theta)
        for name, value in self._held.items():
            full = value.full_tensor().detach()
            if where is not None:
                owner, _, leaf = name.rpartition(".")
                new = torch.nn.Parameter(full.to(where), requires_grad=False)
                setattr(self._shell.get_submodule(owner), leaf, new)
        return self._shell if where is None else self._shell.to(where)

    @torch.no_grad()
    def write(self, values: Params) -> None:
        """Put rows into the module's own shards."""
        for name, value in values.items():
            self._held[name].to_local().copy_(value)
        if self._mesh.device_type == "cuda":
            # FSDP2 gathers on streams of its own, which in a backward wait for no other
            torch.cuda.current_stream().synchronize()

    def run(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """[P, C, H, W]: predictions of this process' pictures."""
        # where pictures do not go round, the last is computed again: blocks are gathered by all
        index = (torch.arange(self._rows_of(len(noisy))) + self._start(len(noisy))).clamp(
            max=len(noisy) - 1
        )
        index = index.to(noisy.device)
        noisy = noisy[index]
        conditioning = {name: value[index] for name, value in conditioning.items()}
        return self._family.own_prediction(noisy, timesteps[index], conditioning)

    def gathered(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """[B, C, H, W]: the predictions of all S processes, from each one's."""
        everyone = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(everyone, own.detach().contiguous(), group=self._group)
        return torch.cat(everyone)[:count]

    def pullback(self, own: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients at the trained rows for one at all predictions; the graph of ``own`` ends."""
        start = self._start(len(gradient))
        part = gradient[start : start + len(own)]
        mine = torch.zeros_like(own)
        mine[: len(part)] = part
        own.backward(mine)
        found = {}
        for name in self.theta:
            held = self._held[name]
            if held.grad is not None:
                assert isinstance(held.grad, DTensor)
                found[name] = held.grad.to_local()
                held.grad = None
        return found

    def require_gradients(self, names: Mapping[str, bool]) -> None:
        """Say which trained weights the next graph is to be differentiated by."""
        for name, required in names.items():
            self._held[name].requires_grad_(required)

    def _rows_of(self, count: int) -> int:
        return -(-count // self._size)

    def _start(self, count: int) -> int:
        return self._rank * self._rows_of(count)


class _Call(torch.autograd.Function):
    """One call of a sharded denoiser, its graph kept apart from the one that it is a node of."""

    @staticmethod
    def forward(
        ctx: Any,
        denoiser: ShardedDenoiser,
        inputs: tuple[torch.Tensor, torch.Tensor, Conditioning],
        names: tuple[str, ...],
        *values: torch.Tensor,
    ) -> torch.Tensor:
        denoiser.write(dict(zip(names, values, strict=True)))
        required = dict(zip(names, ctx.needs_input_grad[3:], strict=True))
        asked = any(required.values())
        if asked:
            denoiser.require_gradients(required)
        with torch.set_grad_enabled(asked):
            own = denoiser.run(*inputs)
        if asked:
            ctx.denoiser, ctx.names, ctx.own = denoiser, names, own
            ctx.save_for_backward(*values)
        return denoiser.gathered(own, len(inputs[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # another call may have written other values since
        ctx.denoiser.write(dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        found = ctx.denoiser.pullback(ctx.own, gradient)
        ctx.own = None
        return None, None, None, *(found.get(name) for name in ctx.names)


def blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a denoiser that are gathered one at a time, inner ones before outer ones.

    Those that diffusers declares not to be split over devices, or else the items of its lists.
    """
    declared = set(getattr(denoiser, "_no_split_modules", None) or ())
    found = [module for module in denoiser.modules() if type(module).__name__ in declared]
    if not found:
        lists = (m for m in denoiser.children() if isinstance(m, torch.nn.ModuleList))
        found = [block for one in lists for block in one]
    return found[::-1]


def _make_whole(module: torch.nn.Module) -> None:
    """Make plain, contiguous weights of those that are not in shards yet."""
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            if not isinstance(value, DTensor):
                new = at_least_float32(value).contiguous()
                setattr(owner, name, torch.nn.Parameter(new, requires_grad=False))


def _shell(denoiser: torch.nn.Module) -> torch.nn.Module:
    """The denoiser's structure, buffers and shapes, without weights."""
    shell = shared_copy(denoiser)
    replace_parameters(shell, lambda value: torch.empty(value.shape, device="meta"))
    return shell
