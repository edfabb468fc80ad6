"""`mima erase`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mima.choices import ErasureMethod, Technique
from mima.cli import options
from mima.cli.base import app
from mima.errors import MimaError

if TYPE_CHECKING:
    from mima.concepts import Concept


@app.command()
def erase(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erased model.")],
    concepts: Annotated[
        list[str] | None, typer.Argument(help="Folders, descriptions or embedded names.")
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(help="What to erase by its name alone, without pictures; may be repeated."),
    ] = None,
    model: options.Model = "embedded",
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    dtype: options.Dtype = "float32",
    method: Annotated[
        ErasureMethod,
        typer.Option(
            help="A closed-form edit of what reads text, or fine-tuning against the model's own "
            "knowledge: of cross-attention, of all but it, or of everything."
        ),
    ] = "uce",
    preserve: Annotated[
        list[str] | None,
        typer.Option(help="For uce: a concept or a caption to keep; may be repeated."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="For uce: a file of ordinary captions to keep; default those shipped."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of the concept, where nothing else says it.")
    ] = None,
    target: Annotated[str, typer.Option(help="Words that take the place of a name.")] = "",
    technique: Annotated[
        Technique,
        typer.Option(help="For uce: move values to the target's, or also remove the old ones."),
    ] = "replace",
    steps: Annotated[int | None, typer.Option(help="For esd: training steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="For esd: learning rate.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For esd: any other setting."),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Erase concepts from a model."""
    from mima.storage.output import check_folder

    check_folder(output, overwrite=overwrite)
    options.check_named(model, device=device)
    named = {"steps": steps, "learning_rate": lr}
    given = options.given_settings(named, settings)
    if method == "uce" and given:
        raise MimaError(f"method uce has no setting {min(given)}; it is a closed form")
    if method != "uce" and (preserve or captions or technique != "replace"):
        raise MimaError(
            f"--preserve, --captions and --technique are for method uce, not for {method}"
        )
    if not concepts and not words:
        raise MimaError("erase: give concepts, or --words")
    erased: list[Concept | str] = [*(words or [])]
    if concepts:
        erased += options.described_concepts(concepts, {} if prompt is None else {"prompt": prompt})
    elif prompt is not None:
        raise MimaError("--prompt says something about a concept; --words are their own prompt")

    # imports that take seconds, once the arguments are checked
    from dataclasses import asdict

    from mima.concepts.reading import load_concepts
    from mima.console import progress, say
    from mima.erasure import VARIANTS
    from mima.erasure import erase as run_erase
    from mima.families import family_of
    from mima.release.repository import ErasedModel
    from mima.settings import checked
    from mima.storage.output import fresh_folder
    from mima.training.captions import ordinary_captions, warn_of_emoji

    source = options.model_source(model, revision, variant, single_file_config)
    if method != "uce":
        preset = VARIANTS[method]
        esd = checked(type(preset), f"method {method}", asdict(preset) | {"seed": seed, **given})
        pipeline = options.open_pipeline(source, dtype, device)
        with progress() as bars:
            task = bars.add_task(f"erasing by {method}", total=esd.steps, note="")
            result = esd.erase(
                pipeline,
                erased,
                target=target,
                on_step=lambda step, loss: bars.update(
                    task, completed=step, note=f"loss {loss:.3f}"
                ),
            )
        said: dict[str, Any] = {"settings": asdict(esd)}
    else:
        kept: list[str | Concept] = [*ordinary_captions(captions)]
        for item in preserve or []:
            kept += load_concepts(item) if _names_concepts(item) else [item]
        pipeline = options.open_pipeline(source, dtype, device)
        family_of(pipeline)
        warn_of_emoji(pipeline, captions)
        result = run_erase(pipeline, erased, preserve=kept, target=target, technique=technique)
        said = {"technique": technique}
    named_prompts = [
        (one, one) if isinstance(one, str) else (one.name, one.prompt) for one in erased
    ]
    said = {"method": method, "target": target, **said}
    with fresh_folder(output, overwrite=overwrite) as staging:
        ErasedModel(result, pipeline, source, named_prompts, said).save_pretrained(staging)
    say(f"erased {', '.join(name for name, _ in named_prompts)}: {output}")


def _names_concepts(item: str) -> bool:
    from mima.concepts import embedded_names

    # a group of a list of concepts is named behind its file
    named = Path(item).exists() or Path(item.rpartition("#")[0]).is_file()
    return named or item in embedded_names()
