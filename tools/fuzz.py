"""Damage files of every kind that mima reads, and count how its readers take it.

    python tools/fuzz.py --inputs 10000            # every reader
    python tools/fuzz.py --inputs 500 yaml adapter # some of them

An input is a good file with bytes changed, cut out, repeated, or taken from another place.
Outcomes: `ok`, read; `refused`, a MimaError of one short message; `accident`, any other exception,
or a message of more than 2000 characters; `hang`, more than ten seconds; `escape`, a program
started or a file opened for writing. Inputs that were not taken well are kept in `--keep`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mima.adapters.files import AdapterReader
from mima.concepts import Concept, load_concepts
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.families.loading import load_embedded, load_pipeline
from mima.storage.plain_data import read_json, read_yaml

SECONDS = 10
LONGEST_MESSAGE = 2000
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
Reader = tuple[dict[str, bytes], Callable[[Path], object]]
"""Good files by name, the first of which is damaged, and what reads the folder that holds them."""


class Hang(BaseException):
    """Raised by the alarm; no reader catches it."""


def readers(place: Path) -> dict[str, Callable[[], Reader]]:
    """How to make each reader; models are opened only for those that need one."""
    concept = {"name": "cat", "prompt": "a <new1> cat", "images": ["0.png"], "token": "<new1>"}
    entry = {"instance_prompt": "a cat", "instance_data_dir": ".", "prompt_filename": "p.txt"}
    caption = b"a cat\n"

    def adapter(kind: str) -> Reader:
        pipeline = load_embedded()
        reader = AdapterReader(pipeline)
        names = [name.removesuffix(".weight") for name in _keys(pipeline)][:4]
        state: dict[str, torch.Tensor] = {}
        for name in names:
            rows, columns = pipeline.unet.get_parameter(f"{name}.weight").shape
            state[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(2, columns)
            state[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(rows, 2)
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": names}
        settings, weights = json.dumps(told).encode(), _safetensors(state)
        if kind == "config":
            files = {"adapter_config.json": settings, "adapter_model.safetensors": weights}
        elif kind == "weights":
            files = {"adapter_model.safetensors": weights, "adapter_config.json": settings}
        else:
            buffer = io.BytesIO()
            torch.save({"<new1>": torch.zeros(1, 2)}, buffer)
            return {"word.pt": buffer.getvalue()}, lambda folder: reader.read(folder / "word.pt")
        return files, reader.read

    def model(name: str) -> Reader:
        folder = place / "model"
        if not folder.exists():
            load_embedded().save_pretrained(folder)
        good = (folder / name).read_bytes()

        def read(damaged: Path) -> object:
            try:
                shutil.copy(damaged / "file", folder / name)
                return load_pipeline(str(folder))
            finally:
                (folder / name).write_bytes(good)

        return {"file": good}, read

    png, jpeg = _picture("PNG"), _picture("JPEG")
    return {
        "yaml": lambda: (
            {"x.yaml": yaml.safe_dump([concept]).encode()},
            lambda folder: read_yaml((folder / "x.yaml").read_text(encoding="utf-8")),
        ),
        "json": lambda: (
            {"x.json": json.dumps([concept]).encode()},
            lambda folder: read_json((folder / "x.json").read_text(encoding="utf-8")),
        ),
        "concept": lambda: (
            {"concept.yaml": yaml.safe_dump(concept).encode(), "0.png": png},
            Concept.from_folder,
        ),
        "list": lambda: (
            {"list.json": json.dumps([entry]).encode(), "0.png": png, "p.txt": caption},
            lambda folder: load_concepts(folder / "list.json"),
        ),
        "csv": lambda: (
            {"metadata.csv": b'file_name,text\n0.png,"a cat, red"\n', "0.png": png},
            Concept.from_folder,
        ),
        "jsonl": lambda: (
            {"metadata.jsonl": b'{"file_name": "0.png", "text": "a cat"}\n', "0.png": png},
            Concept.from_folder,
        ),
        "png": lambda: ({"0.png": png}, lambda folder: Picture(folder / "0.png", "x").load()),
        "jpeg": lambda: ({"0.jpg": jpeg}, lambda folder: Picture(folder / "0.jpg", "x").load()),
        "adapter config": lambda: adapter("config"),
        "adapter weights": lambda: adapter("weights"),
        "pickle": lambda: adapter("pickle"),
        "model index": lambda: model("model_index.json"),
        "unet config": lambda: model("unet/config.json"),
        "scheduler config": lambda: model("scheduler/scheduler_config.json"),
    }


def _keys(pipeline: Any) -> list[str]:
    names = [name for name, _ in pipeline.unet.named_parameters()]
    return [name for name in names if name.endswith("to_k.weight")]


def _safetensors(state: Mapping[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(state), Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def _picture(kind: str) -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(data, format=kind)
    return data.getvalue()


def damaged(good: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four changes."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 2, 8, 64)))
        other = draw.randrange(len(data) + 1)
        piece = (
            bytes(draw.randrange(256) for _ in range(end - start)),
            b"",
            bytes(data[other : other + 16]),
            bytes(data[start:end]) * draw.choice((2, 50)),
            draw.choice((b"null", b"-1", b"1e999", b"9" * 5000, b"[" * 300, b"{}", b'""', b"\0")),
        )
        data[start:end] = draw.choice(piece)
    return bytes(data)


def fuzz(name: str, reader: Reader, inputs: int, seed: int, keep: Path | None) -> Counter[str]:
    """Read damaged inputs and count the outcomes."""
    files, read = reader
    (first, good), *others = files.items()
    draw, found = random.Random(f"{name} {seed}"), Counter[str]()
    escapes: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        )
        if watching and (event in STARTS or writes):
            escapes.append(event)

    watching = False
    sys.addaudithook(watch)
    for number in range(inputs):
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            data = damaged(good, draw)
            for other, content in others:
                (folder / other).write_bytes(content)
            (folder / first).write_bytes(data)
            escapes.clear()
            signal.alarm(SECONDS)
            try:
                watching = name not in ("model index", "unet config", "scheduler config")
                read(folder)
                outcome = "ok"
            except (MimaError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
                # texts alone are read by those who say what is wrong with them
                own = isinstance(error, MimaError) or name in ("yaml", "json")
                short = len(str(error)) <= LONGEST_MESSAGE
                outcome = "refused" if own and short else "accident"
            except Hang:
                outcome = "hang"
            except Exception:
                outcome = "accident"
                traceback.print_exc(limit=-3)
            finally:
                watching = False
                signal.alarm(0)
            outcome = "escape" if escapes else outcome
            found[outcome] += 1
            if keep is not None and outcome not in ("ok", "refused"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{seed}-{number}-{outcome}".replace(" ", "-")).write_bytes(data)
    return found


def main() -> None:
    """Print a table of outcomes, and exit with 1 if anything was not taken well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()

    def alarm(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    warnings.simplefilter("ignore")
    outcomes = ("ok", "refused", "accident", "hang", "escape")
    bad = 0
    print("| reader |", " | ".join(outcomes), "|\n|---|" + "---|" * len(outcomes))
    with tempfile.TemporaryDirectory() as place:
        known = readers(Path(place))
        for name in arguments.readers or known:
            found = fuzz(name, known[name](), arguments.inputs, arguments.seed, arguments.keep)
            print(f"| {name} |", " | ".join(str(found[outcome]) for outcome in outcomes), "|")
            bad += sum(found[outcome] for outcome in outcomes[2:])
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
