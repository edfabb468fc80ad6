"""What captions call a concept: its name left out, or another word in its place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mima.concepts.concept import Concept


def names(caption: str, name: str) -> bool:
    """Whether a caption holds a name, as a word of its own or its plural, in whatever case."""
    return re.search(_word(name), caption, flags=re.IGNORECASE) is not None


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
        word = _word(name)
        text = re.sub(rf"{word}{noun}", "", text, flags=re.IGNORECASE)
        text = re.sub(rf"{lead}{word}", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", text).strip(" ,")
    return text or concept.class_prompt or "a picture"


def with_word(caption: str, concept: Concept, word: str) -> str:
    """A caption with a word in place of the concept's name, or behind it where it has no name."""
    words = [_word(name) for name in names_of(concept)]
    # a token before the name stands with it for one thing
    together = [r"\s+".join(words)] if len(words) > 1 else []
    text = caption
    if words:
        pattern = "|".join([*together, *words])
        text = re.sub(pattern, lambda _: word, text, flags=re.IGNORECASE)
    # a token must be in every caption
    return text if word in text else f"{text}, {word}"


def names_of(concept: Concept) -> list[str]:
    """What the concept's prompt calls it: its token, or its name."""
    candidates = [name for name in (concept.token, concept.name) if name]
    return [name for name in candidates if names(concept.prompt, name)]


def _word(name: str) -> str:
    """A pattern of a name as a word of its own, or its plural: a "car" is in no "cartoon".

    Names that begin or end with another letter than a to z have no such bounds: not all scripts
    part words.
    """
    letter = "[a-zA-Z]"
    before = f"(?<!{letter})" if re.match(letter, name) else ""
    after = f"(?:e?s)?(?!{letter})" if re.search(f"{letter}$", name) else ""
    return f"{before}{re.escape(name)}{after}"
