"""What a run says about each step, and who listens: a progress bar, a file, trackers."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from mima.errors import MimaError
from mima.storage.plain_data import flat

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]
    from rich.console import Console

PRIOR = " (prior)"
"""Ends the name of an upper term that keeps the model useful."""


@dataclass(frozen=True)
class StepReport:
    """One outer step.

    Attributes:
        step: steps done, from 1.
        steps: steps in all.
        losses: loss of each upper term at the merged weights: a concept's is wanted high, a prior's
            low. The name of a prior's ends in ``" (prior)"``.
        drift: ‖φ − θ‖ / ‖θ‖.
        gradient_norm: length of the hypergradient before clipping.
        residual: how far the merged keys and values miss what the concepts' adaptations asked of
            them, ``‖(φ − W_n) C_nᵀ‖ / ‖(W_n − W0) C_nᵀ‖``; 0 without a projected merge.
        seconds: time of this step.
        eta: estimated seconds until the last step.
        memory: peak bytes so far: of the GPU's allocator, or of the process.
        skipped: steps so far that were left out because a loss or gradient was not finite.
        stage: the concept that is being immunized, where each is immunized alone.
    """

    step: int
    steps: int
    losses: dict[str, float]
    drift: float
    gradient_norm: float
    residual: float = 0.0
    seconds: float = 0.0
    eta: float = 0.0
    memory: int = 0
    skipped: int = 0
    stage: str = ""

    @property
    def concept_losses(self) -> dict[str, float]:
        """Loss of each concept: wanted high."""
        return {name: v for name, v in self.losses.items() if not name.endswith(PRIOR)}

    @property
    def prior_loss(self) -> float | None:
        """Mean loss on class pictures, wanted low; None without priors."""
        priors = [value for name, value in self.losses.items() if name.endswith(PRIOR)]
        return sum(priors) / len(priors) if priors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become strings."""
        plain = asdict(self)
        for name in ("drift", "gradient_norm", "residual"):
            plain[name] = _to_json(plain[name])
        plain["losses"] = {name: _to_json(value) for name, value in self.losses.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StepReport:
        """The inverse of ``to_dict``."""
        values = dict(plain)
        for name in ("drift", "gradient_norm", "residual"):
            values[name] = float(values[name])
        values["losses"] = {name: float(value) for name, value in values["losses"].items()}
        return cls(**values)

    def to_scalars(self) -> dict[str, float]:
        """Numbers by name, as trackers want them."""
        scalars = {f"loss/{name}": value for name, value in self.losses.items()}
        if self.prior_loss is not None:
            scalars["prior_loss"] = self.prior_loss
        for name in ("drift", "gradient_norm", "residual", "seconds", "eta", "memory", "skipped"):
            scalars[name] = float(getattr(self, name))
        return scalars


Callback = Callable[[StepReport], bool | None]
"""Called after each outer step; returning True ends the run there. Where each concept is immunized
alone (``compose``), it ends that concept's run, and is told of the main process' concepts only."""


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but on macOS bytes
    return peak if sys.platform == "darwin" else peak * 1024


class MetricsFile:
    """A callback that appends each report to a JSON Lines file.

    Args:
        path: the file; its folder is made.
        history: reports of the steps before, with which the file starts.
    """

    def __init__(self, path: str | Path, history: Sequence[StepReport] = ()) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(map(_line, history)), encoding="utf-8")
        except OSError as error:
            raise MimaError(f"metrics: cannot write {self.path}: {error.strerror}") from error

    def __call__(self, report: StepReport) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(report))
        except OSError as error:
            raise MimaError(f"metrics: cannot write {self.path}: {error.strerror}") from error


class Tracker:
    """A callback that hands each report to one of accelerate's experiment trackers.

    Args:
        tracker: for instance ``accelerate.tracking.TensorBoardTracker("run", logging_dir="runs")``.
        config: plain settings to store with the run.

    Example:
        >>> immunize(model, concepts, callbacks=[Tracker(WandBTracker("mima"))])
    """

    def __init__(self, tracker: GeneralTracker, config: Mapping[str, Any] | None = None) -> None:
        self.tracker = tracker
        tracker.start()
        if config:
            settings = flat(config)
            tracker.store_init_configuration({k: _to_tracker(v) for k, v in settings.items()})

    def __call__(self, report: StepReport) -> None:
        self.tracker.log(report.to_scalars(), step=report.step)

    def finish(self) -> None:
        """Flush and close."""
        self.tracker.finish()


def open_trackers(
    names: Sequence[str], folder: Path | None, config: Mapping[str, Any]
) -> list[Tracker]:
    """Trackers by the names that accelerate knows them by.

    Args:
        names: ``tensorboard``, ``wandb``, ...
        folder: where those that write files write.
        config: plain settings to store with the run.

    Raises:
        MimaError: a tracker whose package is not installed, or that needs a folder.
    """
    if not names:
        return []
    from accelerate import tracking  # type: ignore[import-untyped]

    available = {str(name): kind for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(getattr(kind, "value", kind)) for kind in tracking.get_available_trackers()}
    opened = []
    for name in names:
        if name not in installed:
            raise MimaError(f"trackers: {name} is not installed; pip install {name}")
        kind = available[name]
        if kind.requires_logging_directory:
            if folder is None:
                raise MimaError(f"trackers: {name} writes files, so it needs an output folder")
            opened.append(Tracker(kind("mima", logging_dir=str(folder)), config))
        else:
            opened.append(Tracker(kind("mima"), config))
    return opened


class ProgressBar:
    """A callback that draws one line: step, losses, drift, residual, memory, time left.

    Args:
        console: where to draw; by default stderr, and only if it is a terminal.

    Example:
        >>> with ProgressBar() as bar:
        ...     immunize("embedded", concepts, callbacks=[bar])
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, report: StepReport) -> None:
        if report.stage not in self._tasks:
            label = f"immunizing {report.stage}".strip()
            self._tasks[report.stage] = self._bars.add_task(label, total=report.steps, note="")
        self._bars.update(
            self._tasks[report.stage],
            completed=report.step,
            total=report.steps,
            note=describe(report),
        )


def describe(report: StepReport) -> str:
    """A report in one line, without the step."""
    parts = [f"{name} {value:.3f}" for name, value in report.concept_losses.items()]
    if report.prior_loss is not None:
        parts.append(f"prior {report.prior_loss:.3f}")
    parts.append(f"drift {report.drift:.1e}")
    if report.residual:
        parts.append(f"residual {report.residual:.1e}")
    if report.skipped:
        parts.append(f"{report.skipped} skipped")
    parts += [f"{report.seconds:.2f} s/step", f"{report.memory / 2**30:.1f} GiB"]
    minutes, seconds = divmod(round(report.eta), 60)
    return " · ".join([*parts, f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"])


def _line(report: StepReport) -> str:
    return json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(value: float) -> float | str:
    # JSON has no NaN; float() reads these strings back
    return value if math.isfinite(value) else str(value)


def _to_tracker(value: object) -> int | float | str:
    # trackers store numbers and text
    return value if isinstance(value, (int, float, str)) else str(value)
