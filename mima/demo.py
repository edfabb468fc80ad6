"""The whole story on the embedded model: erase, immunize, evaluate, report; in minutes on a CPU."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mima import console
from mima._version import installed_versions
from mima.concepts import embedded_concept
from mima.concepts.pictures import Picture, spread
from mima.erasure import erase
from mima.evaluation import Evaluation, EvaluationFolder, Sampler, attack_original, evaluate
from mima.evaluation.encoders import EMBEDDED
from mima.evaluation.grid import grid_config
from mima.evaluation.metrics import GapCurve
from mima.evaluation.processes import beside
from mima.families import load_pipeline
from mima.immunization.algorithm import StepReport, immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.recipes import EMBEDDED_RATE, default
from mima.release.repository import save_pipeline
from mima.report import write_report
from mima.storage.inputs import expanded
from mima.storage.output import fresh_folder
from mima.storage.record import write_record
from mima.training.captions import divided, ordinary_captions

logger = logging.getLogger(__name__)

PRIOR_SEED = 999_999
"""Of the class pictures' noise; measurements draw with multiples of `SEED_STRIDE`."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration does; two concepts to immunize against, one to keep learnable."""

    targets: tuple[str, ...] = ("style-mono", "style-fluent")
    """Embedded concepts that are erased and immunized against."""
    untouched: str = "benign-style-twemoji"
    """An embedded concept that the model's users should be able to learn. Objects would not do:
    their pictures are in the target styles, too."""
    benign: tuple[str, ...] = (
        "benign-cupcake",
        "benign-guitar",
        "benign-panda",
        "benign-pizza",
        "benign-tractor",
        "unseen-castle",
    )
    """Embedded concepts that the immunization keeps learnable: those of their pictures that are not
    in a target's style."""
    immunization: ImmunizeConfig
    """Settings of the immunization."""
    sampler: Sampler
    """How pictures are drawn."""
    grid: Mapping[str, Any]
    """Settings of the evaluation's grid over its ``quick`` preset: the attacks, the same on both
    models, and when and by how many pictures they are measured."""


def settings(*, quick: bool, seed: int) -> DemoSettings:
    """The demonstration in full, or a quick one that shows every part with less effect."""
    # half of the recipe's class pictures in each step
    changes: dict[str, Any] = {"upper": {"prior_batch_size": 20}}
    if quick:
        # more and shorter attacks, where there would be two of the recipe's
        changes |= {"steps": 24, "num_class_images": 32, "attack_every": 4}
        changes["lower"] = {"steps": 20, "lr": (5e-5, 1e-3)}
        changes["upper"]["path_every"] = 4
    else:
        # one of the recipe's three paths of each benign concept: hardly one would serve twice
        changes |= {"steps": 108, "num_class_images": 192}
        changes["upper"]["benign"] = {"paths": 1}
    immunization = default(rate=EMBEDDED_RATE, benign=True, seed=seed, **changes)
    steps = 24 if quick else 100
    sampler = Sampler(steps=12, guidance=3.0, batch_size=16, scheduler="dpm++")
    return DemoSettings(
        immunization=immunization,
        sampler=sampler,
        grid={
            "methods": {
                "lora": {"rank": 8, "learning_rate": 5e-4, "batch_size": 4, "steps": steps},
                "dreambooth": {"learning_rate": 1e-4, "batch_size": 4, "steps": steps},
            },
            "lr_factors": [1.0],
            "seeds": [seed],
            "evaluations": 2 if quick else 4,
            "max_prompts": 3 if quick else 6,
            "pictures_per_prompt": 1,
            "sampler": asdict(sampler),
            "benign_prompts": 16 if quick else 48,
        },
    )


