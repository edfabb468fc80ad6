"""How a model is trained: the options that diffusers' training scripts have, by their names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from mima.choices import WeightingScheme
from mima.errors import MimaError, check_settings


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Noise levels, loss weighting and conditions of the training loss.

    Names and defaults are those of diffusers' DreamBooth scripts; docs/families.md says which
    family has which. None stands for the family's default.
    """

    weighting_scheme: WeightingScheme | None = None
    """Of rectified flow. ``logit_normal`` and ``mode`` say how often a noise level is drawn,
    ``sigma_sqrt`` (1/σ²) and ``cosmap`` (2 / (π (1 − 2σ + 2σ²))) what the loss at a uniformly drawn
    level counts, ``none`` draws uniformly and counts all alike."""
    logit_mean: float | None = None
    """Mean of the normal distribution whose sigmoid ``logit_normal`` draws."""
    logit_std: float | None = None
    """Its standard deviation."""
    mode_scale: float | None = None
    """Scale s of ``mode``: 1 − u − s (cos²(πu/2) − 1 + u), u uniform."""
    precondition_outputs: bool | None = None
    """Compare pictures instead of flows (EDM, section 5): the squared error counts σ²."""
    snr_gamma: float | None = None
    """Of DDPM: the loss at a noise level counts min(SNR, γ) / SNR, for v-prediction
    min(SNR, γ) / (SNR + 1) (Min-SNR, Hang et al. 2023)."""
    max_sequence_length: int | None = None
    """Tokens of the longest text stream (T5 or a language model) that training reads; sampling
    reads as many as the pipeline does by default."""
    guidance_scale: float | None = None
    """What a guidance-distilled model is told in training."""
    picture_sizes: bool | None = None
    """SDXL's time ids: each picture's own size and crop; False: uncropped pictures of the size
    that is trained on, as the pipeline's call has it."""

    def __post_init__(self) -> None:
        schemes, length = get_args(WeightingScheme), self.max_sequence_length
        numbers = ("logit_mean", "mode_scale", "guidance_scale")
        check_settings(
            self,
            {
                "weighting_scheme": (
                    self.weighting_scheme in (None, *schemes),
                    f"one of {', '.join(schemes)}",
                ),
                **{name: (_finite(getattr(self, name)), "finite") for name in numbers},
                "logit_std": (_above_zero(self.logit_std), "above 0 and finite"),
                "snr_gamma": (_above_zero(self.snr_gamma), "above 0 and finite"),
                "max_sequence_length": (length is None or length >= 1, "at least 1"),
            },
        )

    def over(self, defaults: Mapping[str, Any], family: str) -> TrainingOptions:
        """These options, with the defaults of those that a family reads where they say nothing.

        Raises:
            MimaError: an option is set that the family does not read.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        unread = [n for n, value in given.items() if value is not None and n not in defaults]
        if unread:
            read = f"its options are {', '.join(defaults)}" if defaults else "it has no options"
            raise MimaError(f"training: {family} has no {unread[0]}; {read}")
        return replace(self, **{n: v for n, v in defaults.items() if given[n] is None})


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _above_zero(value: float | None) -> bool:
    return value is None or 0 < value < math.inf
