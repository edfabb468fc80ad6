"""An immunized model and how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mima.immunization.config import ImmunizeConfig
from mima.immunization.progress import MetricsFile, StepReport
from mima.release.card import CardFacts
from mima.release.delta import Delta
from mima.release.repository import Released


@dataclass
class ImmunizeResult(Released):
    """An immunized model and how it came about.

    Beside the model, ``save_pretrained`` writes ``mima.json`` (settings and concepts) and
    ``metrics.jsonl``.

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
    """

    pipeline: Any
    concepts: list[str]
    config: ImmunizeConfig
    history: list[StepReport] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    model: str | None = None
    changed: list[str] = field(default_factory=list)
    erased: str | None = None
    opened_with: dict[str, str] = field(default_factory=dict)

    def _details(self) -> dict[str, Any]:
        config = {"config": self.config.model_dump(mode="json")}
        return config if self.erased is None else {**config, "erased": self.erased}

    def _write_records(self, folder: Path) -> None:
        super()._write_records(folder)
        MetricsFile(folder / "metrics.jsonl", self.history)

    def _facts(self) -> CardFacts:
        one = len(self.concepts) == 1
        target = "one concept" if one else f"{len(self.concepts)} concepts at once"
        the_concepts = "the concept" if one else "the concepts"
        summed = "its objective" if one else "their summed objectives"
        how = {
            "none": "Nothing was immunized; this is a baseline.",
            "imma": "Immunized against one concept by bi-level optimisation (IMMA).",
            "joint": f"Immunized against {target} by {summed}.",
            "compose": "Immunized against one concept alone."
            if one
            else "Immunized against each concept alone; the results were merged.",
            "mima": f"Immunized against {target} through differentiable merging "
            "([MIMA](https://arxiv.org/abs/2412.15320)).",
        }[self.config.method]
        if self.config.erase_first:
            how += f" Before that, {the_concepts} {'was' if one else 'were'} erased."
        if self.erased is not None:
            how += f" It began with the erased checkpoint `{self.erased}`."
        immunized = self.config.method != "none"
        if immunized:
            how += (
                f" Fine-tuning these weights on {the_concepts} below is meant to fail for longer "
                "than it does from the base model. Immunity is a matter of degree: it costs an "
                "attacker steps, and does not stop one with time, data and another model."
            )
        metrics = {}
        if self.history:
            last = self.history[-1]
            metrics["outer steps"] = float(last.step)
            metrics |= {f"loss at the last step: {k}": v for k, v in last.losses.items()}
        return CardFacts(
            command="immunize",
            title="Immunized model" if immunized else "Model without immunization",
            method=how,
            base_model=self.model,
            opened_with=self.opened_with,
            concepts=list(zip(self.concepts, self.prompts, strict=True)) if self.prompts else [],
            settings=self.config.model_dump(mode="json"),
            seed=self.config.seed,
            metrics=metrics,
            tags=["model-immunization"],
        )

    def _delta(self) -> Delta:
        origin = {"model": self.model, "concepts": self.concepts, **self._details()}
        return Delta.of(self.pipeline, self.changed, origin=origin)
