"""One training loop for every adaptation method: what an attacker does, and what an owner does."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from mima.adaptation.steps import Average, Optimizer, build_optimizers, rate_factor
from mima.choices import LARGEST_SEED, MOST, MOST_AT_ONCE, LearningRateSchedule
from mima.concepts import Concept, Picture
from mima.errors import MimaError, bounded, check_settings
from mima.families import Conditioning, Family, TrainingOptions, family_of
from mima.families.frozen import cast
from mima.families.pipelines import Pipeline, networks, readers, with_modules
from mima.storage.checkpoint import Checkpoint
from mima.storage.inputs import expanded
from mima.storage.tensor_files import order_metadata
from mima.training.batches import Batch, Encoded, encode_images, losses, seeded
from mima.training.class_images import ClassPictures

MOST_RATE = 1e30
"""Of learning rates: AdamW's first step, ten times as large, is to be a number of float32."""


class Diverged(MimaError):  # noqa: N818 - reads as what happened; MimaError says it is an error
    """The training loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Adaptation(ABC):
    """Settings that every method shares; a subclass is one method with its own defaults.

    Examples:
        >>> run = LoRA(rank=4, steps=500).start(pipeline, concept)
        >>> for step in run.until(100, 200, 500):
        ...     run.pipeline("a photo of a cat").images[0].save(f"{step}.png")
        >>> run.save("my-lora")
    """

    method: ClassVar[str]

    steps: int = 500
    """Optimiser steps of a whole adaptation."""
    learning_rate: float = 1e-4
    """Learning rate of the optimiser, at its highest."""
    optimizer: Optimizer = "adamw"
    """``adamw``; ``sgd``, with momentum 0.9, which wants rates some hundred times as high; or
    ``muon``, which does not depend on the scale of gradients: see `mima.adaptation.steps`."""
    schedule: LearningRateSchedule = "constant"
    """Of the learning rate: ``constant``, or ``cosine``, with a warm-up, over `steps`."""
    restart_every: int | None = None
    """After each so many steps the optimiser and the schedule begin anew, as those of a training
    that goes on from saved weights; None never does."""
    ema_decay: float | None = None
    """Sample and save the exponential moving average of what is trained, with this decay at most,
    instead of the last weights; None averages nothing."""
    resolution: int | None = None
    """Side in pixels that the pictures are scaled and cropped to; by default what the model was
    trained on."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """Noise levels, loss weighting and conditions; by default as diffusers' scripts have them for
    the model's family."""
    batch_size: int = 1
    """Pictures of the concept per step; prior preservation adds as many of its class."""
    weight_decay: float = 1e-2
    """Weight decay; that of AdamW and Muon is decoupled."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; None does not clip."""
    prior_weight: float = 0.0
    """Weight of the loss on class pictures; 0 leaves prior preservation out."""
    num_class_images: int = 100
    """Class pictures that the model draws of `concept.class_prompt` where the concept brings none,
    in an evaluation the original for both models; they are kept for the next run (see
    `mima.training.class_images`)."""
    gradient_accumulation_steps: int = 1
    """Batches per step, one after another; the step follows the mean of their gradients."""
    gradient_checkpointing: bool = False
    """Trade time for memory by recomputing activations."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits, by bitsandbytes, which must be installed."""
    offload_encoders: bool = False
    """While training goes on, VAE and frozen text encoders wait in the CPU's memory. They are the
    given pipeline's own; between `Run.advance`s they are back where they were."""
    fp16_vae: bool = False
    """Encode the pictures with a VAE in float16. One that overflows there (`force_upcast` in its
    configuration, as SDXL's) computes in float32 all the same. Sampling is not concerned."""
    seed: int = 0
    """Of initial values, batches, noise and timesteps."""

    def __post_init__(self) -> None:
        check_settings(self, dict(self._whole_numbers()))
        optimizers, schedules = get_args(Optimizer), get_args(LearningRateSchedule)
        checks = {
            "optimizer": (self.optimizer in optimizers, f"one of {', '.join(optimizers)}"),
            "schedule": (self.schedule in schedules, f"one of {', '.join(schedules)}"),
            "steps": bounded(self.steps, 1, MOST),
            "learning_rate": (0 < self.learning_rate <= MOST_RATE, f"above 0, at most {MOST_RATE}"),
            "resolution": (self.resolution is None or self.resolution >= 1, "at least 1"),
            "batch_size": bounded(self.batch_size, 1, MOST_AT_ONCE),
            "seed": bounded(self.seed, 0, LARGEST_SEED),
            "num_class_images": (self.num_class_images >= 1, "at least 1"),
            "gradient_accumulation_steps": bounded(self.gradient_accumulation_steps, 1, MOST),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            "max_grad_norm": (self.max_grad_norm is None or self.max_grad_norm > 0, "above 0"),
            "prior_weight": (0 <= self.prior_weight < math.inf, "at least 0 and finite"),
            "restart_every": (self.restart_every is None or self.restart_every >= 1, "at least 1"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1)"),
            "use_8bit_adam": (
                not self.use_8bit_adam or self.optimizer == "adamw",
                "left out with another optimizer than adamw",
            ),
        }
        check_settings(self, checks)

    def _whole_numbers(self) -> Iterator[tuple[str, tuple[bool, str]]]:
        """A check of each setting that is declared as a whole number."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type == "int" or (setting.type == "int | None" and value is not None):
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                yield setting.name, (whole, "a whole number")

    @abstractmethod
    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Put the method's trainable parameters into a pipeline that shares what stays frozen.

        Both have passed `check`.
        """

    def has_class(self, concept: Concept) -> bool:
        """Whether a concept has the class that the method preserves, if it preserves one."""
        return self.prior_weight == 0 or bool(concept.class_images or concept.class_prompt)

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse what the method does not fit, as `start` does, before anything is made.

        Raises:
            MimaError: the concept or the pipeline does not fit the method.
        """
        if not self.has_class(concept):
            raise MimaError(
                f"concept {concept.name!r}: prior preservation needs class_images, or a "
                "class_prompt to draw them by; it has neither"
            )

    def start(
        self, pipeline: Pipeline, concept: Concept, *, class_pictures_by: Pipeline | None = None
    ) -> Run:
        """Prepare everything and train nothing yet.

        Args:
            pipeline: a diffusers pipeline, which stays as it is.
            concept: `images` are learned; `class_images`, or pictures that the model draws of
                `class_prompt`, are preserved if `prior_weight` > 0.
            class_pictures_by: another model with the same latents that draws these; by default
                `pipeline`.

        Raises:
            MimaError: the concept or the pipeline does not fit the method.
        """
        return Run(self, pipeline, concept, class_pictures_by=class_pictures_by)

    def adapt(
        self, pipeline: Pipeline, concept: Concept, *, on_step: Callable[[Run], None] | None = None
    ) -> Run:
        """Train all `steps`; arguments as for `start`, `on_step` as for `Run.advance`."""
        run = self.start(pipeline, concept)
        run.advance(self.steps, on_step=on_step)
        return run


@dataclass(frozen=True, kw_only=True)
class Injection:
    """A pipeline made ready for training by one method."""

    pipeline: Pipeline
    """A pipeline of the run's own; only trained modules differ from the caller's."""
    parameters: Sequence[torch.Tensor]
    """What the optimiser trains, in float32."""
    save: Callable[[Path], None]
    """Write the trained part to a folder, in the format that diffusers reads."""
    tables: Sequence[torch.Tensor] = ()
    """Among the parameters, tables whose rows are looked up: to Muon no matrices."""
    encode_prompts: Callable[[Family, Sequence[str]], Conditioning] | None = None
    """Text encoding with a graph, for methods that train what reads text; None if that is
    frozen."""
    before_step: Callable[[int], None] = lambda done: None
    """Called before each optimiser step, with the number of steps done; it may set gradients to
    None, and the step leaves their parameters as they are."""
    after_step: Callable[[], None] = lambda: None
    """Called after each optimiser step."""


encode_with_graph = partial(Family.encode_prompts, differentiable=True)
"""Encodes a family's prompts with a graph into the text encoders."""


