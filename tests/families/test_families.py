"""Every family against diffusers itself: its pipelines' calls, its VAEs, its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import builders
from support.families import PROMPTS, open_family

from mima.errors import MimaError
from mima.families import Family, TrainingOptions, load_pipeline
from mima.sampling import Sampler


def unguided(family: Family) -> dict[str, Any]:
    """Arguments of a call in which the denoiser sees the prompts alone."""
    options = family.sampling_options(len(PROMPTS))
    return options if "guidance_scale" in options else {**options, "guidance_scale": 1.0}


def denoiser_call(family: Family, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments and output of the first denoiser call when the pipeline samples PROMPTS."""
    calls = []

    def record(_: Any, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep") if "unet" in family.parts else ("hidden_states",)
        calls.append((dict(zip(names, args, strict=False)) | keywords, output[0]))

    hook = family.denoiser.register_forward_hook(record, with_kwargs=True)
    family.pipeline(
        PROMPTS,
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
    sampled = family.sample_latents(PROMPTS, torch.Generator().manual_seed(3))
    pictures = family.pipeline(
        PROMPTS,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **family.sampling_options(len(PROMPTS)),
    ).images
    vae, size = family.pipeline.vae, family.resolution
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


def test_guidance_is_what_the_pipeline_is_told(folder_of):
    """Another guidance changes Flux dev's prediction, and schnell has none."""
    given, _ = denoiser_call(open_family(folder_of("flux-dev")))
    assert given["guidance"].tolist() == [3.5, 3.5]
    given, _ = denoiser_call(open_family(folder_of("flux-schnell")))
    assert given["guidance"] is None


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
