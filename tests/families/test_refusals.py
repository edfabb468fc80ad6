"""Models that are refused, or cannot be trained, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from support.families import open_family

from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.immunization.checks import check_model
from mima.immunization.config import ImmunizeConfig


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


def test_a_compiled_denoiser_is_refused(folder_of):
    pipeline = load_pipeline(folder_of("sd"))
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with pytest.raises(MimaError, match=r"compiled .* give .* with unet\._orig_mod as its unet"):
        family_of(pipeline)


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
