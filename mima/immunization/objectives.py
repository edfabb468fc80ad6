"""What the upper level wants of an attacked model, each a bounded or slowly growing penalty.

All are functions of the attacked model's prediction v on a concept's noised pictures, minimised:

| name | penalty | source |
| --- | --- | --- |
| neg | −min(L, cap), L = mean (v − target)² | MIMA, eq. 4 (Zheng & Yeh, AAAI 2025) |
| log | −log(L + ε) | the relative form of neg: its gradient is L's, divided by L |
| hinge | mean_B max(0, log(L_start + ε) + margin − log(L + ε)) | ours: no pull beyond the margin |
| anchor | mean (v − v_start)² | ours: the attacked model predicts what the start predicts |
| zero | mean v² | a target that knows nothing of the picture |

L_start and v_start are the loss and the prediction of the model before immunization, on the same
noise. ``neg`` and ``log`` have no minimum: they go on breaking the model; the others stop at 0.
"""

# B = pictures of a batch

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mima.choices import UpperObjective

EPSILON = 1e-3
"""ε: added to losses under a logarithm; a trained denoiser's are of the order of 0.1."""


@dataclass(frozen=True)
class Seen:
    """A batch as a model sees it.

    Attributes:
        prediction: [B, C, H, W] of the attacked model.
        target: [B, C, H, W] what training would have it predict.
        start: [B, C, H, W] the prediction of the model before immunization; None where the
            objective does not read it.
        margin: in nats, what ``hinge`` wants of the loss above that of the start, ≥ 0.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    start: torch.Tensor | None = None
    margin: float = 0.0

    @property
    def loss(self) -> torch.Tensor:
        """L, a scalar."""
        return F.mse_loss(self.prediction, self.target)


def log(seen: Seen) -> torch.Tensor:
    """``−log(L + ε)``."""
    return -torch.log(seen.loss + EPSILON)


def hinge(seen: Seen) -> torch.Tensor:
    """``mean_B max(0, log(L_start + ε) + margin − log(L + ε))``."""
    return F.relu(lacking(seen)).mean()


def lacking(seen: Seen) -> torch.Tensor:
    """What each picture's loss still lacks of what ``hinge`` wants, in nats: [B]."""
    assert seen.start is not None
    before, now = (
        torch.log((v - seen.target).square().flatten(1).mean(1) + EPSILON)
        for v in (seen.start, seen.prediction)
    )
    return before + seen.margin - now


def anchor(seen: Seen) -> torch.Tensor:
    """``mean (v − v_start)²``."""
    assert seen.start is not None
    return F.mse_loss(seen.prediction, seen.start)


def zero(seen: Seen) -> torch.Tensor:
    """``mean v²``."""
    return seen.prediction.square().mean()


PENALTIES: dict[UpperObjective, Callable[[Seen], torch.Tensor]] = {
    "log": log,
    "hinge": hinge,
    "anchor": anchor,
    "zero": zero,
}
"""Every objective but ``neg``, which ``UpperTerm`` is."""

READS_START: frozenset[UpperObjective] = frozenset({"hinge", "anchor"})
"""The objectives that compare with the model before immunization."""
