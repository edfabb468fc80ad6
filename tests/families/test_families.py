"""Every family against diffusers itself: its pipelines' calls, its schedulers, its VAEs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from support import builders, tiny

from mima.errors import MimaError
from mima.families import Family, TrainingOptions, family_of, load_pipeline
from mima.immunization.checks import check_model
from mima.immunization.config import ImmunizeConfig
from mima.sampling import Sampler

PROMPTS = ["a photo of a red cat", "a dog"]


def _sd(folder: Path) -> Path:
    return tiny.save_tiny_stable_diffusion(folder)


def _sd_v(folder: Path) -> Path:
    """Like Stable Diffusion 2: v-prediction, padding by a token of its own."""
    pipeline = tiny.tiny_stable_diffusion(
        folder.with_name("v-tokenizer"), prediction_type="v_prediction"
    )
    pipeline.tokenizer.pad_token = "!"
    pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
    pipeline.save_pretrained(folder)
    return folder


def _built(kind: Any, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: builders.save(kind, folder, **options)


KINDS: dict[str, Callable[[Path], Path]] = {
    "sd": _sd,
    "sd-v": _sd_v,
    "sdxl": _built(builders.sdxl),
    "pixart-alpha": _built(builders.pixart),
    "pixart-sigma": _built(builders.pixart, sigma=True),
    "sd3": _built(builders.sd3),
    "sd3-no-t5": _built(builders.sd3, with_t5=False),
    "flux-dev": _built(builders.flux),
    "flux-schnell": _built(builders.flux, guidance=False),
    "sana": _built(builders.sana),
    "lumina2": _built(builders.lumina2),
    "qwen-image": _built(builders.qwen_image),
}
DDPM = ("sd", "sd-v", "sdxl", "pixart-alpha", "pixart-sigma")
FLOW = ("sd3", "sd3-no-t5", "flux-dev", "flux-schnell")
LANGUAGE_STARTS = {"Sana": 1, "Lumina2": 47, "QwenImage": 105}
"""The place of a prompt's first token, after what the tiny tokenizer makes of each template."""
_FOLDERS: dict[str, Path] = {}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def build(kind: str) -> Path:
        if kind not in _FOLDERS:
            _FOLDERS[kind] = KINDS[kind](tmp_path_factory.mktemp(kind) / "model")
        return _FOLDERS[kind]

    return build


def open_family(folder: Path, **options: Any) -> Family:
    return family_of(builders.opened(folder, **options))


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Family:
    return open_family(folder_of(request.param))


