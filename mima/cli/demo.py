"""`mima demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mima.cli import options
from mima.cli.base import app


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "mima-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run, in two minutes.")] = False,
    seed: options.AttackSeed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Immunize the embedded model against two concepts, attack it, and print what held."""
    from mima.storage.inputs import expanded
    from mima.storage.output import check_folder

    output = expanded(output)
    check_folder(output, overwrite=overwrite)

    from mima.console import stdout, tell

    length = "two minutes" if quick else "six minutes"
    tell(
        "erases two styles from the embedded model, immunizes it against them, attacks the erased "
        "and the immunized model alike, and says what came back; on two quiet cores about "
        f"{length}; results in {output}"
    )

    # imports that take seconds, once the arguments are checked
    from mima.demo import run_demo
    from mima.evaluation import EvaluationFolder
    from mima.report.terminal import summary_lines, summary_table

    run_demo(output, quick=quick, seed=seed, overwrite=overwrite)
    evaluation = EvaluationFolder(output / "evaluation").evaluation()
    stdout().print(summary_table(evaluation))
    stdout().print("\n".join(summary_lines(evaluation)))
    stdout().print(
        f"pictures, curves and all numbers: {output}\nas a page: {output / 'report.html'}"
    )
