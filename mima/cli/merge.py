"""`mima merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mima.choices import MergeMethod
from mima.cli import options
from mima.cli.base import app
from mima.errors import MimaError


@app.command()
def merge(
    adapters: Annotated[
        list[Path], typer.Argument(help="What mima adapt wrote, LoRA files, fine-tuned models.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    model: options.Model = "embedded",
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    dtype: options.Dtype = "float32",
    method: Annotated[
        MergeMethod,
        typer.Option(help="Keys and values by the text they answer to, or a plain average."),
    ] = "projected",
    weights: Annotated[
        str | None, typer.Option(help="One for each adapter: 0.5,0.25,0.25; default equal.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What asks for an adapter's concept; once for each adapter, in order."),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="A file of ordinary captions that the merge leaves alone.")
    ] = None,
    lam: Annotated[
        float,
        typer.Option(
            min=0,
            help="Softness of the constraint; 0 is hard, and refused where prompts share words.",
        ),
    ] = 1e-4,
    delta: options.OnlyDelta = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Merge several adapters of one model into it."""
    from mima.storage.inputs import check_adapters
    from mima.storage.output import check_folder

    check_folder(output, overwrite=overwrite)
    options.check_named(model, device=device)
    check_adapters(adapters)
    shares = None if weights is None else _numbers(weights)

    # imports that take seconds, once the arguments are checked
    from rich.table import Table

    from mima.adapters.merge import merge_adapters
    from mima.console import say, stdout
    from mima.distributed import device_of
    from mima.storage.output import fresh_folder

    merged = merge_adapters(
        options.model_source(model, revision, variant, single_file_config),
        adapters,
        weights=shares,
        method=method,
        prompts=prompt or None,
        captions=captions,
        lam=lam,
        seed=seed,
        device=device_of(device),
        dtype=options.torch_dtype(dtype),
    )
    with fresh_folder(output, overwrite=overwrite) as staging:
        merged.save_pretrained(staging, delta=delta)
    table = Table("adapter", "weight", "residual", "drift bound")
    rows = zip(merged.adapters, merged.weights, merged.residual, merged.drift_bound, strict=True)
    for name, *values in rows:
        table.add_row(name, *("-" if value is None else f"{value:.3g}" for value in values))
    stdout().print(table)
    if merged.condition is not None:
        stdout().print(f"condition number of the captions: {merged.condition:.3g}")
    say(f"merged {', '.join(merged.adapters)}: {output}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise MimaError(f"--weights {text!r}: expected numbers, as in 0.5,0.25,0.25") from None
