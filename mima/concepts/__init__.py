"""What a model is immunized against, or must stay able to learn: concepts and their pictures."""

from mima.concepts.concept import (
    Concept,
    Kind,
    embedded_concept,
    embedded_concepts,
    embedded_names,
)
from mima.concepts.pictures import Picture, PictureError
from mima.concepts.reading import ConceptSource, load_concepts

__all__ = [
    "Concept",
    "ConceptSource",
    "Kind",
    "Picture",
    "PictureError",
    "embedded_concept",
    "embedded_concepts",
    "embedded_names",
    "load_concepts",
]
