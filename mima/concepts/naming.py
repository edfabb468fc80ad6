"""What captions call a concept: its name left out, or another word in its place."""

from __future__ import annotations

import re

from mima.concepts.concept import Concept


def without_name(caption: str, concept: Concept) -> str:
    """A caption without the concept's name, and without the word that led to it.

    "a cat in noto style" is "a cat" without "noto style", and "a photo of a cat" is "a photo"
    without "cat". Where nothing is left, the class prompt stands in, or "a picture".

    Example:
        >>> without_name("a fox in mono style", Concept("mono style", "mono style", pictures))
        'a fox'
    """
    text = caption
    for name in names_of(concept):
        lead = r"(?:,|\b(?:in|of|by|with|from)\b)?\s*(?:\b(?:the|a|an)\b\s*)?"
        # a name before a noun keeps that noun's article: "a cat emoji" becomes "a emoji"
        noun = r"(?=\s+(?!(?:in|of|on|at|by|with|from|and)\b)\w)"
        text = re.sub(rf"{re.escape(name)}{noun}", "", text, flags=re.IGNORECASE)
        text = re.sub(rf"{lead}{re.escape(name)}", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", text).strip(" ,")
    return text or concept.class_prompt or "a picture"


def with_word(caption: str, concept: Concept, word: str) -> str:
    """A caption with a word in place of the concept's name, or behind it where it has no name."""
    text = caption
    for name in names_of(concept):
        text = re.sub(re.escape(name), lambda _: word, text, flags=re.IGNORECASE)
    # a token must be in every caption
    return text if word in text else f"{text}, {word}"


def names_of(concept: Concept) -> list[str]:
    """What the concept's prompt calls it: its token, or its name."""
    candidates = [name for name in (concept.token, concept.name) if name]
    return [name for name in candidates if name.lower() in concept.prompt.lower()]
