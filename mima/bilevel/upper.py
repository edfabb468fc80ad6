"""The upper level: the terms that are summed at merged parameters φ, and their gradient there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mima.bilevel.lower import Tensors
from mima.distributed import ALONE, Ranks, union
from mima.merging import Params


@dataclass(frozen=True)
class UpperTerm:
    """One summand of the upper objective, which is minimised: ``weight · min(loss, cap)``.

    Attributes:
        name: what reports call it, anything that can be a key.
        weight: −1 for a concept that is to become hard to learn, > 0 for what is to be kept.
        cap: losses above it no longer pull; None for no cap.
    """

    name: Any
    weight: float
    cap: float | None = None

    def objective(self, loss: torch.Tensor) -> torch.Tensor:
        """The summand for a value of the loss."""
        return self.weight * (loss if self.cap is None else loss.clamp(max=self.cap))


@dataclass(frozen=True)
class UpperLevel:
    """The terms of the upper objective that one forward and one backward compute together.

    Attributes:
        terms: the summands, those of one concept or of several.
        losses: a function of the merged parameters φ: the loss of each term.
    """

    terms: Sequence[UpperTerm]
    losses: Callable[[Params], Sequence[torch.Tensor]]

    def __call__(self, phi: Params) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
        """The objective at φ, and each term's loss by name."""
        losses = self.losses(phi)
        summands = [term.objective(x) for term, x in zip(self.terms, losses, strict=True)]
        names = [term.name for term in self.terms]
        return torch.stack(summands).sum(), dict(zip(names, losses, strict=True))


Level = Callable[[Params], tuple[torch.Tensor, dict[Any, torch.Tensor]]]
"""A part of the upper level: φ ↦ its objective, and the losses that reports show, by name."""

Upper = Sequence[Level] | Mapping[int, Sequence[Level]]
"""The upper level's parts at the last state of the path, or at some states by their steps."""


def along_path(upper: Upper, steps: int) -> Mapping[int, Sequence[Level]]:
    """The parts by state, in the order of the path.

    Raises:
        ValueError: no state, or one that a path of so many steps does not have.
    """
    parts = dict(upper) if isinstance(upper, Mapping) else {steps: upper}
    if not parts or not all(1 <= k <= steps for k in parts):
        raise ValueError(f"upper level: states must lie in 1 … {steps}, got {sorted(parts)}")
    return {k: parts[k] for k in sorted(parts)}


def upper_gradient(
    phi: Params,
    upper: Sequence[Level],
    ranks: Ranks = ALONE,
    words: Mapping[int, Params] | None = None,
    wrt: tuple[str, ...] | None = None,
) -> tuple[Tensors, dict[int, Tensors], dict[Any, float]]:
    """Gradient of ``Σ upper(φ)`` at φ, a part at a time.

    Args:
        phi: the merged weights.
        upper: the upper level in parts.
        ranks: the processes that share the parts out.
        words: for each concept of this process, embeddings of new words that only its terms read.
        wrt: the names to differentiate by; None for all, the words among them.

    Returns:
        The gradient at φ, those at the words, and the losses by their terms' names.
    """
    leaves = {
        name: value.detach().requires_grad_() if wrt is None or name in wrt else value.detach()
        for name, value in phi.items()
    }
    like = {name: value for name, value in leaves.items() if value.requires_grad}
    words_bar: dict[int, Tensors] = {}
    seen: list[dict[Any, torch.Tensor]] = []
    for n in ranks.share(len(upper)):
        own = {name: v.detach() for name, v in (words or {}).get(n, {}).items()}
        if wrt is None:
            own = {name: value.requires_grad_() for name, value in own.items()}
        # summed in the leaves, parameter by parameter: no part has a gradient of its own in memory
        seen.append(part_backward(upper[n], {**leaves, **own}))
        words_bar[n] = {name: _gradient_of(v) for name, v in own.items() if v.requires_grad}
    phi_bar = {name: _gradient_of(value) for name, value in like.items()}
    # read at the end: each reading waits for the device
    values = ranks.interleave([as_numbers(losses) for losses in seen], len(upper))
    return ranks.all_reduce(phi_bar, like), words_bar, union(values)


def part_backward(part: Level, leaves: Params) -> dict[Any, torch.Tensor]:
    """Losses of one part of the upper level; its gradient is added to each leaf's.

    No graph is left.
    """
    with torch.enable_grad():
        objective, losses = part(leaves)
    # where nothing pulls, no backward is needed to say so
    if objective.requires_grad:
        asked = [value for value in leaves.values() if value.requires_grad]
        torch.autograd.backward(objective, inputs=asked)
    return {name: loss.detach() for name, loss in losses.items()}


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    """What backward passes have summed at a leaf; zeros where none reached it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def as_numbers(losses: Mapping[Any, torch.Tensor]) -> dict[Any, float]:
    """The losses without their graphs, as reports have them."""
    return {name: float(loss.detach()) for name, loss in losses.items()}