def _of(kinds: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("family", kinds, indirect=True)


def unguided(family: Family) -> dict[str, Any]:
    """Arguments of a call in which the denoiser sees the prompts alone."""
    options = family._sampling()
    return options if "guidance_scale" in options else {**options, "guidance_scale": 1.0}


def denoiser_call(family: Family, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments and output of the first denoiser call when the pipeline samples PROMPTS."""
    calls = []

    def record(_: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep") if "unet" in family.parts else ("hidden_states",)
        calls.append((dict(zip(names, args, strict=False)) | keywords, output[0]))

    hook = family.denoiser.register_forward_hook(record, with_kwargs=True)
    size = family.resolution
    family.pipeline(
        PROMPTS,
        height=size,
        width=size,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **{**unguided(family), **options},
    )
    hook.remove()
    return calls[0]


def assert_predicts_what_the_pipeline_computes(family: Family) -> None:
    given, output = denoiser_call(family)
    noisy = given.get("sample", given.get("hidden_states"))
    timesteps = torch.as_tensor(given["timestep"]).expand(len(PROMPTS))
    if type(family).__name__ == "Lumina2":
        # inside, time and flow lead from noise to picture
        timesteps, output = (1 - timesteps) * 1000, -output
    if type(family).__name__ in ("Flux", "QwenImage"):
        side = family.resolution // family.pipeline.vae_scale_factor
        unpack = family.pipeline._unpack_latents
        # of Qwen-Image with a frame
        noisy, output = (unpack(x, side, side, 1).flatten(1, -3) for x in (noisy, output))
        timesteps = timesteps * 1000
    if "StableDiffusion3" in type(family).__name__:
        # without T5, the places of as many tokens as sampling reads are zeros
        family.training = TrainingOptions(max_sequence_length=256)
    conditioning = family.encode_prompts(PROMPTS)
    with torch.no_grad():
        predicted = family.predict(noisy, timesteps, conditioning)
    # PixArt also predicts a variance, which is not trained
    torch.testing.assert_close(predicted, output[:, : noisy.shape[1]], rtol=1e-5, atol=1e-5)
    # the conditioning is no decoration: the other prompt gives something else
    with torch.no_grad():
        swapped = {name: value.flip(0) for name, value in conditioning.items()}
        assert (family.predict(noisy, timesteps, swapped) - predicted).abs().max() > 1e-4


def test_predict_is_the_pipelines_denoiser_call(family):
    assert_predicts_what_the_pipeline_computes(family)


def test_pixart_is_told_the_pictures_size(tmp_path):
    """α with 128² latents, which alone has the additional conditions."""
    folder = builders.save(builders.pixart, tmp_path / "model", sample_size=128, patch=8)
    family = open_family(folder)
    assert family.resolution == 512
    assert family.pipeline.transformer.use_additional_conditions
    assert_predicts_what_the_pipeline_computes(family)


def qwen_statistics(vae: Any) -> list[torch.Tensor]:
    names = ("latents_mean", "latents_std")
    return [torch.tensor(vae.config[name]).view(-1, 1, 1) for name in names]


def test_samples_are_latents_of_the_form_that_is_trained_on(family):
    """Decoded with the VAE, they are the pictures that the pipeline makes."""
    size = family.resolution
    sampled = family.sample_latents(PROMPTS, torch.Generator().manual_seed(3))
    pictures = family.pipeline(
        PROMPTS,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **family._sampling(),
    ).images
    vae = family.pipeline.vae
    assert sampled.shape == family.encode_images(torch.zeros(2, 3, size, size)).shape
    if type(family).__name__ == "QwenImage":
        mean, std = (
            torch.tensor(vae.config[f"latents_{x}"])[:, None, None] for x in ("mean", "std")
        )
        latents = (sampled * std + mean).unsqueeze(2)
    else:
        latents = sampled / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    with torch.no_grad():
        decoded = vae.decode(latents).sample.flatten(1, -3)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)


def test_pictures_are_encoded_to_scaled_shifted_means(family):
    pixels = torch.rand(2, 3, family.resolution, family.resolution) * 2 - 1
    vae = family.pipeline.vae
    name = type(family).__name__
    with torch.no_grad():
        if name == "Sana":
            mean = vae.encode(pixels).latent
        elif name == "QwenImage":
            mean = vae.encode(pixels.unsqueeze(2)).latent_dist.mean[:, :, 0]
        else:
            mean = vae.encode(pixels).latent_dist.mean
    if name == "QwenImage":
        shift, std = (
            torch.tensor(vae.config[f"latents_{x}"])[:, None, None] for x in ("mean", "std")
        )
        expected = (mean - shift) / std
    else:
        expected = (mean - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(family.encode_images(pixels), expected)
    assert not family.encode_images(pixels).requires_grad


def test_pictures_of_a_side_that_does_not_fit_are_refused(family):
    side = family.resolution + 2
    with pytest.raises(ValueError, match=rf"multiples of \d+, got \[1, 3, {side}, {side}\]"):
        family.encode_images(torch.zeros(1, 3, side, side))


def test_many_large_pictures_are_encoded_in_parts(folder_of, monkeypatch):
    family = open_family(folder_of("sd"))
    pixels = torch.rand(5, 3, 32, 32) * 2 - 1
    whole = family.encode_images(pixels)
    sizes = []
    encode = family.pipeline.vae.encode
    monkeypatch.setattr(
        family.pipeline.vae, "encode", lambda x: (sizes.append(len(x)), encode(x))[1]
    )
    monkeypatch.setattr("mima.families.base.PIXELS_AT_ONCE", 2 * 32 * 32)
    torch.testing.assert_close(family.encode_images(pixels), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [2, 2, 1]


def linear_inputs(family: Family, timestep: float) -> dict[str, torch.Tensor]:
    """What every weight matrix of the denoiser reads in one call."""
    inputs = {}
    hooks = []
    for name, layer in family.denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def record(_: Any, args: Any, name: str = name) -> None:
                inputs[f"{name}.weight"] = args[0]

            hooks.append(layer.register_forward_pre_hook(record))
    side = family.resolution // family.pipeline.vae_scale_factor
    noisy = torch.randn(2, 4, side, side)
    with torch.no_grad():
        family.predict(noisy, torch.full((2,), timestep), family.encode_prompts(PROMPTS))
    for hook in hooks:
        hook.remove()
    return inputs


@_of(DDPM)
def test_text_projections_are_exactly_what_reads_text(family):
    text = family.text_embeddings(PROMPTS)
    readers = [
        name
        for name, value in linear_inputs(family, 500).items()
        if value.shape == text.shape and torch.allclose(value, text, atol=1e-6)
    ]
    assert set(family.text_projections()) == set(readers)
    assert len(readers) >= 4


@_of(FLOW)
def test_the_text_streams_keys_and_values_are_the_text_projections(family):
    """The first block's read `text_embeddings`, exactly, at the middle noise level."""
    text = family.text_embeddings(PROMPTS)
    inputs = linear_inputs(family, family.num_train_timesteps / 2)
    assert family.text_projections() == [
        f"transformer_blocks.{block}.attn.add_{part}_proj.weight"
        for block in (0, 1)
        for part in "kv"
    ]
    readers = [
        name
        for name, value in inputs.items()
        if value.shape == text.shape and torch.allclose(value, text, atol=1e-6)
    ]
    assert set(readers) == {f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"}
    later = linear_inputs(family, family.num_train_timesteps)[readers[0]]
    assert (later - text).abs().max() > 1e-3  # the noise level changes what is read


def test_token_embeddings_are_the_rows_of_real_tokens(family):
    """Six words and the end; SD3 has them from CLIP and from T5, Gemma has no end."""
    rows = family.token_embeddings(PROMPTS[0])
    text = family.text_embeddings([PROMPTS[0]])[0]
    seven = list(range(1, 8)), list(range(7))  # CLIP has a start token, T5 has none
    name = type(family).__name__
    if name == "StableDiffusion3":
        has_t5 = family.pipeline.text_encoder_3 is not None
        places = seven[0] + [tiny.MAX_TOKENS + i for i in seven[1]] * has_t5
    elif name in LANGUAGE_STARTS:
        count = 7 if name == "QwenImage" else 6
        places = [LANGUAGE_STARTS[name] + i for i in range(count)]
    else:
        places = seven[1] if name in ("PixArt", "Flux") else seven[0]
    torch.testing.assert_close(rows, text[places], rtol=1e-5, atol=1e-6)


def test_prompts_longer_than_the_model_reads_are_cut(family):
    long = "cat " * 600
    length = family.text_embeddings([long]).shape[1]
    mask = family.token_mask([long])
    starts = {"PixArt": 0, "Flux": 0, **LANGUAGE_STARTS}.get(type(family).__name__, 1)
    padding = 0
    if type(family).__name__ == "StableDiffusion3" and family.pipeline.text_encoder_3 is None:
        padding = length - tiny.MAX_TOKENS  # zeros in T5's place are no tokens
    assert int(mask.sum()) == length - starts - padding
    short = family.encode_prompts(["a cat"])
    for name, value in family.encode_prompts([long]).items():
        assert value.shape == short[name].shape


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_end_is_found_by_the_mask_and_not_by_a_token(folder_of, pad):
    """A prompt may name the end token or the padding token itself."""
    family = open_family(folder_of("sd"))
    family.pipeline.tokenizer.pad_token = pad
    assert len(family.token_embeddings("a <|endoftext|> cat !")) == 5
    assert len(family.token_embeddings("")) == 1


def test_conditioning_has_one_row_per_prompt_in_the_denoisers_dtype(folder_of):
    family = open_family(folder_of("sd3"), dtype=torch.bfloat16)
    conditioning = family.encode_prompts([*PROMPTS, "a bird"])
    assert {len(value) for value in conditioning.values()} == {3}
    assert {value.dtype for value in conditioning.values()} == {torch.bfloat16}
    one = family.encode_prompts(PROMPTS[1:])
    for name, value in conditioning.items():
        torch.testing.assert_close(value[1:2], one[name], rtol=2e-2, atol=2e-2)


def test_prompts_can_be_encoded_differentiably(family):
    pipeline = family.pipeline
    encoder = pipeline.text_encoder
    weight = encoder.get_input_embeddings().weight.requires_grad_()
    assert not any(v.requires_grad for v in family.encode_prompts(PROMPTS).values())
    encoded = family.encode_prompts(PROMPTS, differentiable=True)
    total = sum(value.float().square().sum() for value in encoded.values())
    (gradient,) = torch.autograd.grad(total, [weight])
    cat, bird = (
        pipeline.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "bird")
    )
    assert gradient[cat].abs().sum() > 0
    assert gradient[bird].abs().sum() == 0


def test_presets_contain_each_other(family):
    kv, cross, attention, everything = (
        set(family.parameter_names(which))
        for which in ("cross_attention_kv", "cross_attention", "attention", "denoiser")
    )
    assert kv < cross < attention < everything
    # cross-attention is what text shares with nothing else, and it reaches every text projection
    assert not any(".attn1." in name or "single" in name for name in cross)
    targets = set(family.lora_targets())
    feed_forward = {name for name in targets if ".ff" in name}
    assert bool(feed_forward) == (type(family).__name__ == "Flux")
    # LoRA adapts attention, which of Lumina 2 no text alone reads
    assert targets - feed_forward < attention
    assert kv < targets or type(family).__name__ == "Lumina2"
    parameters = dict(family.denoiser.named_parameters())
    assert all(parameters[name].ndim == 2 for name in targets)


def test_lora_of_flux_adapts_the_layers_of_diffusers_script(folder_of):
    names = open_family(folder_of("flux-dev")).lora_targets()
    block = "transformer_blocks.0."
    endings = {name.removeprefix(block) for name in names if name.startswith(block)}
    assert endings == {
        *(f"attn.to_{name}.weight" for name in ("q", "k", "v", "out.0", "add_out")),
        *(f"attn.add_{name}_proj.weight" for name in "qkv"),
        *(f"{name}.net.0.proj.weight" for name in ("ff", "ff_context")),
        *(f"{name}.net.2.weight" for name in ("ff", "ff_context")),
    }
    single = {name.partition(".attn.")[2] for name in names if name.startswith("single")}
    assert single == {"to_k.weight", "to_q.weight", "to_v.weight"}
    assert len(names) == len(set(names))


def test_a_pattern_selects_and_a_wrong_one_is_named(folder_of):
    family = open_family(folder_of("sd"))
    chosen = family.parameter_names(r"^mid_block.*attn2\.to_k")
    assert chosen == ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    with pytest.raises(MimaError, match="matches no parameter"):
        family.parameter_names("nothing")
    with pytest.raises(MimaError, match="no valid regular expression"):
        family.parameter_names("(")


def test_parameters_can_be_put_in_place_of_the_models_own(family):
    side = family.resolution // family.pipeline.vae_scale_factor
    noisy, conditioning = torch.randn(1, 4, side, side), family.encode_prompts(PROMPTS[:1])
    timesteps = torch.tensor([300])
    weights = dict(family.denoiser.named_parameters())
    params = {
        name: (weights[name] * 1.5).requires_grad_()
        for name in family.parameter_names("cross_attention")
    }
    replaced = family.predict(noisy, timesteps, conditioning, params)
    plain = family.predict(noisy, timesteps, conditioning)
    with torch.no_grad():
        for name, value in params.items():
            weights[name].copy_(value)
        changed = family.predict(noisy, timesteps, conditioning)
    torch.testing.assert_close(replaced.detach(), changed)
    assert (replaced - plain).abs().max() > 1e-5
    # what the text stream's last block writes, nothing reads in Qwen-Image
    gradients = torch.autograd.grad(
        replaced.square().sum(), list(params.values()), materialize_grads=True
    )
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    kv = [g for name, g in zip(params, gradients, strict=True) if name in family.text_projections()]
    assert all(gradient.abs().sum() > 0 for gradient in kv)


# --- training processes


@_of(DDPM)
def test_noise_and_target_follow_the_pipelines_scheduler(family):
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 998])
    scheduler = family.pipeline.scheduler
    alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = family.add_noise(latents, noise, timesteps)
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)
    target = family.target(latents, noise, timesteps)
    if not isinstance(scheduler, DDIMScheduler):
        assert torch.equal(target, noise)
        return
    # the pipeline's own sampler, told the target, finds the clean latents
    scheduler.set_timesteps(family.num_train_timesteps)
    for i, t in enumerate(timesteps.tolist()):
        step = scheduler.step(target[i], t, noisy[i])
        # divided by √ᾱ, which is 0.07 at the last of these levels
        torch.testing.assert_close(step.pred_original_sample, latents[i], rtol=0, atol=1e-4)


