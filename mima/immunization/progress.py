"""What a run says about each step, and who listens: a progress bar, a file, trackers."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from mima.console import Lines, fitting
from mima.errors import MimaError, cut, nearest
from mima.storage.plain_data import flat

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]
    from rich.console import Console

    from mima.console import Bars


class LossName(NamedTuple):
    """What the upper level says of a concept.

    Attributes:
        concept: the concept's name.
        kind: ``concept``, the loss on its pictures; ``prior``, that on its class pictures;
            ``benign``, that on held-out pictures of a benign concept after a benign adaptation;
            ``pair``, that on the class pictures that the objective ``pair`` compares with;
            ``pull``, the share of the concept's pictures on which the objective still pulls.
    """

    concept: str
    kind: Literal["concept", "prior", "benign", "pair", "pull"] = "concept"


LOSSES = {"losses": "concept", "prior_losses": "prior", "benign_losses": "benign"}
"""The losses that a report holds, and their kinds."""


@dataclass(frozen=True)
class StepReport:
    """One outer step.

    Attributes:
        step: steps done, from 1.
        steps: steps in all.
        losses: loss of each concept at the merged weights: wanted high. In the steps of
            ``alternating`` that commit a merge, on the lower level's pictures before it.
        drift: ‖φ − θ‖ / ‖θ‖.
        gradient_norm: length of the hypergradient before clipping.
        prior_losses: loss on each concept's class pictures, which keep the model useful: wanted
            low. Empty without priors, and in the steps of ``alternating`` that commit a merge.
        residual: how far the merged keys and values miss what the concepts' adaptations asked of
            them, ``‖(φ − W_n) C_nᵀ‖ / ‖(W_n − W0) C_nᵀ‖``; 0 without a projected merge, and where
            the states of an earlier step's attack serve again.
        seconds: time of this step.
        eta: estimated seconds until the last step.
        memory: peak bytes so far: of the GPU's allocator, or of the process.
        skipped: steps so far that were left out because a loss or gradient was not finite.
        stage: the concept that is being immunized, where each is immunized alone.
        pulling: share of the concepts' pictures, at all states of the attacks that count, on which
            the objective still pulls; None for objectives that never stop.
        benign_losses: loss on held-out pictures of each benign concept that the step adapted to,
            after the adaptation: wanted as low as before immunization.
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
    prior_losses: dict[str, float] = field(default_factory=dict)
    pulling: float | None = None
    benign_losses: dict[str, float] = field(default_factory=dict)

    @property
    def prior_loss(self) -> float | None:
        """Mean of ``prior_losses``; None where there are none."""
        priors = self.prior_losses.values()
        return sum(priors) / len(priors) if priors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become strings."""
        plain = asdict(self)
        for name in ("drift", "gradient_norm", "residual"):
            plain[name] = _to_json(plain[name])
        for losses in LOSSES:
            plain[losses] = {name: _to_json(value) for name, value in plain[losses].items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StepReport:
        """The inverse of ``to_dict``."""
        values = dict(plain)
        for name in ("drift", "gradient_norm", "residual"):
            values[name] = float(values[name])
        for losses in LOSSES:
            values[losses] = {name: float(value) for name, value in values.get(losses, {}).items()}
        return cls(**values)

    def to_scalars(self) -> dict[str, float]:
        """Numbers by name, as trackers want them."""
        scalars = {f"loss/{name}": value for name, value in self.losses.items()}
        scalars |= {f"prior_loss/{name}": value for name, value in self.prior_losses.items()}
        scalars |= {f"benign_loss/{name}": value for name, value in self.benign_losses.items()}
        if self.prior_loss is not None:
            scalars["prior_loss"] = self.prior_loss
        if self.pulling is not None:
            scalars["pulling"] = self.pulling
        for name in ("drift", "gradient_norm", "residual", "seconds", "eta", "memory", "skipped"):
            scalars[name] = float(getattr(self, name))
        return scalars


Callback = Callable[[StepReport], object]
"""Called after each outer step; returning ``"stop"`` ends the run there, and whatever else it
returns is ignored: tqdm's ``update`` returns True. Where each concept is immunized alone
(``compose``), it ends that concept's run, and is told of the main process' concepts only."""


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if told := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(told[1]) * 1024
    # on Linux at least what the process that started this one held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but on macOS bytes
    return peak if sys.platform == "darwin" else peak * 1024


def write_metrics(path: Path, history: Sequence[StepReport]) -> None:
    """Write reports as JSON Lines, without time and memory: what the same run gives again."""
    lines = []
    for report in history:
        plain = report.to_dict()
        for name in ("seconds", "eta", "memory"):
            del plain[name]
        lines.append(_line(plain))
    path.write_text("".join(lines), encoding="utf-8")


class MetricsFile:
    """A callback that appends each report to a JSON Lines file.

    The file starts with the reports of the steps before, the history.

    Raises:
        MimaError: the file cannot be written.
    """

    def __init__(self, path: Path, history: Sequence[StepReport]) -> None:
        self.path = path
        self._write("w", history)

    def __call__(self, report: StepReport) -> None:
        self._write("a", [report])

    def _write(self, mode: str, reports: Sequence[StepReport]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write("".join(_line(report.to_dict()) for report in reports))
        except OSError as error:
            raise MimaError(f"metrics: cannot write {self.path}: {error.strerror}") from error


class Tracker:
    """A callback that hands each report to one of accelerate's experiment trackers.

    Args:
        tracker: for instance ``accelerate.tracking.TensorBoardTracker("run", logging_dir="runs")``.
        config: plain settings to store with the run.

    Examples:
        >>> immunize(model, concepts, callbacks=[Tracker(WandBTracker("mima"))])
    """

    def __init__(self, tracker: GeneralTracker, config: Mapping[str, Any] | None = None) -> None:
        self.tracker = tracker
        self._config = flat(config or {})
        self._started = False

    def start(self) -> None:
        """Start the tracker, and store the settings."""
        self._started = True
        self.tracker.start()
        if self._config:
            values = {name: _to_tracker(value) for name, value in self._config.items()}
            self.tracker.store_init_configuration(values)

    def __call__(self, report: StepReport) -> None:
        if not self._started:
            self.start()
        self.tracker.log(report.to_scalars(), step=report.step)

    def finish(self) -> None:
        """Flush and close."""
        if self._started:
            self.tracker.finish()


def tracker_kinds(names: Sequence[str], folder: Path | None) -> list[Any]:
    """Accelerate's classes of trackers, by the names that it knows them by.

    Raises:
        MimaError: no such tracker, one whose package is not installed, or that needs a folder.
    """
    if not names:
        return []
    from accelerate import tracking  # type: ignore[import-untyped]

    known = {str(name): kind for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(getattr(kind, "value", kind)) for kind in tracking.get_available_trackers()}
    for name in names:
        if name not in known:
            raise MimaError(f"trackers: {name!r} is unknown; {nearest(name, known)}")
        if name not in installed:
            raise MimaError(f"trackers: {name} is not installed; pip install {name}")
        if known[name].requires_logging_directory and folder is None:
            raise MimaError(f"trackers: {name} writes files, so it needs an output folder")
    return [known[name] for name in names]


def open_trackers(
    names: Sequence[str], folder: Path | None, config: Mapping[str, Any]
) -> list[Tracker]:
    """Trackers by name; some write files, to the folder.

    Raises:
        MimaError: as `tracker_kinds`.
    """
    return [
        Tracker(
            kind("mima", logging_dir=str(folder))
            if kind.requires_logging_directory
            else kind("mima"),
            config,
        )
        for kind in tracker_kinds(names, folder)
    ]


class ProgressBar:
    """A callback that shows step, speed, time left, losses and memory, in one line of any width.

    Where output is no terminal, it prints a line for each tenth of the steps.

    Args:
        console: where to draw; by default stderr.

    Examples:
        >>> with ProgressBar() as bar:
        ...     immunize("embedded", concepts, callbacks=[bar])
    """

    LABEL, BAR = 24, 10
    """Cells of the longest label, and of the bar."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._shown: Bars = Lines(self._console)
        if self._console.is_terminal:
            self._bars = self._shown = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=self.BAR),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, report: StepReport) -> None:
        label = cut(f"immunizing {report.stage}".strip(), self.LABEL)
        if report.stage not in self._tasks:
            self._tasks[report.stage] = self._shown.add_task(label, total=report.steps, note="")
        # cells beside the note: label, bar and step/steps, and a blank between columns
        taken = len(label) + self.BAR + 2 * len(str(report.steps)) + 1 + 3
        self._shown.update(
            self._tasks[report.stage],
            completed=report.step,
            total=report.steps,
            note=fitting(described(report), self._console.width - taken),
        )


def described(report: StepReport) -> list[str]:
    """A report in parts, without the step, the most wanted first; concepts by their mean loss."""
    minutes, seconds = divmod(round(report.eta), 60)
    parts = [
        f"{report.seconds:.2f} s/step",
        f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left",
        f"loss {sum(report.losses.values()) / len(report.losses):.3f}",
    ]
    if report.skipped:
        parts.append(f"{report.skipped} skipped")
    if report.prior_loss is not None:
        parts.append(f"prior {report.prior_loss:.3f}")
    parts += [f"drift {report.drift:.1e}", f"{report.memory / 2**30:.1f} GiB"]
    if report.residual:
        parts.append(f"residual {report.residual:.1e}")
    return parts


def _line(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(value: float) -> float | str:
    # JSON has no NaN; float() reads these strings back
    return value if math.isfinite(value) else str(value)


def _to_tracker(value: object) -> int | float | str:
    # trackers store numbers and text
    return value if isinstance(value, (int, float, str)) else str(value)
