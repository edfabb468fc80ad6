"""Copy the trained models into mima/assets as fp16, with a model card."""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from common import ASSETS, HERE
from text import save_tokenizer
from train_diffusion import build_scheduler

HALVED_MODULES = ("unet", "vae", "text_encoder")


def replace_folder(building: Path, folder: Path) -> None:
    """Put a finished folder in place, readable by everyone and free of this machine's paths."""
    for path in building.rglob("*.json"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    for path in building.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def prefix_text_encoder(path: Path) -> None:
    """Write the names that transformers 4 expects; version 5 omits the prefix and reads both."""
    prefix = "text_model."
    tensors = load_file(path)
    named = {prefix + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})


def export_model(source: Path, assets: Path) -> None:
    """The pipeline in fp16."""
    building = assets / "model.part"
    shutil.rmtree(building, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(
        source, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.scheduler = build_scheduler()
    pipeline.vae = AutoencoderKL.from_pretrained(source.with_name("vae"))
    for name in HALVED_MODULES:
        getattr(pipeline, name).to(torch.float16, memory_format=torch.contiguous_format)
    pipeline.save_pretrained(building)
    save_tokenizer(pipeline.tokenizer, building / "tokenizer")
    prefix_text_encoder(building / "text_encoder" / "model.safetensors")
    shutil.copy(HERE / "legal" / "model_card.md", building / "README.md")
    replace_folder(building, assets / "model")


def main() -> None:
    """Write mima/assets/model and mima/assets/encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", choices=("model", "encoder"))
    args = parser.parse_args()
    args.assets.mkdir(parents=True, exist_ok=True)
    if args.only != "encoder":
        export_model(args.data / "pipeline", args.assets)
    if args.only != "model":
        building = args.assets / "encoder.part"
        shutil.rmtree(building, ignore_errors=True)
        shutil.copytree(args.data / "encoder", building)
        replace_folder(building, args.assets / "encoder")
    for folder in ("model", "encoder"):
        if (args.assets / folder).exists():
            size = sum(f.stat().st_size for f in (args.assets / folder).rglob("*") if f.is_file())
            print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
