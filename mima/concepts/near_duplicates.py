"""Nearly the same picture: saved anew, resized, mirrored, or cropped by a little.

A picture's signature is the picture at 12 × 12 points, its brightness and colour apart (YCbCr). Two
pictures are nearly the same where one's signature is near the other's, mirrored or not, with up to
1/64 of it cut off or added at each side. On the embedded pictures (64 × 64), copies by JPEG of
quality 70, resized to 0.75 and back, cropped by a pixel or mirrored are at most 2.8 apart in
brightness (of 255), or 2.9 if all is done to one; different pictures, of which the nearest show an
object in two styles of one set, are at least 4.3 apart.
"""

# P = pictures, S = signatures and their mirror images, C = those of them that are worth a look
# W = windows of one direction, V = W², windows of both
# N = points of a signature in one direction, F = points of a picture in one direction

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image

from mima.concepts.pictures import Picture

SIDE = 12
"""N: so few that what JPEG does to small pictures averages out, and enough to tell styles apart."""
FINE = 64
"""F: what is cut off or added is one of so many points."""
SIGNATURE_LENGTH = SIDE * SIDE * 3 * 4 // 3
"""Characters of a signature: base64 of a byte for each point and channel."""

BRIGHTNESS = 3.6
"""Mean difference up to which two pictures are nearly the same, of 255."""
CONTRAST = 0.09
"""The same as a share of a picture's own mean deviation: pictures of little contrast differ by
little, too."""
ROUNDING = 0.5
"""What a signature's bytes differ by from what they stand for."""
COLOUR = 4.0
"""Mean difference of Cb and Cr up to which two pictures are nearly the same, of 255."""
UNALIGNED = 30.0
"""Mean difference in brightness from which no window makes two pictures nearly the same."""


def signature(picture: Picture) -> str:
    """What a picture is recognised by when its file or its size is another.

    Anybody can see the picture in it as a thumbnail of 12 × 12 pixels.

    Raises:
        PictureError: the picture cannot be read.
    """
    points_NN3 = _whole(_points(picture)).round().to(torch.uint8)
    return base64.b64encode(points_NN3.numpy().tobytes()).decode()


def nearly_the_same(pictures: Sequence[Picture], signatures: Collection[str]) -> list[bool]:
    """Which of some pictures are nearly the same as one of those whose signatures are given.

    Args:
        pictures: P pictures.
        signatures: as `signature` makes them.

    Returns:
        P answers.

    Raises:
        PictureError: a picture cannot be read.
    """
    if not signatures:
        return [False] * len(pictures)
    raw = np.frombuffer(base64.b64decode("".join(signatures)), dtype=np.uint8)
    known_SNN3 = torch.tensor(raw).view(-1, SIDE, SIDE, 3).float()
    known_SNN3 = torch.cat([known_SNN3, known_SNN3.flip(2)])
    brightness_SNN = known_SNN3[..., 0]
    deviation_S = (brightness_SNN - brightness_SNN.mean((1, 2), keepdim=True)).abs().mean((1, 2))
    limit_S = (ROUNDING + CONTRAST * deviation_S).clamp(max=BRIGHTNESS)
    found = []
    for picture in pictures:
        points_FF3 = _points(picture)
        apart_S = (brightness_SNN - _whole(points_FF3)[..., 0]).abs().mean((1, 2))
        near_C = (apart_S < UNALIGNED).nonzero().flatten()
        if len(near_C) == 0:
            found.append(False)
            continue
        windows_VNN3 = _seen_through(points_FF3, _windows())
        apart_VC = _apart(windows_VNN3[..., :1], known_SNN3[near_C, ..., :1])
        colours_VC = _apart(windows_VNN3[..., 1:], known_SNN3[near_C, ..., 1:])
        found.append(bool(((apart_VC <= limit_S[near_C]) & (colours_VC <= COLOUR)).any()))
    return found


def _apart(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean absolute differences of all rows of two stacks."""
    a, b = first.flatten(1), second.flatten(1)
    return torch.cdist(a, b, p=1) / a.shape[1]


def _points(picture: Picture) -> torch.Tensor:
    """A picture as F × F points of brightness and colour, [F, F, 3]."""
    small = picture.load().resize((FINE, FINE), Image.Resampling.BILINEAR)
    return torch.tensor(np.asarray(small.convert("YCbCr"))).float()


def _whole(points_FF3: torch.Tensor) -> torch.Tensor:
    """A picture's N × N points, [N, N, 3]."""
    centre = len(_windows()) // 2
    return _seen_through(points_FF3, _windows()[centre : centre + 1])[0]


def _seen_through(points_FF3: torch.Tensor, windows_WNF: torch.Tensor) -> torch.Tensor:
    """A picture's N × N points through each pair of windows, [V, N, N, 3]."""
    rows_WNF3 = torch.einsum("vih,hwc->viwc", windows_WNF, points_FF3)
    return torch.einsum("ujw,viwc->vuijc", windows_WNF, rows_WNF3).flatten(0, 1)


@cache
def _windows() -> torch.Tensor:
    """How F points are averaged to N in windows a point narrower or wider at each end, [W, N, F].

    In a wider window the first and last point go on. The window of the whole is in the middle.
    """
    ends = torch.tensor(
        [(low, FINE + high) for low in (-1.0, 0.0, 1.0) for high in (1.0, 0.0, -1.0)]
    )
    edges_WN = torch.lerp(ends[:, :1], ends[:, 1:], torch.linspace(0, 1, SIDE + 1))
    first_F = torch.arange(FINE, dtype=torch.float32)
    last_F = first_F + 1
    first_F[0], last_F[-1] = -1.0, FINE + 1.0
    start_WN1, stop_WN1 = edges_WN[:, :-1, None], edges_WN[:, 1:, None]
    covered = (torch.minimum(stop_WN1, last_F) - torch.maximum(start_WN1, first_F)).clamp(min=0)
    return covered / (stop_WN1 - start_WN1)
