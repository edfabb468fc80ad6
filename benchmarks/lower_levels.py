"""Which simulated attacker holds back which attack: one erased style, immunized, then attacked.

    python benchmarks/lower_levels.py [--style style-mono] [--seed 0] [KEY=VALUE ...]

``KEY=VALUE`` are settings of the immunization, as ``lower.parameters=denoiser lower.lr=3e-4``, over
those of the demonstration at half its cost. Every attack trains the erased and the immunized model
on the same batches, with a learning rate at which the erased one learns the style.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mima import immunize
from mima.adaptation import configure
from mima.assets import assets
from mima.cli.options import parse_setting
from mima.concepts import Concept, embedded_concept
from mima.concepts.pictures import Picture, spread
from mima.demo import settings
from mima.erasure import erase
from mima.evaluation import AttackCurve, ClipEncoder, attack, compare, prompt_alignment
from mima.evaluation.grid import Attack, material
from mima.families import load_pipeline
from mima.immunization.config import ImmunizeConfig
from mima.settings import parse_config, set_nested
from mima.training.captions import ordinary_captions

ATTACKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lora": ({"rank": 8, "learning_rate": 5e-4}, (0, 50, 100)),
    "dreambooth": ({"learning_rate": 1e-4}, (10, 25, 50, 100)),
    "custom-diffusion": ({"learning_rate": 3e-4}, (50, 100)),
    "textual-inversion": ({"learning_rate": 2e-2}, (50, 100)),
}
"""Settings of each method, and when its pictures are compared. The published rates are for larger
models: 5e-6 (dreambooth) and 1e-5 (custom-diffusion) teach this one next to nothing."""
CHEAPER = {"steps": 80, "upper": {"lr": 3e-4, "prior_batch_size": 12}}
UNTOUCHED = "benign-style-twemoji"


class Study:
    """One style's attacks, with what they have in common."""

    def __init__(self, style: str, seed: int) -> None:
        demo = settings(quick=False, seed=seed)
        self.seed = seed
        self.target = embedded_concept(style)
        self.defaults = demo.immunization.model_dump(mode="json")
        self.sampler = demo.sampler
        self.encoder = ClipEncoder(assets() / "encoder")
        self.captions = ordinary_captions(None)

    def config(self, given: Sequence[str]) -> ImmunizeConfig:
        """The demonstration's settings at half its cost, and what was given over them."""
        raw: dict[str, Any] = json.loads(json.dumps(self.defaults))
        raw["steps"] = CHEAPER["steps"]
        raw["upper"] |= CHEAPER["upper"]
        for name, value in map(parse_setting, given):
            set_nested(raw, name, value)
        return parse_config(ImmunizeConfig, raw, source="the command line")

    def immunize(self, erased: Any, original: Any, config: ImmunizeConfig) -> Any:
        """The erased model, immunized; the original one draws the class pictures."""
        prompts = spread(self.captions, config.num_class_images)
        rows = self.sampler(original, prompts, (0,))
        pictures = tuple(Picture(row[0], p) for row, p in zip(rows, prompts, strict=True))
        target = replace(self.target, class_images=pictures)
        return immunize(erased, [target], config).pipeline

    def attack(self, pipeline: Any, concept: Concept, method: str) -> AttackCurve:
        """One attack; textual inversion calls the style by a new word."""
        given, steps = ATTACKS[method]
        adaptation = configure(method, {**given, "batch_size": 4, "seed": self.seed})
        attacked = Attack(
            concept=concept.name,
            slug=concept.name,
            role="target",
            adaptation=adaptation,
            lr_factor=1.0,
            prompt_variant="token" if method == "textual-inversion" else "name",
            images="same",
            preparation="none",
        )
        concept, references = material(attacked, concept)
        return attack(
            pipeline,
            concept,
            adaptation,
            encoder=self.encoder,
            steps=steps,
            seeds=(0, 1),
            sampler=replace(self.sampler, steps=10),
            references=references,
            max_prompts=6,
        )

    def alignment(self, pipeline: Any) -> float:
        """Mean prompt alignment of ordinary pictures."""
        prompts = spread(self.captions, 48)
        rows = self.sampler(pipeline, prompts, (0,))
        return float(prompt_alignment([row[0] for row in rows], prompts, self.encoder).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--style", default="style-mono")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    study = Study(args.style, args.seed)
    config = study.config(args.settings)
    original = load_pipeline("embedded")
    erased = erase(original, [study.target], preserve=study.captions)
    started = time.perf_counter()
    immunized = study.immunize(erased, original, config)
    print(f"immunized in {time.perf_counter() - started:.0f} s", flush=True)
    attacks = [(study.target, method) for method in ATTACKS]
    for concept, method in [*attacks, (embedded_concept(UNTOUCHED), "lora")]:
        gap = compare(*(study.attack(model, concept, method) for model in (erased, immunized)))
        late = (gap.by_step[50] + gap.by_step[100]) / 2
        steps = ", ".join(f"{value:.3f} at {step}" for step, value in gap.by_step.items())
        print(f"{concept.name}, {method}: SGR {late:.3f} (mean of 50 and 100); {steps}")
        for label, curve in (("erased", gap.original), ("immunized", gap.immunized)):
            print(f"  {label:9}", *(f"{value:.3f}" for value in curve), flush=True)
    lost = study.alignment(erased) - study.alignment(immunized)
    print(f"prompt alignment lost: {lost:.3f}")


if __name__ == "__main__":
    main()
