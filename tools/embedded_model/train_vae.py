"""Train the AutoencoderKL, fold a latent normalisation into it, then train the decoder on."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common import TRAIN_STYLES, autocast, load_names, load_pictures, setup

KL_WEIGHT = 3e-4
DECODER_MSE_WEIGHT = 6.0


def build_vae() -> AutoencoderKL:
    """Factor 8, 8 latent channels: a 64x64 picture becomes 8x8x8."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random flip, shift by up to 3 pixels, and a permutation of the colours for two in seven."""
    padded = F.pad(images, (3, 3, 3, 3), value=1.0)
    out = []
    for image in padded:
        dy, dx, flip, permute = torch.randint(0, 7, (4,), generator=rng).tolist()
        image = image[:, dy : dy + 64, dx : dx + 64]
        image = image.flip(-1) if flip % 2 else image
        out.append(image[torch.randperm(3, generator=rng)] if permute < 2 else image)
    return torch.stack(out).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + gradients at three scales + chroma differences on 4x-pooled pictures."""
    loss = (output - target).abs().mean() + 2 * F.mse_loss(output, target)
    error = output - target
    for scale in (1, 2, 4):
        pooled = F.avg_pool2d(error, scale) if scale > 1 else error
        loss = (
            loss + 0.5 * pooled.diff(dim=-1).abs().mean() + 0.5 * pooled.diff(dim=-2).abs().mean()
        )
    pooled = F.avg_pool2d(error, 4)
    chroma = (pooled - pooled.roll(1, dims=1)).abs().mean()
    return loss + 2 * chroma


def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over pictures of the reconstruction PSNR in dB."""
    with torch.no_grad():
        decoded = torch.cat([vae(batch).sample.clamp(-1, 1) for batch in images.split(32)])
    mse = (decoded - images).square().flatten(1).mean(1) / 4
    return float(-10 * mse.clamp_min(1e-10).log10().mean())


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold zero mean and unit deviation of each latent channel into the 1x1 convolutions."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    # moments = (mean, log variance): the first half is scaled, the second shifted by -2 log std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    # decode(z) = old(z * std + mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def train(
    vae: AutoencoderKL,
    images: torch.Tensor,
    test_images: torch.Tensor,
    *,
    whole: bool,
    steps: int,
    batch_size: int,
    lr: float,
    rng: torch.Generator,
) -> None:
    """One one-cycle run, of the whole autoencoder or of the decoder with the latents fixed."""
    modules = [vae] if whole else [vae.post_quant_conv, vae.decoder]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, final_div_factor=1e3
    )
    start = time.time()
    for step in range(1, steps + 1):
        batch = augment(images[torch.randint(len(images), (batch_size,), generator=rng)], rng)
        with autocast():
            with torch.set_grad_enabled(whole):
                posterior = vae.encode(batch).latent_dist
                latents = posterior.sample(rng) if whole else posterior.mean
            output = vae.decode(latents).sample
        loss = reconstruction_loss(output.float(), batch)
        if whole:
            loss = loss + KL_WEIGHT * posterior.kl().mean() / 64
        else:
            loss = loss + DECODER_MSE_WEIGHT * F.mse_loss(output.float(), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step == 50 or step % 500 == 0:
            quality = psnr(vae, test_images)
            print(f"{step} {time.time() - start:.0f}s psnr {quality:.2f}", flush=True)


def main() -> None:
    """Write DATA/vae."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--decoder-only", action="store_true", help="go on from DATA/vae")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decoder-lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    setup(args.seed, args.threads)
    rng = torch.Generator().manual_seed(args.seed)
    pictures = load_pictures(args.data)
    seen_style = np.isin(pictures.styles, TRAIN_STYLES)
    held_out = np.isin(pictures.names, load_names()["held_out"])
    images = pictures.where(seen_style & ~held_out).tensor()
    test_images = pictures.where(seen_style & held_out).tensor()

    vae = AutoencoderKL.from_pretrained(args.data / "vae") if args.decoder_only else build_vae()
    vae.to(memory_format=torch.channels_last)
    size = sum(p.numel() for p in vae.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {len(images)} pictures", flush=True)
    common = {"batch_size": args.batch, "rng": rng}
    if not args.decoder_only:
        train(vae, images, test_images, whole=True, steps=args.steps, lr=args.lr, **common)
        normalise_latents(vae, images)
    train(
        vae,
        images,
        test_images,
        whole=False,
        steps=args.decoder_steps,
        lr=args.decoder_lr,
        **common,
    )
    print(f"held-out psnr {psnr(vae, test_images):.2f}", flush=True)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.data / "vae")


if __name__ == "__main__":
    main()
