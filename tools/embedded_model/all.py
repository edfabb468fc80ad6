"""Run every step, from the packages to the measured assets. Takes about an hour on two cores."""

import argparse
import subprocess
import sys
from pathlib import Path

from common import HERE

STEPS = (
    "fetch",
    "prepare",
    "train_vae",
    "train_encoder",
    "train_diffusion",
    "train_classifier",
    "export",
    "concepts",
    "fit_judge",
    "evaluate",
)


def main() -> None:
    """Each step is a script of this folder that takes `--data`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="work folder, about 3 GB")
    parser.add_argument("--start", choices=STEPS, default=STEPS[0], help="the step to begin with")
    args = parser.parse_args()
    for step in STEPS[STEPS.index(args.start) :]:
        print(f"== {step}", flush=True)
        script = [sys.executable, str(HERE / f"{step}.py"), "--data", str(args.data.resolve())]
        subprocess.run(script, check=True)


if __name__ == "__main__":
    main()
