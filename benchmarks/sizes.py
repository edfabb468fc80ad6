"""Peak memory of outer steps of models of real size, planned and measured.

    python -m benchmarks.sizes [--models sd14 sdxl] [--rows kv kv-4] [--output FILE]

Writes a model of the published architecture with random weights in bfloat16 (SD 1.4: 2.1 GB, ten
seconds; SDXL: 7 GB, a minute), then immunizes it against two concepts at 256 pixels for two steps,
in a fresh process for each row: the second step is the first that has the optimizer's moments. On
two free CPU cores a row of SD 1.4 takes about two minutes, one of SDXL about ten.

Rows: ``kv``, one step of Adam on keys and values of cross-attention below, the same above;
``kv-bf16``, the same in bfloat16; ``kv-4``, four steps; ``lora-4``, four steps on LoRA's factors of
rank 8 on every projection of attention; ``xattn``, one step on all of cross-attention, the same
above: the package's default. All recompute activations. The merge is the default one, its plan made
from 8 captions instead of 200: that saves minutes, not memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.roofline import ARCHITECTURES
from mima.concepts import Concept
from mima.families import ModelSource
from mima.families.loading import load_embedded
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.planning.plan import plan
from mima.immunization.progress import StepReport, peak_memory

SIDE = 256
STEPS = 2
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072}
CLIP_L |= {"num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
CLIP_G |= {"num_hidden_layers": 32, "num_attention_heads": 20}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE |= {"steps_offset": 1}


def write_model(name: str, folder: Path) -> None:
    """Write a pipeline of a published architecture with random weights in bfloat16."""
    tokenizer = load_embedded().tokenizer
    tokenizer.model_max_length = 77
    with torch.device("meta"):
        # as published, but for the number of words of the embedded model's tokenizer
        text = {"vocab_size": 49408, "max_position_embeddings": 77}
        denoiser = ARCHITECTURES[name].build()
        clip = CLIPTextModel(CLIPTextConfig(**text, **CLIP_L))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        other = CLIPTextModelWithProjection(CLIPTextConfig(**text, **CLIP_G))
    parts: dict[str, Any] = {"unet": denoiser, "text_encoder": clip, "vae": vae}
    if name == "sdxl":
        parts["text_encoder_2"] = other
    parts = {part: filled(module) for part, module in parts.items()}
    if name == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(
            **parts,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=EulerDiscreteScheduler(**SCHEDULE),
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the meta device with random weights of a trained one's size, in bfloat16."""
    buffers = dict(module.named_buffers())
    module = module.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    draws = torch.randn(2**20 + 7).mul_(0.02).to(torch.bfloat16)
    for name, value in module.named_parameters():
        flat = value.data.view(-1)
        if value.ndim == 1:
            # scales of norms, and biases
            flat.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        for start in range(0, len(flat), len(draws)):
            part = flat[start : start + len(draws)]
            part.copy_(draws[: len(part)])
    for name, value in module.named_buffers():
        # positions of tokens, which are not stored
        assert buffers[name].dtype == torch.int64
        value.copy_(torch.arange(value.numel()).view_as(value))
    return module


ROWS: dict[str, dict[str, Any]] = {
    "kv": {"lower": {"parameters": "cross_attention_kv"}},
    "kv-bf16": {"lower": {"parameters": "cross_attention_kv"}, "precision": "bfloat16"},
    "kv-4": {"lower": {"parameters": "cross_attention_kv", "steps": 4}},
    "lora-4": {"lower": {"parameters": "lora", "rank": 8, "steps": 4}},
    "xattn": {"upper": {"parameters": "cross_attention"}, "lower": {}},
}
"""What the levels train, by the name of the row."""