def test_sample_prediction_targets_the_latents(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.scheduler.register_to_config(prediction_type="sample")
    latents = torch.randn(1, 4, 8, 8)
    target = family_of(pipeline).target(latents, torch.randn(1, 4, 8, 8), torch.tensor([5]))
    assert torch.equal(target, latents)


def test_zero_terminal_snr_is_kept(folder_of):
    """At the last level there is noise alone, and v is the negated picture."""
    family = open_family(folder_of("sd-v"))
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    last = torch.tensor([family.num_train_timesteps - 1] * 2)
    assert torch.equal(family.add_noise(latents, noise, last), noise)
    assert torch.equal(family.target(latents, noise, last), -latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@_of(("sd-v", "sd3"))
def test_half_precision_rounds_once(family, dtype):
    latents, noise = (torch.randn(64, 4, 8, 8).to(dtype) for _ in range(2))
    timesteps = family.sample_timesteps(64, torch.Generator().manual_seed(0))
    for compute in (family.add_noise, family.target):
        truth = compute(latents.double(), noise.double(), timesteps)
        assert compute(latents, noise, timesteps).dtype == dtype
        error = (compute(latents, noise, timesteps).double() - truth).abs()
        # one rounding to dtype, and those of float32 arithmetic
        bound = truth.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        assert bool((error <= bound).all())


@_of(FLOW)
def test_flow_is_that_of_the_pipelines_scheduler(family):
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    scheduler = family.pipeline.scheduler
    timesteps = scheduler.timesteps[[10, 500, 990]]
    noisy = family.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    # following the target from σ to 0 leads to the clean latents
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    arrived = noisy - sigmas * family.target(latents, noise, timesteps)
    torch.testing.assert_close(arrived, latents, rtol=1e-5, atol=1e-5)


@_of(FLOW)
def test_sampling_shifts_noise_levels_as_the_scheduler_does(family):
    scheduler = copy.deepcopy(family.pipeline.scheduler)
    levels = torch.linspace(0.999, 0.002, 300)
    mu = None
    if scheduler.config.use_dynamic_shifting:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        side = family.resolution // family.pipeline.vae_scale_factor // 2
        mu = calculate_shift(side**2, 256, 4096, 0.5, 1.15)
    if mu is None and scheduler.config.shift == 1:
        expected = levels
    else:
        scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu)
        expected = scheduler.sigmas[:-1]
    torch.testing.assert_close(family._shift(levels), expected, rtol=1e-4, atol=1e-5)


@_of(DDPM)
def test_noise_levels_are_uniform(family):
    drawn = family.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == family.num_train_timesteps - 1
    assert abs(drawn.float().mean() - 499.5) < 10  # 5 standard errors


def test_a_half_precision_vae_runs_in_float32_where_it_overflows(folder_of):
    family = open_family(folder_of("sdxl"), dtype=torch.float16)
    vae = family.pipeline.vae
    assert vae.config.force_upcast
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    encoded = family.encode_images(pixels)
    assert encoded.dtype == torch.float16
    assert vae.dtype == torch.float16
    full = open_family(folder_of("sdxl")).encode_images(pixels)
    # weights and result are rounded to float16, activations are not
    torch.testing.assert_close(encoded.float(), full, rtol=1e-2, atol=1e-3)


def test_vae_statistics_are_followed(folder_of):
    family = open_family(folder_of("sdxl"))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    plain = family.encode_images(pixels)
    family.pipeline.vae.register_to_config(
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 4.0, 8.0]
    )
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    std = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    factor = family.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(family.encode_images(pixels), (plain - mean * factor) / std)


