"""`mima adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mima.choices import AdaptationMethod
from mima.cli import options
from mima.cli.base import app
from mima.errors import check_choice, counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mima.adaptation import Run


@app.command()
def adapt(
    concept: Annotated[
        list[str],
        typer.Argument(
            help="A folder of pictures, a description, or an embedded concept. LoRA learns several "
            "at once, each in a file of its own."
        ),
    ],
    model: options.Model = "embedded",
    revision: options.Revision = None,
    variant: options.Variant = None,
    single_file_config: options.SingleFileConfig = None,
    dtype: options.Dtype = "float32",
    method: Annotated[
        str, typer.Option(help=f"How to adapt: {', '.join(get_args(AdaptationMethod))}.")
    ] = "lora",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the adapter, or for one of each concept; by default CONCEPT-METHOD.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of the concept, where nothing else says it.")
    ] = None,
    class_prompt: Annotated[str | None, typer.Option(help="What the concept is one of.")] = None,
    class_images: Annotated[
        Path | None, typer.Option(help="A folder of that class, for prior preservation.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="A new word in the prompt: '<new1>'.")] = None,
    initializer: Annotated[
        str | None, typer.Option(help="The ordinary word that the new word starts from.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; by default the model's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures per step.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank, for LoRA.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches per step, one after another.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory.")
    ] = False,
    use_8bit_adam: Annotated[
        bool, typer.Option("--use-8bit-adam", help="AdamW of bitsandbytes: less memory.")
    ] = False,
    offload_encoders: Annotated[
        bool, typer.Option("--offload-encoders", help="VAE and text encoders wait on the CPU.")
    ] = False,
    fp16_vae: Annotated[
        bool, typer.Option("--fp16-vae", help="Encode the pictures in float16.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="Write a whole model instead of the adapter.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the method."),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(min=0, help="Steps between pictures; by default a fifth of all, 0 for none."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Teach a model a concept, as its owner would, or an attacker."""
    from mima.storage.output import check_folder

    options.check_named(model, device=device)
    check_choice("method", method, get_args(AdaptationMethod))
    if output is not None:
        check_folder(output, overwrite=overwrite, resume=resume)

    named = {
        "steps": steps,
        "learning_rate": lr,
        "resolution": resolution,
        "batch_size": batch_size,
        "rank": rank,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_checkpointing": gradient_checkpointing or None,
        "use_8bit_adam": use_8bit_adam or None,
        "offload_encoders": offload_encoders or None,
        "fp16_vae": fp16_vae or None,
    }
    given = options.given_settings(named, settings)
    told = {
        "prompt": prompt,
        "class_prompt": class_prompt,
        "class_images": class_images,
        "token": token,
        "initializer": initializer,
    }
    learned = options.described_concepts(
        concept, {key: said for key, said in told.items() if said is not None}
    )

    # imports that take seconds, once the arguments are checked
    from mima.adaptation import configure
    from mima.adaptation.resumable import adapt as run_adapt
    from mima.console import command, progress, say, tell
    from mima.settings import set_nested

    within: dict[str, Any] = {"seed": seed}
    for name, value in given.items():
        set_nested(within, name, value)
    chosen = configure(method, within)
    source = options.model_source(model, revision, variant, single_file_config)
    said = ", ".join(one.name for one in learned)
    with progress() as bars:
        task = bars.add_task(f"learning {said}", total=chosen.steps, note="")

        def on_step(runs: Sequence[Run]) -> None:
            losses = " ".join(f"{run.loss:.3f}" for run in runs)
            bars.update(task, completed=runs[0].step, note=f"loss {losses}")

        try:
            done = run_adapt(
                source,
                learned,
                chosen,
                output,
                checkpoint_every=checkpoint_every,
                sample_every=sample_every,
                whole=whole,
                resume=resume,
                overwrite=overwrite,
                dtype=options.torch_dtype(dtype),
                device=device,
                on_step=on_step,
                on_pictures=lambda step, place: tell(f"step {step}: pictures in {place}"),
            )
        except KeyboardInterrupt:
            tell("what was done is kept; the same command with --resume goes on from it")
            raise
    where = done.folders[0] if len(learned) == 1 else done.folders[0].parent
    say(f"learned {said} by {method} in {counted(done.steps, 'step')}: {where}")
    opened = []
    for key, value in source.options.items():
        opened += ["--" + key.replace("_", "-"), value]
    size = [] if resolution is None else ["--resolution", str(resolution)]
    for one, folder in zip(learned, done.folders, strict=True):
        told_to = (
            ["--model", folder, *size]
            if whole
            else ["--model", model, *opened, *size, "--adapter", folder]
        )
        say(f"look: {command('sample', one.prompt, *told_to)}")
