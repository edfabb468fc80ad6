"""Measure the shipped assets: reconstruction, recognisability of samples, and the encoder."""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from common import (
    ASSETS,
    HERE,
    STYLES,
    TRAIN_STYLES,
    Pictures,
    caption,
    load_names,
    load_pictures,
    setup,
    to_pixels,
    to_tensor,
)
from text import encode_text
from train_classifier import Classifier, load_classifier
from train_encoder import embed_images, embed_texts
from train_vae import psnr

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}
SHEET_NAMES = 24


def load_pipeline(folder: Path, scheduler: str) -> StableDiffusionPipeline:
    """The shipped pipeline in float32 with one of SCHEDULERS."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 40,
) -> np.ndarray:
    """Samples [N, 64, 64, 3] uint8."""
    rng = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), batch):
        result = pipeline(
            prompts[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=64,
            width=64,
            generator=rng,
            output_type="pt",
        )
        images.append(to_pixels(result.images * 2 - 1))
    return np.concatenate(images)


@torch.no_grad()
def classify(model: Classifier, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the recognised name and style, each [N]."""
    logits = [model(batch) for batch in to_tensor(pixels).split(100)]
    name_logits, style_logits = (torch.cat(part) for part in zip(*logits, strict=True))
    return name_logits.argmax(1).numpy(), style_logits.argmax(1).numpy()


def recognised(pixels: np.ndarray, pairs: list[tuple[str, str]], classifier: Classifier) -> dict:
    """Share of pictures whose object, and whose style, the classifier names as asked."""
    names = load_names()["train"]
    name_of, style_of = classify(classifier, pixels)
    name_right = np.array([names[i] == name for i, (name, _) in zip(name_of, pairs, strict=True)])
    style_right = np.array(
        [TRAIN_STYLES[i] == style for i, (_, style) in zip(style_of, pairs, strict=True)]
    )
    asked = np.array([style for _, style in pairs])
    return {
        "object": float(name_right.mean()),
        "style": float(style_right.mean()),
        "object_by_style": {s: float(name_right[asked == s].mean()) for s in TRAIN_STYLES},
        "style_by_style": {s: float(style_right[asked == s].mean()) for s in TRAIN_STYLES},
        "never_recognised": sorted(
            {n for n, _ in pairs} - {n for (n, _), ok in zip(pairs, name_right, strict=True) if ok}
        ),
    }


