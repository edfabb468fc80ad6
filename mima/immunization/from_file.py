"""A run as a YAML file describes it: what `mima immunize run.yaml` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, field_validator

from mima.choices import Recipe, Task
from mima.errors import MimaError, nearest, one_line, quoted
from mima.immunization.config import ImmunizeConfig
from mima.immunization.recipes import EMBEDDED_RATE, RECIPES, USUAL_RATE, beneath
from mima.settings import Settings, parse_config, set_nested
from mima.storage.inputs import check_model, expanded
from mima.storage.output import check_folder
from mima.storage.plain_data import read_yaml, yaml_problem

if TYPE_CHECKING:
    from mima.concepts import Concept
    from mima.immunization.planning.result import Plan
    from mima.immunization.progress import Callback
    from mima.immunization.result import ImmunizeResult


class ImmunizeRun(Settings):
    """What ``mima immunize CONFIG.yaml`` reads."""

    model: str
    """A diffusers folder, a .safetensors file, a hub id, or ``embedded``."""
    revision: str | None = None
    """The hub's branch, tag or commit of the model."""
    variant: str | None = None
    """File variant such as ``fp16``."""
    single_file_config: str | None = None
    """For a single file, a folder (or hub id) of a model of the same architecture. Default: the
    published one, which diffusers fetches from the hub."""
    concepts: list[Any] = Field(min_length=1)
    """Concept descriptions: folders, files, names of embedded concepts, or inline mappings."""
    benign: list[Any] = Field(default_factory=list)
    """Other concepts, described alike, that must stay learnable: ``immunize.upper.benign`` and
    ``immunize.lower.benign_start`` read them."""
    recipe: Recipe | None = None
    """Named settings beneath those of ``immunize``: see ``mima.immunization.recipes``."""
    rate: float | None = Field(None, gt=0, lt=1)
    """The recipe ``default``'s unit of rates, at which models like this one are usually fine-tuned
    on a few pictures. Default: 1e-4 for ``embedded``, else 5e-6, for Stable Diffusion 1.x."""
    erased: Path | None = None
    """A checkpoint in which the concepts are erased, made from ``model`` by whatever means: see
    ``mima.erasure.load_erased``. Takes the place of ``immunize.erase_first``."""
    output: Path | None = None
    """Where the immunized model goes."""
    immunize: ImmunizeConfig = ImmunizeConfig()
    """The settings."""

    @field_validator("concepts", "benign")
    @classmethod
    def _are_descriptions(cls, value: list[Any]) -> list[Any]:
        for one in value:
            if not isinstance(one, (str, dict)):
                raise ValueError(f"expected names, folders, files or mappings, got {quoted(one)}")
        return value


def load_config(path: str | Path) -> ImmunizeRun:
    """Read a run from YAML (or JSON). Relative paths in it are relative to its folder.

    Args:
        path: of the file.

    Returns:
        The run, checked, with its recipe's settings beneath its own.

    Raises:
        MimaError: unreadable, not YAML, or a setting that is unknown or of the wrong type or range;
            every such setting is named, unknown ones with the nearest valid name.
    """
    run = parse_run(read_mapping(path), source=str(path))
    _check_rate(run)
    return _located(run, expanded(path).parent)


def parse_run(
    raw: dict[str, Any], *, source: str, recipe: str | None = None, task: str | None = None
) -> ImmunizeRun:
    """A run from plain data, a recipe's and a task's settings beneath its own.

    The recipe takes the place of one that the data name; errors call them ``source``.

    Raises:
        MimaError: as ``load_config``.
    """
    named, own = recipe or raw.get("recipe"), raw.get("immunize", {})
    # parse_config reports an unknown recipe, or settings of the wrong type, with all other errors
    known = named is None or recipe is not None or (isinstance(named, str) and named in RECIPES)
    if (named is not None or task is not None) and known and isinstance(own, dict):
        benign, rate = bool(raw.get("benign")), _rate_of(raw)
        plain = beneath(own, named, task, benign=benign, rate=rate)
        raw = {**raw, "immunize": plain}
        if named is not None:
            raw["recipe"] = named
    return parse_config(ImmunizeRun, raw, source=source)


def _check_rate(run: ImmunizeRun) -> None:
    if run.rate is not None and run.recipe != "default":
        raise MimaError("rate: the recipe default alone reads it; leave it out, or set it to null")


def _rate_of(raw: dict[str, Any]) -> float:
    """The unit of rates that a run asks for, or else that of its model."""
    try:
        told = ImmunizeRun(model="", concepts=[""], rate=raw.get("rate")).rate
    except ValidationError:
        # it is reported with all other settings
        told = None
    return told or (EMBEDDED_RATE if raw.get("model") == "embedded" else USUAL_RATE)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A mapping of settings from YAML (or JSON), unchecked.

    Raises:
        MimaError: unreadable, not YAML, or no mapping.
    """
    path = expanded(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except MimaError as error:
        raise MimaError(f"config: {path}: {error}") from error
    except OSError as error:
        raise MimaError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MimaError(f"config: {path} is not valid YAML: {yaml_problem(error)}") from error
    if raw is None:
        raise MimaError(f"config: {path} is empty, expected a mapping of settings")
    if not isinstance(raw, dict):
        raise MimaError(f"config: {path} must be a mapping of settings, got {type(raw).__name__}")
    return raw


def read_run(
    path: str | Path,
    *,
    recipe: Recipe | None = None,
    task: Task | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    erased: str | Path | None = None,
) -> ImmunizeRun:
    """Read a run's file, with what is said beside it.

    Args:
        path: the file. Relative paths in it start from its folder, and come out resolved; those of
            the other arguments start from the working directory.
        recipe: named settings that lie beneath what the file and ``settings`` say; takes the place
            of the file's.
        task: what is done before, likewise beneath; where the concepts are erased already, it
            erases nothing.
        settings: dotted names and values that replace the file's: ``{"lower.steps": 8}``. A name
            that only ``ImmunizeConfig`` has needs no ``immunize.`` before it.
        output: takes the place of the file's.
        erased: likewise.

    Raises:
        MimaError: the file cannot be read, a setting is unknown or contradicts another, or neither
            the file nor ``output`` says where to write.
    """
    path = expanded(path)
    raw = read_mapping(path)
    if erased is not None or raw.get("erased") is not None:
        own = raw.get("immunize", {})
        raw["immunize"] = {"erase_first": False, **own} if task and isinstance(own, dict) else own
    run = parse_run(raw, source=str(path), recipe=recipe, task=task)
    known = {*ImmunizeRun.model_fields, *ImmunizeConfig.model_fields}
    for name, value in (settings or {}).items():
        first = name.partition(".")[0]
        if first not in known:
            raise MimaError(f"--set {one_line(name)}: unknown setting; {nearest(first, known)}")
        set_nested(raw, name if first in ImmunizeRun.model_fields else f"immunize.{name}", value)
    if settings:
        run = parse_run(raw, source="--set", recipe=recipe, task=task)
    _check_rate(run)
    run = _located(run, path.parent)
    given = {"output": output, "erased": erased}
    said = {name: Path(value) for name, value in given.items() if value is not None}
    run = run.model_copy(update=said)
    if run.output is None:
        raise MimaError(f"nowhere to write: give --output, or output in {path}")
    return run


def immunize_file(
    path: str | Path,
    *,
    recipe: Recipe | None = None,
    task: Task | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    erased: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    delta: bool = False,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> ImmunizeResult:
    """Immunize a model as a file says: see ``read_run`` and ``immunize`` for the arguments.

    Raises:
        MimaError: as they do.

    Examples:
        >>> immunize_file("run.yaml", task="relearn", settings={"steps": 100})
    """
    run = read_run(path, recipe=recipe, task=task, settings=settings, output=output, erased=erased)
    assert run.output is not None
    check_folder(run.output, overwrite=overwrite, resume=resume)
    said = _arguments(run, path, revision, variant, single_file_config)

    # imports that take seconds, once the arguments are checked
    from mima.immunization.algorithm import immunize

    result: ImmunizeResult = immunize(
        **said,
        overwrite=overwrite,
        resume=resume,
        delta=delta,
        device=device,
        callbacks=callbacks,
    )
    return result


def concepts_of(run: ImmunizeRun, path: str | Path) -> tuple[list[Concept], list[Concept]]:
    """The concepts of a run, and its benign ones, once its model is known to be there.

    Raises:
        MimaError: one of them is not there, or cannot be read.
    """
    from mima.concepts.reading import load_concepts

    check_model(run.model)
    base = expanded(path).parent
    # load_concepts refuses an empty list
    benign = load_concepts(run.benign, base=base) if run.benign else []
    return load_concepts(run.concepts, base=base), benign


def plan_file(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    overwrite: bool = False,
    delta: bool = False,
    device: str | None = None,
    **said: Any,
) -> Plan:
    """Say what ``immunize_file`` would train and need, without loading weights.

    Its arguments are those of ``immunize_file`` and, in ``said``, of ``read_run``.

    Raises:
        MimaError: as they do.
    """
    found = _arguments(read_run(path, **said), path, revision, variant, single_file_config)

    # imports that take seconds, once the arguments are checked
    from mima.immunization.algorithm import immunize

    return immunize(**found, dry_run=True, overwrite=overwrite, delta=delta, device=device)


def _arguments(
    run: ImmunizeRun,
    path: str | Path,
    revision: str | None,
    variant: str | None,
    single_file_config: str | None,
) -> dict[str, Any]:
    """What a file says to ``immunize``."""
    concepts, benign = concepts_of(run, path)

    # imports that take seconds, once the arguments are checked
    from mima.families import ModelSource

    model = ModelSource(
        run.model,
        revision or run.revision,
        variant or run.variant,
        single_file_config or run.single_file_config,
    )
    return {
        "model": model,
        "concepts": concepts,
        "config": run.immunize,
        "benign": benign,
        "erased": run.erased,
        "output": run.output,
    }


def _located(run: ImmunizeRun, folder: Path) -> ImmunizeRun:
    """A run with its paths resolved from the folder of its file."""

    def beside(model: str) -> str:
        """A model may be a hub id or a name, too."""
        place = folder / expanded(model)
        return str(place) if place.exists() else model

    named = run.model == "embedded"
    changes: dict[str, Any] = {"model": run.model if named else beside(run.model)}
    if run.single_file_config is not None:
        changes["single_file_config"] = beside(run.single_file_config)
    if run.output is not None:
        changes["output"] = folder / expanded(run.output)
    if run.erased is not None:
        changes["erased"] = folder / expanded(run.erased)
    if run.immunize.captions is not None:
        captions = folder / expanded(run.immunize.captions)
        changes["immunize"] = run.immunize.model_copy(update={"captions": captions})
    return run.model_copy(update=changes)
