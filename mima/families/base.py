"""What every model family answers: encode, add noise, predict, name the weights that read text."""

# B = batch, S = tokens, D = text embedding, C H W = latent channels and size

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.func import functional_call

from mima.errors import MimaError

Params = Mapping[str, torch.Tensor]
Conditioning = dict[str, torch.Tensor]


class Family(ABC):
    """One diffusers pipeline seen by the training loops, which know nothing of its kind.

    Subclasses say what differs between families and nothing else.

    Attributes:
        pipeline: the wrapped pipeline; its modules are used as they are, never copied.
        denoiser: the network that is fine-tuned (``unet`` or ``transformer``).
    """

    pipeline_names: ClassVar[tuple[str, ...]]
    _presets: ClassVar[dict[str, str]] = {
        "attention": r"\.attn\d?\.",
        "cross_attention": r"\.attn2\.",
    }

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser: torch.nn.Module = self._denoiser()

    @property
    def device(self) -> torch.device:
        """Device of the denoiser's weights."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side of the square pictures that the model was trained on, in pixels."""

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """Number of noise levels of the training process."""

    @abstractmethod
    def _denoiser(self) -> torch.nn.Module: ...

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pictures to scaled latents (the posterior's mean), without a graph.

        Args:
            pixels: [B, 3, height, width] in [-1, 1]; sides divisible by the VAE's factor.

        Returns:
            [B, C, H, W] in the denoiser's dtype.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts to the denoiser's batch-first keyword tensors, without a graph."""

    @abstractmethod
    def token_embeddings(self, prompt: str) -> torch.Tensor:
        """Return what the text projections read for the real tokens of ``prompt``.

        Returns:
            [S, D]; the end token is kept, the start token and padding are not.
        """

    @abstractmethod
    def text_projections(self) -> list[str]:
        """Names, relative to the denoiser, of the [o, D] weights that read text embeddings."""

    def parameter_names(self, which: str) -> list[str]:
        """Names of the denoiser's parameters in a preset, or matching a regular expression.

        Args:
            which: ``cross_attention``, ``cross_attention_kv``, ``attention``, ``denoiser``, or an
                expression that ``re.search`` is to find in a name.

        Raises:
            MimaError: not a valid expression, or it matches nothing.
        """
        names = [name for name, _ in self.denoiser.named_parameters()]
        if which == "denoiser":
            return names
        if which == "cross_attention_kv":
            return self.text_projections()
        pattern = self._presets.get(which, which)
        try:
            chosen = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            presets = ["cross_attention_kv", "denoiser", *self._presets]
            raise MimaError(
                f"parameters: {which!r} is no valid regular expression ({error}) and "
                f"not one of {', '.join(sorted(presets))}"
            ) from error
        if not chosen:
            raise MimaError(f"parameters: {which!r} matches no parameter of the denoiser")
        return chosen

    def lora_targets(self) -> list[str]:
        """Names of the weights that LoRA adapts by default: every attention projection."""
        return [
            name
            for name in self.parameter_names("attention")
            if re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        ]

    def sample_latents(self, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Pictures of ``prompts`` by the pipeline's own sampler, as scaled latents [B, C, H, W]."""
        size = self.resolution
        latents: torch.Tensor = self.pipeline(
            list(prompts), height=size, width=size, generator=generator, output_type="latent"
        ).images
        return latents.to(self.device, self.dtype)

    @abstractmethod
    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw [batch] noise levels as the family's training does."""

    @abstractmethod
    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process: noisy latents at ``timesteps``."""

    @abstractmethod
    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser is trained to predict (noise, velocity, sample or flow)."""

    @abstractmethod
    def _keywords(self, conditioning: Conditioning) -> dict[str, Any]: ...

    def predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        params: Params | None = None,
    ) -> torch.Tensor:
        """Run the denoiser, differentiable as often as its attention allows.

        Args:
            noisy: [B, C, H, W].
            timesteps: [B].
            conditioning: what ``encode_prompts`` returned, B rows.
            params: values that stand in for the denoiser's parameters of these names.

        Returns:
            [B, C, H, W] prediction, the counterpart of ``target``.
        """
        keywords = self._keywords(conditioning)
        if params is None:
            return self.denoiser(noisy, timesteps, return_dict=False, **keywords)[0]
        keywords["return_dict"] = False
        return functional_call(self.denoiser, dict(params), (noisy, timesteps), keywords)[0]
