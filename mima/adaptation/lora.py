"""LoRA on the denoiser's attention, as diffusers' text-to-image script trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from mima.adaptation.base import Adaptation, Injection
from mima.adapters.mixed_batch import ADAPTER
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import component_name, shared_copy, with_modules


@dataclass(frozen=True, kw_only=True)
class LoRA(Adaptation):
    """Text-to-image LoRA through peft; only the adapter is trained, the text encoder is frozen.

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
    """Endings of the names of the adapted layers; None means every attention projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"LoRA: rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must lie in [0, 1), got {self.dropout}")
        if self.target_modules == ():
            raise ValueError("LoRA: target_modules is empty")

    def inject(self, pipeline: Any, concept: Concept) -> Injection:
        """Put a fresh adapter into a denoiser that shares the pipeline's weights."""
        family = family_of(pipeline)
        if getattr(family.denoiser, "peft_config", None):
            raise MimaError(
                "model: adapters are loaded already; fuse_lora() and unload_lora_weights() first"
            )
        name = component_name(pipeline, family.denoiser)
        denoiser: Any = shared_copy(family.denoiser)
        targets = self.target_modules or [
            target.removesuffix(".weight") for target in family.lora_targets()
        ]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            init_lora_weights="gaussian",
            target_modules=list(targets),
        )
        devices = [family.device] if family.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            try:
                if hasattr(denoiser, "add_adapter"):
                    denoiser.add_adapter(config, adapter_name=ADAPTER)
                else:
                    inject_adapter_in_model(config, denoiser, ADAPTER)
            except ValueError as error:
                raise MimaError(f"lora: {error}") from error
        parameters = [weight for weight in denoiser.parameters() if weight.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        adapted = with_modules(pipeline, **{name: denoiser})

        def save(folder: Path) -> None:
            # peft keeps a set, whose order differs between processes
            config.target_modules = sorted(config.target_modules or ())
            layers = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
            if name == "unet":
                # the names that other programs know, too; transformers' files keep peft's
                layers = convert_state_dict_to_diffusers(layers)
            if hasattr(adapted, "save_lora_weights"):
                adapted.save_lora_weights(
                    folder,
                    **{
                        f"{name}_lora_layers": layers,
                        f"{name}_lora_adapter_metadata": config.to_dict(),
                    },
                )
            else:
                config.save_pretrained(str(folder))
                prefixed = {f"base_model.model.{key}": value for key, value in layers.items()}
                save_file(prefixed, folder / SAFETENSORS_WEIGHTS_NAME)

        return Injection(pipeline=adapted, parameters=parameters, save=save)