# --- what is refused


def test_guidance_is_what_the_pipeline_is_told(folder_of):
    """Another guidance changes Flux dev's prediction, and schnell has none."""
    given, _ = denoiser_call(open_family(folder_of("flux-dev")))
    assert given["guidance"].tolist() == [3.5, 3.5]
    given, _ = denoiser_call(open_family(folder_of("flux-schnell")))
    assert given["guidance"] is None


@pytest.mark.parametrize(
    ("kind", "part"),
    [("sd", "vae"), ("sd", "text_encoder"), ("sd3", "tokenizer_2"), ("flux-dev", "text_encoder_2")],
)
def test_a_missing_part_is_named(folder_of, kind, part):
    pipeline = load_pipeline(folder_of(kind))
    setattr(pipeline, part, None)
    with pytest.raises(MimaError, match=f"has no {part}$"):
        family_of(pipeline)


def test_the_sdxl_refiner_is_refused(folder_of):
    pipeline = load_pipeline(folder_of("sdxl"))
    pipeline.text_encoder = None
    with pytest.raises(MimaError, match=r"SDXL refiner.*SDXL base models are supported"):
        family_of(pipeline)
    pipeline = load_pipeline(folder_of("sdxl"))
    pipeline.unet.register_to_config(projection_class_embeddings_input_dim=60)
    with pytest.raises(MimaError, match=r"width 60\) than pooled text and six sizes \(68\)"):
        family_of(pipeline)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"in_channels": 9}, "reads 9 latent channels and the vae makes 4.*inpainting"),
        ({"time_cond_proj_dim": 32}, "guidance-distilled"),
        ({"encoder_hid_dim_type": "text_proj"}, "projected once more"),
        ({"only_cross_attention": True}, "attn1 reads text"),
        ({"num_class_embeds": 4}, "reads classes"),
        ({"class_embed_type": "timestep"}, "reads classes"),
        ({"addition_embed_type": "text"}, "'text', expected None in a StableDiffusionPipeline"),
    ],
)
def test_unets_of_other_kinds_are_refused(folder_of, setting, message):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.unet.register_to_config(**setting)
    with pytest.raises(MimaError, match=message):
        family_of(pipeline)


