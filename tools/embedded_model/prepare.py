"""Render every emoji in every style to 64x64 on white, with names aligned across styles."""

import argparse
import io
import json
import re
from collections import Counter
from pathlib import Path

import emoji
import numpy as np
import resvg_py
from PIL import Image

from common import SIZE, STYLES, load_names

SKIPPED_CATEGORIES = {"Flags", "Component"}


def on_white(image: Image.Image) -> np.ndarray:
    """Composite on white and resize to [64, 64, 3]."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    canvas = canvas.convert("RGB")
    if canvas.size != (SIZE, SIZE):
        canvas = canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(canvas)


def render_svg(path: Path) -> np.ndarray:
    """An SVG file, drawn at four times the size and reduced."""
    png = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=4 * SIZE, height=4 * SIZE)
    return on_white(Image.open(io.BytesIO(bytes(png))))


def source_files(raw: Path, code: str, slug: str) -> dict[str, Path]:
    """The file of one emoji in each style; the file need not exist."""
    webp = raw / "fluent/package/assets" / f"{code}.webp"
    if not webp.exists():
        webp = webp.with_name(f"{code.replace('-fe0f', '')}.webp")
    icons = raw / "fluentui/package/icons"
    return {
        "noto": raw / "noto/package/img/google/64" / f"{code}.png",
        "twemoji": raw / "twemoji/package/img/twitter/64" / f"{code}.png",
        "fluent": webp,
        "mono": icons / "high-contrast" / f"{slug}.svg",
        "flat": icons / "flat" / f"{slug}.svg",
    }


def main() -> None:
    """Write DATA/pictures.npy and DATA/pictures.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    raw = args.data / "raw"
    pixels, names, styles, categories = [], [], [], []
    entries = json.loads((raw / "noto/package/emoji.json").read_text())
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        code = entry["unified"].lower()
        character = "".join(chr(int(part, 16)) for part in code.split("-"))
        known = emoji.EMOJI_DATA.get(character)
        if known is None or entry["category"] in SKIPPED_CATEGORIES:
            continue
        name = known["en"].strip(":").replace("_", " ").lower()
        slug = re.sub(r"[^a-z0-9-]", "", name.replace(" ", "-"))
        for style, path in source_files(raw, code, slug).items():
            if not path.exists():
                continue
            pixels.append(render_svg(path) if path.suffix == ".svg" else on_white(Image.open(path)))
            names.append(name)
            styles.append(style)
            categories.append(entry["category"])
    count = Counter(names)
    wanted = load_names()
    if len(set(wanted["train"])) != 200:
        raise SystemExit("names.yaml: `train` must hold 200 different names")
    incomplete = [n for split in wanted.values() for n in split if count[n] != len(STYLES)]
    if incomplete:
        raise SystemExit(f"names.yaml: not one picture in every style: {incomplete}")
    np.save(args.data / "pictures.npy", np.stack(pixels))
    table = {"names": names, "styles": styles, "categories": categories}
    (args.data / "pictures.json").write_text(json.dumps(table))
    print(f"{len(names)} pictures, {len(count)} names, {dict(Counter(styles))}")


if __name__ == "__main__":
    main()
