"""`mima immunize`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mima.choices import Recipe, Task
from mima.cli import options
from mima.cli.base import app


@app.command()
def immunize(
    config: Annotated[Path, typer.Argument(help="A YAML file: model, concepts, settings.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the immunized model.")
    ] = None,
    recipe: Annotated[
        Recipe | None,
        typer.Option(help="Named settings beneath the file's: recommended, released, a rival's."),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="What comes before, beneath the file's settings: erase the concepts, or add their "
            "new words."
        ),
    ] = None,
    erased: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of the model in which the concepts are erased: weights of a UNet, a "
            "folder or a delta. Takes the place of erasing first."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    delta: options.OnlyDelta = False,
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    device: options.Device = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load no weights; say what is trained, memory, disk and time. --device then also "
            "takes a GPU's name (h100, rtx4090) or its memory (24gib).",
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set lower.steps=8"),
    ] = None,
) -> None:
    """Immunize a model as a config file says."""
    from mima.console import say, stdout, tell
    from mima.immunization.from_file import concepts_of, immunize_file, read_run
    from mima.storage.output import check_folder

    said: dict[str, Any] = {
        "recipe": recipe,
        "task": task,
        "settings": dict(map(options.parse_setting, settings or [])),
        "output": output,
        "erased": erased,
    }
    if not dry_run:
        options.check_named(device=device)
    run = read_run(config, **said)
    folder = run.output
    assert folder is not None
    check_folder(folder, overwrite=overwrite, resume=resume)
    concepts_of(run, config)

    said |= {
        "revision": revision,
        "variant": variant,
        "single_file_config": single_file_config,
        "overwrite": overwrite,
        "delta": delta,
        "device": device,
    }
    if dry_run:
        from mima.errors import MimaError
        from mima.immunization.from_file import plan_file

        found = plan_file(config, **said)
        if os.environ.get("RANK", "0") == "0":
            stdout().print(str(found), markup=False, highlight=False)
        if found.refusal is not None:
            raise MimaError(found.refusal)
        return

    # imports that take seconds, once the arguments are checked
    from mima.immunization.progress import ProgressBar

    try:
        with ProgressBar() as bar:
            result = immunize_file(config, **said, resume=resume, callbacks=[bar])
    except KeyboardInterrupt:
        from mima.storage.runs import default_folder

        if default_folder(folder).exists():
            tell("what was done is kept; the same command with --resume goes on from it")
        raise
    # torchrun's other processes stay silent
    if os.environ.get("RANK", "0") == "0":
        say(f"immunized against {', '.join(result.concepts)}: {folder}")
