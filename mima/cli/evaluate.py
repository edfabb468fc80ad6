"""`mima evaluate` and `mima report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from mima.choices import Method, PictureProtocol, Preset
from mima.cli import options
from mima.cli.base import app
from mima.errors import check_choice


@app.command()
def evaluate(
    original: Annotated[str, typer.Argument(help="The model before immunization.")],
    immunized: Annotated[str, typer.Argument(help="The model after it.")],
    concepts: Annotated[
        list[str], typer.Option("--concepts", help="Immunized against; may be repeated.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    others: Annotated[
        list[str] | None, typer.Option("--others", help="Must stay learnable; may be repeated.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="quick (minutes), headline (attacks are tuned), standard (as published), "
            "adversarial (all)."
        ),
    ] = "quick",
    similarity: Annotated[
        list[str] | None,
        typer.Option(
            help="clip, dino, lpips, embedded, embedded-clip, a hub id or a folder; repeatable."
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            min=0, help="Trial runs by which each attack chooses its settings on each model."
        ),
    ] = None,
    protocol: Annotated[
        PictureProtocol,
        typer.Option(help="How pictures are prepared; 'published' repeats IMMA's script."),
    ] = "standard",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Attacks at a time; by default one per core.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Label of the run.")] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="How it was immunized; by default what its mima.json says."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set one of the preset's settings: --set seeds=[0,1]"
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="A file of ordinary prompts, one per line.")
    ] = None,
    originals: Annotated[
        Path | None,
        typer.Option(
            help="Keep what attacks show on the original model here, for other evaluations of it."
        ),
    ] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: Annotated[
        str | None,
        typer.Option(
            help="For a .safetensors model, ORIGINAL, IMMUNIZED or both, where the hub cannot be "
            "reached: a folder of a model of the same architecture."
        ),
    ] = None,
    immunized_revision: Annotated[
        str | None, typer.Option(help="--revision, of the immunized model.")
    ] = None,
    immunized_variant: Annotated[
        str | None, typer.Option(help="--variant, of the immunized model.")
    ] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Attack a model before and after immunization; run again, it goes on where it stopped."""
    from mima.concepts.reading import load_concepts
    from mima.console import command, progress, stdout, tell
    from mima.storage.inputs import expanded

    check_choice("preset", preset, get_args(Preset))
    options.check_named(original, immunized, device=device)
    found = load_concepts(concepts)
    kept = load_concepts(others) if others else []

    # imports that take seconds, once the arguments are checked
    from mima.evaluation import evaluate as run_evaluate
    from mima.evaluation.encoders import EMBEDDED
    from mima.report.terminal import summary_lines, summary_table

    given = options.given_settings({"tune.trials": tune}, settings)
    default = list(EMBEDDED) if original == "embedded" else ["clip"]
    # whichever is a single file reads the option; of two folders, the original refuses it
    files = [model for model in (original, immunized) if expanded(model).is_file()]
    configs = dict.fromkeys(files or [original], single_file_config)
    with progress() as bars:
        task = bars.add_task("attacking", total=None, note="")

        def show(done: int, total: int, finished: str) -> None:
            bars.update(task, completed=done, total=total)
            if finished:
                bars.update(task, note=finished)

        try:
            result = run_evaluate(
                options.model_source(original, revision, variant, configs.get(original)),
                options.model_source(
                    immunized, immunized_revision, immunized_variant, configs.get(immunized)
                ),
                found,
                output=output,
                others=kept,
                preset=preset,
                settings=given,
                similarities=similarity or default,
                protocol=protocol,
                processes=processes,
                device=device,
                name=name,
                method=method,
                captions=captions,
                originals=originals,
                overwrite=overwrite,
                progress=show,
                announce=lambda work: tell(str(work)),
            )
        except KeyboardInterrupt:
            tell("finished attacks are kept; the same command goes on from them")
            raise
    # torchrun's other processes stay silent
    if os.environ.get("RANK", "0") != "0":
        return
    stdout().print(summary_table(result))
    stdout().print("\n".join(summary_lines(result)))
    stdout().print(f"pictures and all numbers: {output}\nas a page: {command('report', output)}")


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="What mima evaluate wrote; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page, an .html; report.html in the folder, or for several, here.",
        ),
    ] = None,
) -> None:
    """Put evaluations on one self-contained page, with every figure beside it."""
    from mima.storage.inputs import evaluation_file, expanded

    for folder in folders:
        evaluation_file(expanded(folder))

    # imports that take seconds, once the arguments are checked
    from mima.console import stdout
    from mima.report import write_report

    stdout().print(str(write_report(folders, output)))
