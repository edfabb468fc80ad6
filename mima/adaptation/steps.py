"""How an adaptation moves its parameters: the optimisers, schedules of their rate, and averages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel

from mima.choices import LearningRateSchedule
from mima.errors import MimaError

Optimizer = Literal["adamw", "sgd", "muon"]

MOMENTUM = 0.9
MATRICES = (2, 4)
"""Dimensions of the parameters that Muon trains: matrices, and filters of convolutions."""
WARM_UP = 0.1
"""The share of the steps in which a cosine schedule rises to the learning rate."""


def build_optimizers(
    parameters: Sequence[torch.Tensor],
    *,
    optimizer: Optimizer,
    learning_rate: float,
    weight_decay: float,
    use_8bit: bool = False,
    tables: Sequence[torch.Tensor] = (),
) -> list[torch.optim.Optimizer]:
    """The optimisers that train parameters together: one, or two where Muon leaves some out.

    ``muon`` makes the step of each matrix orthogonal, whatever the scale of its gradient, and
    scales the step to the size of AdamW's; filters of convolutions are matrices, too, see `Muon`.
    AdamW trains the rest: biases, norms, the one vector of a new word, and, as its authors advise,
    ``tables`` of embeddings.

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
    looked_up = {id(table) for table in tables}
    matrices = [p for p in parameters if p.ndim in MATRICES and id(p) not in looked_up]
    rest = [p for p in parameters if p.ndim not in MATRICES or id(p) in looked_up]
    both = [(Muon, matrices, {"adjust_lr_fn": "match_rms_adamw"}), (kind, rest, {})]
    return [kind(part, **rates, **more) for kind, part, more in both if part]


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, which refuses filters, with filters [O, I, h, w] as matrices [O, I h w].

    So its source has them: Jordan et al., 2024, github.com/KellerJordan/Muon, ``muon_update``.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], **settings: Any) -> None:
        with _as_matrices(parameters):
            super().__init__(parameters, **settings)

    def step(self, closure: Any = None) -> Any:
        """One step along the parameters' gradients; a closure computes them, and gives the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _as_matrices([p for group in self.param_groups for p in group["params"]]):
            super().step()  # type: ignore[no-untyped-call]
        return loss


@contextmanager
def _as_matrices(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Filters and their gradients as matrices, in the same memory, while the context lasts."""
    shapes = [parameter.shape for parameter in parameters]

    def reshape(parameter: torch.Tensor, shape: Sequence[int]) -> None:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.reshape(shape)
        parameter.grad = None if gradient is None else gradient.reshape(shape)

    for parameter in parameters:
        reshape(parameter, (len(parameter), -1))
    try:
        yield
    finally:
        for parameter, shape in zip(parameters, shapes, strict=True):
            reshape(parameter, shape)


class Average:
    """The running mean of trained parameters, by diffusers' `EMAModel`.

    Its decay rises, (1 + t) / (10 + t) after t steps, to the given one in (0, 1), so that short
    trainings do not keep their start. `swap_in` puts the mean in the parameters' place; training
    goes on with the parameters themselves after `swap_out`.

    Attributes:
        swapped_in: whether the mean is in the parameters' place.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], decay: float) -> None:
        self._parameters: list[Any] = list(parameters)
        self._mean: Any = EMAModel(self._parameters, decay=decay)
        self.swapped_in = False

    def update(self) -> None:
        """Take the parameters after an optimiser step into the mean."""
        self._mean.step(self._parameters)

    def swap_in(self) -> None:
        """Put the mean in the parameters' place."""
        if not self.swapped_in:
            self._mean.store(self._parameters)
            self._mean.copy_to(self._parameters)
            self.swapped_in = True

    def swap_out(self) -> None:
        """Put the parameters back."""
        if self.swapped_in:
            self._mean.restore(self._parameters)
            self.swapped_in = False

    def own(self) -> list[torch.Tensor]:
        """The trained parameters, also while the mean is in their place."""
        return list(self._mean.temp_stored_params if self.swapped_in else self._parameters)

    def state(self) -> tuple[list[torch.Tensor], int]:
        """The mean, and how many steps are in it."""
        return list(self._mean.shadow_params), int(self._mean.optimization_step)

    def restore(self, mean: Sequence[torch.Tensor], steps: int) -> None:
        """Go on from an earlier `state`."""
        for kept, value in zip(self._mean.shadow_params, mean, strict=True):
            kept.copy_(value)
        self._mean.optimization_step = steps


def rate_factor(schedule: LearningRateSchedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in one step.

    Args:
        schedule: ``constant``, or ``cosine``: a linear rise over the first tenth of the steps, then
            half a cosine down to 0.
        step: steps done before, from 0. Beyond the end, the last step's factor stays.
        steps: steps of the whole schedule.

    Examples:
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
