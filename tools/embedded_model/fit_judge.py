"""Solve for the embedded judge: a dictionary of patches, discriminants of objects and of styles.

The references of the embedded concepts, and all pictures of its styles, take no part.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from mima.evaluation.discriminants import FILTER, PATCH, SIDE, described, enlarged
from PIL import Image
from safetensors.torch import save_file

from augment import blurry_copies, uniform
from common import ASSETS, Pictures, load_pictures, setup, to_pixels, to_tensor

CENTRES, FILTERS, PATCHES = 96, 160, 40_000
DISCRIMINANTS, MIXTURES = 160, 1000
# of the squared length of an embedding: known objects, discriminants of objects, styles
SHARES = (0.65, 0.06, 0.29)
OBJECT_SHARPNESS, STYLE_SHARPNESS = 14.0, 6.0
# of the mean variance within objects, added to every direction
SHRINKAGE = 0.3
RIDGE = 3e-4
# patches beside gradients, silhouettes and colours, by what they vary
PATCH_WEIGHT = 0.7
# of "man", "woman" and "person" doing the same no discriminant tells one from the others
SKIPPED_CATEGORY = "People & Body"
# an object seen less often says nothing of what varies within objects
FEWEST_PICTURES = 3

# N = pictures, F = features, D = discriminants


def judging(assets: Path, pictures: Pictures) -> np.ndarray:
    """Which pictures judge the embedded concepts, [N] bool.

    These are the references of every concept and, of a style, those that attacks train on, too.
    """
    index = {picture.tobytes(): i for i, picture in enumerate(pictures.pixels)}
    found = np.zeros(len(pictures.pixels), bool)
    for folder in sorted((assets / "concepts").iterdir()):
        files = [*folder.glob("held_out/*.png")]
        if "style-" in folder.name:
            files += folder.glob("*.png")
        for file in files:
            found[index[np.asarray(Image.open(file).convert("RGB")).tobytes()]] = True
    return found


def patches_of(
    images: torch.Tensor, side: int, flattest: float, rng: torch.Generator
) -> torch.Tensor:
    """Up to PATCHES square patches [P, 3 side²] of pictures [N, 3, 64, 64], flat ones left out."""
    picture = torch.randint(len(images), (PATCHES,), generator=rng)
    left, top = torch.randint(SIDE - side + 1, (2, PATCHES), generator=rng)
    windows = images.unfold(2, side, 1).unfold(3, side, 1)
    patches = windows[picture, :, top, left].flatten(1)
    return patches[patches.std(dim=1) > flattest]


def dictionary(images: torch.Tensor, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Whitened patches of pictures [N, 3, 64, 64], gathered around CENTRES by k-means."""
    patches = patches_of(images, PATCH, 0.02, rng)
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whitening = vectors @ torch.diag((values + 0.01).rsqrt()) @ vectors.T
    white = (patches - mean) @ whitening
    centres = white[torch.randperm(len(white), generator=rng)[:CENTRES]]
    for _ in range(8):
        nearest = torch.cdist(white, centres).argmin(dim=1)
        centres = torch.stack(
            [
                white[nearest == k].mean(dim=0) if (nearest == k).any() else centres[k]
                for k in range(CENTRES)
            ]
        )
    return {"whitening": whitening, "patch_mean": mean, "centres": centres}


