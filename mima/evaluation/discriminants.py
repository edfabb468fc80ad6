"""The embedded judge: features that are computed, and discriminants that are solved for.

A picture is described by its gradients, silhouette, colours and small patches. Fisher's linear
discriminants keep of that what tells objects apart whatever their style; the objects that the judge
knows then compete for the picture, as classes do in a softmax, so that a clear likeness counts for
more than a vague one. A ridge regression on textures does the same for styles, whatever they show.
Nothing is trained by steps, and nothing is shared with the networks that are judged.
`tools/embedded_model/fit_judge.py` solves for the numbers.
"""

# B = pictures, F = features, D = discriminants, K = known objects, S = styles and "nothing"

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SIDE = 64
"""Pictures are squeezed to this many pixels a side."""
OFFLINE = "embedded (--similarity embedded), which ships with mima and knows only emoji"
"""What can be used where nothing can be fetched."""
ORIENTATIONS = 8
PATCH, PATCH_STRIDE = 6, 4
FILTER, FILTER_STRIDE = 3, 2
NEEDED = frozenset(
    (
        *("whitening", "patch_mean", "centres", "patch_weight", "filters", "filter_bias"),
        *("object_map", "object_mean", "known_KD", "object_sharpness", "shares"),
        *("texture_mean", "texture_deviation", "mixture", "mixture_bias"),
        *("style_map", "style_offset", "style_sharpness"),
    )
)
"""The numbers that `fit_judge.py` solves for, by their names."""
_STEPS = (0.004, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, 1.0)
_SATURATIONS = (0.02, 0.1, 0.3, 0.6, 1.0, 1.5)
_INKS = (0.02, 0.1, 0.3, 0.6, 1.0, 1.3, 1.6, 1.9)


