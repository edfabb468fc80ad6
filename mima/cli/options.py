"""Options that several commands have, and how they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mima.choices import DEVICES, LARGEST_ATTACK_SEED, LARGEST_SEED, Precision
from mima.errors import MimaError, check_choice, one_line, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mima.concepts import Concept
    from mima.families import ModelSource

LONGEST_SETTING = 10_000
"""Characters of one ``--set``."""

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
    Precision,
    typer.Option(help="Of the model's weights; what is written has it, too."),
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results.")]

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seeds every random draw.")]

AttackSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_ATTACK_SEED, help="Seeds every random draw.")
]

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]

OnlyDelta = Annotated[
    bool, typer.Option("--delta", help="Write only the changed weights; see mima apply.")
]


def check_named(*models: str, device: str | None = None) -> None:
    """Refuse models and a device that cannot be there, before anything heavy is imported."""
    from mima.storage.inputs import check_model

    for model in models:
        check_model(model)
    if device is not None:
        kind, _, _ = device.partition(":")
        if kind == "gpu":
            raise MimaError(f"device {device!r} is unknown; a GPU is cuda, or cuda:N")
        check_choice("device", kind, DEVICES)


def model_source(
    model: str, revision: str | None, variant: str | None, config: str | None
) -> ModelSource:
    """A model as the options name it."""
    from mima.families import ModelSource

    return ModelSource(model, revision, variant, config)


def open_pipeline(source: ModelSource, dtype: str, device: str | None) -> Any:
    """A model as the options name it, opened in that dtype on that device."""
    from mima.distributed import device_of
    from mima.families import load_pipeline

    return load_pipeline(source, dtype=torch_dtype(dtype), device=device_of(device))


def torch_dtype(name: str) -> torch.dtype:
    """By its name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def given_settings(options: dict[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """Options that were given, and what `--set` says over them."""
    given = {name: value for name, value in options.items() if value is not None}
    return given | dict(map(parse_setting, settings or []))


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `--set a.b=value` into its dotted key and its value, read as YAML."""
    import yaml

    from mima.storage.plain_data import read_yaml

    shown = one_line(text)
    if len(text) > LONGEST_SETTING:
        raise MimaError(f"--set {shown}: longer than {LONGEST_SETTING} characters")
    key, equals, value = text.partition("=")
    name = key.strip()
    if not equals or not all(name.split(".")):
        raise MimaError(f"--set {shown}: expected KEY=VALUE, as in --set lower.steps=8")
    try:
        return name, read_yaml(value)
    except (yaml.YAMLError, MimaError) as error:
        raise MimaError(
            f"--set {shown}: {quoted(value)} is not a value: {one_line(error)}"
        ) from error


def described_concepts(sources: list[str], told: dict[str, Any]) -> list[Concept]:
    """The concepts that sources describe, with what the command line says about a single one."""
    from mima.concepts.reading import load_concepts, num_described

    if told and (number := num_described(sources)) > 1:
        raise MimaError(
            f"{', '.join(f'--{key}' for key in told)}".replace("_", "-")
            + f" says something about one concept, {' '.join(sources)} describes {number}"
        )
    return load_concepts(sources, told=told)
