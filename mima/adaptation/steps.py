"""How an adaptation moves its parameters: the optimisers and the schedules of their rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from mima.errors import MimaError

Optimizer = Literal["adamw", "sgd", "muon"]
Schedule = Literal["constant", "cosine"]

MOMENTUM = 0.9
WARM_UP = 0.1
"""The share of the steps in which a cosine schedule rises to the learning rate."""


def build_optimizers(
    parameters: Sequence[torch.Tensor],
    *,
    optimizer: Optimizer,
    learning_rate: float,
    weight_decay: float,
    use_8bit: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimisers that train parameters together: one, or two where Muon leaves some out.

    ``muon`` (`torch.optim.Muon`) makes the step of each matrix orthogonal, whatever the scale of
    its gradient, and scales the step to the size of AdamW's; AdamW trains what is no matrix.

    Raises:
        MimaError: 8 bits were asked for and bitsandbytes cannot be imported.
    """
    rates: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if optimizer == "sgd":
        return [torch.optim.SGD(parameters, momentum=MOMENTUM, **rates)]
    kind: Any = torch.optim.AdamW
    if use_8bit:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MimaError(
                "use_8bit_adam: needs bitsandbytes, which cannot be imported "
                f"({error}); pip install bitsandbytes, or leave the setting out"
            ) from error
        kind = AdamW8bit
    if optimizer == "adamw":
        return [kind(parameters, **rates)]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    rest = [parameter for parameter in parameters if parameter.ndim != 2]
    both = [(torch.optim.Muon, matrices, {"adjust_lr_fn": "match_rms_adamw"}), (kind, rest, {})]
    return [kind(part, **rates, **more) for kind, part, more in both if part]


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in one step.

    Args:
        schedule: ``constant``, or ``cosine``: a linear rise over the first tenth of the steps, then
            half a cosine down to 0.
        step: steps done before, from 0. Beyond the end, the last step's factor stays.
        steps: steps of the whole schedule.

    Example:
        >>> [round(rate_factor("cosine", step, 20), 2) for step in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    if schedule == "constant":
        return 1.0
    step = min(step, steps - 1)
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