def filter_bank(images: torch.Tensor, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Random filters [FILTERS, 3, 3, 3] of unit response to pictures [N, 3, 64, 64]."""
    patches = patches_of(images, FILTER, 0.01, rng)
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    random = torch.randn(len(mean), FILTERS, generator=rng) / len(mean) ** 0.5
    filters = vectors @ torch.diag((values + 0.003).rsqrt()) @ random
    return {
        "filters": filters.T.reshape(FILTERS, 3, FILTER, FILTER),
        "filter_bias": 0.5 * torch.randn(FILTERS, generator=rng) - mean @ filters,
    }


def empty_pictures(count: int, vae: AutoencoderKL, rng: torch.Generator) -> torch.Tensor:
    """What shows nothing, [5 count, 3, 64, 64].

    Noise at every pixel, noise that varies slowly, one shade of grey, one colour, and latents
    without a picture in them, decoded.
    """
    shape = (count, 3, SIDE, SIDE)
    coarse = torch.randn(count, 3, 8, 8, generator=rng) * 0.6
    latents = torch.randn(count, vae.config.latent_channels, 8, 8, generator=rng)
    with torch.no_grad():
        decoded = vae.decode(latents * uniform(rng, count, 0.3, 1.5)).sample
    kinds = [
        torch.rand(shape, generator=rng) * 2 - 1,
        F.interpolate(coarse, (SIDE, SIDE), mode="bicubic"),
        uniform(rng, count, -1, 1).expand(shape),
        (torch.rand(count, 3, 1, 1, generator=rng) * 2 - 1).expand(shape),
        decoded,
    ]
    return torch.cat(kinds).clamp(-1, 1)


def object_discriminants(
    features_NF: torch.Tensor, label_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher's discriminants [F, D], each scaled by how well it separates; the mean [F]."""
    mean = features_NF.mean(dim=0)
    features = features_NF - mean
    _, place, count = label_N.unique(return_inverse=True, return_counts=True)
    centres_KF = features.new_zeros(len(count), features.shape[1]).index_add_(0, place, features)
    centres_KF /= count[:, None]
    within = features - centres_KF[place]
    within_FF = (within.T @ within / (len(features) - len(count))).double()
    within_FF += SHRINKAGE * within_FF.diagonal().mean() * torch.eye(len(within_FF)).double()
    lower = torch.linalg.cholesky(within_FF)
    # as many directions as there are objects, instead of as many as there are features
    weighted = centres_KF.double() * (count / len(features)).sqrt()[:, None]
    whitened_FK = torch.linalg.solve_triangular(lower, weighted.T, upper=False)
    values, vectors = torch.linalg.eigh(whitened_FK.T @ whitened_FK)
    values, vectors = values[-DISCRIMINANTS:], vectors[:, -DISCRIMINANTS:]
    directions = whitened_FK @ vectors / values.sqrt()
    directions = torch.linalg.solve_triangular(lower.T, directions, upper=True)
    return (directions * (values / (values + 1)).sqrt()).float(), mean


def style_regression(
    features_NF: torch.Tensor, label_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ridge regression [F, S] to S centred indicators, each label counted alike; the mean [F]."""
    features = features_NF.double()
    _, place, count = label_N.unique(return_inverse=True, return_counts=True)
    weight = (1 / (count[place] * len(count))).double()[:, None]
    mean = (weight * features).sum(dim=0)
    deviation = (weight * (features - mean).square()).sum(dim=0).sqrt() + 1e-4
    scaled = (features - mean) / deviation
    target = F.one_hot(place).double() - 1 / len(count)
    gram = scaled.T @ (weight * scaled) + RIDGE * torch.eye(scaled.shape[1]).double()
    return torch.linalg.solve(gram, scaled.T @ (weight * target)) / deviation[:, None], mean


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the judge is told of N pictures in V versions, as they are and as samples show them.

    Attributes:
        shapes: features that tell objects, [V, N, F].
        textures: features that tell styles, [V, N, F'].
        nothing: the latter of M pictures that show nothing, [M, F'].
        numbers: the dictionary of patches.
    """

    shapes: torch.Tensor
    textures: torch.Tensor
    nothing: torch.Tensor
    numbers: dict[str, torch.Tensor]


def describe(
    pixels: np.ndarray, copies: np.ndarray, used: np.ndarray, vae: AutoencoderKL, seed: int
) -> Described:
    """Features of all pictures; only those that `used` [N] selects have a say in the dictionary."""
    rng = torch.Generator().manual_seed(seed)
    versions = to_tensor(pixels), to_tensor(copies)
    shown = torch.cat([images[torch.from_numpy(used)] for images in versions])
    numbers = dictionary(shown, rng) | filter_bank(shown, rng)
    numbers["patch_weight"] = torch.tensor(1.0)
    features = [features_of(images, numbers) for images in versions]
    shapes_VNF = torch.stack([shapes for shapes, _ in features])
    spread = shapes_VNF[0, torch.from_numpy(used)].std(dim=0)
    own = len(spread) - 10 * len(numbers["centres"])
    numbers["patch_weight"] = PATCH_WEIGHT * spread[:own].norm() / spread[own:].norm()
    shapes_VNF[..., own:] *= numbers["patch_weight"]
    return Described(
        shapes=shapes_VNF,
        textures=torch.stack([textures for _, textures in features]),
        nothing=features_of(empty_pictures(60, vae, rng), numbers)[1],
        numbers=numbers,
    )


def features_of(
    images: torch.Tensor, numbers: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `described` says of pictures [N, 3, 64, 64], some at a time."""
    parts = [described(batch, numbers) for batch in images.split(256)]
    shapes, textures = (torch.cat(part) for part in zip(*parts, strict=True))
    return shapes, textures


def solve(
    told: Described, names: np.ndarray, styles: np.ndarray, used: np.ndarray
) -> dict[str, torch.Tensor]:
    """All numbers of the judge, from the pictures that `used` [N] selects."""
    kept = torch.from_numpy(np.flatnonzero(used))
    shapes_VNF, textures_VNF = told.shapes[:, kept], told.textures[:, kept]
    _, name_of, count = np.unique(names[used], return_inverse=True, return_counts=True)
    name_of, count = torch.from_numpy(name_of), torch.from_numpy(count)
    often = count[name_of] >= FEWEST_PICTURES
    versions = len(shapes_VNF)
    object_map, object_mean = object_discriminants(
        shapes_VNF[:, often].flatten(0, 1), name_of[often].repeat(versions)
    )
    objects = F.normalize((shapes_VNF[0] - object_mean) @ object_map, dim=-1)
    sums = objects.new_zeros(len(count), objects.shape[1]).index_add_(0, name_of, objects)

    flat = textures_VNF.flatten(0, 1)
    rng = torch.Generator().manual_seed(0)
    size = flat.shape[1]
    told_more = told.numbers | {
        "texture_mean": flat.mean(dim=0),
        "texture_deviation": flat.std(dim=0) + 1e-4,
        "mixture": torch.randn(size, MIXTURES, generator=rng) / size**0.5,
        "mixture_bias": 0.5 * torch.randn(MIXTURES, generator=rng),
    }
    _, style_of = np.unique(styles[used], return_inverse=True)
    labels = torch.from_numpy(style_of).repeat(versions)
    labels = torch.cat([labels, labels.new_full((len(told.nothing),), int(labels.max()) + 1)])
    style_map, style_mean = style_regression(
        enlarged(torch.cat([flat, told.nothing]), told_more), labels
    )
    return told_more | {
        "object_map": object_map,
        "object_mean": object_mean,
        "known_KD": sums / count[:, None],
        "style_map": style_map.float(),
        "style_offset": (style_mean @ style_map).float(),
        "shares": torch.tensor(SHARES),
        "object_sharpness": torch.tensor(OBJECT_SHARPNESS),
        "style_sharpness": torch.tensor(STYLE_SHARPNESS),
    }


def main() -> None:
    """Write mima/assets/judge/judge.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--without", nargs="*", default=[], help="names and styles left out")
    parser.add_argument("--output", type=Path, help="by default ASSETS/judge")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    setup(args.seed, args.threads)
    pictures = load_pictures(args.data)
    vae = AutoencoderKL.from_pretrained(args.data / "vae").eval()
    kept_copies = args.data / "copies.npy"
    if not kept_copies.exists():
        rng = torch.Generator().manual_seed(args.seed)
        np.save(kept_copies, to_pixels(blurry_copies(vae, pictures.tensor(), rng)))
    looked_at = pictures.categories != SKIPPED_CATEGORY
    copies, pictures = np.load(kept_copies)[looked_at], pictures.where(looked_at)
    used = ~judging(args.assets, pictures)
    told = describe(pictures.pixels, copies, used, vae, args.seed)
    used &= ~np.isin(pictures.names, args.without) & ~np.isin(pictures.styles, args.without)
    numbers = solve(told, pictures.names, pictures.styles, used)
    folder = args.output or args.assets / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        # vectors are small, and some of their values are too small for half precision
        key: (value.half() if value.ndim > 1 else value.float()).contiguous()
        for key, value in numbers.items()
    }
    save_file(stored, folder / "judge.safetensors")
    print(f"{used.sum()} pictures, {len(numbers['known_KD'])} objects, {folder}")


if __name__ == "__main__":
    main()
