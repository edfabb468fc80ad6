"""The report's words and numbers."""

from __future__ import annotations

from mima.errors import counted
from mima.evaluation.records import Evaluation, Interval, Ratio, SimilaritySummary, Tally
from mima.evaluation.summary import FAR, TOLD

METHODS = {
    "lora": "LoRA",
    "dreambooth": "DreamBooth",
    "dreambooth-lora": "DreamBooth-LoRA",
    "textual-inversion": "Textual Inversion",
    "custom-diffusion": "Custom Diffusion",
    "pivotal": "Pivotal tuning",
}

VARIANTS = {
    "name": "its name",
    "description": "a description without the name",
    "token": "a rare token",
}

PREPARATIONS = {
    "none": "none",
    "merge": "merged with another model first",
    "benign": "adapted to ordinary data first",
    "kick": "kicked by noise and settled first",
    "undo": "rid of the strongest part of the change first",
    "interpolate": "half of the way back to the original first",
    "fp16": "rounded to 16 bits first",
    "int8": "rounded to 8 bits first",
}


PICTURES = {
    "same": "same images",
    "other": "other images",
    "fewer": "a quarter of the images",
    "more": "more images",
    "mixed": "mixed with images of other concepts",
}

UNSEEN = (
    "Whether the attacked models' pictures are whole was not measured, for which a judge has to "
    "read texts: pictures that training broke are unlike the concept, too."
)
"""Said where no judge names objects."""


def number(value: float | None, digits: int = 2) -> str:
    """A number with a true minus sign, or a dash where nothing was measured."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A change in percent, with its sign."""
    return f"{100 * value:+.1f}\u00a0%".replace("-", "−")


def share(value: float | None) -> str:
    """A share in percent."""
    # with a no-break space
    return "–" if value is None else f"{number(100 * value, 0)}\u00a0%"


def share_left(value: float | None, at_least: bool) -> str:
    """A share in percent; ≥ before a lower bound."""
    return f"≥\u00a0{share(value)}" if at_least and value is not None else share(value)


def adds(rise: float | None, at_least: bool = False) -> str:
    """What an attack does to the similarity of the immunized model's pictures, as a share."""
    if rise is not None and rise < 0:
        return f"takes away {share(-rise)}"
    return f"adds {'at least ' if at_least else ''}{share(rise)}"


def interval_words(interval: Interval) -> str:
    """What the ends of an interval are, in words."""
    ends = f"{number(interval.low)} to {number(interval.high)}"
    if interval.kind == "t":
        return f"95\u00a0% interval over {interval.runs} attack seeds: {ends}"
    if interval.runs > 1:
        return f"range of {interval.runs} attack seeds: {ends}"
    return "one attack seed, no interval" if interval.runs else "no interval"


def ratio(value: Ratio, digits: int = 1) -> str:
    """A ratio; ≥ before a lower bound."""
    text = number(value.mean, digits)
    return f"≥\u00a0{text}" if value.at_least and value.mean is not None else text


def steps_to_half(original: float | None, immunized: float | None, at_least: bool) -> str:
    """Steps that both models take to half of the original's rise; ≥ before a lower bound."""
    if original is None:
        return "–"
    bound = "≥\u00a0" if at_least else ""
    return f"{number(original, 0)}\u00a0→ {bound}{number(immunized, 0)}"


def method_name(method: str) -> str:
    """How people write an adaptation method."""
    return METHODS.get(method, method)


def setting_text(value: object) -> str:
    """A setting's value."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting_text, value)) or "none"
    return "none" if value is None else str(value)


def with_parts(evaluation: Evaluation) -> str:
    """What a headline of immunity adds where that may be owed to more, or less, than a denoiser."""
    found = []
    if evaluation.same_denoiser:
        found.append("the original's denoiser")
    if evaluation.other_parts:
        found.append(f"parts that are not the original's ({', '.join(evaluation.other_parts)})")
    return f", with {' and '.join(found)}" if found else ""


def part_sentences(evaluation: Evaluation) -> list[str]:
    """What of the immunized model an attacker need not take, and whether its denoiser is another.

    Older records say nothing of some parts.
    """
    found = []
    if evaluation.other_parts:
        found.append(
            "These parts of the immunized model are not the original's: "
            f"{', '.join(evaluation.other_parts)}. Attacks on it trained with them, and an "
            "attacker may put the original's in their place: what is learned then was not measured."
        )
    if evaluation.same_denoiser:
        found.append("The denoisers of both models have the same weights: they were not immunized.")
    return found


def count_sentences(counts: Tally) -> list[str]:
    """What became of attacks on targets that a mean does not show, by one judge."""
    every = counted(counts.attacks, "attack")
    failed = counts.attacks - counts.taught - counts.diverged
    found = (
        (
            counts.led_away,
            "led the immunized model's pictures away from the concept: training broke them. SGR "
            "counts that as immunity, the mean rise as 0\u00a0%.",
        ),
        (
            counts.below_zero,
            "came to an SGR above 1: the immunized model's similarity is below 0, as pictures of "
            "something else have it.",
        ),
        (
            counts.beyond,
            f"came to an SGR above {FAR:g} or below −1: it is divided by the original model's "
            "similarity, which is small there. Such a ratio says little, and moves MSGR far.",
        ),
        (
            counts.diverged,
            "diverged on a model and count as not tried: an attacker would take a lower rate.",
        ),
        (
            counts.cut_short,
            "diverged on a model later on, and count by what they had reached on both by then.",
        ),
        (
            failed,
            "taught neither model anything: they say little, and none of them counts as the one "
            "that got furthest, but MSGR counts them.",
        ),
    )
    return [f"{count} of {every} on immunized concepts {what}" for count, what in found if count]


def untold_sentences(summary: SimilaritySummary) -> list[str]:
    """Which attacks on other concepts their SGR and MRSGR leave out."""
    if not summary.untold:
        return []
    return [
        f"{summary.untold} of {counted(summary.others, 'attack')} on other concepts left the "
        f"original model's pictures below a similarity of {TOLD:g} to the concept, at least for "
        "a while: SGR of other concepts and MRSGR leave them out."
    ]


def known_sentences(counts: Tally) -> list[str]:
    """Which concepts a model showed before any attack, where the numbers say little."""
    found = []
    if counts.known_before:
        found.append(
            f"The immunized model's pictures are nearer to {', '.join(counts.known_before)} before "
            "any attack than the original's, by what counts as learning: there an attack has "
            "little to add, and a low rise is no immunity."
        )
    if counts.known_to_original:
        names = ", ".join(counts.known_to_original)
        found.append(
            f"The original model's pictures are nearer to {names} before any attack than the "
            "immunized model's, by what counts as learning: SGR counts that, though nobody has "
            "attacked yet. Of concepts that were erased before, the original is the erased model."
        )
    return found


def hardly_trained_sentences(evaluation: Evaluation) -> list[str]:
    """How many attacks may get further as configured than with what their trials chose."""
    if not evaluation.hardly_trained:
        return []
    return [
        f"The settings that trials of {counted(len(evaluation.hardly_trained), 'attack')} chose "
        "hardly train the immunized model, because stronger ones broke its pictures: as "
        "configured, with more steps than a trial has, these may get further."
    ]
