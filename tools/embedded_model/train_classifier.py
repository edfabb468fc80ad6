"""Train the classifier that judges samples: the object and the style of a picture.

It learns from real pictures, as they are and as the autoencoder shows them: a judge that has seen
only sharp ones recognises the style of 88% of the *real* pictures after encoding and decoding.
It shares nothing with the text encoder, the UNet or the similarity encoder, and is not shipped.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from augment import augment, blurry_copies
from common import TRAIN_STYLES, autocast, load_names, load_pictures, setup


class Block(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels_out) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H/2, W/2]."""
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.skip(x))


class Classifier(nn.Module):
    """Logits of the name [B, 200] and of the style [B, 4]."""

    def __init__(self, num_names: int, num_styles: int):
        super().__init__()
        widths = (32, 64, 96, 160, 256)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)))
        self.name = nn.Linear(widths[-1] * 16, num_names)
        self.style = nn.Linear(widths[-1], num_styles)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, 64, 64] in [-1, 1]."""
        features = self.blocks(F.relu(self.stem(images)))
        return self.name(F.dropout(features.flatten(1), 0.2, self.training)), self.style(
            features.mean((2, 3))
        )


def load_classifier(data: Path) -> Classifier:
    """The trained classifier, in evaluation mode."""
    model = Classifier(len(load_names()["train"]), len(TRAIN_STYLES))
    model.load_state_dict(torch.load(data / "classifier.pt", weights_only=True))
    return model.eval()


def main() -> None:
    """Write DATA/classifier.pt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    setup(args.seed, args.threads)
    rng = torch.Generator().manual_seed(args.seed)
    names = load_names()["train"]
    pictures = load_pictures(args.data)
    pictures = pictures.where(
        np.isin(pictures.names, names) & np.isin(pictures.styles, TRAIN_STYLES)
    )
    images = pictures.tensor()
    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval()
    vae.to(memory_format=torch.channels_last)
    sources = torch.stack([images, blurry_copies(vae, images, rng)])
    name_labels = torch.tensor([names.index(name) for name in pictures.names])
    style_labels = torch.tensor([TRAIN_STYLES.index(style) for style in pictures.styles])

    model = Classifier(len(names), len(TRAIN_STYLES)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.1
    )
    start = time.time()
    for step in range(1, args.steps + 1):
        index = torch.randint(len(images), (args.batch,), generator=rng)
        source = torch.randint(len(sources), index.shape, generator=rng)
        batch = augment(sources[source, index], rng).contiguous(memory_format=torch.channels_last)
        with autocast():
            name_logits, style_logits = model(batch)
        name_loss = F.cross_entropy(name_logits.float(), name_labels[index], label_smoothing=0.1)
        loss = name_loss + 0.5 * F.cross_entropy(style_logits.float(), style_labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (20, 100) or step % 250 == 0:
            print(f"{step} {time.time() - start:.0f}s loss {loss.item():.3f}", flush=True)
    model.eval()
    torch.save(model.state_dict(), args.data / "classifier.pt")


if __name__ == "__main__":
    main()
