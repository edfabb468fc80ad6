"""LoRA for several concepts at once: one forward of the model serves them all."""

# N = runs, B = pictures of all runs, T = tokens, d -> o = features, r = rank

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from mima.adaptation.base import Run, autocast, training
from mima.adaptation.copies import component_name, shared_copy, with_modules
from mima.adaptation.lora import ADAPTER, LoRA
from mima.diffusion import prediction_and_target
from mima.errors import MimaError
from mima.families import family_of
from mima.ops.batched_lora import batched_lora


class Together:
    """LoRA runs on one model that share each forward and backward.

    A step draws each run's batch as `Run.advance` would, puts all of them through the model at
    once, each picture with its own run's adapter (`mima.ops.batched_lora`), and lets each run's
    optimiser step. The result is that of training the runs one by one, up to rounding; ranks,
    scales, learning rates, seeds, batch sizes and prior preservation may differ from run to run.
    Each run keeps its pipeline, its losses and its `save`, which writes a file of its own.

    Args:
        runs: N runs of `LoRA` or `DreamBoothLoRA`, started on the same pipeline.

    Attributes:
        runs: those.

    Raises:
        MimaError: another method, runs on different models, dropout, adapted layers that are not
            linear, or different `gradient_accumulation_steps`.
        ValueError: no runs, or one of them twice.

    Example:
        >>> lora = LoRA(rank=4)
        >>> together = Together([lora.start(pipeline, concept) for concept in concepts])
        >>> together.advance(500)
        >>> for run in together.runs:
        ...     run.save(f"{run.concept.name}-lora")
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        if not runs or len({id(run) for run in runs}) < len(runs):
            raise ValueError("Together: needs runs, each of them once")
        for run in runs:
            _check(run, runs[0])
        self.runs = tuple(runs)
        first = runs[0]._family
        self._owner = _Owner()
        denoiser = shared_copy(first.denoiser)
        for name in dict.fromkeys(name for run in runs for name in _layers(run)):
            parent, _, child = name.rpartition(".")
            layer = _Layer(runs, name, self._owner)
            setattr(denoiser.get_submodule(parent), child, layer)
        if any(run.adaptation.gradient_checkpointing for run in runs):
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        name = component_name(first.pipeline, first.denoiser)
        self._family = family_of(with_modules(first.pipeline, **{name: denoiser}))

    def advance(self, steps: int, *, on_step: Callable[[Together], None] | None = None) -> None:
        """Train every run some more steps.

        Args:
            steps: how many.
            on_step: called after each step; an exception that it raises ends the training.

        Raises:
            MimaError: a loss is no longer finite.
        """
        with contextlib.ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run._offloaded())
            stack.enter_context(training(self._family))
            for _ in range(steps):
                self._one_step()
                if on_step is not None:
                    on_step(self)

    def _one_step(self) -> None:
        count = self.runs[0].adaptation.gradient_accumulation_steps
        totals = [0.0] * len(self.runs)
        for _ in range(count):
            parts = [(n, *part) for n, run in enumerate(self.runs) for part in run._batches()]
            owners, weights, batches = zip(*parts, strict=True)
            latents, conditionings, timesteps, noise = zip(*batches, strict=True)
            sizes = [len(part) for part in latents]
            device = self._family.device
            self._owner.rows = torch.tensor(owners, device=device).repeat_interleave(
                torch.tensor(sizes, device=device)
            )
            conditioning = {
                name: torch.cat([part[name] for part in conditionings]) for name in conditionings[0]
            }
            with autocast(self._family):
                compared = prediction_and_target(
                    self._family,
                    torch.cat(latents),
                    conditioning,
                    torch.cat(timesteps),
                    torch.cat(noise),
                )
                pairs = zip(*(side.split(sizes) for side in compared), strict=True)
                losses = [F.mse_loss(*pair) for pair in pairs]
            scaled = []
            for n, weight, loss in zip(owners, weights, losses, strict=True):
                part = weight * loss / count
                totals[n] += part.item()
                scaled.append(self.runs[n]._scaler.scale(part))
            # no adapter has a part in another's loss, so that the sum's gradients are theirs
            torch.stack(scaled).sum().backward()
        for run, total in zip(self.runs, totals, strict=True):
            run._update(total)


class _Owner:
    """Whose picture each row of the present batch is, [B]."""

    rows: torch.Tensor


class _Layer(torch.nn.Module):
    """A linear layer with the adapters of those runs that adapt it."""

    def __init__(self, runs: Sequence[Run], name: str, owner: _Owner) -> None:
        super().__init__()
        layers = [_layers(run).get(name) for run in runs]
        adapted = [layer for layer in layers if layer is not None]
        # frozen, and the same storage in all runs
        base = adapted[0].get_base_layer()
        self.weight, self.bias = base.weight, base.bias
        # the runs' own parameters, in lists that hide them: they are saved and stepped there
        self._A = [layer.lora_A[ADAPTER].weight for layer in adapted]
        self._B = [layer.lora_B[ADAPTER].weight for layer in adapted]
        self._scale = [float(layer.scaling[ADAPTER]) for layer in adapted]
        places = torch.full((len(runs),), -1)
        places[[layer is not None for layer in layers]] = torch.arange(len(adapted))
        self._place_of_N = places.to(base.weight.device)
        self._owner = owner

    def forward(self, x_BTd: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b + s x Aᵀ Bᵀ with each row's own A, B and s: [B, T, o]."""
        kind = x_BTd.device.type
        # as peft does under autocast, and as it does not without: the adapters follow the input
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTd.dtype
        return batched_lora(
            x_BTd.to(dtype),
            self.weight.to(dtype),
            [A_rd.to(dtype) for A_rd in self._A],
            [B_or.to(dtype) for B_or in self._B],
            self._scale,
            self._place_of_N[self._owner.rows],
            bias=None if self.bias is None else self.bias.to(dtype),
        )


def _layers(run: Run) -> dict[str, Any]:
    """A run's adapted layers by name."""
    modules = run._family.denoiser.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def _check(run: Run, first: Run) -> None:
    settings = run.adaptation
    if not isinstance(settings, LoRA):
        raise MimaError(
            f"method {settings.method} trains one concept at a time; lora and dreambooth-lora "
            "train several at once"
        )
    if settings.dropout > 0:
        raise MimaError("dropout: several concepts at once are trained without it")
    if settings.gradient_accumulation_steps != first.adaptation.gradient_accumulation_steps:
        raise MimaError(
            "gradient_accumulation_steps must be the same for concepts that are trained at once, "
            f"got {first.adaptation.gradient_accumulation_steps} and "
            f"{settings.gradient_accumulation_steps}"
        )
    bases = [next(one._family.denoiser.parameters()).data_ptr() for one in (run, first)]
    if bases[0] != bases[1]:
        raise MimaError("concepts that are trained at once must be learned by the same model")
    for name, layer in _layers(run).items():
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Linear):
            raise MimaError(
                f"target_modules: {name} is a {type(base).__name__}; several concepts at once "
                "adapt linear layers only"
            )