def embedding(pixels: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit embeddings [B, K + D + S].

    Args:
        pixels: [B, 3, 64, 64] in [−1, 1].
        numbers: what `fit_judge.py` solved for.
    """
    shapes, textures = described(pixels, numbers)
    objects = F.normalize((shapes - numbers["object_mean"]) @ numbers["object_map"], dim=-1)
    likeness_BK = objects @ numbers["known_KD"].mT
    known = F.normalize((numbers["object_sharpness"] * likeness_BK).softmax(dim=-1), dim=-1)
    chosen = enlarged(textures, numbers) @ numbers["style_map"] - numbers["style_offset"]
    shares_BS = (numbers["style_sharpness"] * chosen).softmax(dim=-1)
    # pictures in two styles are less alike than pictures of which nothing is known
    styles = F.normalize(shares_BS - 1 / shares_BS.shape[1], dim=-1)
    parts = (known, objects, styles)
    weighted = [share.sqrt() * part for share, part in zip(numbers["shares"], parts, strict=True)]
    return torch.cat(weighted, dim=1)


def described(
    pixels: torch.Tensor, numbers: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What objects [B, F] and what styles [B, F'] are told by.

    Args:
        pixels: [B, 3, 64, 64] in [−1, 1].
        numbers: the dictionary of patches, as `patch_features` takes it, ``patch_weight``, and the
            ``filters`` [L, 3, 3, 3] with their ``filter_bias`` [L].
    """
    patches = patch_features(pixels, numbers)
    objects = torch.cat([shape_features(pixels), numbers["patch_weight"] * patches], dim=1)
    filtered = F.conv2d(pixels, numbers["filters"], numbers["filter_bias"], FILTER_STRIDE).relu()
    lengths = filtered.square().mean(dim=(2, 3)).sqrt()
    whole = patches[:, : len(numbers["centres"])]
    measured = texture_features(pixels)
    # square roots spread small values, those of rare features
    rare = torch.cat([filtered.mean(dim=(2, 3)), whole, measured], dim=1).sqrt()
    return objects, torch.cat([rare, lengths, whole, measured], dim=1)


def enlarged(textures: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Textures [B, F'], scaled, and random rectified mixtures of them."""
    scaled = (textures - numbers["texture_mean"]) / numbers["texture_deviation"]
    mixed = (scaled @ numbers["mixture"] + numbers["mixture_bias"]).relu()
    return torch.cat([mixed, scaled], dim=1)


def shape_features(pixels: torch.Tensor) -> torch.Tensor:
    """Gradients, silhouette and colours at their places, the same for a picture and its mirror."""
    return (_shapes(pixels) + _shapes(pixels.flip(-1))) / 2


def _shapes(pixels: torch.Tensor) -> torch.Tensor:
    ink = 1 - pixels
    grey = ink.mean(dim=1, keepdim=True)
    silhouette = (ink.amax(dim=1, keepdim=True) > 0.15).float()
    parts = [
        gradient_histograms(F.avg_pool2d(grey, 2), 4),
        0.7 * gradient_histograms(silhouette, 8),
        gradient_histograms(F.avg_pool2d(grey, 4), 4),
        F.avg_pool2d(silhouette, 4),
        0.7 * F.avg_pool2d(grey, 4),
        F.avg_pool2d(ink, 8),
        2 * F.avg_pool2d(ink - grey, 16),
    ]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def gradient_histograms(image: torch.Tensor, cell: int) -> torch.Tensor:
    """Orientations of gradients (Dalal & Triggs, CVPR 2005), weighted by strength, in square cells.

    Args:
        image: [B, 1, H, W].
        cell: pixels a side.

    Returns:
        [B, ORIENTATIONS, H / cell, W / cell], each cell divided by its neighbourhood's length.
    """
    sobel = image.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None] / 8
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across, down = F.conv2d(padded, sobel), F.conv2d(padded, sobel.mT)
    strength = (across.square() + down.square()).sqrt()
    # a contour has no sign: dark on light is the same as light on dark
    place = torch.atan2(down, across) % math.pi / math.pi * ORIENTATIONS
    lower = place.floor()
    upper_share = place - lower
    first = lower.long() % ORIENTATIONS
    counts = image.new_zeros(len(image), ORIENTATIONS, *image.shape[2:])
    counts.scatter_add_(1, first, strength * (1 - upper_share))
    counts.scatter_add_(1, (first + 1) % ORIENTATIONS, strength * upper_share)
    counts = F.avg_pool2d(counts, cell)
    squares = F.pad(counts.square().sum(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return counts / (F.avg_pool2d(squares, 3, stride=1) + 1e-3).sqrt()


def patch_features(pixels: torch.Tensor, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """How near small patches are to those of a dictionary (Coates & Ng, 2011), whole and in ninths.

    Args:
        pixels: [B, 3, H, W].
        numbers: ``whitening`` [108, 108], ``patch_mean`` [108] and ``centres`` [C, 108].

    Returns:
        [B, 10 C].
    """
    whitening, centres = numbers["whitening"], numbers["centres"]
    size = (-1, 3, PATCH, PATCH)
    white = F.conv2d(
        pixels, whitening.mT.reshape(size), -numbers["patch_mean"] @ whitening, PATCH_STRIDE
    )
    products = F.conv2d(white, centres[:, :, None, None])
    lengths = white.square().sum(dim=1, keepdim=True)
    squares = lengths - 2 * products + centres.square().sum(dim=1)[None, :, None, None]
    distances = squares.clamp(min=0).sqrt()
    nearness = (distances.mean(dim=1, keepdim=True) - distances).clamp(min=0)
    ninths = F.adaptive_avg_pool2d(nearness, 3).flatten(1)
    return torch.cat([nearness.mean(dim=(2, 3)), ninths], dim=1)


def texture_features(pixels: torch.Tensor) -> torch.Tensor:
    """How large a share of a picture changes, is coloured and is dark by more than some limits."""
    ink = (1 - pixels).mean(dim=1)
    mean = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.avg_pool2d(pixels, 4)
    measured = [
        ((pixels[..., 1:] - pixels[..., :-1]).abs().amax(dim=1), _STEPS),
        ((pixels - mean).abs().amax(dim=1), _STEPS),
        (pixels.amax(dim=1) - pixels.amin(dim=1), _SATURATIONS),
        (ink, _INKS),
        ((coarse[..., 1:] - coarse[..., :-1]).abs().amax(dim=1), _STEPS),
    ]
    shares = [
        (values.flatten(1) > limit).float().mean(dim=1)
        for values, limits in measured
        for limit in limits
    ]
    return torch.stack(shares, dim=1)
