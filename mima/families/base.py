"""What every model family answers: encode pictures, add noise, predict, name parameters."""

# B = batch, S = tokens, D = width of what the text projections read, C H W = latent channels, size

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.func import functional_call

from mima.errors import MimaError, nearest, one_line
from mima.families.frozen import cast
from mima.families.pipelines import Pipeline
from mima.families.text import Conditioning, ReadsText
from mima.merging import Params
from mima.options import TrainingOptions

if TYPE_CHECKING:
    from mima.families.sharded import ShardedDenoiser

# how many pixels are encoded at once: those of four 512 px pictures
PIXELS_AT_ONCE = 4 * 512**2
# the largest resolution, in multiples of the side that the model was trained on
LARGEST = 4
UNQUANTIZED = (
    "open it unquantized (immunize takes a pipeline in memory whose denoiser torchao has quantized)"
)
# the side assumed of a model whose configuration names none
USUAL_SIDE = 512


class Family(ReadsText):
    """One diffusers pipeline seen by the training loops, which know nothing of its kind.

    Subclasses say what differs between families and nothing else.

    Args:
        pipeline: a diffusers pipeline; its modules are used as they are, never copied.

    Attributes:
        pipeline: the wrapped pipeline.
        denoiser: the network that is fine-tuned (``unet`` or ``transformer``).

    Raises:
        MimaError: a part of the pipeline is missing or of a kind that is not supported.
    """

    pipeline_names: ClassVar[tuple[str, ...]]
    """Names of the diffusers pipelines of this family."""
    parts: ClassVar[tuple[str, ...]]
    """Components that must be there; the first is the denoiser."""
    presets: ClassVar[dict[str, str]] = {
        "attention": r"\.attn\d?\.",
        "cross_attention": r"\.attn2\.",
    }
    """What the names of parameter sets stand for, as expressions on parameter names."""
    training_defaults: ClassVar[dict[str, Any]] = {}
    """By name, of the ``TrainingOptions`` that the family reads."""
    _resolution: int | None = None
    sharded: ShardedDenoiser | None = None
    """Predicts in the denoiser's place, where several processes hold its weights."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.training = TrainingOptions()
        kind = type(pipeline).__name__
        missing = [part for part in self.parts if getattr(pipeline, part, None) is None]
        if missing:
            raise MimaError(f"model: this {kind} has no {' and no '.join(missing)}")
        self.pipeline = pipeline
        denoiser = self.denoiser_name
        self.denoiser: torch.nn.Module = getattr(pipeline, denoiser)
        if getattr(self.denoiser, "is_quantized", False):
            raise MimaError(f"model: the {denoiser} is quantized; {UNQUANTIZED}")
        if hasattr(self.denoiser, "_orig_mod"):
            raise MimaError(
                f"model: the {denoiser} is compiled (torch.compile), and its weights have other "
                f"names; give the pipeline with {denoiser}._orig_mod as its {denoiser}"
            )
        if any(vars(module).get("fused_projections") for module in self.denoiser.modules()):
            raise MimaError(
                f"model: the {denoiser}'s attention projections are fused, so that their own "
                "weights are not read; call unfuse_qkv_projections() first"
            )
        expected, latent = self._latent_channels, self._vae_channels
        if expected != latent:
            raise MimaError(
                f"model: the {denoiser} reads {expected} latent channels and the vae makes "
                f"{latent}; models with further picture inputs (inpainting, editing) are not "
                "supported, text-to-image models are"
            )
        self._check_text()

    @cached_property
    def shares_weights(self) -> bool:
        """Whether a weight of the denoiser goes by several names."""
        every = self.denoiser.named_parameters(remove_duplicate=False)
        return len(list(every)) > len(list(self.denoiser.parameters()))

    @property
    def denoiser_name(self) -> str:
        """Under which name the pipeline holds the denoiser, ``unet`` or ``transformer``."""
        return self.parts[0]

    @property
    def device(self) -> torch.device:
        """Device of the denoiser's weights."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    def resolution(self) -> int:
        """Side of the square pictures in pixels, by default that which the model was trained on.

        Raises:
            MimaError: when it is set to what the VAE and the denoiser cannot take, or to more than
                four times the side that the model was trained on.
        """
        if self._resolution is not None:
            return self._resolution
        sides = self._trained_sides
        if len(sides) != 1:
            raise MimaError(
                f"model: sample_size of the {self.denoiser_name} must be one number or two equal "
                f"ones, got {one_line(self._sample_size)}; only square pictures are supported, "
                "whose resolution must be said"
            )
        return sides.pop()

    @resolution.setter
    def resolution(self, pixels: int) -> None:
        if pixels < 1 or pixels % self._multiple:
            raise MimaError(
                f"resolution: {pixels} pixels do not fit the vae of this "
                f"{type(self.pipeline).__name__}, which needs a multiple of {self._multiple}, "
                f"such as {max(1, round(pixels / self._multiple)) * self._multiple}"
            )
        side = max(self._trained_sides, default=USUAL_SIDE)
        if pixels > LARGEST * side:
            raise MimaError(
                f"resolution: at most {LARGEST * side} pixels, {LARGEST} times what this "
                f"{type(self.pipeline).__name__} was trained on, got {pixels}"
            )
        self._resolution = pixels

    @property
    def training(self) -> TrainingOptions:
        """How the family is trained, by default as diffusers' scripts do it.

        Raises:
            MimaError: when an option is set that the family does not read.
        """
        return self._training

    @training.setter
    def training(self, options: TrainingOptions) -> None:
        self._training = options.over(self.training_defaults, type(self).__name__)

    @property
    def _trained_sides(self) -> set[int]:
        """Sides in pixels of the pictures that training read: one where they are square."""
        size = self._sample_size
        sides = (size,) if isinstance(size, int) else size or ()
        return {int(side * self.pipeline.vae_scale_factor) for side in sides}

    @property
    def _multiple(self) -> int:
        """What a side in pixels must be a multiple of."""
        return int(self.pipeline.vae_scale_factor * self._patch)

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """Number of noise levels of the training process."""

    @property
    def _latent_channels(self) -> int:
        return int(self._config["in_channels"])

    @property
    def _vae_channels(self) -> int:
        return int(self.pipeline.vae.config.latent_channels)

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        """[B, C, H, W] of a batch's latents at ``resolution``."""
        side = self.resolution // self.pipeline.vae_scale_factor
        return batch, self._latent_channels, side, side

    @property
    def _sample_size(self) -> Any:
        return self._config["sample_size"]

    @property
    def _patch(self) -> int:
        """Side, in latents, of what the denoiser takes for one token."""
        return 1

    @property
    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.denoiser.config  # type: ignore[assignment]
        return config

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pictures to scaled latents (the posterior's mean), without a graph.

        A float16 VAE that diffusers marks ``force_upcast`` is run in float32, where it does not
        overflow, as the pipeline does when it decodes.

        Args:
            pixels: [B, 3, height, width] in [-1, 1].

        Returns:
            [B, C, H, W] in the denoiser's dtype.

        Raises:
            ValueError: a side is no multiple of what the VAE and the denoiser need.
            MimaError: the VAE is none that training reads.
        """
        self.check_vae()
        vae, multiple = self.pipeline.vae, self._multiple
        height, width = pixels.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"encode_images: pixels must be [B, 3, height, width] with sides that are "
                f"multiples of {multiple}, got {list(pixels.shape)}"
            )
        dtype = vae.dtype
        upcast = dtype == torch.float16 and vae.config.get("force_upcast")
        if upcast:
            cast(vae, torch.float32)
        parts = pixels.split(max(1, PIXELS_AT_ONCE // (height * width)))
        mean = torch.cat([self._posterior_mean(part.to(vae.device, vae.dtype)) for part in parts])
        if upcast:
            cast(vae, dtype)
        return self._scaled(mean).to(self.device, self.dtype)

    def check_vae(self) -> None:
        """Refuse a VAE that draws pictures alone.

        Raises:
            MimaError: it makes no distributions of latents.
        """
        if type(self.pipeline.vae).__name__ == "AutoencoderTiny":
            raise MimaError(
                "model: AutoencoderTiny makes no distributions of latents, which training reads; "
                "open the model with its own vae"
            )

    def _posterior_mean(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] that the VAE encodes pictures to, unscaled."""
        mean: torch.Tensor = self.pipeline.vae.encode(pixels).latent_dist.mean
        return mean

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser reads them, from the VAE's."""
        return latents * float(self.pipeline.vae.config.scaling_factor)

    def parameter_names(self, which: str) -> list[str]:
        """Names of the denoiser's parameters in a preset, or matching a regular expression.

        Args:
            which: ``cross_attention``, ``cross_attention_kv`` (the text projections),
                ``attention``, ``denoiser``, ``not_cross_attention`` (what ``cross_attention``
                leaves), or an expression that ``re.search`` is to find in a name.

        Raises:
            MimaError: not a valid expression, or it matches nothing.
        """
        names = [name for name, _ in self.denoiser.named_parameters()]
        if which == "denoiser":
            return names
        if which == "cross_attention_kv":
            return self.text_projections()
        if which == "not_cross_attention":
            return [n for n in names if not re.search(self.presets["cross_attention"], n)]
        pattern = self.presets.get(which, which)
        try:
            chosen = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            presets = ["cross_attention_kv", "denoiser", "not_cross_attention", *self.presets]
            raise MimaError(
                f"parameters: {which!r} is no valid regular expression ({error}) and "
                f"not one of {', '.join(sorted(presets))}"
            ) from error
        if not chosen:
            hint = nearest(which, self.presets)
            raise MimaError(f"parameters: {which!r} matches no parameter of the denoiser; {hint}")
        return chosen

    def lora_targets(self) -> list[str]:
        """Names of the weights that LoRA adapts by default: every attention projection."""
        return [
            name
            for name in self.parameter_names("attention")
            if re.search(r"\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)\.weight$", name)
        ]

    def sample_latents(self, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
        """Pictures of ``prompts`` by the pipeline's own sampler, as scaled latents [B, C, H, W]."""
        latents: torch.Tensor = self.pipeline(
            list(prompts),
            generator=generator,
            output_type="latent",
            **self.sampling_options(len(prompts)),
        ).images
        return self._sampled(latents).to(self.device, self.dtype)

    def sampling_options(
        self, count: int, guidance: float | None = None, negative: str = ""
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call for pictures of ``count`` prompts at ``resolution``.

        Args:
            count: prompts.
            guidance: its scale; None is the pipeline's own.
            negative: what guidance leads away from; empty for what the pipeline has by default.

        Raises:
            MimaError: the family's guidance has no negative prompt.
        """
        size = {"height": self.resolution, "width": self.resolution}
        return {**size, **self._sampling(), **self._guidance(count, guidance, negative)}

    def _sampling(self) -> dict[str, Any]:
        """The family's own part of ``sampling_options``."""
        return {}

    def _guidance(self, count: int, scale: float | None, negative: str) -> dict[str, Any]:
        """The guidance's part of ``sampling_options``."""
        said: dict[str, Any] = {} if scale is None else {"guidance_scale": scale}
        if negative and (scale is None or scale > 1):
            said["negative_prompt"] = [negative] * count
        return said

    def _sampled(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] from what the pipeline calls latents."""
        return latents

    @abstractmethod
    def sample_timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw [batch] noise levels as the family's training does."""

    @abstractmethod
    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process: noisy latents at ``timesteps``, computed in float32 at least."""

    @abstractmethod
    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser is trained to predict (noise, velocity, sample or flow)."""

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """What the squared error at noise levels [B] counts in the loss, [B]; None: 1 at all."""
        return None

    def picture_conditions(self, places: torch.Tensor) -> Conditioning:
        """What the denoiser is told of each picture beside its text.

        Args:
            places: [P, 4] integers: height and width of the pictures as they were, top and left of
                the square that is trained on, in pixels after scaling.

        Returns:
            Tensors of P rows; none where the family's models read nothing of the kind.
        """
        return {}

    @abstractmethod
    def sampling_timesteps(self, steps: int) -> torch.Tensor:
        """Noise levels [steps] of a deterministic sampler, from pure noise downwards."""

    @abstractmethod
    def denoise(
        self,
        noisy: torch.Tensor,
        prediction: torch.Tensor,
        timesteps: torch.Tensor,
        following: torch.Tensor,
    ) -> torch.Tensor:
        """One step of that sampler, computed in float32 at least.

        Args:
            noisy: [B, C, H, W] at ``timesteps``.
            prediction: [B, C, H, W] of the denoiser there.
            timesteps: [B].
            following: [B] lower noise levels.

        Returns:
            [B, C, H, W] at ``following``.
        """

    @abstractmethod
    def _inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser's forward."""

    def _prediction(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] from what the denoiser returns."""
        return output

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
        if self.sharded is not None:
            return self.sharded.predict(noisy, timesteps, conditioning, params)
        return self.own_prediction(noisy, timesteps, conditioning, params)

    def own_prediction(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        params: Params | None = None,
    ) -> torch.Tensor:
        """`predict` by this process' denoiser alone."""
        inputs = {**self._inputs(noisy, timesteps, conditioning), "return_dict": False}
        if params is None:
            output = self.denoiser(**inputs)[0]
        else:
            # torch's own search for shared weights takes as long as a small model's forward
            output = functional_call(
                self.denoiser, dict(params), (), inputs, tie_weights=self.shares_weights
            )[0]
        return self._prediction(output, noisy)

    @torch.no_grad()
    def projection_inputs(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, torch.Tensor]:
        """Record what each text projection reads, [B, S, D], while ``predict`` runs."""
        inputs: dict[str, torch.Tensor] = {}
        hooks = []
        for name in self.text_projections():
            layer = self.denoiser.get_submodule(name.removesuffix(".weight"))

            def record(_: torch.nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                inputs[name] = args[0]

            hooks.append(layer.register_forward_pre_hook(record))
        try:
            self.predict(noisy, timesteps, conditioning)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs
