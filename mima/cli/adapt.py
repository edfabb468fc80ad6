"""`mima adapt`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mima.cli.base import app
from mima.cli.options import (
    Device,
    Dtype,
    Model,
    Overwrite,
    Revision,
    Seed,
    SingleFileConfig,
    Variant,
    described_concepts,
    given_settings,
    model_source,
    open_pipeline,
    record,
)
from mima.errors import MimaError

if TYPE_CHECKING:
    from mima.adaptation import Adaptation


@app.command()
def adapt(
    concept: Annotated[
        list[str],
        typer.Argument(
            help="A folder of pictures, a description, or an embedded concept. LoRA learns several "
            "at once, each in a file of its own."
        ),
    ],
    model: Model = "embedded",
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    dtype: Dtype = "float32",
    method: Annotated[str, typer.Option(help="How to adapt.")] = "lora",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the adapter, or for one folder per concept; CONCEPT-METHOD.",
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
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Teach a model a concept, as its owner would, or an attacker."""
    from dataclasses import asdict

    from mima.adaptation import LoRA, Together, configure
    from mima.adaptation.resumable import SAMPLES, learn
    from mima.console import command, progress, stderr, stdout
    from mima.families import family_of
    from mima.sampling import Sampler
    from mima.storage.checkpoint import CheckpointFolder
    from mima.storage.output import check_folder, fresh_folder, slug
    from mima.storage.runs import claim, default_folder, describe_run

    options = {
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
    given = given_settings(options, settings)
    chosen = configure(method, {"seed": seed, **given})
    told = {
        "prompt": prompt,
        "class_prompt": class_prompt,
        "class_images": class_images,
        "token": token,
        "initializer": initializer,
    }
    learned = described_concepts(
        concept, {key: said for key, said in told.items() if said is not None}
    )
    if len(learned) > 1 and not isinstance(chosen, LoRA):
        raise MimaError(
            f"method {method} learns one concept at a time, got {len(learned)} "
            f"({', '.join(one.name for one in learned)}); lora and dreambooth-lora learn several"
        )
    names = [slug(one.name) for one in learned]
    alike = [one.name for one, name in zip(learned, names, strict=True) if names.count(name) > 1]
    if alike:
        raise MimaError(
            f"concepts {', '.join(map(repr, alike))} would be written to one folder; "
            "give them names that differ in letters or digits"
        )
    folder = output or Path(f"{slug('-'.join(names))}-{method}")
    check_folder(folder, overwrite=overwrite)

    source = model_source(model, revision, variant, single_file_config)
    pipeline = open_pipeline(source, dtype, device)
    runs = [chosen.start(pipeline, one) for one in learned]
    learner = runs[0] if len(runs) == 1 else Together(runs)
    kept = CheckpointFolder(default_folder(folder))
    if overwrite and not resume:
        kept.remove()
    weights = dict(family_of(pipeline).denoiser.state_dict())
    claim(kept, describe_run(_plain(chosen), learned, weights), resume=resume)
    if sample_every is None:
        sample_every = -(-chosen.steps // 5)
    with progress() as bars:
        task = bars.add_task(f"learning {', '.join(names)}", total=chosen.steps, note="")

        def on_step() -> None:
            losses = " ".join(f"{run.loss:.3f}" for run in runs)
            bars.update(task, completed=runs[0].step, note=f"loss {losses}")

        try:
            learn(
                learner,
                kept,
                checkpoint_every=checkpoint_every,
                sample_every=sample_every,
                sampler=Sampler(),
                on_step=on_step,
                on_pictures=lambda step, place: stderr().print(f"step {step}: pictures in {place}"),
            )
        except KeyboardInterrupt:
            stderr().print("what was done is kept; the same command with --resume goes on from it")
            raise
    with fresh_folder(folder, overwrite=overwrite) as staging:
        for run, name in zip(runs, names, strict=True):
            inside = run.save(staging / name if len(runs) > 1 else staging)
            record(inside, "adapt", source, [run.concept], method=method, settings=asdict(chosen))
        if len(runs) > 1:
            record(staging, "adapt", source, learned, method=method, settings=asdict(chosen))
        if (kept.path / SAMPLES).is_dir():
            shutil.copytree(kept.path / SAMPLES, staging / SAMPLES)
    kept.remove()
    said = ", ".join(one.name for one in learned)
    stdout().print(f"learned {said} by {method} in {chosen.steps} steps: {folder}")
    for one, name in zip(learned, names, strict=True):
        where = folder / name if len(learned) > 1 else folder
        opened = [part for key, value in source.options.items() for part in (f"--{key}", value)]
        if single_file_config is not None:
            opened += ["--single-file-config", single_file_config]
        if resolution is not None:
            opened += ["--resolution", str(resolution)]
        look = command("sample", one.prompt, "--model", model, *opened, "--adapter", where)
        stdout().print(f"look: {look}")


def _plain(adaptation: Adaptation) -> dict[str, Any]:
    """A method and its settings, as a JSON file gives them back."""
    import json
    from dataclasses import asdict

    plain: dict[str, Any] = json.loads(json.dumps(asdict(adaptation)))
    return {"method": adaptation.method, **plain}
