"""The whole story on the embedded model: erase, immunize, attack, compare; in minutes on a CPU."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mima import console
from mima._version import installed_versions
from mima.adaptation import LoRA
from mima.assets import assets
from mima.concepts import Concept, embedded_concept
from mima.concepts.pictures import Picture
from mima.erasure import erase
from mima.evaluation import (
    AttackCurve,
    ClipEncoder,
    GapSummary,
    Sampler,
    attack,
    compare,
    prompt_alignment,
)
from mima.evaluation.trajectory import score
from mima.families import load_pipeline
from mima.immunization.algorithm import StepReport, immunize
from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.release.repository import save_pipeline
from mima.report.figures import ATTACK_ROWS, attack_columns, image_grid, plot_curves
from mima.storage.output import fresh_folder
from mima.training.captions import ordinary_captions, spread

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration does; two concepts to immunize against, one to keep learnable."""

    targets: tuple[str, ...] = ("style-mono", "style-fluent")
    """Embedded concepts that are erased and immunized against."""
    untouched: str = "benign-style-twemoji"
    """An embedded concept that the model's users should be able to learn. Objects would not do:
    their pictures are in the target styles, too."""
    immunization: ImmunizeConfig
    """Settings of the immunization."""
    attack: LoRA
    """The attack, the same on every model."""
    attack_steps: tuple[int, ...] = (25, 50, 100)
    """When the attacked models are sampled."""
    sampler: Sampler
    """How pictures are drawn."""
    max_prompts: int = 6
    """Held-out prompts per concept."""
    sampling_seeds: tuple[int, ...] = (0, 1)
    """Pictures per prompt."""
    alignment_prompts: int = 48
    """Ordinary prompts on which the models' prompt alignment is compared."""


def settings(*, quick: bool, seed: int) -> DemoSettings:
    """The demonstration in full, or a quick one that shows every part with less effect."""
    immunization = ImmunizeConfig(
        hypergradient="first_order",
        steps=40 if quick else 120,
        seed=seed,
        num_class_images=32 if quick else 192,
        # what Custom Diffusion trains; it stands for LoRA as well, against which this is measured
        lower=LowerConfig(
            steps=4, optimizer="adam", lr=1e-3, batch_size=4, parameters="cross_attention_kv"
        ),
        upper=UpperConfig(
            lr=3e-4 if quick else 2e-4,
            weight_decay=0.0,
            batch_size=4,
            parameters="cross_attention",
            prior_weight=6.0,
            prior_batch_size=12 if quick else 24,
            loss_cap=1.4,
        ),
    )
    return DemoSettings(
        immunization=immunization,
        attack=LoRA(rank=8, learning_rate=5e-4, batch_size=4, seed=seed),
        sampler=Sampler(steps=15, guidance=3.0, batch_size=16, scheduler="dpm++"),
        attack_steps=(10, 25) if quick else (25, 50, 100),
        max_prompts=3 if quick else 6,
        alignment_prompts=16 if quick else 48,
    )