def settings(row: str, mode: str) -> ImmunizeConfig:
    """Two steps, of all concepts."""
    common: dict[str, Any] = {
        "steps": STEPS,
        "hypergradient": mode,
        "resolution": SIDE,
        "num_captions": 8,
        "gradient_checkpointing": True,
        "upper": {"parameters": "cross_attention_kv"},
    }
    return ImmunizeConfig.model_validate({**common, **ROWS[row]})


def concepts() -> list[Concept]:
    """Two, with two pictures each and two class pictures, so that none is drawn."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    return [
        Concept(
            noun, f"a photo of a {noun}", pictures, class_prompt="a photo", class_images=pictures
        )
        for noun in ("cat", "dog")
    ]


def measure(folder: str, row: str, mode: str, *, plan_only: bool) -> dict[str, Any]:
    """Plan, and immunize in this process; sizes in bytes."""
    config = settings(row, mode)
    planned = plan(ModelSource(folder), concepts(), config, device="cpu")
    phases = {phase: sum(parts.values()) for phase, parts in planned.memory.items()}
    seen: dict[str, Any] = {"plan": str(planned), "planned": phases}
    if plan_only:
        return seen
    reports: list[StepReport] = []
    started = time.perf_counter()
    immunize(ModelSource(folder), concepts(), config, device="cpu", callbacks=[reports.append])
    return {
        **seen,
        "threads": torch.get_num_threads(),
        "peak_after_step": [report.memory for report in reports],
        "peak_with_result": peak_memory(torch.device("cpu")),
        "step_seconds": [round(report.seconds, 1) for report in reports],
        "seconds": round(time.perf_counter() - started, 1),
    }


def cpu() -> str:
    """The processor's name."""
    try:
        told = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(line.split(":")[1].strip() for line in told if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["sd14", "sdxl"], default=["sd14", "sdxl"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["kv", "kv-4", "lora-4"])
    parser.add_argument("--modes", nargs="+", default=["first_order"])
    parser.add_argument("--plan-only", action="store_true", help="count on the meta device alone")
    parser.add_argument("--folder", type=Path, help="where models are kept, or found again")
    parser.add_argument("--output", type=Path, help="a JSON file, to which the rows are added")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_model(args.write[0], Path(args.write[1]))
        return
    if args.one:
        print(json.dumps(measure(*args.one, plan_only=args.plan_only)))
        return
    print(f"{cpu()}, torch {torch.__version__}, GiB")
    print(__doc__.split("\n\n")[2].replace("\n", " "), flush=True)
    with tempfile.TemporaryDirectory() as made:
        for model in args.models:
            folder = (args.folder or Path(made)) / model
            if not folder.is_dir():
                # in a process of its own, so that its memory is given back
                _in_a_process("--write", model, str(folder))
            for row, mode in itertools.product(args.rows, args.modes):
                _row(args, model, folder, row, mode)


def _row(args: argparse.Namespace, model: str, folder: Path, row: str, mode: str) -> None:
    only = ["--plan-only"] * args.plan_only
    found = json.loads(_in_a_process("--one", str(folder), row, mode, *only).splitlines()[-1])
    print(f"\n{model}, {row}, {mode}\n{found.pop('plan')}", flush=True)
    if args.plan_only:
        return
    peak, planned = max(found["peak_after_step"]), found["planned"]
    before = max(planned["preparing"], planned["outer steps"])
    print(
        f"measured: {peak / 2**30:.2f} GiB up to the end of the last step, {before / peak:.2f} of "
        f"it planned; {found['peak_with_result'] / 2**30:.2f} with the float32 result; "
        f"{found['step_seconds'][-1]:.0f} s the step, {found['seconds']:.0f} s in all",
        flush=True,
    )
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
        told = {"model": model, "row": row, "mode": mode}
        rows = [one for one in known["rows"] if not told.items() <= one.items()]
        known |= {"cpu": cpu(), "torch": torch.__version__, "rows": [*rows, {**told, **found}]}
        args.output.write_text(json.dumps(known, indent=1) + "\n")


def _in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.sizes", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
