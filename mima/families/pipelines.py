"""Copies that let an adaptation change a pipeline while the caller's stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)


class Pipeline(Protocol):
    """A diffusers pipeline of any family: what mima asks of one, beside its parts by name."""

    scheduler: Any

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: models, tokenizers, the scheduler; those left out are None."""

    @property
    def device(self) -> torch.device:
        """Where its models are."""

    def to(self, *where: Any) -> Any:
        """The pipeline itself, on another device or in another dtype."""

    def register_modules(self, **modules: Any) -> None:
        """Put parts in their places, and into the configuration that is saved."""

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Write a folder that diffusers opens."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Pictures of prompts."""

    def __getattr__(self, name: str) -> Any:
        """A part by its name, such as ``unet``."""


@dataclass(frozen=True)
class Reader:
    """A text encoder with its tokenizer.

    Attributes:
        number: of the components: ``""``, ``"_2"`` or ``"_3"``.
        name: what files of learned words call it.
        tokenizer: its tokenizer.
        encoder: the text encoder.
    """

    number: str
    name: str
    tokenizer: Any
    encoder: Any

    @property
    def rows(self) -> torch.Tensor:
        """[V, D] embeddings of its tokens."""
        rows: torch.Tensor = self.encoder.get_input_embeddings().weight
        return rows

    @property
    def is_clip(self) -> bool:
        """Whether the text encoder is CLIP's, which training scripts fine-tune; T5 stays frozen."""
        return self.name.startswith("clip")

    @property
    def part(self) -> str:
        """Under which name the pipeline holds the text encoder, such as ``text_encoder_2``."""
        return f"text_encoder{self.number}"


def readers(pipeline: Pipeline) -> list[Reader]:
    """The tokenizers and text encoders of a pipeline, in order."""
    found = []
    for number in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if tokenizer is None or encoder is None:
            continue
        clip = "CLIP" in type(encoder).__name__
        name = ("clip_g" if number else "clip_l") if clip else "t5xxl"
        found.append(Reader(number, name, tokenizer, encoder))
    return found


def networks(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


def networks_beside(pipeline: Pipeline, denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The parts that have weights, by name, but for the denoiser."""
    return {n: m for n, m in networks(pipeline).items() if m is not denoiser}


def tensors(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """All weights and buffers of a pipeline, by part and name; not copies."""
    return {
        f"{part}.{name}": value
        for part, network in networks(pipeline).items()
        for name, value in network.state_dict().items()
    }


def scheduler_settings(pipeline: Pipeline) -> dict[str, Any]:
    """Class and settings of a pipeline's scheduler, without what says where it came from."""
    scheduler = pipeline.scheduler
    own = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {"class": type(scheduler).__name__, **own}


PREFIX = "text_model."
"""Of the names in a ``CLIPTextModel``, but in transformers 5."""


def names_for_all(module: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state, or an adapter's of it, under names that any transformers from 4 on reads.

    transformers 5 names what is in a ``CLIPTextModel`` without the prefix ``text_model.``, which
    transformers 4 takes for missing, and draws random weights with no more than a warning; both
    read the names with the prefix.
    """
    if type(module).__name__ != "CLIPTextModel":
        return dict(state)
    return {PREFIX + name.removeprefix(PREFIX): value for name, value in state.items()}


def save_network(network: Any, folder: Path) -> None:
    """Write a network as a folder of a diffusers model, which any transformers from 4 on reads."""
    state = network.state_dict()
    named = names_for_all(network, state)
    # diffusers' networks take no state
    network.save_pretrained(
        folder, **({} if named.keys() == state.keys() else {"state_dict": named})
    )


def named_weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """All weights and buffers by part and name; those of CLIP are called as in transformers 5."""
    named: dict[str, torch.Tensor] = {}
    for part, network in networks(pipeline).items():
        prefix = PREFIX if type(network).__name__ == "CLIPTextModel" else ""
        state = network.state_dict()
        named |= {f"{part}.{name.removeprefix(prefix)}": value for name, value in state.items()}
    return named


def own_name(pipeline: Pipeline, name: str) -> str:
    """What a pipeline calls a parameter, whichever transformers wrote its name."""
    component, _, inner = name.partition(".")
    module = networks(pipeline).get(component)
    if module is None or type(module).__name__ != "CLIPTextModel":
        return name
    bare = inner.removeprefix(PREFIX)
    named = f"{PREFIX}{bare}"
    known = dict(module.named_parameters())
    return f"{component}.{named if named in known else bare}"


def parameter(pipeline: Pipeline, name: str) -> torch.nn.Parameter:
    """A parameter by component and name, as in ``unet.conv_in.weight``.

    Raises:
        AttributeError: the pipeline has none of that name.
    """
    component, _, inner = name.partition(".")
    found: torch.nn.Parameter = getattr(pipeline, component).get_parameter(inner)
    return found


def shared_copy(module: Module) -> Module:
    """Copy a module's structure around the same weights.

    Adapters can be put into the copy without touching `module`, and the frozen weights exist once.
    The copy's parameters are new objects on the same storage and want no gradient: replace them,
    but do not write into them.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, memo)


def own_networks(pipeline: Pipeline) -> dict[str, Any]:
    """Copies of a pipeline's networks by name, as of ``shared_copy``.

    In a pipeline they can be moved, and their modes changed, while the caller's stay as they are.
    """
    return {name: shared_copy(network) for name, network in networks(pipeline).items()}


def with_modules(pipeline: Pipeline, **modules: Any) -> Pipeline:
    """The pipeline with some modules replaced and a scheduler of its own; the rest is shared.

    Args:
        pipeline: a diffusers pipeline, left as it was.
        modules: replacements by component name, for instance `unet=...`.

    Returns:
        A pipeline of the same class.
    """
    clone = copy.copy(pipeline)
    clone.register_modules(scheduler=copy.deepcopy(pipeline.scheduler), **modules)
    return clone


def with_values(pipeline: Pipeline, values: Mapping[str, torch.Tensor]) -> Pipeline:
    """The pipeline with new values of some parameters; everything else is shared.

    Args:
        pipeline: a diffusers pipeline, left as it was.
        values: by component and name, as in `unet.conv_in.weight`; cast to the old ones' dtype.

    Returns:
        A pipeline of the same class.
    """
    modules: dict[str, torch.nn.Module] = {}
    for name, value in values.items():
        component, _, parameter = name.partition(".")
        if component not in modules:
            modules[component] = shared_copy(getattr(pipeline, component))
        owner_name, _, leaf = parameter.rpartition(".")
        owner = modules[component].get_submodule(owner_name)
        new = value.detach().to(getattr(owner, leaf))
        setattr(owner, leaf, torch.nn.Parameter(new, requires_grad=False))
    return with_modules(pipeline, **modules)
