"""An evaluation as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mima.errors import counted
from mima.evaluation.records import Evaluation, Gap
from mima.report.wording import (
    UNSEEN,
    adds,
    count_sentences,
    hardly_trained_sentences,
    interval_words,
    known_sentences,
    method_name,
    number,
    part_sentences,
    ratio,
    share,
    steps_to_half,
    untold_sentences,
)

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(evaluation: Evaluation) -> Table:
    """A row for each target and method, by the primary similarity, their means, and the others."""
    from rich.table import Table

    summary = evaluation.summary[evaluation.similarities[0]]
    notes = [
        "SGR 0: as like the concept as without immunization.",
        "Rise left 1: the attack adds as much as without immunization, 0: nothing.",
        "Steps to half of the original's rise, in both models, and their ratio; – : the attack "
        "taught nothing.",
        f"Means are over {counted(len(evaluation.seeds), 'attack seed')} and one immunized model.",
    ]
    if any(concept.role != "target" for concept in evaluation.concepts):
        notes.append("Concepts of the last part should stay learnable: SGR 0 is wanted.")
    table = Table(
        title="the same attacks on both models", caption_justify="left", caption="\n".join(notes)
    )
    table.add_column("concept", overflow="fold", min_width=8)
    # whole, because names of attacks may differ at their ends
    table.add_column("method", overflow="fold", min_width=10)
    for name in (
        "SGR\nbefore",
        "SGR\nmean",
        "SGR\nlast",
        "rise\nleft",
        "steps\nto half",
        "steps\nratio",
    ):
        table.add_column(name, justify="right", no_wrap=True)

    def add(concept: str, method: str, gap: Gap) -> None:
        table.add_row(
            concept,
            method,
            number(gap.sgr_before.mean),
            number(gap.mean),
            number(gap.final),
            ratio(gap.rise_left, 2),
            steps_to_half(
                gap.steps_to_half.original, gap.steps_to_half.immunized, gap.steps_ratio.at_least
            ),
            ratio(gap.steps_ratio),
        )

    def add_all(targets: bool) -> None:
        for concept in evaluation.concepts:
            if (concept.role == "target") == targets:
                for method, gap in summary.sgr[concept.name].methods.items():
                    add(concept.name, method_name(method), gap)
        table.add_section()

    add_all(targets=True)
    add("their MSGR", "all", summary.targets)
    table.add_section()
    add_all(targets=False)
    return table


def summary_lines(evaluation: Evaluation) -> list[str]:
    """For each similarity, the attacks that got furthest and the mean with its interval."""
    lines = []
    for label, summary in evaluation.summary.items():
        worst, rise, counts = summary.worst_attack, summary.worst_rise, summary.tally
        told = [*count_sentences(counts), *untold_sentences(summary)]
        if worst.sgr is None:
            lines.append(f"{label}: no attack could be compared")
            lines += [f"{label}: {sentence}" for sentence in told]
            continue
        unknown = [
            concept.name
            for concept in evaluation.concepts
            if concept.role == "target" and summary.sgr[concept.name].mean is None
        ]
        if unknown:
            lines.append(f"{label}: no attack on {', '.join(unknown)} could be compared")
        if rise.rise_left is None:
            lines.append(
                f"{label}: no attack taught either model anything: nothing was measured; train "
                "longer, or at a higher rate"
            )
        lines += [f"{label}: {sentence}" for sentence in told]
        lines += [f"{label}: {sentence}" for sentence in known_sentences(counts)]
        lines.append(
            f"{label}: worst attack SGR {number(worst.sgr)} ({worst.attack}); MSGR "
            f"{number(summary.msgr.mean)} ({interval_words(summary.msgr)})"
        )
        if rise.rise_left is not None:
            lines.append(
                f"{label}: the attack that regained most {adds(rise.rise_left, rise.at_least)} "
                f"of what it adds on the original ({rise.attack})"
            )
        objects = summary.objects
        if objects.original is not None and objects.immunized is not None:
            lines.append(
                f"{label}: after attacks names the right object in {share(objects.original)} "
                f"of the original's pictures and {share(objects.immunized)} of the immunized's"
            )
    for label, by_concept in evaluation.calibration.items():
        for name, known in by_concept.items():
            lines.append(
                f"{label} on {name}: right pictures {number(known.right)}, other concepts "
                f"{number(known.others)}, noise {number(known.noise)}, grey {number(known.grey)}"
            )
    lines += [f"parts: {sentence}" for sentence in part_sentences(evaluation)]
    lines += [f"overlap: {sentence}" for sentence in evaluation.overlaps]
    if evaluation.tuned is False:
        lines.append(
            "attacks were not tuned: an attacker who tries other rates, schedules, batches and "
            "optimizers may get further"
        )
    lines += [f"trials: {sentence}" for sentence in hardly_trained_sentences(evaluation)]
    learned = [c.name for c in evaluation.concepts if c.references == "images"]
    if learned:
        lines.append(
            f"{', '.join(learned)}: no held-out pictures; copies of the training pictures look "
            "like learning"
        )
    if all(summary.objects.original is None for summary in evaluation.summary.values()):
        lines.append(f"pictures: {UNSEEN}")
    alignment = evaluation.benign.prompt_alignment
    if alignment.original is not None and alignment.immunized is not None:
        lines.append(
            f"prompt alignment {number(alignment.original, 3)} → {number(alignment.immunized, 3)}"
        )
    return lines
