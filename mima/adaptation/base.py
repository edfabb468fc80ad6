"""One training loop for every adaptation method: what an attacker does, and what an owner does."""

# B = batch, C H W = latent channels and size

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mima.batches import encode_images
from mima.concepts import Concept
from mima.diffusion import diffusion_loss
from mima.errors import MimaError
from mima.families import Conditioning, Family, family_of
from mima.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Adaptation(ABC):
    """Settings that every method shares; a subclass is one method with its own defaults.

    Example:
        >>> run = LoRA(rank=4, steps=500).start(pipeline, concept)
        >>> for step in run.until(100, 200, 500):
        ...     run.pipeline("a photo of a cat").images[0].save(f"{step}.png")
        >>> run.save("my-lora")
    """

    method: ClassVar[str]

    steps: int = 500
    """Optimiser steps of a whole adaptation."""
    learning_rate: float = 1e-4
    """Constant learning rate of AdamW."""
    batch_size: int = 1
    """Pictures of the concept per step; prior preservation adds as many of its class."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None does not clip."""
    prior_weight: float = 0.0
    """Weight of the loss on class pictures; 0 leaves prior preservation out."""
    gradient_checkpointing: bool = False
    """Trade time for memory by recomputing activations."""
    seed: int = 0
    """Of initial values, batches, noise and timesteps."""

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "max_grad_norm": (self.max_grad_norm is None or self.max_grad_norm > 0, "above 0"),
            "prior_weight": (self.prior_weight >= 0, "at least 0"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                value = getattr(self, name)
                raise ValueError(f"{type(self).__name__}: {name} must be {wanted}, got {value}")

    @abstractmethod
    def inject(self, pipeline: Any, concept: Concept) -> Injection:
        """Put the method's trainable parameters into a pipeline that shares what stays frozen."""

    def start(self, pipeline: Any, concept: Concept) -> Run:
        """Prepare everything and train nothing yet.

        Args:
            pipeline: a diffusers pipeline, which stays as it is.
            concept: `images` are learned, `class_images` preserved if `prior_weight` > 0.

        Raises:
            MimaError: the concept or the pipeline does not fit the method.
        """
        return Run(self, pipeline, concept)

    def adapt(
        self, pipeline: Any, concept: Concept, *, on_step: Callable[[Run], None] | None = None
    ) -> Run:
        """Train all `steps`; arguments as for `start`, `on_step` as for `Run.advance`."""
        run = self.start(pipeline, concept)
        run.advance(self.steps, on_step=on_step)
        return run


@dataclass(frozen=True, kw_only=True)
class Injection:
    """A pipeline made ready for training by one method."""

    pipeline: Any
    """A pipeline of the run's own; only trained modules differ from the caller's."""
    parameters: Sequence[torch.nn.Parameter]
    """What the optimiser trains, in float32."""
    save: Callable[[Path], None]
    """Write the trained part to a folder, in the format that diffusers reads."""
    encode_prompts: Callable[[Family, Sequence[str]], Conditioning] | None = None
    """Text encoding with a graph, for methods that train tokens; None if text is frozen."""
    after_step: Callable[[], None] | None = None
    """Called after each optimiser step."""


def require_full_precision(pipeline: Any, method: str) -> None:
    """Refuse half-precision weights to methods that train them: small updates would be lost.

    Raises:
        MimaError: the denoiser or the text encoder is not in float32 or float64.
    """
    for name, module in (
        ("denoiser", family_of(pipeline).denoiser),
        ("text encoder", pipeline.text_encoder),
    ):
        dtype = next(module.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            raise MimaError(
                f"{method}: load the model in float32 to train its weights; "
                f"the {name} is in {str(dtype).removeprefix('torch.')}"
            )


class Run:
    """An adaptation under way: train some steps, look, train on, stop whenever you like.

    Attributes:
        adaptation: the method and its settings.
        concept: what is learned.
        pipeline: the adapted pipeline; sample from it at any time.
        step: optimiser steps done.
        losses: the loss at each step done.
    """

    def __init__(self, adaptation: Adaptation, pipeline: Any, concept: Concept) -> None:
        if adaptation.prior_weight > 0 and not concept.class_images:
            raise MimaError(
                f"concept {concept.name!r}: prior preservation needs class_images, it has none"
            )
        injection = adaptation.inject(pipeline, concept)
        self.adaptation = adaptation
        self.concept = concept
        self.pipeline = injection.pipeline
        self.step = 0
        self.losses: list[float] = []
        self._injection = injection
        self._family = family_of(injection.pipeline)
        if adaptation.gradient_checkpointing:
            self._family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self._generator = torch.Generator().manual_seed(adaptation.seed)
        stream = (self._family, self._generator, injection.encode_prompts)
        self._images = _Stream(concept.images, *stream)
        self._class_images = (
            _Stream(concept.class_images, *stream) if adaptation.prior_weight > 0 else None
        )
        self._optimizer = torch.optim.AdamW(
            injection.parameters,
            lr=adaptation.learning_rate,
            weight_decay=adaptation.weight_decay,
        )
        half = self._family.dtype in (torch.float16, torch.bfloat16)
        self._autocast = (
            torch.autocast(self._family.device.type, self._family.dtype)
            if half
            else contextlib.nullcontext()
        )
        self._scaler = torch.amp.GradScaler(
            self._family.device.type, enabled=self._family.dtype == torch.float16
        )

    @property
    def loss(self) -> float:
        """The loss of the last step.

        Raises:
            ValueError: no step has been done.
        """
        if not self.losses:
            raise ValueError("Run.loss: no step has been done yet")
        return self.losses[-1]

    def advance(self, steps: int, *, on_step: Callable[[Run], None] | None = None) -> None:
        """Train some more steps.

        Args:
            steps: how many.
            on_step: called after each step; an exception that it raises ends the training.

        Raises:
            MimaError: the loss is no longer finite.
        """
        denoiser = self._family.denoiser
        denoiser.train()
        try:
            for _ in range(steps):
                self._one_step()
                if on_step is not None:
                    on_step(self)
        finally:
            denoiser.eval()

    def until(self, *steps: int, on_step: Callable[[Run], None] | None = None) -> Iterator[int]:
        """Train up to each of `steps`, ascending, and yield it; leave the loop to end early.

        Raises:
            ValueError: a step that has been passed already.
        """
        for step in steps:
            if step < self.step:
                raise ValueError(f"Run.until: steps must ascend from {self.step}, got {steps}")
            self.advance(step - self.step, on_step=on_step)
            yield step

    def save(self, folder: str | Path) -> Path:
        """Write what was trained to `folder`, in the format that diffusers reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._injection.save(folder)
        return folder

    def _one_step(self) -> None:
        settings = self.adaptation
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            loss = self._loss(self._images)
            if self._class_images is not None:
                loss = loss + settings.prior_weight * self._loss(self._class_images)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._injection.parameters, settings.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._injection.after_step is not None:
            self._injection.after_step()
        self.step += 1
        self.losses.append(loss.item())
        if not torch.isfinite(loss):
            raise MimaError(
                f"{settings.method}: the loss is {loss.item()} at step {self.step}; "
                f"lower learning_rate ({settings.learning_rate})"
            )

    def _loss(self, stream: _Stream) -> torch.Tensor:
        latents, conditioning = stream.draw(self.adaptation.batch_size)
        # drawn on the CPU, so that a seed means the same on every device
        noise = torch.randn(latents.shape, generator=self._generator).to(latents)
        timesteps = self._family.sample_timesteps(len(latents), self._generator)
        return diffusion_loss(self._family, latents, conditioning, timesteps, noise)


class _Stream:
    """An endless shuffle of pictures, encoded once."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        family: Family,
        generator: torch.Generator,
        encode_prompts: Callable[[Family, Sequence[str]], Conditioning] | None,
    ) -> None:
        self._latents = encode_images(family, pictures)
        self._family = family
        self._generator = generator
        self._prompts = [picture.prompt for picture in pictures]
        self._encode_prompts = encode_prompts
        unique = list(dict.fromkeys(self._prompts))
        self._rows = torch.tensor([unique.index(prompt) for prompt in self._prompts])
        self._text = {} if encode_prompts is not None else family.encode_prompts(unique)
        self._queue: list[int] = []

    def draw(self, batch_size: int) -> tuple[torch.Tensor, Conditioning]:
        """Latents [B, C, H, W] and their conditioning; every picture comes once per round."""
        while len(self._queue) < batch_size:
            self._queue += torch.randperm(len(self._prompts), generator=self._generator).tolist()
        chosen, self._queue = self._queue[:batch_size], self._queue[batch_size:]
        if self._encode_prompts is not None:
            prompts = [self._prompts[index] for index in chosen]
            conditioning = self._encode_prompts(self._family, prompts)
        else:
            rows = self._rows[chosen]
            conditioning = {name: value[rows] for name, value in self._text.items()}
        return self._latents[chosen], conditioning