def run_demo(
    output: str | Path, *, quick: bool = False, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Erase two concepts from the embedded model, immunize it, attack both, and report.

    Progress goes to the terminal, the results into a folder.

    Args:
        output: a new folder. It will hold ``erased/`` and ``immunized/`` (diffusers folders),
            ``evaluation/`` (what `evaluate` writes), ``report.html``, ``report-figures/`` (every
            figure of the report), ``results.json``, ``curves.png``, ``grid.png`` and ``log``.
        quick: two minutes instead of six.
        seed: of everything random.
        overwrite: replace the results of an earlier run.

    Returns:
        What ``results.json`` holds.

    Raises:
        MimaError: the folder cannot be used.
    """
    with (
        fresh_folder(expanded(output), overwrite=overwrite) as folder,
        _log_to(folder / "log"),
        console.progress() as bars,
    ):
        return _run(settings(quick=quick, seed=seed), folder, bars)


def _run(settings: DemoSettings, folder: Path, bars: console.Bars) -> dict[str, Any]:
    started = time.perf_counter()
    # refuses a seed before minutes are spent
    grid_config("quick", settings.grid)
    targets = [embedded_concept(name) for name in settings.targets]
    untouched = embedded_concept(settings.untouched)
    captions = ordinary_captions(None)

    original = load_pipeline("embedded")
    erased = erase(original, targets, preserve=captions)
    save_pipeline(erased, folder / "erased")

    with tempfile.TemporaryDirectory() as scratch:
        alike: dict[str, Any] = {
            "others": [untouched],
            "settings": settings.grid,
            "similarities": list(EMBEDDED),
            "originals": Path(scratch, "originals"),
        }
        drawn = _bar(bars, "class pictures")
        prior = _class_pictures(settings, original, captions, Path(scratch), drawn)
        # the erased model is attacked while the immunized one is made
        with beside(attack_original, folder / "erased", targets, **alike), _one_thread():
            advance = _bar(bars, "immunize")

            def on_step(report: StepReport) -> None:
                advance(report.step, report.steps)
                logger.info("%s", report)

            with_prior = [replace(target, class_images=prior) for target in targets]
            benign = [embedded_concept(name).without(targets) for name in settings.benign]
            result = immunize(
                erased, with_prior, settings.immunization, benign=benign, callbacks=[on_step]
            )
        result.save_pretrained(folder / "immunized")

        attacked = _bar(bars, "attack")
        evaluation = evaluate(
            folder / "erased",
            folder / "immunized",
            targets,
            output=folder / "evaluation",
            name="demonstration",
            method=settings.immunization.method,
            progress=lambda done, total, _: attacked(done, total),
            **alike,
        )
    page = write_report([folder / "evaluation"], folder / "report.html")
    for name in ("curves.png", "grid.png"):
        shutil.copy(page.with_name(f"{page.stem}-figures") / name, folder / name)
    results = {
        **_numbers(evaluation, EvaluationFolder(folder / "evaluation")),
        "targets": [target.name for target in targets],
        "untouched": untouched.name,
        "seconds": time.perf_counter() - started,
        "seed": settings.immunization.seed,
        "versions": installed_versions(),
        "config": {
            "immunize": settings.immunization.model_dump(mode="json"),
            "attack": settings.grid["methods"],
            "sampler": asdict(settings.sampler),
            "grid": dict(settings.grid),
        },
    }
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    write_record(
        folder,
        "demo",
        model="embedded",
        opened_with={},
        concepts=results["targets"],
        prompts=[target.prompt for target in targets],
        details={"seed": results["seed"]},
    )
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread, so that numbers are the same on any number of cores.

    On layers of 8 by 8 one is as fast as several.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _class_pictures(
    settings: DemoSettings,
    original: Any,
    captions: Sequence[str],
    scratch: Path,
    progress: Callable[[int, int], None],
) -> tuple[Picture, ...]:
    """Ordinary pictures by the model as it was, the same for all concepts.

    Their prompts are none of those on which prompt alignment is measured. Nearly half of them are
    drawn into files by a process beside this one, in whole batches, so that they are the same.
    """
    free, _ = divided(captions)
    prompts = spread(free, settings.immunization.num_class_images)
    sampler = settings.sampler
    batches = math.ceil(len(prompts) / sampler.batch_size)
    # fewer there: that process has to start first
    here = (batches - max(1, batches * 9 // 20)) * sampler.batch_size
    with beside(_draw_class_pictures, sampler, prompts[here:], scratch), _one_thread():
        rows = sampler(original, prompts[:here], (PRIOR_SEED,), progress=progress)
    images: list[Image.Image | Path] = [row[0] for row in rows]
    images += [_class_picture(scratch, place) for place in range(len(prompts) - here)]
    return tuple(Picture(image, prompt) for image, prompt in zip(images, prompts, strict=True))


def _draw_class_pictures(sampler: Sampler, prompts: Sequence[str], scratch: Path) -> None:
    for place, (image,) in enumerate(sampler(load_pipeline("embedded"), prompts, (PRIOR_SEED,))):
        image.save(_class_picture(scratch, place))


def _class_picture(scratch: Path, place: int) -> Path:
    return scratch / f"class-{place}.png"


def _numbers(evaluation: Evaluation, folder: EvaluationFolder) -> dict[str, Any]:
    """What ``results.json`` says of an evaluation with one seed."""
    primary = evaluation.similarities[0]
    summary = evaluation.summary[primary]
    curves: dict[str, dict[str, GapCurve]] = {}
    told = [point for point in folder.curves() if point.similarity == primary]
    for row in folder.attacks():
        # what diverged has no curve
        if row.similarity != primary or row.sgr_mean is None:
            continue
        points = [point for point in told if point.attack == row.attack]
        curves.setdefault(row.concept, {})[row.method] = GapCurve(
            concept=row.concept,
            steps=tuple(point.step for point in points),
            original=tuple(point.original for point in points),
            immunized=tuple(point.immunized for point in points),
        )
    concepts = {}
    for name, by_method in curves.items():
        gap, every = summary.sgr[name], list(by_method.values())
        steps = every[0].steps
        concepts[name] = {
            "sgr": {
                str(step): float(np.mean([curve.by_step[step] for curve in every]))
                for step in steps
                if step > 0
            },
            "mean": gap.mean,
            "final": gap.final,
            "worst": min(curve.worst for curve in every),
            "before": gap.sgr_before.mean,
            "rise_left": gap.rise_left.mean,
            "steps_ratio": gap.steps_ratio.mean,
            "steps_ratio_at_least": gap.steps_ratio.at_least,
            "similarity": {
                "steps": list(steps),
                "original": np.mean([curve.original for curve in every], axis=0).tolist(),
                "immunized": np.mean([curve.immunized for curve in every], axis=0).tolist(),
            },
            "methods": {method: curve.to_dict() for method, curve in by_method.items()},
        }
    targets = [concept.name for concept in evaluation.concepts if concept.role == "target"]
    others = [concept.name for concept in evaluation.concepts if concept.role == "other"]
    measured = [name for name in (*targets, *others) if name in concepts]
    benign = [mean for name in others if (mean := summary.sgr[name].mean) is not None]
    over = summary.targets
    alignment = evaluation.benign.prompt_alignment
    erased, immunized = alignment.original, alignment.immunized
    # the second judge reads texts, and ordinary prompts were drawn
    assert erased is not None
    assert immunized is not None
    return {
        "msgr": summary.msgr.mean,
        "worst_sgr": summary.worst_concept.sgr,
        "final_msgr": over.final,
        "before": over.sgr_before.mean,
        "before_similarity": {"erased": over.before.original, "immunized": over.before.immunized},
        "rise_left": over.rise_left.mean,
        "steps_ratio": over.steps_ratio.mean,
        "steps_ratio_at_least": over.steps_ratio.at_least,
        "worst_attack": summary.worst_attack.model_dump(),
        "worst_rise": summary.worst_rise.model_dump(),
        "benign_sgr": float(np.mean(benign)) if benign else None,
        "benign_rsgr": summary.mrsgr,
        "sgr": {name: concepts[name]["sgr"] for name in measured},
        "concepts": {name: concepts[name] for name in measured},
        "prompt_alignment": {
            "erased": erased,
            "immunized": immunized,
            "loss": erased - immunized,
            "relative_loss": (erased - immunized) / erased,
        },
    }


def _bar(bars: console.Bars, label: str) -> Callable[[int, int], None]:
    task = bars.add_task(label, total=None, note="")
    return lambda done, total: bars.update(task, completed=done, total=total)


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
