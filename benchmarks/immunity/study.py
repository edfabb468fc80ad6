"""Run cells: erase, immunize, attack; everything once, and on from where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.immunity.cells import (
    BENIGN,
    CEILING,
    NOT_IMMUNIZED,
    UNTRAINED,
    Cell,
    Cut,
    Problem,
    attack_steps,
    ceiling_of,
    configured,
)
from mima._version import installed_versions
from mima.concepts import Concept, embedded_concept
from mima.erasure import erase
from mima.errors import MimaError, one_line
from mima.evaluation import EvaluationFolder, evaluate
from mima.evaluation.grid import GridConfig, attack_grid, grid_config
from mima.evaluation.ledger import summarized
from mima.evaluation.records import ModelPair
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.release.repository import save_pipeline
from mima.storage.output import fresh_folder, write_whole
from mima.storage.record import read_record
from mima.storage.tensor_files import fingerprint
from mima.training.captions import ordinary_captions

SECONDS_PER_STEP, SECONDS_PER_PICTURE, SECONDS_PER_SIMULATED_STEP = 0.045, 0.09, 0.25
"""Rough figures for the embedded model on one core: a training step with a batch of 4, a picture
of 12 sampling steps, and a step of a simulated attack with its share of the outer step. They serve
estimates alone; `evaluate` times its own before it begins."""


RECORDS = Path(__file__).parent / "records"
"""What is kept of finished cells: figures without models and pictures, a folder for each."""
SETTINGS_FILE, COMPUTE_FILE = "settings.json", "compute.json"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What an immunization cost.

    Attributes:
        outer_steps: steps of the upper level.
        attack_steps: steps of simulated attacks in all of them.
        seconds: wall time of the outer steps; None where a stopped run lost count.
    """

    outer_steps: int
    attack_steps: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a cell has to do.

    Attributes:
        simulated: steps of simulated attacks.
        trained: training steps of trials, attacks and repairs, on both models.
        pictures: how many are drawn.
    """

    simulated: float
    trained: int
    pictures: int

    def seconds(self, processes: int) -> float:
        """About how long that takes on cores like those that the figures are of."""
        attacked = self.trained * SECONDS_PER_STEP + self.pictures * SECONDS_PER_PICTURE
        return self.simulated * SECONDS_PER_SIMULATED_STEP + attacked / processes


class Study:
    """A cut of the study in a folder.

    Args:
        folder: holds ``models/`` (erased ones, by problem), ``originals/`` (what attacks show on
            them, once for all methods) and ``cells/``.
        cut: what there is to do.
        ceilings: a folder of models that were trained without a problem's concepts, each named as
            the problem is; by default those that the study ships. Cells of the method ``ceiling``
            are left out where there is none.
        records: what is kept of finished cells, by default in the checkout. A cell that was made
            with the settings which it has today is not run again, and reported from there.
        processes: attacks at a time.
    """

    def __init__(
        self,
        folder: Path,
        cut: Cut,
        *,
        ceilings: Path | None = None,
        records: Path = RECORDS,
        processes: int | None = None,
    ) -> None:
        self.folder = folder
        self.cut = cut
        self.ceilings = ceilings
        self.records = records
        self.processes = processes

    def cells(self) -> list[Cell]:
        """The cells that can be run here."""
        return [
            cell
            for cell in self.cut.cells()
            if cell.method != CEILING or ceiling_of(cell.problem, self.ceilings)
        ]

    def place(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / cell.name

    def evaluation(self, cell: Cell) -> EvaluationFolder:
        """The folder of a cell's attacks, or what is kept of them where those are not all done."""
        own = EvaluationFolder(self.place(cell) / "evaluation")
        done = own.exists() and own.evaluation().complete and not self.outdated(cell)
        kept = None if done else self.kept(cell)
        return own if kept is None else EvaluationFolder(kept)

    def compute(self, cell: Cell) -> Compute | None:
        """What a cell's immunization cost; None before it is done, and of models as they are."""
        kept = self.kept(cell)
        file = self.place(cell) / COMPUTE_FILE
        if kept is not None and self.evaluation(cell).path == kept:
            file = kept / COMPUTE_FILE
        if not file.is_file():
            return None
        then = _plain(file)
        return Compute(**{name: then[name] for name in Compute.__dataclass_fields__})

    def kept(self, cell: Cell) -> Path | None:
        """What is kept of a cell; None where nothing is, or with other settings."""
        place = self.records / cell.name
        if not (place / SETTINGS_FILE).is_file():
            return None
        return place if not self._differing(cell, _plain(place / SETTINGS_FILE)) else None

    def outdated(self, cell: Cell) -> list[str]:
        """Settings of today that what is in the cell's folder was made without, by name."""
        place, names = self.place(cell), list[str]()
        record = read_record(place / "immunized") if (place / "immunized").is_dir() else None
        if cell.method not in NOT_IMMUNIZED and record is not None:
            names += _differing(record.get("config", {}), _plain_config(configured(cell, self.cut)))
        folder = EvaluationFolder(place / "evaluation")
        if folder.exists():
            then, now = folder.evaluation(), self._settings(cell)
            learnable = [c.name for c in then.concepts if c.role == "other"]
            if _grid(then.config.get("grid")) != now["attacks"]:
                names.append("attacks")
            if [*then.config.get("similarities", {}).values()] != now["similarities"]:
                names.append("similarities")
            if learnable != [_name_of(name) for name in now["others"]]:
                names.append("others")
            if now["ceiling"] and then.config.get("weights", {}).get("immunized") != now["ceiling"]:
                names.append("ceiling")
        return names

    def keep(self, cell: Cell) -> Path:
        """Keep the figures of a finished cell, instead of what was kept of it before.

        Raises:
            MimaError: it is not finished, or was made with other settings.
        """
        own = self.place(cell)
        evaluation = EvaluationFolder(own / "evaluation")
        if not evaluation.exists() or not evaluation.evaluation().complete or self.outdated(cell):
            raise MimaError(f"{cell.name}: {self.status(cell)}; only what is done can be kept")
        with fresh_folder(self.records / cell.name, overwrite=True) as staging:
            copy = EvaluationFolder(staging)
            rows, curves = evaluation.attacks(), evaluation.curves()
            copy.write_rows(rows, curves)
            # by name: where they lay is nobody's business
            models = ModelPair(original=cell.problem.name, immunized=cell.name)
            named = evaluation.evaluation().model_copy(update={"models": models})
            # an older evaluation may lack what a summary says today
            copy.write_evaluation(summarized(named, rows, curves))
            if (own / COMPUTE_FILE).is_file():
                shutil.copyfile(own / COMPUTE_FILE, staging / COMPUTE_FILE)
            text = json.dumps(self._settings(cell), indent=2)
            write_whole(staging / SETTINGS_FILE, f"{text}\n".encode())
        return self.records / cell.name

    def _settings(self, cell: Cell) -> dict[str, Any]:
        """What a cell is made with, plain."""
        config = None if cell.method in NOT_IMMUNIZED else configured(cell, self.cut)
        shown = ceiling_of(cell.problem, self.ceilings) if cell.method == CEILING else None
        return {
            "ceiling": shown and _weights(shown),
            "model": self.cut.model,
            "similarities": list(self.cut.similarities),
            "others": list(self.cut.others),
            "attacks": grid_config("quick", self.cut.grid).model_dump(mode="json"),
            "immunization": config and _plain_config(config),
        }

    def _differing(self, cell: Cell, then: dict[str, Any]) -> list[str]:
        """Settings that a cell has otherwise today; those that are new count as their default."""
        now = self._settings(cell)
        plain = ("model", "similarities", "others", "ceiling")
        names = [name for name in plain if then.get(name) != now[name]]
        if _grid(then.get("attacks")) != now["attacks"]:
            names.append("attacks")
        if now["immunization"] is not None:
            names += _differing(then.get("immunization"), now["immunization"])
        return names

    def run(self, cell: Cell, say: Callable[[str], None] = print) -> None:
        """Do what is left of a cell.

        Raises:
            MimaError: a setting cannot be used, or what is there was made with others.
        """
        targets = [embedded_concept(name) for name in cell.problem.targets]
        original = self._original(cell.problem, targets)
        immunized = self._immunized(cell, original, targets, say)
        others = [embedded_concept(name).without(targets) for name in self.cut.others]
        evaluate(
            original,
            immunized,
            targets,
            others=others,
            output=self.place(cell) / "evaluation",
            settings=self.cut.grid,
            similarities=self.cut.similarities,
            processes=self.processes,
            # the same for every method
            originals=self.folder / "originals",
            name=cell.method,
            announce=lambda work: say(f"{cell.name}: {work}"),
        )
        say(f"{cell.name}: done")

    def status(self, cell: Cell) -> str:
        """How far a cell is, in words."""
        place, evaluation = self.place(cell), self.evaluation(cell)
        if evaluation.path != self.kept(cell) and (names := self.outdated(cell)):
            return f"made with other {', '.join(names)}"
        if evaluation.exists():
            done = {row.attack for row in evaluation.attacks()}
            whole = evaluation.evaluation().complete
            if whole:
                return "kept" if evaluation.path == self.kept(cell) else "done"
            return f"{len(done)} of {len(self.attacks(cell))} attacks"
        if (place / "immunized").is_dir():
            return "immunized"
        return "immunizing" if place.is_dir() else "not begun"

    def attacks(self, cell: Cell) -> list[Any]:
        """The attacks of a cell, as far as they can be known before the models are there."""
        named = [
            {name: embedded_concept(name) for name in names}
            for names in (cell.problem.targets, self.cut.others)
        ]
        return attack_grid(grid_config("quick", self.cut.grid), *named)

    def work(self, cell: Cell) -> Work:
        """How much a cell is, from nothing."""
        config = grid_config("quick", self.cut.grid)
        attacks, simulated = self.attacks(cell), 0.0
        if cell.method not in NOT_IMMUNIZED:
            settings, count = configured(cell, self.cut), len(cell.problem.targets)
            simulated = settings.steps * attack_steps(settings, count)
        keys = {attack.key for attack in attacks}
        trials = 2 * len(keys) * config.tune.trials
        prompts = config.max_prompts or 8
        per_attack = prompts * config.pictures_per_prompt
        moments = 1 + config.evaluations + (config.repair_steps > 0)
        return Work(
            simulated=simulated,
            trained=trials * (config.tune.steps or 0)
            + sum(2 * (attack.steps + config.repair_steps) for attack in attacks),
            pictures=2 * len(attacks) * moments * per_attack
            + trials * prompts
            + 2 * config.benign_prompts,
        )

    def _original(self, problem: Problem, targets: Sequence[Concept]) -> str | Path:
        """What is immunized: the model, without the concepts where they are to be re-learned."""
        if problem.task != "relearn":
            return self.cut.model
        folder = self.folder / "models" / problem.name
        if not folder.is_dir():
            pipeline = load_pipeline(self.cut.model)
            erased = erase(pipeline, targets, preserve=ordinary_captions(None))
            with fresh_folder(folder, overwrite=False) as staging:
                save_pipeline(erased, staging)
        return folder

    def _immunized(
        self, cell: Cell, original: str | Path, targets: Sequence[Concept], say: Callable[..., None]
    ) -> str | Path:
        if cell.method == UNTRAINED:
            return original
        if cell.method == CEILING:
            folder = ceiling_of(cell.problem, self.ceilings)
            if folder is None:
                raise MimaError(
                    f"{cell.name}: no model that was trained without {cell.problem.targets}; "
                    "make one with tools/embedded_model/train_diffusion.py --without, put it in "
                    f"DIR/{cell.problem.name} and give --ceilings DIR"
                )
            return folder
        output, config = self.place(cell) / "immunized", configured(cell, self.cut)
        if output.is_dir():
            _refuse_other(output, config)
            return output
        started = time.perf_counter()
        count = len(targets)
        say(
            f"{cell.name}: {config.steps} outer steps, "
            f"{config.steps * attack_steps(config, count):.0f} simulated attack steps"
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        result = immunize(
            original,
            # ordinary captions' class pictures, not those of a class prompt
            [replace(target, class_images=()) for target in targets],
            config,
            # their pictures in a target's style are of the target
            benign=[embedded_concept(name).without(targets) for name in BENIGN]
            if config.reads_benign
            else (),
            output=output,
            resume=True,
        )
        measured = [report.seconds for report in result.history]
        cost = Compute(
            outer_steps=len(result.history),
            attack_steps=config.steps * attack_steps(config, count),
            seconds=sum(measured) if measured else None,
        )
        text = json.dumps(asdict(cost) | {"versions": installed_versions()}, indent=2)
        write_whole(self.place(cell) / COMPUTE_FILE, f"{text}\n".encode())
        say(f"{cell.name}: immunized in {time.perf_counter() - started:.0f} s")
        return output


def _refuse_other(output: Path, config: ImmunizeConfig) -> None:
    """Refuse a model that was immunized with other settings than the cell's."""
    then = (read_record(output) or {}).get("config", {})
    if differing := _differing(then, _plain_config(config)):
        raise MimaError(
            f"{output} was immunized with other {', '.join(differing)}; choose another folder, or "
            "remove it"
        )


def _plain_config(config: ImmunizeConfig) -> dict[str, Any]:
    """The settings of an immunization, with the name of a file of captions, wherever it lies."""
    plain = config.model_dump(mode="json")
    return plain | {"captions": plain["captions"] and Path(plain["captions"]).name}


def _differing(then: Any, now: dict[str, Any]) -> list[str]:
    """Settings of an immunization that differ; those that have come since are the defaults."""
    try:
        known = _plain_config(ImmunizeConfig.model_validate(then))
    except ValidationError:
        # such as a setting that there is no more
        return ["immunization"]
    return [name for name in now if known[name] != now[name]]


def _grid(then: Any) -> dict[str, Any] | None:
    """Settings of attacks as they are written today; None where they cannot be."""
    try:
        return GridConfig.model_validate(then).model_dump(mode="json")
    except ValidationError:
        return None


@cache
def _name_of(concept: str) -> str:
    return embedded_concept(concept).name


@cache
def _weights(folder: Path) -> str:
    """What an evaluation records of a model's denoiser."""
    return fingerprint(dict(family_of(load_pipeline(str(folder))).denoiser.state_dict()))


def _plain(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MimaError(f"cannot read {path}: {one_line(error)}") from error


def estimate(study: Study, cells: Sequence[Cell], processes: int) -> Iterator[str]:
    """How much work cells are and about how long it takes, line by line, then of all."""
    total = 0.0
    for cell in cells:
        work = study.work(cell)
        seconds = work.seconds(processes)
        total += seconds
        yield (
            f"{cell.name}: {work.simulated:.0f} simulated attack steps, {work.trained} training "
            f"steps, {work.pictures} pictures, about {seconds / 60:.0f} minutes"
        )
    yield f"{len(cells)} cells, about {total / 60:.0f} minutes with {processes} processes"
