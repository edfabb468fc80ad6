"""Draw a picture with the embedded model: an ordinary diffusers pipeline."""

import sys
from pathlib import Path

import torch

import mima

output = Path(sys.argv[1] if len(sys.argv) > 1 else ".")

pipeline = mima.load_embedded()
pipeline.set_progress_bar_config(disable=True)
image = pipeline(
    "a cat emoji in noto style",
    num_inference_steps=15,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(output / "cat.png")
print(output / "cat.png")
