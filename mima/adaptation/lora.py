"""LoRA on the denoiser's attention, as diffusers' text-to-image script trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mima.adaptation.base import Adaptation, Injection
from mima.adaptation.copies import component_name, shared_copy, with_modules
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoRA(Adaptation):
    """Text-to-image LoRA through peft; only the adapter is trained, the text encoder is frozen.

    The defaults are those of the published immunization experiments (rank 4, learning rate 1e-4).
    `Run.save` writes a file for diffusers' `load_lora_weights`.
    """

    method: ClassVar[str] = "lora"

    rank: int = 4
    """Rank of the update BA of each adapted weight."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None means alpha = rank."""
    dropout: float = 0.0
    """Dropout before A."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the adapted layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"LoRA: rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must lie in [0, 1), got {self.dropout}")
        if not self.target_modules:
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
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            init_lora_weights="gaussian",
            target_modules=list(self.target_modules),
        )
        devices = [family.device] if family.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            denoiser.add_adapter(config, adapter_name=ADAPTER)
        parameters = [weight for weight in denoiser.parameters() if weight.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        adapted = with_modules(pipeline, **{name: denoiser})

        def save(folder: Path) -> None:
            layers = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
            adapted.save_lora_weights(
                folder,
                **{
                    f"{name}_lora_layers": convert_state_dict_to_diffusers(layers),
                    f"{name}_lora_adapter_metadata": config.to_dict(),
                },
            )

        return Injection(pipeline=adapted, parameters=parameters, save=save)