@torch.no_grad()
def encoder_embeddings(folder: Path, pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings of the pictures and of their captions, each [N, D]."""
    model = CLIPModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pairs = zip(pictures.names, pictures.styles, strict=True)
    ids = encode_text(tokenizer, [caption(name, style) for name, style in pairs])
    images = torch.cat([embed_images(model, batch) for batch in pictures.tensor().split(200)])
    texts = torch.cat([embed_texts(model, batch) for batch in ids.split(200)])
    return images.numpy(), texts.numpy()


def encoder_report(folder: Path, pictures: Pictures, held_out: np.ndarray) -> dict:
    """Cosines by kind of pair and retrieval, from pictures that the encoder was not trained on."""
    images, texts = encoder_embeddings(folder, pictures)
    cosine = images[held_out] @ images.T
    same_name = pictures.names[held_out][:, None] == pictures.names
    same_style = pictures.styles[held_out][:, None] == pictures.styles
    itself = held_out[:, None] == np.arange(len(images))
    others = np.where(itself, -1, cosine).argmax(1)
    to_text = (images[held_out] @ texts.T).argmax(1)
    text_right = pictures.names[to_text] == pictures.names[held_out]
    text_style_right = pictures.styles[to_text] == pictures.styles[held_out]

    def spread(mask: np.ndarray) -> dict[str, float]:
        return {"mean": float(cosine[mask].mean()), "std": float(cosine[mask].std())}

    return {
        "held_out_pictures": len(held_out),
        "candidates": len(images),
        "cosine": {
            "same object, other style": spread(same_name & ~same_style),
            "other object, same style": spread(~same_name & same_style),
            "other object, other style": spread(~same_name & ~same_style),
        },
        "nearest_picture_same_object": float(
            (pictures.names[others] == pictures.names[held_out]).mean()
        ),
        "caption_retrieval": {
            "object": float(text_right.mean()),
            "style": float(text_style_right.mean()),
            "both": float((text_right & text_style_right).mean()),
        },
    }


def sample_report(folder: Path, sample_pixels: np.ndarray, pairs: list, pictures: Pictures) -> dict:
    """Cosine of samples with the real picture that they should show, and with a shuffled one."""
    index = {key: i for i, key in enumerate(zip(pictures.names, pictures.styles, strict=True))}
    real = pictures.where(np.array([index[pair] for pair in pairs]))
    drawn = Pictures(
        pixels=sample_pixels, names=real.names, styles=real.styles, categories=real.categories
    )
    real_images, texts = encoder_embeddings(folder, real)
    drawn_images, _ = encoder_embeddings(folder, drawn)
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    return {
        "sample_to_its_picture": float((drawn_images * real_images).sum(1).mean()),
        "sample_to_another_picture": float((drawn_images * real_images[shuffled]).sum(1).mean()),
        "sample_to_its_caption": float((drawn_images * texts).sum(1).mean()),
        "picture_to_its_caption": float((real_images * texts).sum(1).mean()),
    }


def sheet(rows: list[np.ndarray], path: Path) -> None:
    """Rows of pictures as one PNG."""
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)).save(
        path, optimize=True
    )


def main() -> None:
    """Write results.json and samples.png beside this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), default="ddim")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--names", type=int, default=200, help="how many names to sample")
    parser.add_argument("--seed", type=int, default=4)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    setup(args.seed)
    pictures, splits = load_pictures(args.data), load_names()
    index = {key: i for i, key in enumerate(zip(pictures.names, pictures.styles, strict=True))}
    names = splits["train"][:: len(splits["train"]) // args.names]
    pairs = [(name, style) for name in names for style in TRAIN_STYLES]
    real = pictures.pixels[[index[pair] for pair in pairs]]
    classifier = load_classifier(args.data)

    vae = AutoencoderKL.from_pretrained(args.assets / "model/vae", torch_dtype=torch.float32).eval()
    unseen = np.isin(pictures.names, splits["held_out"])
    reconstruction = {
        style: psnr(vae, pictures.where(unseen & (pictures.styles == style)).tensor())
        for style in STYLES
    }
    reconstruction["training styles"] = float(np.mean([reconstruction[s] for s in TRAIN_STYLES]))
    pipeline = load_pipeline(args.assets / "model", args.scheduler)
    start = time.time()
    drawn = draw(
        pipeline,
        [caption(*pair) for pair in pairs],
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )
    seconds = (time.time() - start) / len(pairs)
    results = {
        "sampling": {
            "scheduler": args.scheduler,
            "steps": args.steps,
            "guidance": args.guidance,
            "samples": len(pairs),
            "seconds_per_sample": seconds,
        },
        "psnr_of_unseen_objects": reconstruction,
        "samples_recognised": recognised(drawn, pairs, classifier),
        "real_pictures_recognised": recognised(real, pairs, classifier),
        "encoder": {
            **encoder_report(
                args.assets / "encoder", pictures, np.load(args.data / "encoder_held_out.npy")
            ),
            **sample_report(args.assets / "encoder", drawn, pairs, pictures),
        },
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
    }
    text = json.dumps(results, indent=2)
    (args.output / "results.json").write_text(text + "\n")
    shown = names[:: max(1, len(names) // SHEET_NAMES)][:SHEET_NAMES]
    rows = []
    for style in TRAIN_STYLES:
        places = [pairs.index((name, style)) for name in shown]
        rows += [real[places], drawn[places]]
    sheet(rows, args.output / "samples.png")
    print(text)


if __name__ == "__main__":
    main()
