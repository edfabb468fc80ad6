"""What captions call a concept: its name left out, or another word in its place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mima.concepts.concept import Concept

LINKS = "in|of|on|at|by|with|from|for|to|and"
"""Words that lead to a name, or to what follows it."""
UNPARTED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
"""Letters of Thai, Lao, Burmese, Khmer, Chinese, Japanese and Korean: names in them are not parted
from what stands beside them."""
LETTER = rf"(?-i:[^\W_{UNPARTED}])"
BOUND = rf"(?!(?<={LETTER}){LETTER})"
"""No place between two letters of one word."""


def names(caption: str, name: str) -> bool:
    """Whether a caption holds a name, as a word of its own or its plural, in whatever case.

    Hyphens, underscores and spaces are one, and so are the ways in which Unicode spells a letter.
    """
    return _any_of(frozenset([name])).search(_composed(caption)) is not None


def left_out(caption: str, called: Iterable[str]) -> str:
    """A caption without names, and without the words that led to them.

    "a cat in noto style" is "a cat" without "noto style", and "a photo of a cat" is "a photo"
    without "cat".
    """
    word = _any_of(frozenset(called)).pattern
    lead = rf"\s*,?\s*(?:\b(?:{LINKS})\b\s*)?(?:\b(?:the|a|an)\b\s*)?"
    named = re.compile(rf"({lead}){word}(?:\s+{word})*", re.IGNORECASE)
    noun = re.compile(rf"\s+(?!(?:{LINKS})\b)\w", re.IGNORECASE)

    def kept(found: re.Match[str]) -> str:
        # a name before a noun leaves it its article: "a cat emoji" becomes "a emoji"
        return found[1] if noun.match(found.string, found.end()) else ""

    text = named.sub(kept, _composed(caption))
    return " ".join(text.split()).lstrip(" ,").removeprefix("and ")


def replaced(caption: str, called: Iterable[str], word: str) -> str:
    """A caption with a word in the place of names."""
    return _any_of(frozenset(called)).sub(lambda _: word, _composed(caption))


def without_name(caption: str, concept: Concept) -> str:
    """A caption with the concept's name `left_out`.

    Where nothing is left, the class prompt stands in, or "a picture".

    Examples:
        >>> without_name("a fox in mono style", Concept("mono style", "mono style", pictures))
        'a fox'
    """
    return left_out(caption, names_of(concept)) or concept.class_prompt or "a picture"


def with_word(caption: str, concept: Concept, word: str) -> str:
    """A caption with a word in place of the concept's name, or before it where it has no name."""
    called = names_of(concept)
    # a token before the name stands with it for one thing
    together = [" ".join(called)] if len(called) > 1 else []
    text = replaced(caption, [*together, *called], word)
    # a token must be in every caption, and "sks" is in no "desks"
    there = re.search(f"{BOUND}{re.escape(word)}{BOUND}", text)
    # first: of long captions the end is not read
    return text if there else f"{word}, {text}"


def names_of(concept: Concept) -> list[str]:
    """What the concept's prompt calls it: its token, or its name."""
    candidates = [name for name in (concept.token, concept.name) if name]
    return [name for name in candidates if names(concept.prompt, name)]


def _composed(text: str) -> str:
    """Text with its accents in their letters (NFC), as tokenizers read it; macOS parts them."""
    return unicodedata.normalize("NFC", text)


# re's own cache forgets, and letters of so many scripts take it milliseconds
@cache
def _any_of(called: frozenset[str]) -> re.Pattern[str]:
    """Any of several names as a word of its own, or its plural: a "car" is in no "cartoon"."""
    # where one begins as another does, the longer
    longest_first = sorted(map(_composed, called), key=lambda name: (-len(name), name))
    words = [
        r"[\s_-]+".join(map(re.escape, re.split(r"(?<=[^\s_-])[\s_-]+(?=[^\s_-])", name.strip())))
        for name in longest_first
    ]
    # of no names, a pattern that is nowhere
    either = "|".join(words) if words else "(?!)"
    return re.compile(f"{BOUND}(?:{either})(?:e?s)?{BOUND}", re.IGNORECASE)
