"""Families of transformers with joint attention, trained by rectified flow (SD3, Flux)."""

# B = batch, S = tokens, D = width of the text stream, C H W = latent channels and size

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mima.errors import MimaError
from mima.families.base import Conditioning, Family, TextReader
from mima.families.ddpm import at_least_float32
from mima.options import TrainingOptions


class RectifiedFlow(Family):
    """``x_σ = (1 − σ) x + σ ε``, target ``ε − x`` (Liu et al. 2023; Esser et al. 2024).

    Noise levels are given as timesteps ``σ · num_train_timesteps``, floating point. Training draws
    them as diffusers' scripts do: a place u in [0, 1] by the weighting scheme, and there the level
    of the scheduler's own training schedule, which has the scheduler's constant shift, and no shift
    where it shifts by resolution when it samples.

    **Text in joint attention.** A text stream runs beside the picture's; its ``add_k_proj`` and
    ``add_v_proj`` play the part of cross-attention's keys and values, and the preset
    ``cross_attention`` is the text stream's attention: ``add_q_proj``, ``add_k_proj``,
    ``add_v_proj``, their norms and ``to_add_out``. What they read is not the text encoders'
    output: it is embedded, updated block by block, and each block normalises and modulates it by
    the noise level and the pooled text. ``text_embeddings`` is therefore one point of it: *what the
    first block reads at the middle noise level* (σ = ½). The merge plan made of it meets its
    constraint exactly there, and approximately in later blocks and at other noise levels;
    ``projection_embeddings`` says what each weight reads, block by block. Flux's single-stream
    blocks have no weights for text alone; they are merged like any other weight.
    """

    training_defaults: ClassVar[Mapping[str, Any]] = {
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
    }
    text_weights = r"\.attn\.add_[kv]_proj\.weight$"
    presets = Family.presets | {
        "cross_attention": r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    }

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if "shift" not in pipeline.scheduler.config:
            raise MimaError(
                f"scheduler: {type(pipeline.scheduler).__name__} has no shift; "
                f"{type(pipeline).__name__} is supported with flow-matching schedulers "
                "(FlowMatchEulerDiscreteScheduler)"
            )

    @property
    def num_train_timesteps(self) -> int:
        return int(self.pipeline.scheduler.config.num_train_timesteps)

    @property
    def _patch(self) -> int:
        return int(self._config["patch_size"])

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._scaled(latents - (self.pipeline.vae.config.shift_factor or 0.0))

    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw [batch] noise levels of the schedule, float32 in (0, num_train_timesteps]."""
        u = density(self.training, batch, generator)
        index = (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return self._schedule[index].to(self.device)

    @cached_property
    def _schedule(self) -> torch.Tensor:
        """The timesteps that training draws from, descending, whatever sampling has set since."""
        config = dict(self.pipeline.scheduler.config)
        schedule: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        timesteps: torch.Tensor = schedule.timesteps
        return timesteps

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        return flow_weights(self.training, timesteps / self.num_train_timesteps)

    def _shift(self, sigmas: torch.Tensor) -> torch.Tensor:
        scheduler, config = self.pipeline.scheduler, self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            shift = float(config.shift)
            return shift * sigmas / (1 + (shift - 1) * sigmas)
        # a straight line through (base_image_seq_len, base_shift), (max_image_seq_len, max_shift)
        side = self.resolution // self.pipeline.vae_scale_factor // self._patch
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (side**2 - config.base_image_seq_len)
        shifted: torch.Tensor = scheduler.time_shift(mu, 1.0, sigmas)
        return shifted

    def _sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return (timesteps.to(like) / self.num_train_timesteps).view(-1, 1, 1, 1)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        x, eps = (at_least_float32(tensor) for tensor in (latents, noise))
        sigmas = self._sigmas(timesteps, x)
        return ((1 - sigmas) * x + sigmas * eps).to(latents.dtype)

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        x, eps = (at_least_float32(tensor) for tensor in (latents, noise))
        return (eps - x).to(latents.dtype)

    def sampling_timesteps(self, steps: int) -> torch.Tensor:
        """Euler's: evenly spaced before the shift, as the pipeline's scheduler has them."""
        sigmas = self._shift(torch.linspace(1, 0, steps + 1)[:-1])
        return (sigmas * self.num_train_timesteps).to(self.device)

    def denoise(
        self,
        noisy: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        following: torch.Tensor,
    ) -> torch.Tensor:
        """Euler's step along the predicted flow."""
        x, flow = (at_least_float32(tensor) for tensor in (noisy, prediction))
        step = self._sigmas(following, x) - self._sigmas(timesteps, x)
        return (x + step * flow).to(noisy.dtype)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, S, D] that the first block's text projections read at σ = ½, padding included."""
        # the picture reaches the text stream in the first block's attention, after its projections
        smallest = self._latents(len(prompts), self._patch)
        return self._read(prompts, smallest)[self.text_projections()[0]]

    def text_readers(self) -> list[TextReader]:
        """The embedding of the text encoders' tokens, and that of the pooled text.

        What the text projections read depends on the picture; what these two read does not, and
        text reaches the denoiser through them alone.
        """
        return [
            TextReader(
                ["context_embedder.weight"],
                lambda prompts: self.encode_prompts(prompts)["encoder_hidden_states"],
                self._text_stream,
            ),
            self._pooled_reader(
                "time_text_embed.text_embedder.linear_1.weight", "pooled_projections"
            ),
        ]

    @property
    def _text_stream(self) -> list[tuple[Any, int | None]]:
        """Tokenizers of the text stream, as ``TextReader.tokenizers``."""
        return [(self._t5_tokenizer, None)]

    @torch.no_grad()
    def projection_embeddings(self, prompt: str, generator: torch.Generator) -> Conditioning:
        """What each text projection reads for the real tokens of ``prompt`` at σ = ½.

        Args:
            prompt: a text.
            generator: draws the picture, pure noise of the model's resolution.

        Returns:
            [S, D] by name of the weight; those of one block share a tensor.
        """
        noise = torch.randn(
            self._latents(1, self.resolution // self.pipeline.vae_scale_factor).shape,
            generator=generator,
        )
        mask = self.token_mask([prompt])[0].to(self.device)
        inputs = self._read([prompt], noise.to(self.device, self.dtype))
        return {name: value[0][mask] for name, value in inputs.items()}

    def _latents(self, batch: int, side: int) -> torch.Tensor:
        size = (batch, self._latent_channels, side, side)
        return torch.zeros(size, device=self.device, dtype=self.dtype)

    def _read(self, prompts: Sequence[str], noisy: torch.Tensor) -> Conditioning:
        middle = torch.full((len(prompts),), self.num_train_timesteps / 2, device=self.device)
        return self.projection_inputs(noisy, middle, self.encode_prompts(prompts))

    @property
    @abstractmethod
    def _t5_tokenizer(self) -> Any: ...

    def _max_tokens(self, wanted: int | None) -> int:
        """As many of the wanted tokens as the tokenizer gives."""
        assert wanted is not None
        tokenizer = self._t5_tokenizer
        return wanted if tokenizer is None else min(wanted, tokenizer.model_max_length)


def density(options: TrainingOptions, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Where in a rectified flow's schedule a batch is drawn: [B] float32 in [0, 1], 0 is noise."""
    scheme = options.weighting_scheme
    if scheme == "logit_normal":
        assert options.logit_mean is not None
        assert options.logit_std is not None
        normal = torch.randn(batch, generator=generator)
        return (options.logit_mean + options.logit_std * normal).sigmoid()
    u = torch.rand(batch, generator=generator)
    if scheme == "mode":
        assert options.mode_scale is not None
        u = 1 - u - options.mode_scale * ((math.pi * u / 2).cos().square() - 1 + u)
    return u.clamp(0, 1)


def flow_weights(options: TrainingOptions, sigmas: torch.Tensor) -> torch.Tensor | None:
    """What the squared error of a flow counts at noise levels σ [B] in (0, 1]; None: 1 at all."""
    weights = None
    if options.weighting_scheme == "sigma_sqrt":
        weights = sigmas**-2
    elif options.weighting_scheme == "cosmap":
        weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    if options.precondition_outputs:
        weights = sigmas**2 if weights is None else weights * sigmas**2
    return weights