def run_demo(
    output: str | Path, *, quick: bool = False, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Erase two concepts from the embedded model, immunize it, attack it, and write what happened.

    Progress goes to the terminal, the results into a folder.

    Args:
        output: a new folder. It will hold ``immunized/`` (a diffusers folder), ``results.json``,
            ``curves.png``, ``grid.png`` and ``log``.
        quick: a minute and a half instead of six.
        seed: of everything random.
        overwrite: replace the results of an earlier run.

    Returns:
        What ``results.json`` holds.

    Raises:
        MimaError: the folder cannot be used.
    """
    with (
        fresh_folder(Path(output), overwrite=overwrite) as folder,
        _log_to(folder / "log"),
        console.progress() as bars,
    ):
        return Demo(settings(quick=quick, seed=seed), folder, bars).run()


def show(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal: one row for each concept."""
    from rich.table import Table

    steps = list(next(iter(results["sgr"].values())))
    table = Table(
        title="similarity gap ratio (SGR) after attacking the erased and the immunized model",
        caption="SGR 0: learned as easily as before; 1: nothing of the concept is learned.",
    )
    table.add_column("concept")
    for step in steps:
        table.add_column(f"step {step}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    for name, gap in results["concepts"].items():
        label = name if name in results["targets"] else f"{name} (not immunized)"
        cells = [f"{gap['sgr'][step]:.2f}" for step in steps]
        table.add_row(label, *cells, f"{gap['mean']:.2f}")
    table.add_section()
    table.add_row("MSGR of the immunized concepts", *[""] * len(steps), f"{results['msgr']:.2f}")
    alignment = results["prompt_alignment"]
    table.add_row(
        f"prompt alignment {alignment['erased']:.3f} → {alignment['immunized']:.3f}, lost",
        *[""] * len(steps),
        f"{alignment['loss']:.3f}",
    )
    return table


class Demo:
    """One demonstration under way."""

    def __init__(self, settings: DemoSettings, folder: Path, bars: console.Bars) -> None:
        self.settings = settings
        self.folder = folder
        self.bars = bars
        self.encoder = ClipEncoder(assets() / "encoder")

    def run(self) -> dict[str, Any]:
        """Erase, immunize, attack, compare, write."""
        started = time.perf_counter()
        s = self.settings
        targets = [embedded_concept(name) for name in s.targets]
        untouched = embedded_concept(s.untouched)
        captions = ordinary_captions(None)

        original = load_pipeline("embedded")
        erased = erase(original, targets, preserve=captions)
        class_images = self._class_pictures(original, captions)
        immunized = self._immunize(
            erased, [replace(target, class_images=class_images) for target in targets]
        )
        save_pipeline(immunized, self.folder / "immunized")

        attacks = {
            concept.name: (
                self._attack("erased", erased, concept),
                self._attack("immunized", immunized, concept),
            )
            for concept in (*targets, untouched)
        }
        gaps = {name: compare(*pair) for name, pair in attacks.items()}
        summary = GapSummary(
            targets=tuple(gaps[target.name] for target in targets), others=(gaps[untouched.name],)
        )
        alignment = self._alignment({"erased": erased, "immunized": immunized}, captions)
        self._draw(original, attacks, targets)
        results = {
            "msgr": summary.msgr,
            "worst_sgr": summary.worst_sgr,
            "final_msgr": summary.final_msgr,
            "benign_sgr": summary.other_sgr,
            "benign_rsgr": summary.mrsgr,
            "sgr": {name: gap.to_dict()["sgr"] for name, gap in gaps.items()},
            "concepts": {name: gap.to_dict() for name, gap in gaps.items()},
            "targets": [target.name for target in targets],
            "untouched": untouched.name,
            "prompt_alignment": alignment,
            "seconds": time.perf_counter() - started,
            "seed": s.immunization.seed,
            "versions": installed_versions(),
            "config": {
                "immunize": s.immunization.model_dump(mode="json"),
                "attack": asdict(s.attack),
                "sampler": asdict(s.sampler),
            },
        }
        text = json.dumps(results, indent=2, ensure_ascii=False)
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")
        return results

    def _class_pictures(self, original: Any, captions: Sequence[str]) -> tuple[Picture, ...]:
        """Ordinary pictures by the model as it was, for prior preservation."""
        count = self.settings.immunization.num_class_images
        prompts = spread(captions, count)
        advance = self._bar("class pictures", count)
        rows = self.settings.sampler(original, prompts, (0,), progress=advance)
        return tuple(Picture(row[0], prompt) for row, prompt in zip(rows, prompts, strict=True))

    def _immunize(self, erased: Any, targets: Sequence[Concept]) -> Any:
        config = self.settings.immunization
        advance = self._bar("immunize", config.steps)

        def on_step(report: StepReport) -> None:
            advance(report.step, report.steps)
            logger.info("%s", report)

        return immunize(erased, targets, config, callbacks=[on_step]).pipeline

    def _attack(self, label: str, pipeline: Any, concept: Concept) -> AttackCurve:
        s = self.settings
        curve = attack(
            pipeline,
            concept,
            s.attack,
            encoder=self.encoder,
            steps=(0, *s.attack_steps),
            seeds=s.sampling_seeds,
            sampler=s.sampler,
            max_prompts=s.max_prompts,
            progress=self._bar(f"attack {label} model: {concept.name}", None),
        )
        logger.info("attack on %s, %s: %s", label, concept.name, curve.similarity)
        return curve

    def _alignment(self, pipelines: dict[str, Any], captions: Sequence[str]) -> dict[str, float]:
        prompts = spread(captions, self.settings.alignment_prompts)
        out = {}
        for label, pipeline in pipelines.items():
            advance = self._bar(f"prompt alignment: {label}", len(prompts))
            rows = self.settings.sampler(pipeline, prompts, (0,), progress=advance)
            scores = prompt_alignment([row[0] for row in rows], prompts, self.encoder)
            out[label] = float(scores.mean())
        out["loss"] = out["erased"] - out["immunized"]
        out["relative_loss"] = out["loss"] / out["erased"]
        return out

    def _draw(
        self,
        original: Any,
        attacks: dict[str, tuple[AttackCurve, AttackCurve]],
        targets: Sequence[Concept],
    ) -> None:
        s = self.settings
        columns, ceiling, notes = [], {}, {}
        for name, pair in attacks.items():
            erased, _ = pair
            advance = self._bar(f"original model: {name}", len(erased.prompts) * len(erased.seeds))
            before = s.sampler(original, erased.prompts, erased.seeds, progress=advance)
            references = [self.encoder.embed(images) for images in erased.references]
            ceiling[name] = float(score(before, references, self.encoder).mean())
            if name not in [target.name for target in targets]:
                notes[name] = "not immunized against"
            columns += attack_columns(pair, before)
        plot_curves(
            list(attacks.values()),
            self.folder / "curves.png",
            labels=("erased", "erased and immunized"),
            ceiling=ceiling,
            notes=notes,
        )
        image_grid(ATTACK_ROWS, columns, self.folder / "grid.png")

    def _bar(self, label: str, total: int | None) -> Callable[[int, int], None]:
        task = self.bars.add_task(label, total=total, note="")
        return lambda done, all_: self.bars.update(task, completed=done, total=all_)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger("mima")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
