"""Immunize the embedded model against two concepts, and open the result without mima.

Three steps, to show the calls. Some hundred are needed for an effect: see `mima demo`.
"""

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

from mima import ImmunizeConfig, embedded_concept, immunize

output = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "immunized"

concepts = [embedded_concept("tiger"), embedded_concept("style-fluent")]
config = ImmunizeConfig(
    steps=3,
    erase_first=True,
    hypergradient="first_order",
    num_class_images=4,
    lower={"steps": 2, "lr": 1e-3, "parameters": "lora"},
    upper={"lr": 3e-4, "prior_weight": 2.0},
)
result = immunize(
    "embedded",
    concepts,
    config,
    output=output,
    overwrite=True,
    callbacks=[lambda report: print(f"step {report.step}: {report.losses}")],
)
print(f"immunized against {', '.join(result.concepts)}")

pipeline = DiffusionPipeline.from_pretrained(output)
print(f"{output} opens as a {type(pipeline).__name__}")