def require_full_precision(pipeline: Pipeline, method: str) -> None:
    """Refuse half-precision weights to methods that train them: small updates would be lost.

    Raises:
        MimaError: the denoiser or the text encoder is not in float32 or float64.
    """
    parts = {"denoiser": family_of(pipeline).denoiser}
    parts |= {f"text encoder{reader.number}": reader.encoder for reader in readers(pipeline)}
    for name, module in parts.items():
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

    def __init__(
        self,
        adaptation: Adaptation,
        pipeline: Pipeline,
        concept: Concept,
        *,
        class_pictures_by: Pipeline | None = None,
    ) -> None:
        adaptation.check(pipeline, concept)
        sized = partial(family_of, resolution=adaptation.resolution, training=adaptation.training)
        # what draws class pictures is not adapted, so that every method finds the same
        drawer = sized(pipeline if class_pictures_by is None else class_pictures_by)
        injection = adaptation.inject(pipeline, concept)
        self.adaptation = adaptation
        self.concept = concept
        self.pipeline = injection.pipeline
        self.step = 0
        self.losses: list[float] = []
        self._injection = injection
        self._family = sized(injection.pipeline)
        # made before pictures are encoded, which takes long: bitsandbytes may be missing
        self._optimizers = self._new_optimizers()
        self._average: Average | None = None
        if adaptation.ema_decay is not None:
            self._average = Average(injection.parameters, adaptation.ema_decay)
        if adaptation.gradient_checkpointing:
            self._family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self._generator = torch.Generator().manual_seed(adaptation.seed)
        encoder = self._family
        if adaptation.fp16_vae:
            vae = copy.deepcopy(self.pipeline.vae)
            cast(vae, torch.float16)
            encoder = sized(with_modules(self.pipeline, vae=vae))

        def shuffled(pictures: Sequence[Picture]) -> _Shuffled:
            prompts = [picture.prompt for picture in pictures]
            encoded = Encoded.of(self._family, encode_images(encoder, pictures), prompts, pictures)
            return _Shuffled(encoded, list(dict.fromkeys(prompts)))

        self._images = shuffled(concept.images)
        self._class_images: _Shuffled | None = None
        if adaptation.prior_weight > 0 and concept.class_images:
            self._class_images = shuffled(concept.class_images)
        elif adaptation.prior_weight > 0:
            prompts = [concept.class_prompt] * adaptation.num_class_images
            generator = seeded(adaptation.seed, "class images")
            latents = ClassPictures(drawer).latents(prompts, generator)
            encoded = Encoded.of(self._family, latents, prompts)
            self._class_images = _Shuffled(encoded, [concept.class_prompt])
        self._scaler = torch.amp.GradScaler(
            self._family.device.type, enabled=self._family.dtype == torch.float16
        )

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.adaptation
        return build_optimizers(
            self._injection.parameters,
            tables=self._injection.tables,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            use_8bit=settings.use_8bit_adam,
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
            Diverged: the loss is no longer finite.
        """
        with self._prepared(), training(self._family):
            for _ in range(steps):
                with self._own_draws():
                    self._one_step()
                if on_step is not None:
                    on_step(self)

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
        """Write what was trained to `folder`, in the format that diffusers reads.

        Raises:
            Diverged: the last step left numbers that are not finite.
        """
        if not all(bool(weight.isfinite().all()) for weight in self._injection.parameters):
            settings = self.adaptation
            raise Diverged(
                f"{settings.method}: step {self.step} left numbers that are not finite; "
                f"lower learning_rate ({settings.learning_rate})"
            )
        folder = expanded(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # what else lies in the folder stays as it is
        with tempfile.TemporaryDirectory(prefix=".mima-", dir=folder) as made:
            scratch = Path(made)
            self._injection.save(scratch)
            for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
                if file.suffix == ".safetensors":
                    order_metadata(file)
                place = folder / file.relative_to(scratch)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        return folder

    def checkpoint(self) -> Checkpoint:
        """Where the run stands after its last step: parameters, optimiser and draws to come."""
        own = self._injection.parameters if self._average is None else self._average.own()
        tensors: dict[str, torch.Tensor] = {f"parameter.{n}": p for n, p in enumerate(own)}
        tensors["generator"] = self._generator.get_state()
        # bitsandbytes keeps numbers beside its tensors
        numbers: dict[str, Any] = {}
        first = 0
        for optimizer in self._optimizers:
            kept = optimizer.state_dict()
            for n, values in kept["state"].items():
                for key, value in values.items():
                    kind: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else numbers
                    kind[f"optimizer.{first + n}.{key}"] = value
            first += _num_parameters(kept)
        state = {
            "losses": self.losses,
            "queues": [one.queue for one in self._shuffled()],
            "scaler": self._scaler.state_dict(),
            "numbers": numbers,
        }
        if self._average is not None:
            mean, state["averaged"] = self._average.state()
            tensors |= {f"average.{n}": value for n, value in enumerate(mean)}
        return Checkpoint(self.step, tensors, state)

    @torch.no_grad()
    def restore(self, kept: Checkpoint) -> None:
        """Go on from a checkpoint of a run with the same settings, concept and model."""
        parameters = self._injection.parameters
        if self._average is not None:
            self._average.swap_out()
            mean = [kept.tensors[f"average.{n}"] for n in range(len(parameters))]
            self._average.restore(mean, kept.state["averaged"])
        for n, parameter in enumerate(parameters):
            parameter.copy_(kept.tensors[f"parameter.{n}"])
        if self._average is not None:
            self._average.swap_in()
        self._injection.after_step()
        self._generator.set_state(kept.tensors["generator"])
        moments: dict[int, dict[str, Any]] = {}
        for name, value in (kept.tensors | kept.state["numbers"]).items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                n, _, key = rest.partition(".")
                moments.setdefault(int(n), {})[key] = value
        first = 0
        for optimizer in self._optimizers:
            fresh = optimizer.state_dict()
            count = _num_parameters(fresh)
            mine = {n: moments[first + n] for n in range(count) if first + n in moments}
            optimizer.load_state_dict({"state": mine, "param_groups": fresh["param_groups"]})
            first += count
        if kept.state["scaler"]:
            self._scaler.load_state_dict(kept.state["scaler"])
        for one, queue in zip(self._shuffled(), kept.state["queues"], strict=True):
            one.queue = list(queue)
        self.step, self.losses = kept.step, list(kept.state["losses"])

    def _shuffled(self) -> list[_Shuffled]:
        return [one for one in (self._images, self._class_images) if one is not None]

    def _one_step(self) -> None:
        count = self.adaptation.gradient_accumulation_steps
        total = 0.0
        for _ in range(count):
            with autocast(self._family):
                parts = [
                    weight * losses(self._family, [batch])[0] for weight, batch in self._batches()
                ]
            loss = torch.stack(parts).sum() / count
            self._scaler.scale(loss).backward()
            total += loss.item()
        self._update(total)

    def _batches(self) -> Iterator[tuple[float, Batch]]:
        """The batches of one backward, each with its weight: the concept's, then its class's."""
        yield 1.0, self._draw(self._images)
        if self._class_images is not None:
            yield self.adaptation.prior_weight, self._draw(self._class_images)

    def _draw(self, pictures: _Shuffled) -> Batch:
        chosen = pictures.draw(self.adaptation.batch_size, self._generator)
        # drawn on the CPU, so that a seed means the same on every device
        noise = torch.randn(chosen.latents.shape, generator=self._generator)
        timesteps = self._family.sample_timesteps(len(chosen), self._generator)
        batch = Batch.of(self._family, chosen, timesteps, noise)
        if self._injection.encode_prompts is None:
            return batch
        texts = [pictures.texts[row] for row in batch.prompt]
        conditioning = self._injection.encode_prompts(self._family, texts)
        return replace(batch, conditioning={**batch.conditioning, **conditioning})

    def _update(self, loss: float) -> None:
        """One step of the optimiser along the gradients that have been accumulated."""
        settings = self.adaptation
        period = settings.restart_every or settings.steps
        if settings.restart_every is not None and self.step and self.step % period == 0:
            self._optimizers = self._new_optimizers()
        self._injection.before_step(self.step)
        done = self.step % period if settings.restart_every is not None else self.step
        rate = settings.learning_rate * rate_factor(settings.schedule, done, period)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            self._scaler.unscale_(optimizer)
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._injection.parameters, settings.max_grad_norm)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update()
        self._injection.after_step()
        self.step += 1
        self.losses.append(loss)
        if not math.isfinite(loss) and self.step == 1:
            # the loss is that of the weights before the step
            raise Diverged(
                f"{settings.method}: the loss is {loss} before any step: the model's weights are "
                "not finite, or overflow"
            )
        if not math.isfinite(loss):
            raise Diverged(
                f"{settings.method}: the loss is {loss} at step {self.step}; "
                f"lower learning_rate ({settings.learning_rate})"
            )

    @contextlib.contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Let dropout, which draws from torch's own state, draw by the run's seed and step."""
        device = self._family.device
        seed = seeded(self.adaptation.seed, "dropout", self.step).initial_seed()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # torch.manual_seed keeps a stack for CUDA, whose formatting costs more than small steps
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """For training: the parameters in place of their average, and the encoders offloaded."""
        with self._offloaded():
            if self._average is None:
                yield
                return
            self._average.swap_out()
            try:
                yield
            finally:
                self._average.swap_in()
                self._injection.after_step()

    @contextlib.contextmanager
    def _offloaded(self) -> Iterator[None]:
        """With the encoders on the CPU, if the settings say so."""
        waiting: list[tuple[torch.nn.Module, torch.device]] = []
        if self.adaptation.offload_encoders:
            text_is_trained = self._injection.encode_prompts is not None
            idle = ("vae",) if text_is_trained else ("vae", "text_encoder")
            parts = networks(self.pipeline).items()
            waiting = [(m, next(m.parameters()).device) for n, m in parts if n.startswith(idle)]
        try:
            for module, _ in waiting:
                module.to("cpu")
            yield
        finally:
            for module, device in waiting:
                module.to(device)


def _num_parameters(state: dict[str, Any]) -> int:
    """How many parameters an optimiser trains, by its state."""
    return sum(len(group["params"]) for group in state["param_groups"])


@contextlib.contextmanager
def training(family: Family) -> Iterator[None]:
    """The denoiser in training mode."""
    family.denoiser.train()
    try:
        yield
    finally:
        family.denoiser.eval()


def autocast(family: Family) -> contextlib.AbstractContextManager[None]:
    """In the model's own dtype where that is half precision; adapters stay in float32."""
    if family.dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(family.device.type, family.dtype)
    return contextlib.nullcontext()


@dataclass
class _Shuffled:
    """Encoded pictures in an endless shuffle: every picture comes once per round.

    Attributes:
        pictures: P of them.
        texts: their distinct prompts, in the order of ``pictures.prompts``.
        queue: the indices that come next.
    """

    pictures: Encoded
    texts: list[str]
    queue: list[int] = field(default_factory=list)

    def draw(self, batch_size: int, generator: torch.Generator) -> Encoded:
        while len(self.queue) < batch_size:
            self.queue += torch.randperm(len(self.pictures), generator=generator).tolist()
        chosen, self.queue = self.queue[:batch_size], self.queue[batch_size:]
        return self.pictures.rows(torch.tensor(chosen))
