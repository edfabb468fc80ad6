"""Sampling for measurement: batched over prompts, seeds and adapters, noise fixed by the seed."""

# P = prompts, R = seeds per prompt

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from PIL import Image

from mima.adapters.adapter import Adapter
from mima.adapters.mixed_batch import with_adapters
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import Pipeline


@dataclass(frozen=True)
class Job:
    """One picture to draw.

    Attributes:
        prompt: what is asked for.
        seed: of its noise.
        adapter: place among the adapters given, −1 for none.
    """

    prompt: str
    seed: int
    adapter: int = -1


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How pictures are drawn from a pipeline when models are compared.

    A picture depends on its prompt and seed only, not on what else is in the batch: it is what
    `pipeline(prompt, generator=torch.Generator().manual_seed(seed))` gives, up to rounding.

    Examples:
        >>> rows = Sampler(steps=20)(pipeline, ["a cat", "a dog"], seeds=(0, 1, 2))
        >>> rows[1][2]  # "a dog", seed 2
    """

    steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale; 1 turns guidance off and halves the work. None is the pipeline's own."""
    batch_size: int = 8
    """Pictures per forward pass, before guidance doubles them."""
    negative_prompt: str = ""
    """What guidance leads away from; the empty one is what the pipeline uses by default."""
    scheduler: str = "own"
    """`"own"` keeps the pipeline's scheduler; `"dpm++"` is DPM-Solver++ 2M, good in 10–15 steps."""
    size: int | None = None
    """Side of the square pictures in pixels; None is the model's own."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MimaError(f"Sampler: {name} must be at least 1, got {getattr(self, name)}")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise MimaError(f"Sampler: guidance must be at least 0 and finite, got {self.guidance}")
        if self.scheduler not in ("own", "dpm++"):
            raise MimaError(f"Sampler: scheduler must be own or dpm++, got {self.scheduler!r}")

    def __call__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        progress: Callable[[int, int], None] | None = None,
        broken: list[int] | None = None,
    ) -> list[list[Image.Image]]:
        """Draw one picture for each prompt and seed.

        Args:
            pipeline: a diffusers text-to-image pipeline; it is left as it was.
            prompts: P texts.
            seeds: R seeds; every prompt uses the same ones.
            progress: called with the number of pictures done and the number of all.
            broken: as for `draw`, places counted through the rows.

        Returns:
            P rows of R pictures.

        Raises:
            MimaError: the model's scheduler has fewer steps, or fits no other.
            ValueError: no prompts or no seeds.
        """
        if not prompts or not seeds:
            raise ValueError(
                f"Sampler: needs prompts and seeds, got {len(prompts)} and {len(seeds)}"
            )
        jobs = [Job(prompt, seed) for prompt in prompts for seed in seeds]
        pictures: list[Image.Image] = []
        for image in self.draw(pipeline, jobs, broken=broken):
            pictures.append(image)
            if progress is not None:
                progress(len(pictures), len(jobs))
        width = len(seeds)
        return [pictures[row * width : (row + 1) * width] for row in range(len(prompts))]

    def draw(
        self,
        pipeline: Pipeline,
        jobs: Sequence[Job],
        adapters: Sequence[Adapter] = (),
        *,
        broken: list[int] | None = None,
    ) -> Iterator[Image.Image]:
        """Draw pictures in the order of their jobs, each as soon as its batch is done.

        One batch may hold several prompts, seeds and adapters; a picture does not depend on what
        else is in it, up to rounding.

        Args:
            pipeline: a diffusers text-to-image pipeline; it is left as it was.
            jobs: what to draw.
            adapters: LoRAs of this pipeline's denoiser, by the jobs' `adapter`.
            broken: takes the places of jobs whose pictures are no finite numbers, and so black.

        Raises:
            MimaError: the model's scheduler has fewer steps, or fits no other.
            ValueError: a job whose adapter is not there.
        """
        wrong = [job for job in jobs if not -1 <= job.adapter < len(adapters)]
        if wrong:
            raise ValueError(f"Sampler: {wrong[0]} names none of {len(adapters)} adapters")
        rows = None
        if adapters:
            pipeline, rows = with_adapters(pipeline, adapters)
        drawer = self._drawer(pipeline)
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            if rows is not None:
                rows.choose(job.adapter for job in batch)
            pixels = self._draw(drawer, batch)
            finite = np.isfinite(pixels)
            if broken is not None:
                whole = finite.all(axis=(1, 2, 3))
                broken += [start + place for place in np.flatnonzero(~whole).tolist()]
            # what a cast to bytes makes of other numbers is undefined
            shown = np.where(finite, pixels, np.float32(0))
            images: list[Image.Image] = drawer.image_processor.numpy_to_pil(shown)
            yield from images

    def _drawer(self, pipeline: Pipeline) -> Any:
        """The same modules in a pipeline of its own, without progress bar and safety checker."""
        drawer: Any = copy.copy(pipeline)
        drawer.set_progress_bar_config(disable=True)
        if self.scheduler == "own":
            drawer.scheduler = copy.deepcopy(pipeline.scheduler)
        else:
            config = pipeline.scheduler.config
            if "beta_schedule" not in config:
                name = type(pipeline.scheduler).__name__
                raise MimaError(f"Sampler: dpm++ does not fit a {name}; use scheduler='own'")
            drawer.scheduler = DPMSolverMultistepScheduler.from_config(
                config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
            )
        config = drawer.scheduler.config
        # rectified flow has a noise level for every number of steps
        if "beta_schedule" in config and self.steps > config["num_train_timesteps"]:
            raise MimaError(
                f"Sampler: steps must be at most {config['num_train_timesteps']}, the noise levels "
                f"of this model's scheduler, got {self.steps}"
            )
        solver = isinstance(drawer.scheduler, DPMSolverMultistepScheduler)
        if self.steps == 1 and solver and isinstance(drawer, PixArtAlphaPipeline):
            # of one step the pipeline takes the clean picture, which this scheduler does not give
            raise MimaError(
                "Sampler: steps must be at least 2 for a PixArtAlphaPipeline with a "
                "DPMSolverMultistepScheduler, got 1"
            )
        if getattr(drawer, "safety_checker", None) is not None:
            # the checker paints pictures black, which would void every comparison
            drawer.register_to_config(requires_safety_checker=False)
            drawer.safety_checker = None
        return drawer

    def _draw(self, drawer: Any, jobs: Sequence[Job]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[B, H, W, 3] in [0, 1], as the pipeline makes pictures of."""
        family = family_of(drawer, resolution=self.size)
        result = drawer(
            prompt=[job.prompt for job in jobs],
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            num_inference_steps=self.steps,
            output_type="np",
            **family.sampling_options(len(jobs), self.guidance, self.negative_prompt),
        )
        pixels: np.ndarray[Any, np.dtype[np.float32]] = result.images
        return pixels
