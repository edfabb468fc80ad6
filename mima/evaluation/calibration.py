"""Can a judge tell a concept from other concepts, from noise and from nothing?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from PIL import Image

from mima.concepts import Concept
from mima.concepts.naming import names
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation.encoders import (
    ImageEncoder,
    PairwiseSimilarity,
    at_a_time,
    embed_files,
    similarity,
)

NOISE_PICTURES = 16
GREYS = (64, 128, 192, 255)
NOISE_SIDE = 512
"""Pixels of the longest side of a picture of noise, at most."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Mean similarity to a concept's references of pictures whose subject is known.

    Attributes:
        concept: its name.
        right: of the concept's other pictures.
        others: of each other concept's pictures, less those whose captions name this one. A tiger
            in fluent style is no wrong picture of fluent style; a cat in fluent style is a wrong
            one of the tiger.
        noise: of pictures that are noise at every pixel.
        grey: of pictures in one shade, white among them.
    """

    concept: str
    right: float
    others: dict[str, float]
    noise: float
    grey: float

    @property
    def margin(self) -> float:
        """How far the right pictures are above the best of the wrong ones."""
        return self.right - max([*self.others.values(), self.noise, self.grey])


def calibrate(
    judge: ImageEncoder | PairwiseSimilarity, concepts: Sequence[Concept]
) -> list[Calibrated]:
    """Measure a judge on pictures whose subject is known, no model being involved.

    The references are each concept's held-out pictures; the right pictures those that are learned
    from, which show the same object otherwise, or other objects in the same style.

    Args:
        judge: a similarity model.
        concepts: each with held-out pictures.

    Raises:
        MimaError: a concept without held-out pictures.

    Examples:
        >>> for found in calibrate(load_similarity("clip"), concepts):
        ...     print(found.concept, found.right, found.margin)
    """
    for concept in concepts:
        if not concept.held_out:
            raise MimaError(f"concept {concept.name!r} has no held_out pictures to compare with")
    known = [picture for concept in concepts for picture in concept.images]
    first = known[0].load()
    # of a photograph's size, noise would be grey once it is scaled to what judges look at
    first.thumbnail((NOISE_SIDE, NOISE_SIDE))
    size = first.size
    draws = np.random.default_rng(0)
    shape = (NOISE_PICTURES, size[1], size[0], 3)
    noise = [Image.fromarray(pixels) for pixels in draws.integers(0, 256, shape, dtype=np.uint8)]
    grey = [Image.new("RGB", size, (shade,) * 3) for shade in GREYS]
    images = [*known, *(Picture(image, "") for image in (*noise, *grey))]
    features = embed_files(judge, images) if isinstance(judge, ImageEncoder) else None
    found = []
    for concept in concepts:
        if isinstance(judge, ImageEncoder):
            assert features is not None
            table = similarity(features, embed_files(judge, concept.held_out))
        else:
            references = [picture.load() for picture in concept.held_out]
            table = torch.cat(
                [
                    judge.pairs([picture.load() for picture in some], references)
                    for some in at_a_time(images)
                ]
            )
        values = table.mean(dim=1).tolist()
        of_noise, of_grey = values[len(known) : -len(grey)], values[-len(grey) :]
        right, others, place = 0.0, {}, 0
        for other in concepts:
            mine = values[place : place + len(other.images)]
            place += len(mine)
            if other is concept:
                right = fmean(mine)
                continue
            wrong = [
                value
                for value, picture in zip(mine, other.images, strict=True)
                if not names(picture.prompt, concept.name)
            ]
            if wrong:
                others[other.name] = fmean(wrong)
        found.append(
            Calibrated(
                concept=concept.name,
                right=right,
                others=others,
                noise=fmean(of_noise),
                grey=fmean(of_grey),
            )
        )
    return found
