"""A model's files, looked at before diffusers and transformers open them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from mima.errors import MimaError, first_line, one_line
from mima.storage.inputs import check_model, expanded
from mima.storage.names import MODEL_INDEX
from mima.storage.tensor_files import read_header

# what diffusers and transformers raise for files that are missing, damaged or do not fit
LOADING_ERRORS = (
    # an index may name a library that is none, a tokenizer one that is not installed
    ImportError,
    *(OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError),
    # older diffusers: a class that model_index.json names and the library does not have
    *(AttributeError, SingleFileComponentError),
    # configurations with values of other types or sizes than their classes expect
    *(TypeError, IndexError, AssertionError, ArithmeticError, EOFError, MemoryError),
    # values of another type than transformers 5 declares
    StrictDataclassError,
)

# transformers opens a tokenizer without these files, which then knows no word
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})

OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}

MOST_TIMESTEPS = 100_000
"""Noise levels of a schedule, of which diffusers makes tables; models have 1000."""

MOST_LAYERS = 1000
"""Layers, or layers of a block, that a configuration may ask for."""

MOST_SETTINGS = 1000
"""Names in one configuration; diffusers takes kilobytes of memory for each unknown one."""

SPARE_NUMBERS = 2**24
"""How many more numbers than twice those of its files a network may consist of."""

HALF_PRECISION = {"BF16": torch.bfloat16, "F16": torch.float16}
"""By the names that safetensors has for them."""

VARIANT = re.compile(r"^[^.]+\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")


def read_index(path: Path) -> dict[str, Any]:
    """What a diffusers folder's index names.

    Raises:
        MimaError: there is no index, or it names no pipeline.
    """
    check_model(path)
    index = json_of(path / MODEL_INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise MimaError(f"model: {path / MODEL_INDEX} names no diffusers pipeline")
    return index


def check_code(path: Path, index: Mapping[str, Any]) -> None:
    """Refuse an index that would have diffusers run code other than its own and transformers'.

    diffusers imports whatever module an index names as a part's library, and takes a file of that
    name in the part's folder before it.
    """
    for name, kind in index.items():
        if isinstance(kind, (str, dict)) and len(kind) == 2 and not name.startswith("_"):
            # older diffusers take any two things for a library and a class
            shown = one_line(f"{name}: {kind}")
            raise MimaError(f"model: {path / MODEL_INDEX} names no library and class for {shown}")
        if not isinstance(kind, list) or not kind or not isinstance(kind[0], str):
            continue
        try:
            expanded(name)
        except MimaError as error:
            raise MimaError(f"model: {path / MODEL_INDEX}: {error}") from error
        shown = one_line(f"{name}: {kind}")
        if len(kind) != 2 or not all(
            isinstance(part, str) and part.isidentifier() for part in kind
        ):
            raise MimaError(f"model: {path / MODEL_INDEX} names no library and class for {shown}")
        library = library_of(kind[0])
        own = (path / name / f"{kind[0]}.py", path / name / MODEL_INDEX)
        if library is None or any(file.exists() for file in own):
            raise MimaError(
                f"model: {path} would run code of its own for {shown}, which is not done; "
                "its parts must be of diffusers and transformers"
            )


def library_of(name: str) -> str | None:
    """The module that an index means by a part's library; None for one of somebody else's."""
    if name in ("diffusers", "transformers"):
        return name
    # such as stable_diffusion, which has the safety checker
    inside = f"diffusers.pipelines.{name}"
    return inside if importlib.util.find_spec(inside) is not None else None


def without_weights(folder: Path, kind: Sequence[str]) -> torch.nn.Module:
    """A part of a model on the meta device, of its configuration alone.

    Args:
        folder: the part's.
        kind: library and class, as ``model_index.json`` names them.

    Raises:
        MimaError: the configuration cannot be used.
    """
    library, name = kind
    try:
        cls = getattr(importlib.import_module(library_of(library) or library), name)
        with torch.device("meta"):
            if library == "diffusers":
                made = cls.from_config(cls.load_config(str(folder)))
            else:
                made = cls(cls.config_class.from_pretrained(str(folder)))
    except LOADING_ERRORS as error:
        raise MimaError(f"model: cannot open {folder}: {first_line(error)}") from error
    assert isinstance(made, torch.nn.Module)
    return made


def too_many_numbers(folder: Path, network: torch.nn.Module, files: Iterable[Path]) -> str | None:
    """What is wrong with a configuration that asks for far more weights than its files hold.

    diffusers and transformers make all of them in memory before they read a file.

    Args:
        folder: of the configuration.
        network: as it is described there, on the meta device.
        files: of safetensors; where there are none, those that end in ``.bin`` count by their size.
    """
    return _too_many(folder, _size(network), files)


def _size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _too_many(folder: Path, asked: int, files: Iterable[Path]) -> str | None:
    shapes = [shape for file in files for _, shape in read_header(file).values()]
    held = sum(map(math.prod, shapes))
    if not shapes:
        held = sum(file.stat().st_size for file in folder.glob("*.bin")) // 2
    if asked <= 2 * held + SPARE_NUMBERS:
        return None
    return f"{folder / 'config.json'} asks for {asked:,} numbers, the files hold {held:,}"


_SIZES: dict[tuple[str, str, bytes], int] = {}
"""Of networks, by library, class and configuration: to make one, even empty, takes as long as to
open a small model."""


def _size_asked(folder: Path, library: str, name: str) -> int:
    """The size of the network that a part's configuration describes."""
    try:
        described = library, name, (folder / "config.json").read_bytes()
    except OSError as error:
        raise MimaError(f"model: cannot open {folder}: {first_line(error)}") from error
    if described not in _SIZES:
        _SIZES[described] = _size(without_weights(folder, (library, name)))
    return _SIZES[described]


