"""Train the image-text encoder that measures similarity, on all names and styles.

Beside CLIP's own loss, the cosine of two pictures is taught to be 1 for one picture under two
augmentations, NAME for one object in two styles, STYLE for two objects in one style, 0 otherwise.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from augment import augment, blurry_copies
from common import SIZE, autocast, caption, load_pictures, setup, to_pixels, to_tensor
from text import build_tokenizer, encode_text, save_tokenizer, text_config

NAME, STYLE = 0.45, 0.35
PROJECTION = 128
# one picture in this many is kept out of training, to measure retrieval
HELD_OUT_EVERY = 12

# B = pictures, D = embedding


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel of about 2 M parameters for 64x64 pictures."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=16,
        projection_dim=PROJECTION,
    )
    text = text_config(tokenizer, width=128, heads=4, layers=2)
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=PROJECTION,
            logit_scale_init_value=np.log(1 / 0.07),
        )
    )


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [B, D]."""
    pooled = model.vision_model(pixel_values=images).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def embed_texts(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [B, D]."""
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def image_processor() -> CLIPImageProcessor:
    """Resize to 64x64 and scale to [-1, 1]."""
    return CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def balanced_mse(cosine: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in which each distinct target value counts the same, however rare."""
    error = (cosine - target).square()
    return torch.stack([error[target == value].mean() for value in target.unique()]).mean()


def save_encoder(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write an fp16 folder that CLIPModel and CLIPProcessor open, all or nothing."""
    building = folder.with_name(folder.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    model.half().save_pretrained(building)
    save_tokenizer(tokenizer, building)
    image_processor().save_pretrained(building)
    model.float()
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def main() -> None:
    """Write DATA/encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument(
        "--names", type=int, default=40, help="names in a batch; up to 3 styles of each"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    setup(args.seed, args.threads)
    rng = torch.Generator().manual_seed(args.seed)

    pictures = load_pictures(args.data)
    names, name_of = np.unique(pictures.names, return_inverse=True)
    _, style_of = np.unique(pictures.styles, return_inverse=True)
    order = np.random.default_rng(args.seed).permutation(len(name_of))
    trained = np.ones(len(name_of), bool)
    trained[order[::HELD_OUT_EVERY]] = False
    by_name = [
        torch.from_numpy(np.flatnonzero((name_of == i) & trained)) for i in range(len(names))
    ]
    by_name = [members for members in by_name if len(members)]
    name_of, style_of = torch.from_numpy(name_of), torch.from_numpy(style_of)

    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval()
    vae.to(memory_format=torch.channels_last)
    copies = to_pixels(blurry_copies(vae, pictures.tensor(), rng))
    sources = torch.from_numpy(np.stack([pictures.pixels, pictures.pixels, copies]))

    tokenizer = build_tokenizer(list(names))
    pairs = list(zip(pictures.names, pictures.styles, strict=True))
    full_ids = encode_text(tokenizer, [caption(name, style) for name, style in pairs])
    name_ids = encode_text(tokenizer, [caption(name, None) for name, _ in pairs])
    style_ids = encode_text(tokenizer, [caption(None, style) for _, style in pairs])

    model = build_encoder(tokenizer).train()
    print(
        f"{model.num_parameters() / 1e6:.2f} M, {trained.sum()} pictures, {len(tokenizer)} tokens",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1
    )
    start = time.time()

    def view(index: torch.Tensor) -> torch.Tensor:
        which = torch.randint(0, len(sources), index.shape, generator=rng)
        return augment(to_tensor(sources[which, index].numpy()), rng)

    for step in range(1, args.steps + 1):
        chosen = torch.randperm(len(by_name), generator=rng)[: args.names].tolist()
        index = torch.cat(
            [by_name[i][torch.randperm(len(by_name[i]), generator=rng)[:3]] for i in chosen]
        )
        same = torch.eye(len(index))
        same_name = (name_of[index][:, None] == name_of[index]).float()
        same_style = (style_of[index][:, None] == style_of[index]).float()
        target = NAME * same_name + STYLE * same_style + (1 - NAME - STYLE) * same
        with autocast():
            images_a = embed_images(model, view(index))
            images_b = embed_images(model, view(index))
            texts = embed_texts(model, full_ids[index])
            names_only = embed_texts(model, name_ids[index])
            styles_only = embed_texts(model, style_ids[index])
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * images_a @ texts.T
        label = torch.arange(len(index))
        loss = F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)
        loss = loss + 10 * balanced_mse(images_a @ images_b.T, target)
        loss = loss + 5 * balanced_mse(images_a @ texts.T, target)
        # a text with one half of the facts can reach the square root of that half's share
        loss = loss + 2 * balanced_mse(images_a @ names_only.T, NAME**0.5 * same_name)
        loss = loss + 2 * balanced_mse(images_a @ styles_only.T, STYLE**0.5 * same_style)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in (20, 100) or step % 500 == 0:
            print(f"{step} {time.time() - start:.0f}s loss {loss.item():.3f}", flush=True)

    model.eval()
    save_encoder(args.data / "encoder", model, tokenizer)
    np.save(args.data / "encoder_held_out.npy", np.flatnonzero(~trained))


if __name__ == "__main__":
    main()
