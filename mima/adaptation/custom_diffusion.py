"""Custom Diffusion: cross-attention keys and values, and a new word where the concept has one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from mima.adaptation.base import Adaptation, Injection, require_full_precision
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of
from mima.families.new_words import add_word, check_token
from mima.families.pipelines import Pipeline, with_modules
from mima.storage.names import CUSTOM_DIFFUSION_FILE


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion(Adaptation):
    """Fine-tune the weights that read text, and the embedding of `concept.token` if it has one.

    After Kumari et al., arXiv 2212.04488, without its resizing of the pictures. `Run.save` writes
    `pytorch_custom_diffusion_weights.safetensors` for `unet.load_attn_procs(folder,
    weight_name=..., _pipeline=pipeline)`, which without `_pipeline` loads nothing under diffusers
    0.42, and, for a new word, a file for `load_textual_inversion`. Of a transformer, mima alone
    reads the weights back. The published command's `--scale_lr` multiplies the rate by the pictures
    per step of all processes, and by 2 with prior preservation; nothing does so here: set
    `learning_rate` to 4e-5 for it.
    """

    method: ClassVar[str] = "custom-diffusion"

    learning_rate: float = 1e-5
    batch_size: int = 2

    def check(self, pipeline: Pipeline, concept: Concept) -> None:
        """Refuse half precision, too, other attention, and words that cannot be added."""
        super().check(pipeline, concept)
        require_full_precision(pipeline, self.method)
        denoiser = family_of(pipeline).denoiser
        if not hasattr(denoiser, "attn_processors"):
            raise MimaError(
                f"model: custom-diffusion needs attention processors that read text, which "
                f"{type(denoiser).__name__} lacks"
            )
        if concept.token is not None:
            check_token(pipeline, concept)

    def inject(self, pipeline: Pipeline, concept: Concept) -> Injection:
        """Copy the denoiser, free its text projections, and add the word."""
        family = family_of(pipeline)
        denoiser: Any = copy.deepcopy(family.denoiser).requires_grad_(False)
        weights = {
            name: denoiser.get_parameter(name).requires_grad_(True)
            for name in family.text_projections()
        }
        name = family.denoiser_name

        def save(folder: Path) -> None:
            save_file(_attention_state(denoiser, weights), folder / CUSTOM_DIFFUSION_FILE)

        if concept.token is None:
            return Injection(
                pipeline=with_modules(pipeline, **{name: denoiser}),
                parameters=list(weights.values()),
                save=save,
            )
        worded, word = add_word(pipeline, concept)

        def save_both(folder: Path) -> None:
            save(folder)
            word.save(folder, worded)

        return Injection(
            pipeline=with_modules(worded, **{name: denoiser}),
            parameters=[*weights.values(), word.embedding],
            save=save_both,
            encode_prompts=word.encode,
            after_step=lambda: word.commit(worded),
        )


def _attention_state(denoiser: Any, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The trained weights under the names that diffusers gives custom attention processors."""
    # a processor without weights is an empty entry; diffusers replaces all processors or none
    state = {name: torch.zeros(0) for name in denoiser.attn_processors}
    for name, weight in weights.items():
        attention, projection, _ = name.rsplit(".", 2)
        processor = f"{attention}.processor"
        state.pop(processor, None)
        key = f"{processor}.{projection}_custom_diffusion.weight"
        state[key] = weight.detach().cpu().contiguous()
    return state
