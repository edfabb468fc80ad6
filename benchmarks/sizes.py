"""Peak memory of outer steps of models of real size, planned and measured.

    python -m benchmarks.sizes [--models sd14 sdxl] [--rows kv kv-4] [--output FILE]

Writes a model of the published architecture with random weights in bfloat16 (SD 1.4: 2.1 GB, ten
seconds; SDXL: 7 GB, a minute), then immunizes it against two concepts at 256 pixels for two steps,
in a fresh process for each row: the second step is the first that has the optimizer's moments. On
one thread that others shared, a row of SD 1.4 took 4 minutes (``exact``: 12), one of SDXL 9 to 13.

Rows: ``kv``, one step of Adam on keys and values of cross-attention below, the same above;
``kv-bf16``, the same in bfloat16; ``kv-4``, four steps; ``lora-4``, four steps on LoRA's factors of
rank 8 on every projection of attention; ``xattn``, one step on all of cross-attention, the same
above: the package's default; ``xattn-disk``, the same with AdamW's moments on disk. All recompute
activations. The merge is the default one, its plan made from 2 captions instead of 200: that saves
minutes, not memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
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

from benchmarks.architectures import ARCHITECTURES
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


def write_model(name: str, folder: Path, *, weights: bool = True) -> None:
    """Write a pipeline of a published architecture with random weights in bfloat16.

    Args:
        name: ``sd14`` or ``sdxl``.
        folder: a new one.
        weights: False leaves holes in the files where the weights would be, which is enough for a
            plan: it reads headers alone.
    """
    tokenizer = load_embedded().tokenizer
    tokenizer.model_max_length = 77
    with torch.device("meta"):
        # as published, but for the number of words of the embedded model's tokenizer
        text = {"vocab_size": 49408, "max_position_embeddings": 77}
        denoiser = ARCHITECTURES[name].build(*ARCHITECTURES[name].layers)
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
    parts = {part: (filled if weights else hollow)(m) for part, m in parts.items()}
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


def hollow(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the meta device that is written as configuration and header, without weights."""
    made: Any = module.to(torch.bfloat16).eval()
    made.save_pretrained = partial(_save_hollow, made)
    opened: torch.nn.Module = made
    return opened


def _save_hollow(module: Any, folder: str, **_: Any) -> None:
    place = Path(folder)
    if hasattr(module, "save_config"):
        name = "diffusion_pytorch_model.safetensors"
        module.save_config(folder)
    else:
        name = "model.safetensors"
        module.config.save_pretrained(folder)
    header, end = {}, 0
    for key, value in module.named_parameters():
        start, end = end, end + value.nbytes
        header[key] = {"dtype": "BF16", "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (place / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


ROWS: dict[str, dict[str, Any]] = {
    "kv": {"lower": {"parameters": "cross_attention_kv"}},
    "kv-bf16": {"lower": {"parameters": "cross_attention_kv"}, "precision": "bfloat16"},
    "kv-4": {"lower": {"parameters": "cross_attention_kv", "steps": 4}},
    "lora-4": {"lower": {"parameters": "lora", "rank": 8, "steps": 4}},
    "xattn": {"upper": {"parameters": "cross_attention"}, "lower": {}},
    "xattn-disk": {
        "upper": {"parameters": "cross_attention"},
        "lower": {},
        "offload_optimizer": True,
    },
}
"""What the levels train, by the name of the row."""


def settings(row: str, mode: str) -> ImmunizeConfig:
    """Two steps, of all concepts."""
    common: dict[str, Any] = {
        "steps": STEPS,
        "hypergradient": mode,
        "resolution": SIDE,
        "num_captions": 2,
        "gradient_checkpointing": True,
        "upper": {"parameters": "cross_attention_kv"},
    }
    return ImmunizeConfig.model_validate({**common, **ROWS[row]})


def concepts() -> list[Concept]:
    """Two, with two pictures each and a class picture, so that none is drawn."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    return [
        Concept(
            noun,
            f"a photo of a {noun}",
            pictures,
            class_prompt="a photo",
            class_images=pictures[:1],
        )
        for noun in ("cat", "dog")
    ]


def measure(folder: str, row: str, mode: str, *, plan_only: bool) -> dict[str, Any]:
    """Plan, and immunize in this process; sizes in bytes."""
    config = settings(row, mode)
    planned = plan(ModelSource(folder), concepts(), config, device="cpu")
    seen: dict[str, Any] = {"plan": str(planned), "planned": planned.memory}
    if plan_only:
        return seen
    reports: list[StepReport] = []

    def tell(report: StepReport) -> None:
        reports.append(report)
        said = f"step {report.step}: {report.seconds:.0f} s, {report.memory / 2**30:.2f} GiB so far"
        print(said, file=sys.stderr, flush=True)

    started = time.perf_counter()
    immunize(ModelSource(folder), concepts(), config, device="cpu", callbacks=[tell])
    # a step that is left out takes no step of the optimizer, whose moments are to be there
    assert [report.skipped for report in reports] == [0] * STEPS
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
        write_model(args.write[0], Path(args.write[1]), weights=not args.plan_only)
        return
    if args.one:
        print(json.dumps(measure(*args.one, plan_only=args.plan_only)))
        return
    print(f"{cpu()}, torch {torch.__version__}, GiB")
    print(__doc__.split("\n\n")[2].replace("\n", " "), flush=True)
    only = ["--plan-only"] * args.plan_only
    with tempfile.TemporaryDirectory() as made:
        for model in args.models:
            folder = (args.folder or Path(made)) / model
            if not folder.is_dir():
                # what has no weights is not kept
                folder = Path(made) / model if args.plan_only else folder
                # in a process of its own, so that its memory is given back
                _in_a_process("--write", model, str(folder), *only)
            for row, mode in itertools.product(args.rows, args.modes):
                found = _in_a_process("--one", str(folder), row, mode, *only).splitlines()[-1]
                told = {"model": model, "row": row, "mode": mode}
                _say(told, json.loads(found), args.output)


def _say(told: Mapping[str, str], found: dict[str, Any], output: Path | None) -> None:
    """Print what a row found, and add it to a file."""
    print(f"\n{', '.join(told.values())}\n{found.pop('plan')}", flush=True)
    if "peak_after_step" not in found:
        return
    print(f"{HEADER}\n{line({**told, **found})}", flush=True)
    if output:
        known = json.loads(output.read_text()) if output.exists() else {"rows": []}
        rows = [one for one in known["rows"] if not told.items() <= one.items()]
        rows = sorted([*rows, {**told, **found}], key=itemgetter(*told))
        known |= {"cpu": cpu(), "torch": torch.__version__, "rows": rows}
        output.write_text(json.dumps(known, indent=1) + "\n")


HEADER = """\
| model | row | | planned | measured | with the result: planned | measured | a step | in all |
|---|---|---|---|---|---|---|---|---|"""


def line(found: Mapping[str, Any]) -> str:
    """A row of the table: bytes up to the last step, with the float32 result, and seconds."""
    planned = {phase: sum(parts.values()) for phase, parts in found["planned"].items()}
    steps = max(planned["preparing"], planned["outer steps"])
    sizes = (
        steps,
        max(found["peak_after_step"]),
        max(steps, planned["the result, in float32"]),
        found["peak_with_result"],
    )
    told = [found["model"], f"`{found['row']}`", f"`{found['mode']}`"]
    told += [f"{size / 2**30:.1f} GiB" for size in sizes]
    told += [f"{found['step_seconds'][-1]:.0f} s", f"{found['seconds'] / 60:.0f} min"]
    return f"| {' | '.join(told)} |"


def _in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.sizes", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
