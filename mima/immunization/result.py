"""An immunized model and how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mima.families.pipelines import Pipeline
from mima.immunization.config import ImmunizeConfig
from mima.immunization.progress import StepReport, write_metrics
from mima.release.card import CardFacts, as_text
from mima.release.delta import Delta
from mima.release.repository import Released
from mima.storage.names import METRICS_FILE
from mima.storage.record import without_thumbnails

MIMA_PAPER = "[MIMA](https://arxiv.org/abs/2412.15320)"


@dataclass
class ImmunizeResult(Released):
    """An immunized model and how it came about.

    Beside the model, ``save_pretrained`` writes ``mima.json`` (settings, concepts and what each
    level saw) and ``metrics.jsonl`` (one report per step, without time and memory, so that the same
    run writes the same bytes).

    Attributes:
        pipeline: an ordinary diffusers pipeline.
        concepts: names of the concepts it was immunized against.
        config: the settings.
        history: one report per outer step.
        prompts: the concepts' prompts.
        model: what was immunized, as it was named.
        opened_with: what else was said of it, see ``ModelSource.options``.
        changed: names of the parameters that the run may have changed, as ``unet.conv_in.weight``.
        erased: the checkpoint that the run began with.
        saw: what each level saw, see ``mima.immunization.encoding.saw``; ``evaluate`` keeps apart
            or marks what it measures with of that.
    """

    pipeline: Pipeline
    concepts: list[str]
    config: ImmunizeConfig
    history: list[StepReport] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    model: str | None = None
    changed: list[str] = field(default_factory=list)
    erased: str | None = None
    opened_with: dict[str, str] = field(default_factory=dict)
    saw: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def _details(self) -> dict[str, Any]:
        details = {"config": self.config.model_dump(mode="json"), "saw": self.saw}
        return details if self.erased is None else {**details, "erased": self.erased}

    def _write_records(self, folder: Path) -> None:
        super()._write_records(folder)
        write_metrics(folder / METRICS_FILE, self.history)

    def _story(self) -> Iterator[str]:
        """What was done, in the order in which it was done."""
        config = self.config
        one = len(self.concepts) == 1
        the_concepts, were = ("the concept", "was") if one else ("the concepts", "were")
        target = "one concept" if one else f"{len(self.concepts)} concepts at once"
        if self.erased is not None:
            yield f"Begun with the erased checkpoint {as_text(self.erased)}."
        if config.erase_first:
            yield f"{the_concepts.capitalize()} {were} erased by a closed-form edit (UCE)."
        if config.method == "none":
            yield "Nothing was immunized; this is a baseline."
            return
        if config.new_words:
            yield f"The new words of {the_concepts} were known to the model while it was immunized."
        rule = {
            "projected": "keys and values by the text they answer to, other weights by their mean",
            "average": "by the mean of all weights",
            "sum": "by the sum of what each adaptation changes",
        }[config.merge]
        at_once = config.concepts_per_step or len(self.concepts)
        if config.method in ("mima", "joint") and at_once < len(self.concepts):
            target = f"{len(self.concepts)} concepts in turn, {at_once} in each step,"
        yield {
            "imma": "Immunized against one concept by bi-level optimisation (IMMA).",
            "joint": f"Immunized against {target} by "
            + (
                "its objective."
                if one or at_once == 1
                else "their summed objectives, without a merge."
            ),
            "compose": "Immunized against each concept alone, from the same start; the immunized "
            f"models were merged, {rule}.",
            "mima": f"Immunized against {target} without a merge between them."
            if at_once == 1 < len(self.concepts)
            else f"Immunized against {target} through differentiable merging, {rule} "
            f"({MIMA_PAPER}).",
            "alternating": f"Immunized against {target} by the update that MIMA's authors "
            f"published ({MIMA_PAPER}): steps that commit a merge of the adapted weights, {rule}, "
            "alternate with steps of ascent.",
        }[config.method]
        if "benign" in self.saw:
            yield (
                "Learning other concepts was simulated, too, so that they stay learnable: "
                f"{', '.join(self.saw['benign']['concepts'])}."
            )
        yield (
            f"Fine-tuning these weights on {the_concepts} below is meant to fail for longer than "
            "it does from the base model. Immunity is a matter of degree: it costs an attacker "
            "steps, and does not stop one with time, data and another model."
        )

    def _facts(self) -> CardFacts:
        immunized = self.config.method != "none"
        metrics = {}
        # of concepts that have their turns, or are immunized alone, each at its last step
        for report in self.history:
            metrics["outer steps"] = float(report.step)
            for what, losses in (
                ("last loss", report.losses),
                ("last loss on class pictures", report.prior_losses),
            ):
                metrics |= {f"{what}: {name}": loss for name, loss in losses.items()}
        return CardFacts(
            command="immunize",
            title="Immunized model" if immunized else "Model without immunization",
            method=" ".join(self._story()),
            base_model=self.model,
            opened_with=self.opened_with,
            concepts=list(zip(self.concepts, self.prompts, strict=True)) if self.prompts else [],
            settings=self.config.read(),
            seed=self.config.seed,
            metrics=metrics,
            tags=["model-immunization"],
        )

    def _delta(self) -> Delta:
        origin = {"model": self.model, "concepts": self.concepts, "prompts": self.prompts}
        return Delta.of(
            self.pipeline, self.changed, origin=without_thumbnails({**origin, **self._details()})
        )
