"""What the upper level wants of an attacked model, each a penalty that is minimised.

All are functions of the attacked model's prediction v on a concept's noised pictures; ``neg``
alone, without a cap, has neither a bound nor a slope that fades:

| name | penalty | source |
| --- | --- | --- |
| neg | −min(L, cap), L = mean (v − target)² | MIMA (Zheng & Yeh, AAAI 2025) |
| log | −log(L + ε) | the relative form of neg: its gradient is L's, divided by L |
| hinge | mean_B max(0, log(L_start + ε) + margin − log(L + ε)) | ours: no pull beyond the margin |
| pair | mean −log σ(−β d), d = (e⁺ − e⁺_start) − (e⁻ − e⁻_start) | APDM (NeurIPS 2025) |
| anchor | mean (v − v_start)² | ours: the attacked model predicts what the start predicts |
| zero | mean v² | a target that knows nothing of the picture |
| entropy | mean (v − v_blind)² | after TAR (Tamirisa et al., ICLR 2025), see below |

L_start and v_start are the loss and the prediction of the model before immunization, on the same
noise. ``pair`` compares squared errors e, element by element, on the concept's picture (⁻) and on a
class picture (⁺), both under the concept's caption, at the same noise level and noise.

TAR asks of an attacked language model the answers of the greatest entropy. What corresponds to
these here is v_blind, the best prediction for pictures of the greatest entropy among those of unit
variance, Gaussian noise: it knows the noise level and nothing of any picture.

``neg``, ``log`` and ``pair`` have no minimum: they go on breaking the model, ``pair`` ever more
weakly; the others have it at 0. With ``ascent_ratio``, which gives the gradient of all but
``hinge`` its length, they go on at that length in whatever direction is left.
"""

# B = pictures of a batch

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mima.choices import UpperObjective
from mima.families import Family
from mima.immunization.level_config import UpperConfig
from mima.training.batches import Batch
from mima.training.loss import weighted

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
        blind: [B, C, H, W] v_blind; None where the objective does not read it.
        pair: the paired batch; None where the objective does not read it.
        beta: β of ``pair``, > 0.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    start: torch.Tensor | None = None
    margin: float = 0.0
    blind: torch.Tensor | None = None
    pair: Seen | None = None
    beta: float = 1.0

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


def pair(seen: Seen) -> torch.Tensor:
    """``mean −log σ(−β d)`` over elements, d as above."""
    assert seen.pair is not None
    return F.softplus(seen.beta * (_gained(seen.pair) - _gained(seen))).mean()


def _gained(seen: Seen) -> torch.Tensor:
    """E − e_start, element by element."""
    assert seen.start is not None
    return (seen.prediction - seen.target).square() - (seen.start - seen.target).square()


def anchor(seen: Seen) -> torch.Tensor:
    """``mean (v − v_start)²``."""
    assert seen.start is not None
    return F.mse_loss(seen.prediction, seen.start)


def zero(seen: Seen) -> torch.Tensor:
    """``mean v²``."""
    return seen.prediction.square().mean()


def entropy(seen: Seen) -> torch.Tensor:
    """``mean (v − v_blind)²``."""
    assert seen.blind is not None
    return F.mse_loss(seen.prediction, seen.blind)


def blind_prediction(family: Family, batch: Batch) -> torch.Tensor:
    """v_blind [B, C, H, W]: what the best denoiser of Gaussian pictures predicts on a batch.

    Noisy latents are ``z = a x + s ε``. With x of unit variance, like ε, the expectations are
    ``x̂ = a z / (a² + s²)`` and ``ε̂ = s z / (a² + s²)``; targets are linear in both. Weighted as
    the loss is.
    """
    one, none = torch.ones_like(batch.latents), torch.zeros_like(batch.latents)
    a = family.add_noise(one, none, batch.timesteps)
    s = family.add_noise(none, one, batch.timesteps)
    z = family.add_noise(batch.latents, batch.noise, batch.timesteps) / (a.square() + s.square())
    return weighted(family, family.target(a * z, s * z, batch.timesteps), batch.timesteps)


PENALTIES: dict[UpperObjective, Callable[[Seen], torch.Tensor]] = {
    "log": log,
    "hinge": hinge,
    "pair": pair,
    "anchor": anchor,
    "zero": zero,
    "entropy": entropy,
}
"""Every objective but ``neg``, which ``UpperTerm`` is."""

READS_START: frozenset[UpperObjective] = frozenset({"hinge", "pair", "anchor"})
"""The objectives that compare with the model before immunization."""


def reads_start(upper: UpperConfig) -> bool:
    """Whether a run keeps the weights as they were before it."""
    compared = upper.benign is not None and upper.benign.target == "match"
    return upper.objective in READS_START or upper.retain == "distill" or compared