def check_sizes(
    folder: Path, index: Mapping[str, Any], files_of: Callable[[Path], Iterable[Path]]
) -> None:
    """Refuse a folder with a part whose configuration asks for more weights than its files hold."""
    for name, kind in index.items():
        part = folder / name
        if isinstance(kind, list) and (part / "config.json").is_file():
            problem = _too_many(part, _size_asked(part, *kind), files_of(part))
            if problem is not None:
                raise MimaError(f"model: {problem}")


def stored_dtypes(
    path: Path, index: Mapping[str, Any], variant: str | None
) -> dict[str, torch.dtype]:
    """The dtype of each component's file, as diffusers' ``from_pretrained`` wants them."""
    return {
        "default": torch.float32,
        **{
            name: stored_dtype(weight_files(path / name, variant))
            for name, kind in index.items()
            if isinstance(kind, list) and (path / name / "config.json").is_file()
        },
    }


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a component that diffusers opens."""
    return [file for file in opened_files(folder, variant) if file.suffix == ".safetensors"]


def opened_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a component's weights that diffusers opens: safetensors before pickles."""
    files = _weights(folder)
    for wanted in (variant, None):
        for suffix in (".safetensors", ".bin"):
            found = [f for f in files if f.suffix == suffix and variant_of(f) == wanted]
            if found:
                return found
    return []


def _weights(folder: Path) -> list[Path]:
    """The files of a component's weights, whatever their variant."""
    return visible(folder, "*.safetensors", "*pytorch_model*.bin")


def visible(folder: Path, *patterns: str) -> list[Path]:
    """Files by their names, but for hidden ones, such as macOS leaves beside every file."""
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    return [file for file in found if not file.name.startswith(".")]


def lone_variants(folders: Iterable[Path]) -> set[str]:
    """The variants that serve those components which have no plain weights."""
    held = [{variant_of(file) for file in _weights(folder)} for folder in folders]
    alone = [{str(name) for name in found} for found in held if found and None not in found]
    return (set.intersection(*alone) or set.union(*alone)) if alone else set()


