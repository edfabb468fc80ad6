"""Train text encoder and UNet jointly on the latents of the training pictures."""

import argparse
import copy
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from common import (
    TRAIN_STYLES,
    Pictures,
    autocast,
    caption,
    load_names,
    load_pictures,
    reworded_captions,
    setup,
    without,
)
from text import build_tokenizer, encode_text, save_tokenizer, text_config

WIDTH = 160
# shares of the caption kinds: complete, three rewordings of it, name only, style only, empty
CAPTION_SHARES = (0.63, 0.05, 0.05, 0.05, 0.08, 0.04, 0.10)


def build_unet() -> UNet2DConditionModel:
    """Two levels, 8x8 and 4x4, with cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        # despite its name, diffusers reads this as the number of heads
        attention_head_dim=(3, 5),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def tokenised_captions(pictures: Pictures, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Token ids [7, N, 16] of each picture's captions, in the order of CAPTION_SHARES."""
    rows = [
        [
            caption(name, style),
            *reworded_captions(name, style),
            caption(name, None),
            caption(None, style),
            "",
        ]
        for name, style in zip(pictures.names, pictures.styles, strict=True)
    ]
    return torch.stack([encode_text(tokenizer, list(kind)) for kind in zip(*rows, strict=True)])


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of every picture, each [N, 8, 8, 8]."""
    posteriors = [vae.encode(batch).latent_dist for batch in pictures.tensor().split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def save_pipeline(
    folder: Path, vae: AutoencoderKL, text: nn.Module, unet: nn.Module, tokenizer: CLIPTokenizer
) -> None:
    """Write a StableDiffusionPipeline folder, all or nothing."""
    building = folder.with_name(folder.name + ".part")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(building, ignore_errors=True)
    pipeline.save_pretrained(building)
    save_tokenizer(tokenizer, building / "tokenizer")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def main() -> None:
    """Write the pipeline, every `--save-every` steps and at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--start-from", type=Path, help="a pipeline folder to train further")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="CONCEPT",
        help="leave the pictures of styles (style-mono) or names (tiger) out of the training: the "
        "ceiling of the study, a model that never learned them; needs --output",
    )
    parser.add_argument("--output", type=Path, help="the pipeline folder; default DATA/pipeline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.without and (args.output is None or args.start_from):
        parser.error("--without: needs --output, and no --start-from, which has learned everything")
    setup(args.seed, args.threads)

    splits = load_names()
    pictures = load_pictures(args.data)
    train = pictures.where(
        [
            n in set(splits["train"]) and s in TRAIN_STYLES
            for n, s in zip(pictures.names, pictures.styles, strict=True)
        ]
    )
    train = without(train, args.without)
    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval()
    mean, std = encode_latents(vae, train)
    if args.start_from:
        tokenizer = CLIPTokenizer.from_pretrained(args.start_from / "tokenizer")
    else:
        tokenizer = build_tokenizer(splits["train"] + splits["held_out"])
    token_ids = tokenised_captions(train, tokenizer)
    print(f"{len(mean)} pictures, latent std {mean.std():.3f}, {len(tokenizer)} tokens", flush=True)

    if args.start_from:
        text = CLIPTextModel.from_pretrained(args.start_from / "text_encoder").float()
        unet = UNet2DConditionModel.from_pretrained(args.start_from / "unet").float()
    else:
        text = CLIPTextModel(text_config(tokenizer, WIDTH, heads=5, layers=2))
        unet = build_unet()
    unet.to(memory_format=torch.channels_last)
    models = nn.ModuleList([text, unet]).train()
    averaged = copy.deepcopy(models).eval().requires_grad_(False)
    parameters, averages = list(models.parameters()), list(averaged.parameters())
    print(
        f"text {text.num_parameters() / 1e6:.2f} M, UNet {unet.num_parameters() / 1e6:.2f} M",
        flush=True,
    )

    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-2, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.03, final_div_factor=1e3
    )
    scheduler = build_scheduler()
    rng = torch.Generator().manual_seed(args.seed)
    shares = torch.tensor(CAPTION_SHARES)
    start, running = time.time(), 0.5
    for step in range(1, args.steps + 1):
        index = torch.randint(len(mean), (args.batch,), generator=rng)
        kind = torch.multinomial(shares, args.batch, replacement=True, generator=rng)
        latents = mean[index] + std[index] * torch.randn(mean[index].shape, generator=rng)
        noise = torch.randn(latents.shape, generator=rng)
        timesteps = torch.randint(
            0, scheduler.config.num_train_timesteps, (args.batch,), generator=rng
        )
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(
            memory_format=torch.channels_last
        )
        target = scheduler.get_velocity(latents, noise, timesteps)
        with autocast():
            hidden = text(token_ids[kind, index]).last_hidden_state
            prediction = unet(noisy, timesteps, hidden).sample
        loss = F.mse_loss(prediction.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        # the average follows closely at first, so that early snapshots are usable
        torch._foreach_lerp_(averages, parameters, 1 - min(args.ema, step / (step + 10)))
        running += 0.01 * (loss.item() - running)
        if step in (20, 100) or step % 200 == 0:
            print(f"{step} {time.time() - start:.0f}s loss {running:.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            output = args.output or args.data / "pipeline"
            save_pipeline(output, vae, averaged[0], averaged[1], tokenizer)


if __name__ == "__main__":
    main()
