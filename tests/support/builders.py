"""Tiny randomly initialised pipelines of the families other than Stable Diffusion.

Like `tiny`: deterministic in the seed, built from diffusers' and transformers' own classes, and
written to a folder, so that tests run the code that loads real models. Nothing is fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from support.tiny import MAX_TOKENS, WORDS, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from mima.families import load_pipeline

T5_WIDTH = 32
T5_TOKENS = 12
LANGUAGE_TOKENS = 80


def clip(tokenizer: Any, width: int, *, projection: int | None = None) -> Any:
    """A CLIP text model of two layers, with a projection of the pooled output if asked for."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection or 16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A T5 tokenizer that knows each of `tiny.WORDS` as one token."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [f"▁{word}" for word in WORDS] + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -float(rank)) for rank, piece in enumerate(dict.fromkeys(letters), 1)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": T5_TOKENS,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return T5TokenizerFast.from_pretrained(folder)


def t5(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(
        # published ones have more rows than tokens, too
        vocab_size=len(tokenizer) + 28,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def vae(*, channels: int = 4, blocks: int = 3, **options: Any) -> AutoencoderKL:
    """A VAE whose side factor is 2 ** (blocks - 1)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        **options,
    ).eval()


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = tiny_tokenizer(folder / "one")
    tokenizer_2 = tiny_tokenizer(folder / "two")
    tokenizer_2.pad_token = "!"
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(tokenizer, 16),
        text_encoder_2=clip(tokenizer_2, 32, projection=20),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def pixart(
    folder: Path, *, sigma: bool = False, sample_size: int = 8, patch: int = 2
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """PixArt; α with 128² latents is the one that is told the picture's size."""
    tokenizer = t5_tokenizer(folder / "t5")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=patch,
        caption_channels=T5_WIDTH,
        interpolation_scale=1,
        use_additional_conditions=sample_size == 128,
    )
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return kind(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def sd3(folder: Path, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizer = tiny_tokenizer(folder / "one")
    tokenizer_2 = tiny_tokenizer(folder / "two")
    tokenizer_2.pad_token = "!"
    tokenizer_3 = t5_tokenizer(folder / "three") if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=24,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(tokenizer, 12, projection=12),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer_2, 20, projection=20),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5(tokenizer_3) if with_t5 else None,
        tokenizer_3=tokenizer_3,
    )


def flux(folder: Path, *, guidance: bool = True) -> FluxPipeline:
    tokenizer = tiny_tokenizer(folder / "one")
    tokenizer_2 = t5_tokenizer(folder / "two")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = FluxPipeline(
        scheduler=scheduler if guidance else FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    return pipeline


def language_tokenizer(*, begin: bool, letters: str = "") -> PreTrainedTokenizerFast:
    """A language model's tokenizer: each of `tiny.WORDS` is one token, and each letter."""
    vocabulary = [("<pad>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0)]
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *letters]
    vocabulary += [(piece, -float(rank)) for rank, piece in enumerate(pieces, 1)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if begin else None,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=LANGUAGE_TOKENS,
    )


def gemma(tokenizer: Any) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=T5_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return Gemma2Model(config).eval()


def sana(folder: Path) -> SanaPipeline:
    tokenizer = language_tokenizer(begin=True)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=T5_WIDTH,
        sample_size=8,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def lumina2(folder: Path) -> Lumina2Pipeline:
    tokenizer = language_tokenizer(begin=True)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=T5_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        # the pipeline takes 8 for the side factor of any
        vae=vae(blocks=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )


def qwen_image(folder: Path) -> QwenImagePipeline:
    # its template must have as many tokens as the pipeline cuts off
    tokenizer = language_tokenizer(begin=False, letters="abcdefghijklmnopqrstuvwxyz\n")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(4, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )
    encoder = Qwen2_5_VLConfig(
        text_config={
            "bos_token_id": 1,
            "eos_token_id": 1,
            "vocab_size": len(tokenizer),
            "hidden_size": T5_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": T5_WIDTH,
        },
        # as published: older transformers have no default for it
        vision_start_token_id=151652,
    )
    return QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=tokenizer,
    )


KINDS = {
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
}
"""One of each family but Stable Diffusion's own, by name."""


def save(kind: Any, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Build a pipeline with one of the functions above and write it to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = kind(folder.with_name(f"{folder.name}-tokenizers"), **options)
    # adaptive norms and output layers start at zero in some of these models: then text and time
    # would have no effect
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        denoiser = pipeline.components.get("transformer") or pipeline.components["unet"]
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    pipeline.save_pretrained(folder)
    return folder


def opened(folder: Path, **options: Any) -> Any:
    """A saved pipeline that takes small pictures, whatever its family."""
    pipeline = load_pipeline(folder, **options)
    if isinstance(pipeline, (FluxPipeline, QwenImagePipeline)):
        pipeline.default_sample_size = 8  # their folders do not say what they were trained on
    return pipeline
