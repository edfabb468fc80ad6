"""Errors that a caller can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class MimaError(ValueError):
    """Bad input, explained. The command line prints its message without a traceback."""


LONGEST_PROBLEM = 1000
"""Characters of one line of several."""
MOST_PROBLEMS = 100
"""Lines of one message; a list may have a hundred thousand bad rows."""


class ProblemList(MimaError):  # noqa: N818 - reads as what it holds; MimaError says it is one
    """One error for several problems of the same input, so that all can be mended at once.

    Attributes:
        problems: one line each, already naming file or row; the message has the first hundred.
    """

    def __init__(self, summary: str, problems: Iterable[str]) -> None:
        self.problems = tuple(one_line(problem, LONGEST_PROBLEM) for problem in problems)
        lines = [f"  - {problem}" for problem in self.problems[:MOST_PROBLEMS]]
        if len(self.problems) > MOST_PROBLEMS:
            lines.append(f"  and {len(self.problems) - MOST_PROBLEMS} more")
        super().__init__("\n".join([summary, *lines]))


def cut(text: str, longest: int) -> str:
    """A text that is not too long, whose cut end shows."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def one_line(error: object, longest: int = 200) -> str:
    """An error or a value as one line that is not too long, whatever stands in it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return cut(text, longest)


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0] if lines else type(error).__name__)


def quoted(value: object, longest: int = 200) -> str:
    """A value as Python writes it, in one line that is not too long."""
    return one_line(repr(value), longest)


def counted(number: int, what: str) -> str:
    """A number of things, of which there may be one: "1 attack", "2 attacks"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def told_apart(names: Iterable[str], form: str = "{} ({})") -> list[str]:
    """Names of things that may be called alike, with a number where one came before."""
    taken: dict[str, None] = {}
    for given in names:
        name, number = given, 1
        while name in taken:
            number += 1
            name = form.format(given, number)
        taken[name] = None
    return list(taken)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A suggestion to append to "unknown NAME": the closest valid name and the whole list."""
    known = sorted(valid)
    if not known:
        return "none is available"
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.55)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {one_line(', '.join(known), LONGEST_PROBLEM)}"


def check_choice(what: str, name: str, valid: Iterable[str]) -> None:
    """Refuse a name of something, ``what``, that is none of the valid ones.

    Raises:
        MimaError: suggests the nearest.
    """
    known = tuple(valid)
    if name not in known:
        raise MimaError(f"{what} {name!r} is unknown; {nearest(name, known)}")


def bounded(value: int, least: int, most: int) -> tuple[bool, str]:
    """A check for `check_settings`, which says what was passed: the least or the most."""
    return least <= value <= most, f"at least {least}" if value < least else f"at most {most}"


def check_settings(settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse the first setting that is out of its range; checks say if it is good, and the range.

    Raises:
        MimaError: names the settings' class, the setting, what was wanted and the value.
    """
    for name, (good, wanted) in checks.items():
        if not good:
            value = getattr(settings, name)
            raise MimaError(f"{type(settings).__name__}: {name} must be {wanted}, got {value}")
