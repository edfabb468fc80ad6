"""DreamBooth: the denoiser is fine-tuned, or with it the text encoders, or LoRA adapters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mima.adaptation.base import (
    Adaptation,
    Injection,
    encode_with_graph,
    require_full_precision,
)
from mima.adaptation.lora import LoRA
from mima.concepts import Concept
from mima.errors import MimaError, nearest
from mima.families import family_of
from mima.families.pipelines import Pipeline, readers, save_network, with_modules


@dataclass(frozen=True, kw_only=True)
class DreamBooth(Adaptation):
    """Fine-tune the weights of the denoiser; with `prior_weight=1`, with prior preservation.

    After Ruiz et al., arXiv 2208.12242; text is frozen, unless `text_encoder` is set. `Run.save`
    writes what it trains as folders of a diffusers model: `unet/`, for
    `UNet2DConditionModel.from_pretrained`, and `text_encoder/`.
    """

    method: ClassVar[str] = "dreambooth"

    steps: int = 1000
    learning_rate: float = 5e-6
    frozen: tuple[str, ...] = ()
    """Names of the denoiser's parameters that are not trained."""
    text_encoder: bool = False
    """Fine-tune all weights of the CLIP text encoders, too, at the same rate, as diffusers' scripts
    do under `--train_text_encoder`; T5 stays frozen there, and here."""

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse half precision, too, names of nothing, or of everything, and text without CLIP."""
        super().check(pipeline, concept)
        require_full_precision(pipeline, self.method)
        names = [name for name, _ in family_of(pipeline).denoiser.named_parameters()]
        for name in self.frozen:
            if name not in names:
                raise MimaError(
                    f"frozen: the denoiser has no parameter {name}; {nearest(name, names)}"
                )
        if len(set(self.frozen)) == len(names) and not self.text_encoder:
            raise MimaError("frozen: names every parameter of the denoiser; nothing is trained")
        if self.text_encoder and not any(reader.is_clip for reader in readers(pipeline)):
            raise MimaError(
                f"dreambooth: text_encoder needs a CLIP text encoder, and this "
                f"{type(pipeline).__name__} has none"
            )

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Copy what is trained and free all of it, but for what is `frozen`."""
        family = family_of(pipeline)
        trained = {family.denoiser_name: family.denoiser}
        if self.text_encoder:
            trained |= {one.part: one.encoder for one in readers(pipeline) if one.is_clip}
        modules: dict[str, Any] = {
            name: copy.deepcopy(module).requires_grad_(True) for name, module in trained.items()
        }
        for name in self.frozen:
            modules[family.denoiser_name].get_parameter(name).requires_grad_(False)

        def save(folder: Path) -> None:
            for name, module in modules.items():
                save_network(module, folder / name)

        every = [part for module in modules.values() for part in module.modules()]
        return Injection(
            pipeline=with_modules(pipeline, **modules),
            parameters=[
                parameter
                for module in modules.values()
                for parameter in module.parameters()
                if parameter.requires_grad
            ],
            tables=[part.weight for part in every if isinstance(part, torch.nn.Embedding)],
            save=save,
            encode_prompts=encode_with_graph if self.text_encoder else None,
        )


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoRA(LoRA):
    """LoRA trained as DreamBooth is, with prior preservation."""

    method: ClassVar[str] = "dreambooth-lora"

    prior_weight: float = 1.0
