"""Damaged files for everything that mima reads, and what came of reading them.

An input is a good file, of which bytes are changed, cut out, repeated or taken from another place,
or, of a file with a structure, a value, a name or a cell is replaced by one that is hostile.

Outcomes: `ok`, read; `refused`, a MimaError; `accident`, any other exception, or a message with a
line of more than 2000 characters; `hang`, more than ten seconds of computing, or 500 MB of memory;
`escape`, a program started, a file opened for writing or another machine called.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import struct
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from diffusers.pipelines import pipeline_utils
from PIL import Image
from safetensors.torch import save_file
from support import tiny
from support.evaluations import write_evaluation

from mima.adaptation import LoRA
from mima.adapters.files import AdapterReader
from mima.cli.options import parse_setting
from mima.concepts import Concept, load_concepts
from mima.concepts.pictures import Picture
from mima.errors import MimaError
from mima.evaluation import load_encoder
from mima.families.loading import load_pipeline
from mima.immunization.from_file import read_run
from mima.release.delta import Delta, read_delta
from mima.report.runs import load_runs
from mima.settings import set_nested
from mima.storage.atomic import sha256_of
from mima.storage.checkpoint import SUMS_FILE, CheckpointFolder
from mima.storage.plain_data import read_json, read_yaml
from mima.storage.record import read_record
from mima.storage.runs import claim, describe_run

OUTCOMES = ("ok", "refused", "accident", "hang", "escape")
SECONDS = 10
MEGABYTES = 500
LONGEST_LINE = 2000
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
CALLS = ("socket.connect", "socket.getaddrinfo")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2, 0.5, 1e308, 10**30, 2**31, "", "a", "0.png", "\0", "\ud800", "é" * 300),
    *("../../etc/passwd", "/dev/zero", "~nosuchuser/x", "x" * 100_000, "(a+)+$", "<new1>", "{}"),
    *([], {}, [[]], [None], {"": 0}, {"a": {"a": {}}}, ["a"] * 1000, "2001-99-99", "nan"),
)
"""Values that take the place of good ones."""
RAW = (b"1e999", b"NaN", b"9" * 5000, b"[" * 5000, b'{"a":' * 300, b"&a [*a]", b"!!python/none x")
"""Bytes that take the place of a value, which no writer of JSON writes."""
_HOLE = "a hole for raw bytes"


@dataclass(frozen=True)
class Parser:
    """A reader of files, and good files for it."""

    files: Mapping[str, bytes]
    """By name within a folder; the first is damaged."""
    read: Callable[[Path], object]
    """Reads the folder."""
    kind: str = "bytes"
    """How the first file may be damaged besides in its bytes: json, yaml, csv or safetensors."""
    own: tuple[type[Exception], ...] = ()
    """Errors beside MimaError with which it refuses, for those who say what is wrong."""
    prepares: bool = False
    """Whether `read` writes files of its own before it reads, and says by `reading` what counts."""


class Stop(BaseException):
    """Ends a reading; no reader catches it."""


def parsers(place: Path) -> dict[str, Callable[[], Parser]]:
    """How to make each parser; models are made only for those that need one.

    Args:
        place: a folder for what they need beside the damaged files.
    """
    concept = {"name": "cat", "prompt": "a <new1> cat", "images": ["0.png"], "token": "<new1>"}
    entry = {
        "instance_prompt": "a cat",
        "instance_data_dir": ".",
        "class_prompt": "an animal",
        "prompt_filename": "p.txt",
    }
    png = picture("PNG")
    beside = {"0.png": png, "p.txt": b"a cat\n"}
    run = {
        "model": "embedded",
        "concepts": ["tiger"],
        "output": "out",
        "immunize": {"steps": 3, "lower": {"steps": 4, "lr": [1e-5, 1e-4]}, "upper": {"lr": 1e-5}},
    }

    def text(data: object) -> bytes:
        return json.dumps(data).encode()

    def setting(folder: Path) -> object:
        line = (folder / "setting").read_text(encoding="utf-8", errors="surrogateescape")
        name, value = parse_setting(line)
        nested: dict[str, Any] = {}
        set_nested(nested, name, value)
        return read_run(folder / "run.yaml", settings={name: value})

    def pictures(kind: str, name: str) -> Callable[[], Parser]:
        return lambda: Parser({name: picture(kind)}, lambda at: Picture(at / name, "x").load())

    def evaluation(name: str, kind: str) -> Callable[[], Parser]:
        def make() -> Parser:
            folder = place / "evaluation"
            if not folder.exists():
                write_evaluation(folder, seeds=(0,), adaptations=("lora",), num_pictures=1)
            tables = ("evaluation.json", "attacks.csv", "curves.csv")
            files = {one: (folder / one).read_bytes() for one in sorted(tables, key=name.__ne__)}
            return Parser(files, lambda at: load_runs([at]), kind)

        return make

    return {
        "YAML": lambda: Parser(
            {"x.yaml": yaml.safe_dump([concept]).encode()},
            lambda at: read_yaml((at / "x.yaml").read_text(encoding="utf-8")),
            "yaml",
            (yaml.YAMLError, UnicodeDecodeError),
        ),
        "JSON": lambda: Parser(
            {"x.json": text([concept])},
            lambda at: read_json((at / "x.json").read_text(encoding="utf-8")),
            "json",
            (json.JSONDecodeError, UnicodeDecodeError),
        ),
        "concept.yaml": lambda: Parser(
            {"concept.yaml": yaml.safe_dump(concept).encode(), **beside},
            Concept.from_folder,
            "yaml",
        ),
        "list of concepts": lambda: Parser(
            {"list.yaml": yaml.safe_dump([concept, {**concept, "name": "b"}]).encode(), **beside},
            lambda at: load_concepts(at / "list.yaml"),
            "yaml",
        ),
        "training list": lambda: Parser(
            {"list.json": text([entry]), **beside},
            lambda at: load_concepts(at / "list.json"),
            "json",
        ),
        "metadata.csv": lambda: Parser(
            {"metadata.csv": b'file_name,text\n0.png,"a cat, red"\n', **beside},
            Concept.from_folder,
            "csv",
        ),
        "metadata.jsonl": lambda: Parser(
            {"metadata.jsonl": text({"file_name": "0.png", "text": "a cat"}), **beside},
            Concept.from_folder,
            "json",
        ),
        "caption": lambda: Parser({"0.txt": b"a red cat\n", "0.png": png}, Concept.from_folder),
        "run": lambda: Parser(
            {"run.yaml": yaml.safe_dump(run).encode()}, lambda at: read_run(at / "run.yaml"), "yaml"
        ),
        "set": lambda: Parser(
            {"setting": b"lower.lr=[1.0e-5, 1.0e-4]", "run.yaml": yaml.safe_dump(run).encode()},
            setting,
        ),
        "PNG": pictures("PNG", "0.png"),
        "JPEG": pictures("JPEG", "0.jpg"),
        "WebP": pictures("WEBP", "0.webp"),
        "GIF": pictures("GIF", "0.gif"),
        "BMP": pictures("BMP", "0.bmp"),
        "TIFF": pictures("TIFF", "0.tiff"),
        "PPM": pictures("PPM", "0.ppm"),
        "TGA": pictures("TGA", "0.tga"),
        "mima.json": lambda: Parser(
            {"mima.json": text({"command": "adapt", "prompts": ["a cat"], "version": "0.2.0"})},
            read_record,
            "json",
        ),
        "evaluation.json": evaluation("evaluation.json", "json"),
        "attacks.csv": evaluation("attacks.csv", "csv"),
        "curves.csv": evaluation("curves.csv", "csv"),
        **_with_a_model(place),
    }


def _with_a_model(place: Path) -> dict[str, Callable[[], Parser]]:
    """Parsers of what goes into a model, and of a model's own files."""

    def model() -> Path:
        folder = place / "model"
        return folder if folder.exists() else tiny.save_tiny_stable_diffusion(folder, blocks=1)

    def adapter(damaged: str) -> Callable[[], Parser]:
        def make() -> Parser:
            pipeline = load_pipeline(str(model()))
            reader = AdapterReader(pipeline)
            keys = [n for n, _ in pipeline.unet.named_parameters() if n.endswith("to_k.weight")]
            state: dict[str, torch.Tensor] = {}
            names = [key.removesuffix(".weight") for key in keys][:2]
            for name in names:
                rows, columns = pipeline.unet.get_parameter(f"{name}.weight").shape
                state[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(2, columns)
                state[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(rows, 2)
            told = {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 2,
                "target_modules": names,
                "rank_pattern": {names[0]: 2},
            }
            buffer = io.BytesIO()
            torch.save({"<new1>": torch.zeros(1, 32)}, buffer)
            word = {"<new1>": torch.zeros(1, 32)}
            choices = {
                "peft config": (
                    {
                        "adapter_config.json": json.dumps(told).encode(),
                        "adapter_model.safetensors": tensors(state),
                    },
                    "json",
                ),
                "peft weights": (
                    {
                        "adapter_model.safetensors": tensors(state),
                        "adapter_config.json": json.dumps(told).encode(),
                    },
                    "safetensors",
                ),
                "learned word": ({"learned_embeds.safetensors": tensors(word)}, "safetensors"),
                "pickle": ({"learned_embeds.bin": buffer.getvalue()}, "bytes"),
            }
            files, kind = choices[damaged]
            return Parser(files, reader.read, kind)

        return make

    def delta() -> Parser:
        pipeline = load_pipeline(str(model()))
        name, value = next(iter(pipeline.unet.named_parameters()))
        folder = place / "delta"
        Delta({name: value.detach()}, {}, {"command": "immunize"}).save(folder)
        file = next(folder.iterdir())
        return Parser({file.name: file.read_bytes()}, read_delta, "safetensors")

    def checkpoint(damaged: str) -> Callable[[], Parser]:
        def make() -> Parser:
            lora = LoRA(steps=1, rank=1, seed=0)
            started = lora.start(load_pipeline(str(model())), tiny.concept())
            folder = CheckpointFolder(place / "checkpoint")
            weights = {"w": torch.zeros(2)}
            told = describe_run(
                {"steps": 1, "method": "lora"}, [tiny.concept().identity()], weights, {}
            )
            claim(folder, told, resume=True)
            started.advance(1)
            folder.write(started.checkpoint())
            step = next(folder.path.glob("step-*"))
            files = {p.name: p.read_bytes() for p in [*step.iterdir(), folder.path / "run.json"]}
            files = {name: files[name] for name in sorted(files, key=damaged.__ne__)}

            def read(at: Path) -> object:
                where = at / "kept"
                (where / step.name).mkdir(parents=True)
                for name in ("state.json", "state.safetensors"):
                    (at / name).rename(where / step.name / name)
                # whoever changes a checkpoint can make its checksums anew
                sums = [f"{sha256_of(p)}  {p.name}" for p in (where / step.name).iterdir()]
                if damaged == SUMS_FILE:
                    (at / SUMS_FILE).rename(where / step.name / SUMS_FILE)
                else:
                    (where / step.name / SUMS_FILE).write_text("\n".join(sums))
                (at / "run.json").rename(where / "run.json")
                with reading():
                    kept = CheckpointFolder(where)
                    if damaged == "run.json":
                        # beside, since it is written anew
                        return kept.read_json("run.json")
                    found = kept.latest()
                    assert found is not None
                    with kept.restoring():
                        started.restore(found)
                    return found

            kind = {"state.safetensors": "safetensors", SUMS_FILE: "bytes"}.get(damaged, "json")
            return Parser(files, read, kind, prepares=True)

        return make

    opened: dict[tuple[str, ...], Any] = {}
    load_sub_model = pipeline_utils.load_sub_model

    def encoder_file(name: str) -> Callable[[], Parser]:
        def make() -> Parser:
            folder = place / "encoder"
            if not folder.exists():
                tiny.save_tiny_clip(folder)
            good = (folder / name).read_bytes()

            def read(at: Path) -> object:
                (folder / name).write_bytes((at / "file").read_bytes())
                try:
                    with reading():
                        return load_encoder(folder).embed([Image.new("RGB", (9, 9))])
                finally:
                    (folder / name).write_bytes(good)

            return Parser({"file": good}, read, "json", prepares=True)

        return make

    def model_file(name: str) -> Callable[[], Parser]:
        def make() -> Parser:
            folder = model()
            good = (folder / name).read_bytes()

            def once(**options: Any) -> Any:
                """Open a part whose own files are good once for all inputs, to save time."""
                if name.startswith(f"{options['name']}/"):
                    return load_sub_model(**options)
                key = tuple(str(options[part]) for part in ("name", "library_name", "class_name"))
                if key not in opened:
                    opened[key] = load_sub_model(**options)
                return opened[key]

            def read(at: Path) -> object:
                (folder / name).write_bytes((at / "file").read_bytes())
                parts = unittest.mock.patch.object(pipeline_utils, "load_sub_model", once)
                try:
                    with parts, reading():
                        return load_pipeline(str(folder))
                finally:
                    (folder / name).write_bytes(good)

            return Parser({"file": good}, read, "json", prepares=True)

        return make

    adapters = ("peft config", "peft weights", "learned word", "pickle")
    checkpoints = ("state.json", "state.safetensors", "run.json", SUMS_FILE)
    models = (
        *("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
        *("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    )
    encoders = ("config.json", "preprocessor_config.json")
    return {
        **{name: adapter(name) for name in adapters},
        "delta": delta,
        **{f"checkpoint's {name}": checkpoint(name) for name in checkpoints},
        **{f"model's {name}": model_file(name) for name in models},
        **{f"encoder's {name}": encoder_file(name) for name in encoders},
    }


def tensors(state: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(state), Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def picture(kind: str) -> bytes:
    """A picture file."""
    data = io.BytesIO()
    Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(data, format=kind)
    return data.getvalue()


def damaged(parser: Parser, draw: random.Random) -> bytes:
    """The parser's first file with one to four changes."""
    good = next(iter(parser.files.values()))
    if parser.kind != "bytes" and draw.random() < 0.6:
        return _STRUCTURES[parser.kind](good, draw)
    return _bytes(good, draw)


def _bytes(good: bytes, draw: random.Random) -> bytes:
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
            draw.choice((*RAW, b"null", b"-1", b"{}", b'""', b"\0", b"\xff\xfe", b"\n", b",")),
        )
        data[start:end] = draw.choice(piece)
    return bytes(data)


def _changed(value: Any, draw: random.Random) -> Any:
    """Plain data with one value or name replaced, left out, or there twice."""
    inner: list[Any] = []
    if isinstance(value, (dict, list)):
        inner = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not inner or draw.random() < 0.1:
        return draw.choice((*HOSTILE, _HOLE))
    key = draw.choice(inner)
    copy = dict(value) if isinstance(value, dict) else list(value)
    what = draw.random()
    if what < 0.1:
        del copy[key]
    elif what < 0.2 and isinstance(copy, dict):
        copy[draw.choice(("a", "", "\0", "x" * 300, *inner))] = copy.pop(key)
    elif what < 0.25 and isinstance(copy, list):
        copy = copy * 2
    else:
        copy[key] = _changed(value[key], draw)
    return copy


def _json(good: bytes, draw: random.Random) -> bytes:
    data = json.loads(good)
    for _ in range(draw.randint(1, 2)):
        data = _changed(data, draw)
    text = json.dumps(data, ensure_ascii=draw.random() < 0.8)
    return text.encode(errors="surrogatepass").replace(json.dumps(_HOLE).encode(), draw.choice(RAW))


def _yaml(good: bytes, draw: random.Random) -> bytes:
    # YAML holds JSON
    return _json(json.dumps(yaml.safe_load(good)).encode(), draw)


def _csv(good: bytes, draw: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(good.decode())))
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = str(draw.choice(HOSTILE))
    if draw.random() < 0.2:
        row.append("more")
    text = io.StringIO()
    # Python 3.10 writes NUL with an escape only
    csv.writer(text, lineterminator="\n", escapechar="\\").writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


def _safetensors(good: bytes, draw: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", good[:8])
    header = _json(good[8 : 8 + size], draw)
    told = len(header) if draw.random() < 0.9 else draw.choice((0, 2**40, 2**63, len(header) + 1))
    return struct.pack("<Q", told) + header + good[8 + size :]


_STRUCTURES = {"json": _json, "yaml": _yaml, "csv": _csv, "safetensors": _safetensors}

_escapes: list[str] = []
_watching = False
_hooked = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, mode, flags = arguments
        wrote = set(mode) & set("wax+") if isinstance(mode, str) else flags & WRITES
        if wrote and path != os.devnull:
            _escapes.append(f"writes {path!r}")
    elif event in STARTS:
        _escapes.append(event)
    elif event in CALLS:
        _escapes.append(f"{event} {arguments[-2:]!r}")
        # whoever calls waits long, and tries again
        raise Stop


@contextmanager
def reading() -> Iterator[None]:
    """What starts or writes within is an escape."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True
    before, _watching = _watching, True
    try:
        yield
    finally:
        _watching = before


def _most_memory() -> int:
    """The most megabytes that this process held since `_forget_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise OSError("/proc/self/status names no VmHWM")


def _forget_memory() -> int:
    """Count memory anew, and return the megabytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _most_memory()


def outcome_of(parser: Parser, data: bytes) -> tuple[str, BaseException | str | None]:
    """Read one input; the outcome, and what was raised or done."""

    def alarm(_: int, frame: FrameType | None) -> None:
        raise Stop

    first, *others = parser.files
    # computing, for on a busy machine ten seconds pass by themselves; and a minute of waiting
    before = [(number, signal.signal(number, alarm)) for number in (signal.SIGPROF, signal.SIGALRM)]
    _escapes.clear()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for other in others:
            (folder / other).write_bytes(parser.files[other])
        (folder / first).write_bytes(data)
        held = _forget_memory()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
        try:
            if parser.prepares:
                parser.read(folder)
            else:
                with reading():
                    parser.read(folder)
            outcome, problem = "ok", None
        except (MimaError, *parser.own) as error:
            outcome, problem = "refused", error
            if max(map(len, str(error).splitlines()), default=0) > LONGEST_LINE:
                outcome = "accident"
        except Stop:
            outcome, problem = "hang", None
        except Exception as error:
            outcome, problem = "accident", error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before:
                signal.signal(number, handler)
    if _escapes:
        return "escape", _escapes[0]
    grown = _most_memory() - held
    return ("hang", f"{grown} MB") if grown > MEGABYTES else (outcome, problem)
