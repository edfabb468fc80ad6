"""Teach a model a new thing with LoRA, and use the adapter as any diffusers user would."""

import sys
from pathlib import Path

from mima import embedded_concept, load_embedded
from mima.adaptation import LoRA

output = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "panda-lora"

run = LoRA(rank=4, learning_rate=1e-3, batch_size=2).start(
    load_embedded(), embedded_concept("benign-panda")
)
for step in run.until(5, 10):
    print(f"step {step}: loss {run.loss:.3f}")
run.save(output)

pipeline = load_embedded()
pipeline.set_progress_bar_config(disable=True)
pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
image = pipeline("a panda emoji", num_inference_steps=8, guidance_scale=3.0).images[0]
image.save(output / "panda.png")
print(output / "panda.png")