def variant_of(file: Path) -> str | None:
    """Such as fp16 in diffusion_pytorch_model.fp16-00001-of-00002.safetensors."""
    return match[1] if (match := VARIANT.search(file.name)) else None


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The widest of the floating point dtypes in files; float32 for all but half precision."""
    found = {dtype for file in files for dtype, _ in read_header(file).values() if "F" in dtype}
    return (
        HALF_PRECISION[found.pop()]
        if len(found) == 1 and found <= {*HALF_PRECISION}
        else torch.float32
    )


def check_complete(folder: Path, module: torch.nn.Module, variant: str | None) -> None:
    """Refuse files that lack weights: the loaders only warn, and draw random ones."""
    stored = {key for file in opened_files(folder, variant) for key in _keys(file)}
    # transformers 4 and 5 differ by a prefix, older files have other names for a VAE's attention
    tails = {key[i + 1 :] for key in stored for i, letter in enumerate(key) if letter == "."}
    for new, old in OLD_NAMES.items():
        stored |= {key.replace(old, new) for key in stored if old in key}
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        prefix, _, tail = name.partition(".")
        # the only prefix that transformers adds to what a file holds
        if prefix == getattr(module, "base_model_prefix", None):
            names_of[id(parameter)].append(tail)
        # models that read pictures, too, are stored as if they were the language model alone
        names_of[id(parameter)].append(name.replace("model.language_model.", "model."))
    missing = [names[0] for names in names_of.values() if not (stored | tails) & set(names)]
    if missing:
        hint = ""
        prefix, _, tail = missing[0].partition(".")
        if tail in stored:
            hint = (
                f"; it holds {tail}, as transformers 5 writes it, which transformers "
                f"{transformers.__version__} does not find"
            )
        if missing[0].replace(".weight", ".base_layer.weight") in stored:
            hint = "; it was saved with an adapter in it: fuse or unload that before saving"
        raise MimaError(
            f"model: the weights in {folder} are incomplete: {len(missing)} tensors are missing, "
            f"such as {missing[0]}{hint}"
        )


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """Components that the pipeline was saved without; diffusers wants that confirmed for some."""
    return {name: None for name, kind in index.items() if kind == [None, None]}


def check_parts(path: Path, index: Mapping[str, Any], variant: str | None) -> None:
    """Refuse a folder that lacks parts, or that has no weights of a variant."""
    for name, kind in index.items():
        if isinstance(kind, list) and all(isinstance(part, str) for part in kind):
            _check_component(path / name, one_line(".".join(kind)), variant)
    files = visible(path, "*/*.safetensors", "*/*.bin")
    # diffusers takes the plain weights of components that come in no variant
    if variant is not None and not any(f".{variant}" in file.name for file in files):
        found = ", ".join(sorted(str(file.relative_to(path)) for file in files))
        raise MimaError(f"variant: {path} holds no {variant!r} weights, only {found}")


def _check_component(folder: Path, kind: str, variant: str | None) -> None:
    """Name the file that is missing or damaged; the loaders' own errors often do not."""
    if not folder.is_dir():
        raise MimaError(f"model: {folder} is missing; it should hold the {kind}")
    held = {file.name for file in folder.iterdir()}
    for name in sorted(held):
        # a pipe would keep its reader waiting
        if (folder / name).exists() and not ((folder / name).is_file() or (folder / name).is_dir()):
            raise MimaError(f"model: {folder / name} is no ordinary file")
    for file in visible(folder, "*.json"):
        content = json_of(file)
        # diffusers takes a configuration that is a text for the name of a model, and fetches it
        if not isinstance(content, dict):
            raise MimaError(f"model: {file} is damaged: expected a mapping")
        if file.name.endswith("config.json") and len(content) > MOST_SETTINGS:
            raise MimaError(f"model: {file}: more than {MOST_SETTINGS} settings")
        steps = content.get("num_train_timesteps")
        if isinstance(steps, (int, float)) and steps > MOST_TIMESTEPS:
            raise MimaError(f"model: {file}: num_train_timesteps is over {MOST_TIMESTEPS}")
        if file.name == "config.json":
            problem = too_many_layers(content)
            if problem is not None:
                raise MimaError(f"model: {file}: {problem}")
        if file.name.endswith(".index.json"):
            places = content.get("weight_map")
            if not isinstance(places, dict):
                raise MimaError(f"model: {file} names no files of weights")
            shards = sorted({str(shard) for shard in places.values()})
            absent = one_line(", ".join(shard for shard in shards if shard not in held))
            if absent:
                raise MimaError(f"model: {folder} lacks {absent}, named in {file.name}")
    weights = visible(folder, "*.safetensors")
    for file in weights:
        safetensors_keys(file)
    tokenizer = kind.endswith(("Tokenizer", "TokenizerFast"))
    if tokenizer and not any(needed <= held for needed in VOCABULARIES):
        wanted = " or ".join(" with ".join(sorted(needed)) for needed in VOCABULARIES)
        raise MimaError(f"model: {folder} holds no vocabulary of the {kind}: {wanted}")
    if not (folder / "config.json").is_file():
        return
    weights += visible(folder, "*.bin")
    if not weights:
        raise MimaError(f"model: {folder} holds no weights (.safetensors or .bin) of the {kind}")
    variants = {variant_of(file) for file in weights}
    if not variants & {None, variant}:
        found = " or ".join(sorted(str(name) for name in variants))
        raise MimaError(
            f"model: {folder} holds the weights of the {kind} as variant {found} alone; say so"
        )


def too_many_layers(content: Mapping[str, Any]) -> str | None:
    """What is too large in a configuration: layers are made before anybody looks at weights."""
    # a model of several has a configuration for each
    for part in (content, *(inner for inner in content.values() if isinstance(inner, dict))):
        for name, counts in part.items():
            values = counts if isinstance(counts, list) else [counts]
            numbers = [value for value in values if isinstance(value, (int, float))]
            if "layers" in str(name) and max(numbers, default=0) > MOST_LAYERS:
                return f"{one_line(name, 80)} is over {MOST_LAYERS}"
    return None


def check_filled(path: Path, name: str, module: torch.nn.Module) -> None:
    """Refuse a file that lacks weights of a part."""
    missing = [key for key, value in module.named_parameters() if value.is_meta]
    if missing:
        raise MimaError(
            f"model: {path} is incomplete: {len(missing)} tensors of the {name} are missing, such "
            f"as {missing[0]}"
        )


def _keys(path: Path) -> Iterable[str]:
    """Names of the tensors in a file of weights that the loaders could open."""
    if path.suffix == ".safetensors":
        return safetensors_keys(path)
    # files of older versions of torch are no archives, and cannot be mapped
    mmap = zipfile.is_zipfile(path)
    state: dict[str, Any] = torch.load(path, "meta", weights_only=True, mmap=mmap)
    return state


def safetensors_keys(path: Path) -> list[str]:
    """Names of the tensors in a file, whose header is checked against its length."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise MimaError(
            f"model: {path} is damaged or no safetensors file: {first_line(error)}"
        ) from error


def json_of(path: Path) -> Any:
    """A file's content, as diffusers and transformers read it; refused by name where it is none.

    The checks of ``mima.storage.plain_data.read_json`` would take seconds of a large vocabulary.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MimaError(f"model: cannot read {path}: {first_line(error)}") from error
