"""LoRA on the denoiser's attention, as diffusers' text-to-image script trains it, and beyond."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from mima.adaptation.base import Adaptation, Injection, encode_with_graph
from mima.adapters.adapter import check_unadapted
from mima.choices import MOST_AT_ONCE
from mima.concepts import Concept
from mima.errors import MimaError, bounded, check_settings
from mima.families import Family, family_of
from mima.families.pipelines import Pipeline, names_for_all, readers, shared_copy, with_modules

TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Attention projections of a CLIP text encoder."""


@dataclass(frozen=True, kw_only=True)
class LoRA(Adaptation):
    """Text-to-image LoRA through peft; only the adapter is trained, on the denoiser by default.

    The defaults are those of the published immunization experiments (rank 4, learning rate 1e-4).
    `Run.save` writes a file for diffusers' `load_lora_weights`; for pipelines that have none
    (PixArt), a folder for peft's `PeftModel.from_pretrained`.
    """

    method: ClassVar[str] = "lora"

    rank: int = 4
    """Rank of the update BA of each adapted weight."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None means alpha = rank."""
    dropout: float = 0.0
    """Dropout before A."""
    target_modules: tuple[str, ...] | None = None
    """Endings of the names of the adapted layers; None means those of ``Family.lora_targets``."""
    convolutions: bool = False
    """Adapt every linear and convolutional layer of the denoiser instead (LoCon), but for grouped
    convolutions, into whose weights peft merges no update."""
    dora: bool = False
    """Train a magnitude for each output of the adapted weights, too, and let the update turn their
    direction alone: DoRA, Liu et al., ICML 2024, arXiv 2402.09353. Those of text encoders are read
    by mima; diffusers leaves them out under transformers 5."""
    text_encoder: bool = False
    """Adapt the attention of the CLIP text encoders, too: of those that the pipeline loads LoRAs
    for, both of SDXL and SD3, the one of Stable Diffusion and Flux."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scaled = self.alpha is None or 0 < self.alpha < math.inf
        checks = {
            "rank": bounded(self.rank, 1, MOST_AT_ONCE),
            "alpha": (scaled, "above 0 and finite"),
        }
        check_settings(self, checks)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must lie in [0, 1), got {self.dropout}")
        if self.target_modules == ():
            raise ValueError("LoRA: target_modules is empty")
        if isinstance(self.target_modules, str):
            raise MimaError(
                f"LoRA: target_modules must be several names, got the text {self.target_modules!r}"
            )
        if self.convolutions and self.target_modules is not None:
            raise ValueError("LoRA: convolutions adapts every layer; leave target_modules out")

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse models with adapters, too, and text encoders that none can be saved for."""
        super().check(pipeline, concept)
        check_unadapted(family_of(pipeline))
        if self.text_encoder and not _text_encoders(pipeline):
            raise MimaError(
                "lora: text_encoder needs a CLIP text encoder that the pipeline loads LoRAs for, "
                f"and this {type(pipeline).__name__} has none"
            )

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Put a fresh adapter into a denoiser that shares the pipeline's weights."""
        family = family_of(pipeline)
        part = family.denoiser_name
        modules: dict[str, Any] = {part: shared_copy(family.denoiser)}
        configs = {part: self._config(self._targets(family))}
        if self.text_encoder:
            for name, encoder in _text_encoders(pipeline).items():
                modules[name] = shared_copy(encoder)
                configs[name] = self._config(TEXT_PROJECTIONS)
        devices = [family.device] if family.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            try:
                for name, module in modules.items():
                    if name == part and hasattr(module, "add_adapter"):
                        module.add_adapter(configs[name])
                    else:
                        inject_adapter_in_model(configs[name], module)
            except ValueError as error:
                raise MimaError(f"lora: {error}") from error
        for config in configs.values():
            # peft makes a set of the list, whose order differs from process to process in files
            config.target_modules = sorted(config.target_modules or ())
        parameters = [
            weight
            for module in modules.values()
            for weight in module.parameters()
            if weight.requires_grad
        ]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        adapted = with_modules(pipeline, **modules)

        def save(folder: Path) -> None:
            states = {name: get_peft_model_state_dict(module) for name, module in modules.items()}
            if not hasattr(adapted, "save_lora_weights"):
                configs[part].save_pretrained(str(folder))
                named = {f"base_model.model.{key}": value for key, value in states[part].items()}
                save_file(named, folder / SAFETENSORS_WEIGHTS_NAME)
                return
            parts: dict[str, Any] = {}
            for name, state in states.items():
                # other programs know diffusers' names of these parts, and peft's of transformers
                known = state if name == "transformer" else _in_diffusers_names(state)
                parts[f"{name}_lora_layers"] = names_for_all(modules[name], known)
                parts[f"{name}_lora_adapter_metadata"] = configs[name].to_dict()
            adapted.save_lora_weights(folder, **parts)

        return Injection(
            pipeline=adapted,
            parameters=parameters,
            save=save,
            encode_prompts=encode_with_graph if self.text_encoder else None,
        )

    def _targets(self, family: Family) -> list[str]:
        """Names, or their endings, of the adapted layers of the denoiser."""
        if self.target_modules is not None:
            return list(self.target_modules)
        if self.convolutions:
            kinds = (torch.nn.Linear, torch.nn.Conv2d)
            return [
                name
                for name, module in family.denoiser.named_modules()
                if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
            ]
        return [target.removesuffix(".weight") for target in family.lora_targets()]

    def _config(self, targets: Sequence[str]) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            init_lora_weights="gaussian",
            use_dora=self.dora,
            target_modules=list(targets),
        )


def _text_encoders(pipeline: Pipeline) -> dict[str, Any]:
    """By name, the CLIP text encoders whose LoRAs the pipeline writes and loads."""
    write = getattr(pipeline, "save_lora_weights", None)
    taken = inspect.signature(write).parameters if write else ()
    return {
        reader.part: reader.encoder
        for reader in readers(pipeline)
        if reader.is_clip and f"{reader.part}_lora_layers" in taken
    }


def _in_diffusers_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA's state under diffusers' names, or peft's where any of its layers has no other.

    diffusers renames attention alone, and skips half of a file that has names of both kinds.
    """
    known: dict[str, Any] = convert_state_dict_to_diffusers(dict(state))
    return dict(state) if any(".lora_A." in name for name in known) else known
