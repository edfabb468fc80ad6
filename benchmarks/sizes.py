"""Peak memory of one outer step of models of real size, planned and measured.

    python -m benchmarks.sizes [--models sd14 sdxl] [--modes first_order exact] [--plan-only]

Writes a model of the published architecture with random weights in bfloat16 to a temporary folder
(SD 1.4: 2.1 GB, a minute; SDXL: 7 GB, two minutes), then immunizes it against two concepts at 256
pixels for one step, in a fresh process: SD 1.4 takes about two minutes a mode on two CPU cores,
SDXL about ten. Keys and values of cross-attention are trained on both levels; ``--parameters``
trains others.
"""

from __future__ import annotations

import argparse
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

SIDE = 256
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


def settings(mode: str, parameters: str, savers: bool) -> ImmunizeConfig:
    """One step at both levels, all concepts."""
    return ImmunizeConfig(
        steps=1,
        hypergradient=mode,
        resolution=SIDE,
        merge="average",
        gradient_checkpointing=savers,
        lower={"parameters": parameters},
        upper={"parameters": parameters},
    )


def concepts() -> list[Concept]:
    """Two, with two pictures each and two class pictures, so that none is drawn."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    return [
        Concept(
            noun, f"a photo of a {noun}", pictures, class_prompt="a photo", class_images=pictures
        )
        for noun in ("cat", "dog")
    ]


def measure(folder: str, config: ImmunizeConfig, *, plan_only: bool) -> dict[str, Any]:
    """Plan, and immunize in this process; sizes in bytes."""
    seen: dict[str, Any] = {
        "plan": str(plan(ModelSource(folder), concepts(), config, device="cpu"))
    }
    if plan_only:
        return seen
    started = time.perf_counter()

    def note(report: Any) -> None:
        seen.update(steps=report.memory, step_seconds=report.seconds)

    immunize(ModelSource(folder), concepts(), config, device="cpu", callbacks=[note])
    from mima.immunization.progress import peak_memory

    whole = peak_memory(torch.device("cpu"))
    return {**seen, "whole": whole, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["sd14", "sdxl"], default=["sd14", "sdxl"])
    parser.add_argument("--modes", nargs="+", default=["first_order"])
    parser.add_argument("--parameters", default="cross_attention_kv")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--plan-only", action="store_true", help="count on the meta device alone")
    parser.add_argument("--folder", type=Path, help="of temporary files")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, mode = args.one
        config = settings(mode, args.parameters, args.gradient_checkpointing)
        print(json.dumps(measure(folder, config, plan_only=args.plan_only)))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, GiB")
    print(__doc__.split("\n\n")[2].replace("\n", " "), flush=True)
    for model in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as made:
            folder = Path(made) / model
            write_model(model, folder)
            for mode in args.modes:
                command = [sys.executable, "-m", "benchmarks.sizes", "--one", str(folder), mode]
                command += ["--parameters", args.parameters]
                command += ["--gradient-checkpointing"] * args.gradient_checkpointing
                command += ["--plan-only"] * args.plan_only
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                print(f"\n{model}, {mode}\n{row['plan']}", flush=True)
                if args.plan_only:
                    continue
                print(
                    f"measured: {row['steps'] / 2**30:.2f} GiB up to the end of the step, "
                    f"{row['whole'] / 2**30:.2f} with the float32 result; "
                    f"{row['step_seconds']:.0f} s the step, {row['seconds']:.0f} s in all",
                    flush=True,
                )


if __name__ == "__main__":
    main()
