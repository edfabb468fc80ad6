"""Write the sample concepts and the ordinary captions into mima/assets."""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from mima.storage.output import slug
from PIL import Image

from augment import move
from common import (
    ASSETS,
    HELD_OUT_STYLE,
    HERE,
    TRAIN_STYLES,
    Pictures,
    caption,
    load_names,
    load_pictures,
    reworded_captions,
    to_pixels,
    to_tensor,
)

STYLE_TRAIN_PICTURES, STYLE_HELD_OUT_PICTURES = 14, 8

# file stem -> (pixels, caption)
Files = dict[str, tuple[np.ndarray, str]]


class Library:
    """Looks pictures up by name and style, and makes slightly moved copies."""

    def __init__(self, pictures: Pictures, seed: int):
        keys = zip(pictures.names, pictures.styles, strict=True)
        self.pixels = dict(zip(keys, pictures.pixels, strict=True))
        self.rng = torch.Generator().manual_seed(seed)

    def moved(self, name: str, style: str) -> np.ndarray:
        """The picture, rotated, scaled and shifted a little."""
        return to_pixels(move(to_tensor(self.pixels[name, style][None]), self.rng))[0]


def write_pictures(folder: Path, files: Files) -> None:
    """PNGs and the metadata.csv of an image folder."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("file_name", "text"))
        for stem, (pixels, text) in files.items():
            Image.fromarray(pixels).save(folder / f"{stem}.png", optimize=True)
            writer.writerow((f"{stem}.png", text))


def write_concept(folder: Path, description: dict[str, str], train: Files, held_out: Files) -> None:
    """One concept folder."""
    write_pictures(folder, train)
    write_pictures(folder / "held_out", held_out)
    (folder / "concept.yaml").write_text(yaml.safe_dump(description, sort_keys=False, width=100))


def object_files(
    library: Library, name: str, shown_as: str, held_out_style: str
) -> tuple[Files, Files]:
    """Training: three styles, each as it is and moved. Held out: the fourth, and the unseen one."""
    train: Files = {}
    for style in TRAIN_STYLES:
        if style != held_out_style:
            text = caption(shown_as, style)
            train[style] = (library.pixels[name, style], text)
            train[f"{style}-moved"] = (library.moved(name, style), text)
    held_out = {
        held_out_style: (library.pixels[name, held_out_style], caption(shown_as, held_out_style)),
        HELD_OUT_STYLE: (library.pixels[name, HELD_OUT_STYLE], caption(shown_as, None)),
    }
    return train, held_out


def style_files(library: Library, style: str, names: list[str]) -> tuple[Files, Files]:
    """Pictures of different names in one style, the last ones held out."""
    files = {slug(name): (library.pixels[name, style], caption(name, style)) for name in names}
    stems = list(files)
    return (
        {stem: files[stem] for stem in stems[:STYLE_TRAIN_PICTURES]},
        {stem: files[stem] for stem in stems[STYLE_TRAIN_PICTURES:]},
    )


def ordinary_captions(names: list[str], styles: list[str]) -> list[str]:
    """Captions of every name, with every style that is given."""
    captions = [caption(name, None) for name in names]
    for name in names:
        for style in styles:
            captions += [caption(name, style), *reworded_captions(name, style)]
    return captions


def main() -> None:
    """Replace mima/assets/concepts and mima/assets/captions.txt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    library = Library(load_pictures(args.data), args.seed)
    names = load_names()
    table = yaml.safe_load((HERE / "concepts.yaml").read_text())
    objects, instances, benign = table["object"], table["instance"], table["benign_object"]
    building = args.assets / "concepts.part"
    shutil.rmtree(building, ignore_errors=True)

    for name, style in objects.items():
        description = {
            "name": name,
            "kind": "object",
            "prompt": caption(name, None),
            "class_prompt": caption(None, None),
            "description": f"The object '{name}', which the embedded model draws in four styles.",
        }
        write_concept(building / slug(name), description, *object_files(library, name, name, style))
    for number, (name, style) in enumerate(instances.items(), start=1):
        token = f"<new{number}>"
        description = {
            "name": f"unseen {name}",
            "kind": "instance",
            "prompt": caption(token, None),
            "class_prompt": caption(None, None),
            "token": token,
            "description": f"A {name}, which the embedded model has never seen, as a new token.",
        }
        write_concept(
            building / f"unseen-{slug(name)}",
            description,
            *object_files(library, name, token, style),
        )
    for name, style in benign.items():
        seen = "has learned" if name in names["train"] else "has never seen"
        description = {
            "name": name,
            "kind": "benign",
            "prompt": caption(name, None),
            "class_prompt": caption(None, None),
            "description": f"The object '{name}', which the model {seen}. Must stay learnable.",
        }
        write_concept(
            building / f"benign-{slug(name)}",
            description,
            *object_files(library, name, name, style),
        )

    taken = {*objects, *benign}
    free = [name for name in names["train"] if name not in taken]
    count = STYLE_TRAIN_PICTURES + STYLE_HELD_OUT_PICTURES
    styles = [
        *((s, "style") for s in table["style"]),
        *((s, "benign") for s in table["benign_style"]),
    ]
    for offset, (style, kind) in enumerate(styles):
        must_stay = " Must stay learnable." if kind == "benign" else ""
        description = {
            "name": f"{style} style",
            "kind": kind,
            "prompt": caption(None, style),
            "class_prompt": caption(None, None),
            "description": f"The style '{style}', which the embedded model has learned.{must_stay}",
        }
        # evenly spread over the list, with other names for each style
        chosen = [free[(offset + i * len(free) // count) % len(free)] for i in range(count)]
        order = np.random.default_rng(args.seed + offset).permutation(count)
        folder = f"{'benign-' if kind == 'benign' else ''}style-{style}"
        write_concept(
            building / folder, description, *style_files(library, style, [chosen[i] for i in order])
        )

    shutil.rmtree(args.assets / "concepts", ignore_errors=True)
    building.rename(args.assets / "concepts")
    captions = ordinary_captions(
        [name for name in names["train"] if name not in objects],
        [style for style in TRAIN_STYLES if style not in table["style"]],
    )
    (args.assets / "captions.txt").write_text("\n".join(captions) + "\n")
    print(
        f"{sum(1 for _ in (args.assets / 'concepts').iterdir())} concepts, {len(captions)} captions"
    )


if __name__ == "__main__":
    main()
