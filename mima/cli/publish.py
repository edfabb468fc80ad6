"""`mima apply` and `mima push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mima.cli import options
from mima.cli.base import app
from mima.errors import MimaError


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(help="A folder or file that --delta wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the whole model.")],
    model: options.Model = "embedded",
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    dtype: options.Dtype = "float32",
    overwrite: options.Overwrite = False,
) -> None:
    """Apply a delta to its base model, and write the whole model."""
    from mima.storage.inputs import delta_file
    from mima.storage.output import check_folder

    check_folder(output, overwrite=overwrite)
    options.check_named(model)
    delta_file(delta)

    # imports that take seconds, once the arguments are checked
    from mima.console import say
    from mima.release.repository import apply_delta
    from mima.storage.output import fresh_folder

    source = options.model_source(model, revision, variant, single_file_config)
    whole = apply_delta(source, delta, dtype=options.torch_dtype(dtype))
    with fresh_folder(output, overwrite=overwrite) as staging:
        whole.save_pretrained(staging)
    say(f"applied {delta} to {source.label}: {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What another command wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Made if it is new.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; by default as you have set."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; by default the main one.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with mima",
) -> None:
    """Publish a result on the hub, as whoever `hf auth login` (or HF_TOKEN) says."""
    from mima.console import say
    from mima.storage.names import DELTA_FILE, LORA_FILE, MODEL_INDEX, WORD_FILE
    from mima.storage.output import OUR_FILES

    if not folder.is_dir():
        raise MimaError(f"{folder} is not a folder")
    # what the functions write, without a command, has no record
    written = (*OUR_FILES, MODEL_INDEX, DELTA_FILE, LORA_FILE, WORD_FILE)
    if not any((folder / name).is_file() for name in written):
        raise MimaError(f"{folder} holds nothing that mima wrote: none of {', '.join(written)}")

    # an import that takes a second, once the arguments are checked
    from mima.release.repository import Repository

    address = Repository(repo_id, private=private).upload(
        folder, revision=revision, create_pr=create_pr, commit_message=message
    )
    say(f"published {folder}: {address}")
