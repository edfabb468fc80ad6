"""`mima sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mima.cli import options
from mima.cli.base import app
from mima.errors import MimaError, counted


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: options.Model = "embedded",
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    dtype: options.Dtype = "float32",
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", "--lora", help="What mima adapt wrote, a LoRA file, a fine-tuned model."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png; by default the prompt's words.")
    ] = None,
    seed: options.Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; by default the model's.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale; 1 is none.")] = 4.0,
    num: Annotated[int, typer.Option(min=1, help="Pictures, with seeds SEED, SEED+1, ...")] = 1,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw pictures."""
    from mima.storage.inputs import check_adapters, expanded
    from mima.storage.output import check_file, slug, write_picture

    if not prompt.strip():
        raise MimaError("the prompt is empty")
    path = expanded(output or f"{slug(prompt)}.png")
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    if path.suffix.lower() not in kinds:
        raise MimaError(f"output {path}: expected a file ending in .png, .jpg or .webp")
    paths = [path]
    if num > 1:
        paths = [path.with_stem(f"{path.stem}-{number}") for number in range(1, num + 1)]
    for one in paths:
        check_file(one, overwrite=overwrite)
    options.check_named(model, device=device)
    check_adapters([] if adapter is None else [adapter])

    # imports that take seconds, once the arguments are checked
    from mima.adapters.merge import merge_adapters
    from mima.console import progress, stdout
    from mima.families import family_of
    from mima.sampling import Sampler

    source = options.model_source(model, revision, variant, single_file_config)
    pipeline = options.open_pipeline(source, dtype, device)
    # family_of refuses a resolution that the model cannot have
    size = family_of(pipeline, resolution=resolution).resolution
    if adapter is not None:
        pipeline = merge_adapters(pipeline, [adapter], weights=[1.0], method="weighted").pipeline
    seeds, broken = range(seed, seed + num), list[int]()
    with progress() as bars:
        task = bars.add_task("drawing", total=num, note="")
        sampler = Sampler(steps=steps, guidance=guidance, size=size)
        (row,) = sampler(
            pipeline,
            [prompt],
            seeds,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            broken=broken,
        )
    for place, (one, picture) in enumerate(zip(paths, row, strict=True)):
        if place not in broken:
            write_picture(one, picture, kinds[one.suffix.lower()])
            stdout().print(str(one))
    if broken:
        raise MimaError(
            f"{source.label}: {len(broken)} of {counted(num, 'picture')} (seeds "
            f"{', '.join(str(seeds[place]) for place in broken)}) are not of finite numbers and so "
            f"not written: the weights are not finite, or overflow in {dtype}"
        )
