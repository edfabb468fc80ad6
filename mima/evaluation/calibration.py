"""Can a judge tell a concept from other concepts, from noise and from nothing?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation.encoders import ImageEncoder, PairwiseSimilarity, similarity

NOISE_PICTURES = 16
GREYS = (64, 128, 192, 255)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Mean similarity to a concept's references of pictures whose subject is known.

    Attributes:
        concept: its name.
        right: of the concept's other pictures.
        others: of each other concept's pictures.
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

    @property
    def mean_margin(self) -> float:
        """How far they are above the mean of the other concepts, noise and grey, if lowest."""
        others = [float(np.mean(list(self.others.values())))] if self.others else []
        return self.right - max([*others, self.noise, self.grey])


def calibrate(
    judge: ImageEncoder | PairwiseSimilarity, concepts: Sequence[Concept]
) -> list[Calibration]:
    """Measure a judge on pictures whose subject is known, no model being involved.

    The references are each concept's held-out pictures; the right pictures those that are learned
    from, which show the same object otherwise, or other objects in the same style.

    Args:
        judge: a similarity model.
        concepts: each with held-out pictures.

    Raises:
        MimaError: a concept without held-out pictures.

    Example:
        >>> for found in calibrate(load_similarity("clip"), concepts):
        ...     print(found.concept, found.right, found.margin)
    """
    for concept in concepts:
        if not concept.held_out:
            raise MimaError(f"concept {concept.name!r} has no held_out pictures to compare with")
    pictures = {concept.name: _loaded(concept.images) for concept in concepts}
    size = next(iter(pictures.values()))[0].size
    draws = np.random.default_rng(0)
    shape = (NOISE_PICTURES, size[1], size[0], 3)
    noise = [Image.fromarray(pixels) for pixels in draws.integers(0, 256, shape, dtype=np.uint8)]
    grey = [Image.new("RGB", size, (shade,) * 3) for shade in GREYS]
    found = []
    for concept in concepts:
        references = _loaded(concept.held_out)
        means = {n: _mean(judge, images, references) for n, images in pictures.items()}
        found.append(
            Calibration(
                concept=concept.name,
                right=means.pop(concept.name),
                others=means,
                noise=_mean(judge, noise, references),
                grey=_mean(judge, grey, references),
            )
        )
    return found


def _loaded(pictures: Sequence[Picture]) -> list[Image.Image]:
    return [picture.load() for picture in pictures]


def _mean(
    judge: ImageEncoder | PairwiseSimilarity,
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
) -> float:
    if isinstance(judge, ImageEncoder):
        return float(similarity(judge.embed(images), judge.embed(references)).mean())
    return float(judge.pairs(images, references).mean())
