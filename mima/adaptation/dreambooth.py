"""DreamBooth: the denoiser is fine-tuned, or LoRA adapters on it with the same recipe."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mima.adaptation.base import Adaptation, Injection, require_full_precision
from mima.adaptation.lora import LoRA
from mima.concepts import Concept
from mima.errors import MimaError, nearest
from mima.families import family_of
from mima.families.pipelines import Pipeline, with_modules


@dataclass(frozen=True, kw_only=True)
class DreamBooth(Adaptation):
    """Fine-tune the weights of the denoiser; with `prior_weight=1`, with prior preservation.

    After Ruiz et al., arXiv 2208.12242; the text encoder is frozen. `Run.save` writes the denoiser
    as a diffusers model folder (`unet/`), for `UNet2DConditionModel.from_pretrained`.
    """

    method: ClassVar[str] = "dreambooth"

    steps: int = 1000
    learning_rate: float = 5e-6
    frozen: tuple[str, ...] = ()
    """Names of the denoiser's parameters that are not trained."""

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse half precision, too, and names of nothing, or of everything, in `frozen`."""
        super().check(pipeline, concept)
        require_full_precision(pipeline, self.method)
        names = [name for name, _ in family_of(pipeline).denoiser.named_parameters()]
        for name in self.frozen:
            if name not in names:
                raise MimaError(
                    f"frozen: the denoiser has no parameter {name}; {nearest(name, names)}"
                )
        if len(set(self.frozen)) == len(names):
            raise MimaError("frozen: names every parameter of the denoiser; nothing is trained")

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Copy the denoiser and free all of it, but for what is `frozen`."""
        family = family_of(pipeline)
        name = family.denoiser_name
        denoiser: Any = copy.deepcopy(family.denoiser).requires_grad_(True)
        parameters = dict(denoiser.named_parameters())
        for parameter in set(self.frozen):
            parameters.pop(parameter).requires_grad_(False)

        def save(folder: Path) -> None:
            denoiser.save_pretrained(folder / name)

        return Injection(
            pipeline=with_modules(pipeline, **{name: denoiser}),
            parameters=list(parameters.values()),
            save=save,
        )


@dataclass(frozen=True, kw_only=True)
class DreamBoothLoRA(LoRA):
    """LoRA trained as DreamBooth is, with prior preservation."""

    method: ClassVar[str] = "dreambooth-lora"

    prior_weight: float = 1.0
