"""The commands. Each body imports what it needs, so that `mima --help` is instant."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mima._version import __version__
from mima.errors import MimaError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mima.adaptation import Adaptation
    from mima.concepts import Concept
    from mima.config import ImmunizeRun
    from mima.families import ModelSource

USAGE_ERROR, UNEXPECTED_ERROR, INTERRUPTED = 2, 1, 130


class _Commands(TyperGroup):
    """Turns exceptions into messages and exit codes, for every command alike."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # people append --debug to the command that has just failed
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from mima.console import show_error

        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        # typer ends quietly where `| head` has read enough
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        # this is the outermost frame: whatever went wrong is reported here and nowhere else
        except Exception as error:
            # usage errors know how to show themselves
            if hasattr(error, "format_message"):
                raise
            if debug:
                traceback.print_exc()
            if _is_ours(error):
                show_error(str(error))
                raise typer.Exit(USAGE_ERROR) from error
            hint = "" if debug else "\nThis should not happen; --debug shows where it did."
            show_error(f"{type(error).__name__}: {error}{hint}")
            raise typer.Exit(UNEXPECTED_ERROR) from error


def _is_ours(error: Exception) -> bool:
    """Whether an exception is mima's own word about its input, not an accident further down."""
    if isinstance(error, MimaError):
        return True
    if not isinstance(error, (ValueError, TypeError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    module = str(frames[-1][0].f_globals.get("__name__", ""))
    return module == "mima" or module.startswith("mima.")


app = typer.Typer(
    name="mima",
    cls=_Commands,
    help="Immunize text-to-image models against fine-tuning on many concepts at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Option(
        help="A diffusers folder, a .safetensors file, a hub id, or 'embedded'.", show_default=True
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Of a model of the hub: a branch, tag or commit.")
]
Variant = Annotated[
    str | None, typer.Option(help="Of the model's files, where there are several: fp16.")
]
SingleFileConfig = Annotated[
    str | None,
    typer.Option(
        help="For a .safetensors model where the hub cannot be reached: a folder of a model of the "
        "same architecture."
    ),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option(help="Of the model's weights; what is written has it, too."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results.")]
Seed = Annotated[int, typer.Option(min=0, help="Seeds every random draw.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]

OnlyDelta = Annotated[
    bool, typer.Option("--delta", help="Write only the changed weights; see mima apply.")
]


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mima {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and other libraries' messages.")
    ] = False,
) -> None:
    from mima.console import quiet_third_parties

    if not debug:
        quiet_third_parties()


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "mima-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run, in 90 seconds.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Immunize the embedded model against two concepts, attack it, and print what held."""
    from mima.output import check_folder

    check_folder(output, overwrite=overwrite)

    # only now what takes seconds to import
    from mima.console import stdout
    from mima.demo import run_demo, show

    stdout().print(show(run_demo(output, quick=quick, seed=seed, overwrite=overwrite)))
    stdout().print(f"pictures, curves and all numbers: {output}")


@app.command()
def immunize(
    config: Annotated[Path, typer.Argument(help="A YAML file: model, concepts, settings.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the immunized model.")
    ] = None,
    task: Annotated[
        Literal["relearn", "personalize"] | None,
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
    from mima.concepts import load_concepts
    from mima.config import load_config
    from mima.console import stderr, stdout
    from mima.output import check_folder

    run = _with_settings(load_config(config), settings or [], task, erased)
    folder = output or (run.output and config.parent / run.output)
    if folder is None:
        raise MimaError(f"nowhere to write: give --output, or output in {config}")
    check_folder(folder, overwrite=overwrite)
    concepts = load_concepts(run.concepts, base=config.parent)

    # only now what takes seconds to import
    from mima.ascent import default_folder
    from mima.immunize import immunize as run_immunize
    from mima.progress import ProgressBar

    def beside(model: str) -> str:
        return str(config.parent / model) if (config.parent / model).exists() else model

    structure = single_file_config
    if structure is None and run.single_file_config is not None:
        structure = beside(run.single_file_config)
    source = _source(beside(run.model), revision or run.revision, variant or run.variant, structure)
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
                device=None if device is None else _device(device),
                callbacks=[bar],
            )
    except KeyboardInterrupt:
        if default_folder(folder).exists():
            stderr().print("what was done is kept; the same command with --resume goes on from it")
        raise
    # torchrun's other processes stay silent
    if os.environ.get("RANK", "0") == "0":
        stdout().print(f"immunized against {', '.join(result.concepts)}: {folder}")


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
    import shutil
    from dataclasses import asdict

    from mima.adaptation import LoRA, Together, configure
    from mima.ascent import claim, default_folder, describe_run
    from mima.checkpoint import CheckpointFolder
    from mima.console import command, progress, stderr, stdout
    from mima.evaluation.sampling import Sampler
    from mima.families import family_of, load_pipeline
    from mima.learning import SAMPLES, learn
    from mima.output import check_folder, fresh_folder

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
    given = _given(options, settings)
    chosen = configure(method, {"seed": seed, **given})
    told = {
        "prompt": prompt,
        "class_prompt": class_prompt,
        "class_images": class_images,
        "token": token,
        "initializer": initializer,
    }
    learned = _described(concept, {key: said for key, said in told.items() if said is not None})
    if len(learned) > 1 and not isinstance(chosen, LoRA):
        raise MimaError(
            f"method {method} learns one concept at a time, got {len(learned)} "
            f"({', '.join(one.name for one in learned)}); lora and dreambooth-lora learn several"
        )
    names = [_slug(one.name) for one in learned]
    folder = output or Path(f"{'-'.join(names)[:80]}-{method}")
    check_folder(folder, overwrite=overwrite)

    source = _source(model, revision, variant, single_file_config)
    pipeline = load_pipeline(source, dtype=_dtype(dtype), device=_device(device))
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
            _write_down(
                inside, "adapt", source, [run.concept], method=method, settings=asdict(chosen)
            )
        if len(runs) > 1:
            _write_down(staging, "adapt", source, learned, method=method, settings=asdict(chosen))
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


@app.command()
def erase(
    concepts: Annotated[list[str], typer.Argument(help="Folders, descriptions or embedded names.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erased model.")],
    model: Model = "embedded",
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    dtype: Dtype = "float32",
    method: Annotated[
        Literal["uce", "esd-x", "esd-u", "esd-full"],
        typer.Option(
            help="A closed-form edit of what reads text, or fine-tuning against the model's own "
            "knowledge: of cross-attention, of all but it, or of everything."
        ),
    ] = "uce",
    preserve: Annotated[
        list[str] | None,
        typer.Option(help="For uce: a concept or a caption to keep; may be repeated."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of the concept, where nothing else says it.")
    ] = None,
    target: Annotated[str, typer.Option(help="Words that take the place of a name.")] = "",
    technique: Annotated[
        Literal["replace", "tensor"],
        typer.Option(help="For uce: move values to the target's, or also remove the old ones."),
    ] = "replace",
    steps: Annotated[int | None, typer.Option(help="For esd: training steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="For esd: learning rate.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For esd: any other setting."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Erase concepts from a model."""
    from dataclasses import asdict

    from mima.concepts import load_concepts
    from mima.config import checked
    from mima.console import progress, stdout
    from mima.erasure import VARIANTS
    from mima.erasure import erase as run_erase
    from mima.families import load_pipeline
    from mima.output import check_folder, fresh_folder
    from mima.problem import ordinary_captions
    from mima.saving import save_pipeline

    check_folder(output, overwrite=overwrite)
    options = {"steps": steps, "learning_rate": lr}
    given = _given(options, settings)
    if method == "uce" and given:
        raise MimaError(f"method uce has no setting {min(given)}; it is a closed form")
    if method != "uce" and (preserve or technique != "replace"):
        raise MimaError(f"--preserve and --technique are for method uce, not for {method}")
    erased = _described(concepts, {} if prompt is None else {"prompt": prompt})
    source = _source(model, revision, variant, single_file_config)
    if method != "uce":
        preset = VARIANTS[method]
        esd = checked(type(preset), f"method {method}", asdict(preset) | {"seed": seed, **given})
        pipeline = load_pipeline(source, dtype=_dtype(dtype), device=_device(device))
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
        kept: list[str | Concept] = [*ordinary_captions(None)]
        for item in preserve or []:
            kept += load_concepts(item) if _names_concepts(item) else [item]
        pipeline = load_pipeline(source, dtype=_dtype(dtype), device=_device(device))
        result = run_erase(pipeline, erased, preserve=kept, target=target, technique=technique)
        said = {"technique": technique}
    with fresh_folder(output, overwrite=overwrite) as staging:
        save_pipeline(result, staging)
        _write_down(staging, "erase", source, erased, method=method, target=target, **said)
    stdout().print(f"erased {', '.join(concept.name for concept in erased)}: {output}")


@app.command()
def merge(
    adapters: Annotated[
        list[Path], typer.Argument(help="What mima adapt wrote, LoRA files, fine-tuned models.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    model: Model = "embedded",
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    dtype: Dtype = "float32",
    method: Annotated[
        Literal["projected", "weighted"],
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
        float, typer.Option(min=0, help="Softness of the constraint; 0 is hard.")
    ] = 1e-4,
    delta: OnlyDelta = False,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge several adapters of one model into it."""
    from mima.output import check_folder

    check_folder(output, overwrite=overwrite)
    shares = None if weights is None else _numbers("weights", weights)

    # only now what takes seconds to import
    from rich.table import Table

    from mima.adapter_merge import merge_adapters
    from mima.console import stdout
    from mima.output import fresh_folder

    merged = merge_adapters(
        _source(model, revision, variant, single_file_config),
        adapters,
        weights=shares,
        method=method,
        prompts=prompt or None,
        captions=captions,
        lam=lam,
        seed=seed,
        device=_device(device),
        dtype=_dtype(dtype),
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
    stdout().print(f"merged {', '.join(merged.adapters)}: {output}")


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(help="A folder or file that --delta wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the whole model.")],
    model: Model = "embedded",
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Apply a delta to its base model, and write the whole model."""
    from mima.output import check_folder

    check_folder(output, overwrite=overwrite)

    # only now what takes seconds to import
    from mima.console import stdout
    from mima.families import load_pipeline
    from mima.output import fresh_folder
    from mima.saving import load_delta, read_delta, save_pipeline

    origin = read_delta(delta).origin
    source = _source(model, revision, variant, single_file_config)
    whole = load_delta(load_pipeline(source, dtype=_dtype(dtype)), delta)
    with fresh_folder(output, overwrite=overwrite) as staging:
        save_pipeline(whole, staging)
        _write_down(staging, "apply", source, [], delta=str(delta), origin=origin)
    stdout().print(f"applied {delta} to {source.label}: {output}")


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
    from mima.console import stdout
    from mima.output import OUR_FILES

    if not folder.is_dir():
        raise MimaError(f"{folder} is not a folder")
    if not any((folder / name).is_file() for name in OUR_FILES):
        raise MimaError(f"{folder} holds nothing that mima wrote: none of {', '.join(OUR_FILES)}")

    # only now what takes a second to import
    from mima.hub import Repository

    address = Repository(repo_id, private=private).upload(
        folder, revision=revision, create_pr=create_pr, commit_message=message
    )
    stdout().print(f"published {folder}: {address}")


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Model = "embedded",
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    dtype: Dtype = "float32",
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", "--lora", help="What mima adapt wrote, a LoRA file, a fine-tuned model."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png; by default the prompt's words.")
    ] = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; by default the model's.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale; 1 is none.")] = 4.0,
    num: Annotated[int, typer.Option(min=1, help="Pictures, with seeds SEED, SEED+1, ...")] = 1,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw pictures."""
    from mima.adapter_merge import merge_adapters
    from mima.console import progress, stdout
    from mima.evaluation.sampling import Sampler
    from mima.families import family_of, load_pipeline
    from mima.output import check_file

    if not prompt.strip():
        raise MimaError("the prompt is empty")
    path = output or Path(f"{_slug(prompt)}.png")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise MimaError(f"output {path}: expected a file ending in .png, .jpg or .webp")
    paths = [path]
    if num > 1:
        paths = [path.with_stem(f"{path.stem}-{number}") for number in range(1, num + 1)]
    for one in paths:
        check_file(one, overwrite=overwrite)
    source = _source(model, revision, variant, single_file_config)
    pipeline = load_pipeline(source, dtype=_dtype(dtype), device=_device(device))
    # refuses what does not fit
    size = family_of(pipeline, resolution=resolution).resolution
    if adapter is not None:
        pipeline = merge_adapters(
            pipeline, [adapter], weights=[1.0], method="weighted", device=_device(device)
        ).pipeline
    seeds = range(seed, seed + num)
    with progress() as bars:
        task = bars.add_task("drawing", total=num, note="")
        sampler = Sampler(steps=steps, guidance=guidance, size=size)
        (row,) = sampler(
            pipeline,
            [prompt],
            seeds,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    for one, picture in zip(paths, row, strict=True):
        picture.save(one)
        stdout().print(str(one))


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
        str, typer.Option(help="quick (minutes), standard (as published), adversarial (all).")
    ] = "quick",
    similarity: Annotated[
        list[str] | None,
        typer.Option(help="clip, dino, lpips, embedded, a hub id or a folder; may be repeated."),
    ] = None,
    protocol: Annotated[
        Literal["standard", "published"],
        typer.Option(help="How pictures are prepared; 'published' repeats IMMA's script."),
    ] = "standard",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Attacks at a time; by default one per core.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Label of the run.")] = None,
    method: Annotated[
        Literal["none", "imma", "joint", "compose", "mima"] | None,
        typer.Option(help="How it was immunized; by default what its mima.json says."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one: --set seeds=[0,1]"),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="A file of ordinary prompts, one per line.")
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    single_file_config: SingleFileConfig = None,
    immunized_revision: Annotated[
        str | None, typer.Option(help="--revision, of the immunized model.")
    ] = None,
    immunized_variant: Annotated[
        str | None, typer.Option(help="--variant, of the immunized model.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Attack a model before and after immunization; run again, it goes on where it stopped."""
    from mima.concepts import load_concepts
    from mima.console import command, progress, stderr, stdout

    found = load_concepts(concepts)
    kept = load_concepts(others) if others else []

    # only now what takes seconds to import
    from mima.evaluation import evaluate as run_evaluate

    given = _given({}, settings)
    default = "embedded" if original == "embedded" else "clip"
    with progress() as bars:
        task = bars.add_task("attacking", total=None, note="")

        def show(done: int, total: int, finished: str) -> None:
            bars.update(task, completed=done, total=total)
            if finished:
                bars.update(task, note=finished)

        try:
            result = run_evaluate(
                _source(original, revision, variant, single_file_config),
                _source(immunized, immunized_revision, immunized_variant, None),
                found,
                output=output,
                others=kept,
                preset=preset,
                settings=given,
                similarities=similarity or [default],
                protocol=protocol,
                processes=processes,
                device=None if device is None else _device(device),
                name=name,
                method=method or _method_of(immunized),
                captions=captions,
                overwrite=overwrite,
                progress=show,
            )
        except KeyboardInterrupt:
            stderr().print("finished attacks are kept; the same command goes on from them")
            raise
    for label, summary in result.summary.items():
        worst, mean = summary.worst_attack, summary.msgr
        if worst.sgr is None or mean.mean is None:
            stdout().print(f"{label}: no attack could be compared")
            continue
        stdout().print(
            f"{label}: worst attack SGR {worst.sgr:+.3f} ({worst.attack}); mean over concepts "
            f"{mean.mean:+.3f} (95% over seeds: {mean.low:+.3f} to {mean.high:+.3f})"
        )
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
            help="The page; report.html in the folder, or for several, here.",
        ),
    ] = None,
) -> None:
    """Put evaluations on one self-contained page, with every figure beside it."""
    from mima.console import stdout
    from mima.report import write_report

    stdout().print(str(write_report(folders, output)))


@app.command()
def doctor() -> None:
    """Show versions, devices, and which backend serves each operator, or why not."""
    from mima.doctor import show

    show()


def _with_settings(
    run: ImmunizeRun, settings: Sequence[str], task: str | None, erased: Path | None
) -> ImmunizeRun:
    """Apply `--set key=value`; a key that only ImmunizeConfig has needs no "immunize." before.

    A task's recipe lies beneath what the file and `--set` say; where the concepts are erased
    already, it erases nothing.
    """
    from mima.config import ImmunizeConfig, ImmunizeRun, parse_config, set_nested, with_recipe

    raw = run.model_dump(exclude_unset=True)
    known = {*ImmunizeRun.model_fields, *ImmunizeConfig.model_fields}
    for parts, value in map(_setting, settings):
        name = ".".join(parts)
        if parts[0] not in known:
            raise MimaError(f"--set {name}: unknown setting; {nearest(parts[0], known)}")
        inside = "" if parts[0] in ImmunizeRun.model_fields else "immunize."
        set_nested(raw, inside + name, value)
    if task is not None:
        own = raw.get("immunize", {})
        if erased is not None or raw.get("erased") is not None:
            own = {"erase_first": False, **own}
        raw["immunize"] = with_recipe(task, own)
    return parse_config(ImmunizeRun, raw, source="--set") if settings or task else run


def _source(
    model: str, revision: str | None, variant: str | None, config: str | None
) -> ModelSource:
    from mima.families import ModelSource

    return ModelSource(model, revision, variant, config)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _plain(adaptation: Adaptation) -> dict[str, Any]:
    """A method and its settings, as a JSON file gives them back."""
    import json
    from dataclasses import asdict

    plain: dict[str, Any] = json.loads(json.dumps(asdict(adaptation)))
    return {"method": adaptation.method, **plain}


def _given(options: dict[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """Options that were given, and what `--set` says over them."""
    given = {name: value for name, value in options.items() if value is not None}
    return given | {".".join(parts): value for parts, value in map(_setting, settings or [])}


def _setting(text: str) -> tuple[list[str], Any]:
    """Split `--set a.b=value` into its key's parts and its value, read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise MimaError(f"--set {text}: expected KEY=VALUE, as in --set lower.steps=8")
    try:
        return parts, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise MimaError(f"--set {text}: {value!r} is not a value: {error}") from error


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise MimaError(f"--{option} {text!r}: expected numbers, as in 0.5,0.25,0.25") from None


def _described(sources: list[str], told: dict[str, Any]) -> list[Concept]:
    """The concepts that sources describe, with what the command line says about a single one."""
    from dataclasses import replace

    from mima.concepts import Concept, load_concepts

    if not told:
        return load_concepts(sources)
    if len(sources) == 1 and Path(sources[0]).is_dir():
        return [Concept.from_folder(sources[0], **told)]
    found = load_concepts(sources)
    if len(found) > 1:
        raise MimaError(
            f"{', '.join(f'--{key}' for key in told)}".replace("_", "-")
            + f" says something about one concept, {' '.join(sources)} describes {len(found)} "
            f"({', '.join(concept.name for concept in found)})"
        )
    return [replace(found[0], **told)]


def _write_down(
    folder: Path,
    command: str,
    source: ModelSource,
    concepts: Sequence[Concept],
    **settings: Any,
) -> None:
    """Say in `mima.json` where a folder came from; it also marks the folder as mima's own."""
    import json

    origin = {
        "command": command,
        "version": __version__,
        "model": str(source.model),
        **source.options,
        "concepts": [concept.name for concept in concepts],
        "prompts": [concept.prompt for concept in concepts],
        **settings,
    }
    text = json.dumps(origin, indent=2, ensure_ascii=False)
    (folder / "mima.json").write_text(text + "\n", encoding="utf-8")


def _method_of(model: str) -> Any:
    """How a folder that `mima immunize` wrote was immunized, or None."""
    import json

    path = Path(model) / "mima.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("config", {}).get("method")
    except (OSError, ValueError, AttributeError) as error:
        raise MimaError(f"cannot read {path}: {error}") from error


def _names_concepts(item: str) -> bool:
    from mima.concepts import embedded_names

    return Path(item).exists() or item in embedded_names()


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MimaError(f"device {name!r} is unknown; {nearest(name, ['cpu', 'cuda'])}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MimaError(f"device {name}: this machine has no usable CUDA device")
    return str(device)


def _slug(text: str) -> str:
    """A file name from words."""
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-")[:80] or "picture"