@pytest.mark.parametrize(
    ("kind", "part", "setting", "what"),
    [
        ("sd", "unet", "cross_attention_dim", "text"),
        ("sdxl", "unet", "cross_attention_dim", "text"),
        ("pixart-alpha", "transformer", "caption_channels", "text"),
        ("sd3", "transformer", "joint_attention_dim", "text"),
        ("sd3", "transformer", "pooled_projection_dim", "pooled text"),
        ("flux-dev", "transformer", "joint_attention_dim", "text"),
        ("flux-dev", "transformer", "pooled_projection_dim", "pooled text"),
    ],
)
def test_parts_of_different_models_are_refused(folder_of, kind, part, setting, what):
    pipeline = load_pipeline(folder_of(kind))
    getattr(pipeline, part).register_to_config(**{setting: 7})
    with pytest.raises(MimaError, match=rf"the {part} reads {what} of width 7 and the text enc"):
        family_of(pipeline)


def test_a_tokenizer_of_another_model_is_refused(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.tokenizer.add_tokens(["<new1>"])
    with pytest.raises(MimaError, match=r"tokenizer has \d+ tokens and text_encoder knows \d+"):
        family_of(pipeline)


def test_pictures_that_are_not_square_are_refused(folder_of):
    family = open_family(folder_of("sd"))
    family.pipeline.unet.register_to_config(sample_size=[8, 8])
    assert family.resolution == 32
    for size in ([8, 12], None):
        family.pipeline.unet.register_to_config(sample_size=size)
        with pytest.raises(MimaError, match="only square pictures are supported"):
            _ = family.resolution


def test_the_largest_pictures_are_four_times_those_of_the_training(folder_of):
    family = open_family(folder_of("sd"))
    family.resolution = 128
    with pytest.raises(MimaError, match=r"at most 128 pixels, 4 times .* got 136"):
        family.resolution = 136
    # SD's, where the model does not say
    family.pipeline.unet.register_to_config(sample_size=None)
    family.resolution = 2048
    with pytest.raises(MimaError, match=r"at most 2048 pixels, .* got 4096"):
        family.resolution = 4096


def test_schedulers_of_other_processes_are_refused(folder_of):
    pipeline = load_pipeline(folder_of("sdxl"))
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(MimaError, match="EDMEulerScheduler has no betas"):
        family_of(pipeline)
    pipeline.scheduler = LCMScheduler(prediction_type="other")
    with pytest.raises(MimaError, match="got 'other'"):
        family_of(pipeline)
    flow = load_pipeline(folder_of("sd3"))
    flow.scheduler = LCMScheduler()
    with pytest.raises(MimaError, match="LCMScheduler has no shift"):
        family_of(flow)
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    family_of(flow)


def test_what_trains_on_other_levels_or_latents_is_refused(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction"
    )
    with pytest.raises(MimaError, match="continuous noise levels"):
        family_of(pipeline)
    tiny_vae = load_pipeline(folder_of("sd"))
    tiny_vae.vae = AutoencoderTiny()
    family = family_of(tiny_vae)
    with pytest.raises(MimaError, match="with its own vae"):
        family.encode_images(torch.zeros(1, 3, 32, 32))
    # a run refuses it before it draws class pictures
    with pytest.raises(MimaError, match="with its own vae"):
        check_model(tiny_vae, [], ImmunizeConfig())


@pytest.mark.parametrize("kind", ["sd", "qwen-image", "flux-dev"])
def test_pictures_are_drawn_under_the_guidance_that_is_asked_for(folder_of, kind):
    pipeline = load_pipeline(folder_of(kind))
    if kind != "sd":
        pipeline.default_sample_size = 8

    def drawn(**options):
        rows = Sampler(steps=2, size=32, **options)(pipeline, ["a cat", "a dog"], (0,))
        return np.stack([np.asarray(row[0], float) for row in rows])

    assert (drawn(guidance=9.0) != drawn(guidance=1.0)).any()
    if kind == "flux-dev":
        with pytest.raises(MimaError, match="leave negative_prompt out"):
            drawn(negative_prompt="a red house")
        return
    assert (drawn(guidance=9.0) != drawn(guidance=9.0, negative_prompt="a red house")).any()
    assert (drawn(guidance=1.0) == drawn(guidance=1.0, negative_prompt="a red house")).all()


def test_fused_projections_are_refused(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.unet.fuse_qkv_projections()
    with pytest.raises(MimaError, match="fused"):
        family_of(pipeline)
    pipeline.unet.unfuse_qkv_projections()


def test_loaded_adapters_are_named_where_weights_are_asked_for(folder_of):
    from peft import LoraConfig

    pipeline = load_pipeline(folder_of("sd"))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    with pytest.raises(MimaError, match="unload_lora_weights"):
        family_of(pipeline).text_projections()


def test_a_pipeline_of_another_kind_is_refused():
    class StableDiffusionXLImg2ImgPipeline:
        pass

    with pytest.raises(MimaError, match=r"refiner.*supported pipelines are .*FluxPipeline"):
        family_of(StableDiffusionXLImg2ImgPipeline())
