"""`mima immunize`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mima.choices import Task
from mima.cli.base import app
from mima.cli.options import (
    Device,
    OnlyDelta,
    Overwrite,
    Revision,
    SingleFileConfig,
    Variant,
    model_source,
    parse_setting,
)
from mima.errors import MimaError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mima.immunization.config import ImmunizeRun


@app.command()
def immunize(
    config: Annotated[Path, typer.Argument(help="A YAML file: model, concepts, settings.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the immunized model.")
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="A recipe beneath the file's settings: erase the concepts first, or add their new "
            "words."
        ),
    ] = None,
    erased: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of the model in which the concepts are erased: weights of a UNet, a "
            "folder or a delta. Takes the place of erasing first."
        ),
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    delta: OnlyDelta = False,
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    device: Device = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set lower.steps=8"),
    ] = None,
) -> None:
    """Immunize a model as a config file says."""
    from mima.concepts.reading import load_concepts
    from mima.console import stderr, stdout
    from mima.immunization.config import load_config
    from mima.storage.output import check_folder

    run = _with_settings(load_config(config), settings or [], task, erased)
    folder = output or (run.output and config.parent / run.output)
    if folder is None:
        raise MimaError(f"nowhere to write: give --output, or output in {config}")
    check_folder(folder, overwrite=overwrite)
    concepts = load_concepts(run.concepts, base=config.parent)

    # only now what takes seconds to import
    from mima.immunization.algorithm import immunize as run_immunize
    from mima.immunization.progress import ProgressBar
    from mima.storage.runs import default_folder

    def beside(model: str) -> str:
        return str(config.parent / model) if (config.parent / model).exists() else model

    structure = single_file_config
    if structure is None and run.single_file_config is not None:
        structure = beside(run.single_file_config)
    source = model_source(
        beside(run.model), revision or run.revision, variant or run.variant, structure
    )
    # an option's path starts from the working directory, a file's from its folder
    checkpoint = erased or (run.erased and config.parent / run.erased.expanduser())
    settings_used = run.immunize
    if settings_used.captions is not None:
        captions = config.parent / settings_used.captions
        settings_used = settings_used.model_copy(update={"captions": captions})
    try:
        with ProgressBar() as bar:
            result = run_immunize(
                source,
                concepts,
                settings_used,
                erased=checkpoint,
                output=folder,
                overwrite=overwrite,
                resume=resume,
                delta=delta,
                device=device,
                callbacks=[bar],
            )
    except KeyboardInterrupt:
        if default_folder(folder).exists():
            stderr().print("what was done is kept; the same command with --resume goes on from it")
        raise
    # torchrun's other processes stay silent
    if os.environ.get("RANK", "0") == "0":
        stdout().print(f"immunized against {', '.join(result.concepts)}: {folder}")


def _with_settings(
    run: ImmunizeRun, settings: Sequence[str], task: str | None, erased: Path | None
) -> ImmunizeRun:
    """Apply `--set key=value`; a key that only ImmunizeConfig has needs no "immunize." before.

    A task's recipe lies beneath what the file and `--set` say; where the concepts are erased
    already, it erases nothing.
    """
    from mima.immunization.config import ImmunizeConfig, ImmunizeRun, with_recipe
    from mima.settings import parse_config, set_nested

    raw = run.model_dump(exclude_unset=True)
    known = {*ImmunizeRun.model_fields, *ImmunizeConfig.model_fields}
    for name, value in map(parse_setting, settings):
        first = name.partition(".")[0]
        if first not in known:
            raise MimaError(f"--set {name}: unknown setting; {nearest(first, known)}")
        inside = "" if first in ImmunizeRun.model_fields else "immunize."
        set_nested(raw, inside + name, value)
    if task is not None:
        own = raw.get("immunize", {})
        if erased is not None or raw.get("erased") is not None:
            own = {"erase_first": False, **own}
        raw["immunize"] = with_recipe(task, own)
    return parse_config(ImmunizeRun, raw, source="--set") if settings or task else run
