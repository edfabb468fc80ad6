"""Open a model from wherever it is, and say clearly why it cannot be opened."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from mima.assets import assets
from mima.errors import MimaError, first_line, one_line
from mima.families.base import UNQUANTIZED, Family, cast
from mima.families.flux import Flux
from mima.families.hub import unreachable
from mima.families.lumina2 import Lumina2
from mima.families.pipelines import Pipeline, networks
from mima.families.pixart import PixArt
from mima.families.qwen_image import QwenImage
from mima.families.sana import Sana
from mima.families.sd3 import StableDiffusion3
from mima.families.sdxl import StableDiffusionXL
from mima.families.stable_diffusion import StableDiffusion
from mima.options import TrainingOptions
from mima.storage.inputs import check_model, expanded
from mima.storage.names import MODEL_INDEX
from mima.storage.tensor_files import read_header

logger = logging.getLogger(__name__)

FAMILIES: tuple[type[Family], ...] = (
    *(StableDiffusion, StableDiffusionXL, PixArt, StableDiffusion3, Flux),
    *(Sana, Lumina2, QwenImage),
)

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
# what huggingface_hub and diffusers raise for what cannot be fetched
HUB_ERRORS = (OSError, ValueError, HfHubHTTPError, EntryNotFoundError)

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

# single checkpoint files by a prefix of their keys: how to open them, or why not
SINGLE_FILES: tuple[tuple[str, Any], ...] = (
    ("conditioner.embedders.1.", StableDiffusionXLPipeline),
    ("conditioner.embedders.0.model.", "the SDXL refiner is not supported, SDXL base models are"),
    ("joint_blocks.", SD3Transformer2DModel),
    ("double_blocks.", FluxTransformer2DModel),
    ("model.diffusion_model.input_blocks.0.", StableDiffusionPipeline),
)


TRANSFORMERS = {
    SD3Transformer2DModel: "StableDiffusion3Pipeline",
    FluxTransformer2DModel: "FluxPipeline",
}
"""Whose transformer a single file may be."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, for whatever opens one: ``load_pipeline``, ``immunize``, ``evaluate``, ...

    Example:
        >>> immunize(ModelSource("owner/name", revision="v1", variant="fp16"), concepts)
    """

    model: str | Path
    """A diffusers folder, a single ``.safetensors`` file (of SD3 and Flux: a transformer), a hub
    id, or ``"embedded"`` for the model that mima ships."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    variant: str | None = None
    """File variant such as ``"fp16"``."""
    config: str | Path | None = None
    """For a single file, a diffusers folder (or hub id) of a model of the same architecture; by
    default diffusers fetches the published one from the hub. A file of SD3 or Flux is read for its
    transformer, and needs one for the other parts."""

    @property
    def label(self) -> str:
        """The model with its options, for people."""
        options = [f"{name} {value}" for name, value in self.options.items()]
        return f"{self.model} ({', '.join(options)})" if options else str(self.model)

    @property
    def options(self) -> dict[str, str]:
        """What diffusers' ``from_pretrained`` must be told beside the model."""
        options = {"revision": self.revision, "variant": self.variant}
        return {name: value for name, value in options.items() if value is not None}


def source_of(model: Any) -> ModelSource | None:
    """Where a model is that must be opened first; None for a pipeline in memory."""
    if isinstance(model, ModelSource):
        return model
    return ModelSource(model) if isinstance(model, (str, Path)) else None


def family_of(
    pipeline: Pipeline, *, resolution: int | None = None, training: TrainingOptions | None = None
) -> Family:
    """Wrap a diffusers pipeline in the family that knows it.

    Args:
        pipeline: the pipeline.
        resolution: side of the pictures in pixels; by default what the model was trained on.
        training: how it is trained; by default as diffusers' scripts train the family.

    Raises:
        MimaError: the pipeline's class belongs to no supported family, pictures of that size do
            not fit it, or it does not read one of the options.
    """
    family = _family_class(type(pipeline).__name__)(pipeline)
    if resolution is not None:
        family.resolution = resolution
    if training is not None:
        family.training = training
    return family


def origin_of(model: Any) -> str | None:
    """How a model is called: its hub id, folder or file; None for one that was built in memory."""
    source = source_of(model)
    if source is not None:
        return str(source.model)
    name = model.config.get("_name_or_path")
    return str(name) if name else None


def _family_class(name: str, where: str = "this") -> type[Family]:
    for family in FAMILIES:
        if name in family.pipeline_names:
            return family
    supported = ", ".join(n for family in FAMILIES for n in family.pipeline_names)
    hint = ""
    if name == "StableDiffusionXLImg2ImgPipeline":
        hint = " (the SDXL refiner is such a model)"
    raise MimaError(
        f"model: {where} is a {one_line(name)}, which is not supported{hint}; "
        f"supported pipelines are {supported}"
    )


def load_pipeline(
    model: Any,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> Any:
    """Open a model in one dtype on one device, in evaluation mode and without gradients.

    Args:
        model: a diffusers pipeline (cast and moved in place, not copied), a ``ModelSource``, or
            what its ``model`` is.
        dtype: dtype of every module. In float16 the layers of T5 that overflow there stay in
            float32, as transformers declares. None is each module's own: of a file, the widest of
            those that its floating point weights have there.
        device: where to put it; by default a pipeline stays where it is and a file goes to the CPU.
        revision: as in ``ModelSource``, where ``model`` is none.
        variant: likewise.
        config: likewise.

    Raises:
        MimaError: nothing there, damaged, or not of a supported family; the message says which.
        ValueError: ``revision``, ``variant`` or ``config`` of what is open, or says its own.
    """
    if isinstance(model, (str, Path)):
        model = ModelSource(model, revision, variant, config)
    elif (revision, variant, config) != (None, None, None):
        raise ValueError(
            "load_pipeline: revision, variant and config say more of a folder, file or hub id; "
            f"got a {type(model).__name__}"
        )
    pipeline = _open(model, dtype) if isinstance(model, ModelSource) else model
    family_of(pipeline)
    for name, component in pipeline.components.items():
        if getattr(component, "is_quantized", False):
            raise MimaError(f"model: the {name} is quantized; {UNQUANTIZED}")
    if device is not None:
        pipeline.to(device)
    for network in networks(pipeline).values():
        if dtype is not None:
            cast(network, dtype)
        network.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _open(source: ModelSource, dtype: torch.dtype | None) -> Any:
    model, variant = str(source.model), source.variant
    if model == "embedded":
        for name in ("revision", "variant", "config"):
            if getattr(source, name) is not None:
                raise MimaError(f"{name}: the embedded model has none")
        return _open_embedded(dtype)
    check_model(model)
    path = expanded(model)
    if source.revision is not None and path.exists():
        raise MimaError(f"revision: only models of the hub have revisions, {path} is local")
    if source.config is not None and not path.is_file():
        raise MimaError(f"config: only a single file needs one, {model} brings its own")
    if path.is_file():
        if variant is not None:
            raise MimaError(f"variant: {path} is a single file and has no variants")
        return _open_file(path, dtype, source.config)
    if path.is_dir():
        return _open_folder(path, dtype, variant)
    return _open_hub(model, dtype, source.revision, variant)


def _open_hub(
    model: str, dtype: torch.dtype | None, revision: str | None, variant: str | None
) -> Any:
    try:
        # huggingface_hub tries six times before it reports an unreachable hub
        known = isinstance(try_to_load_from_cache(model, MODEL_INDEX, revision=revision), str)
        problem = None if known else unreachable()
        if problem:
            raise MimaError(f"model: {_absent_offline(model, revision)}: {problem}")
        file = hf_hub_download(model, MODEL_INDEX, revision=revision)
    except MimaError:
        raise
    except HUB_ERRORS as error:
        raise MimaError(f"model: {_explain(model, revision, error)}") from error
    index = _read_json(Path(file))
    if not isinstance(index, dict):
        raise MimaError(f"model: {model} names no diffusers pipeline")
    # refuse other pipelines before gigabytes are fetched
    _family_class(str(index.get("_class_name")), model)
    try:
        folder = DiffusionPipeline.download(
            model, revision=revision, variant=variant, **absent_parts(index)
        )
    except HUB_ERRORS as error:
        raise MimaError(f"model: {_explain(model, revision, error)}") from error
    pipeline = _open_folder(Path(folder), dtype, variant)
    # diffusers writes down the hub id, not the cache's folder
    pipeline.register_to_config(_name_or_path=model)
    return pipeline


def _absent_offline(model: str, revision: str | None) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"there is no folder {model!r}, the hub's cache on this machine does not hold it{at}, "
        "and the hub cannot be reached"
    )


def _explain(model: str, revision: str | None, error: Exception) -> str:
    match error:
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return f"{_absent_offline(model, revision)}: {first_line(error)}"
        case GatedRepoError():
            return f"{model} is gated: accept its conditions on the hub, then `hf auth login`"
        case RevisionNotFoundError():
            return f"{model} has no revision {revision or 'main'!r}"
        case EntryNotFoundError():
            return f"{model} has no {MODEL_INDEX}: not a diffusers pipeline"
        case RepositoryNotFoundError():
            return f"neither a folder nor a public model of the hub is called {model!r}"
        case _:
            return f"cannot get {model!r} from the hub: {first_line(error)}"


def _open_folder(path: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    index = check_folder_of_model(path, variant)
    _check_sizes(path, index, lambda part: weight_files(part, variant))
    wanted = _dtype(_stored_dtypes(path, index, variant) if dtype is None else dtype)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(path), variant=variant, local_files_only=True, **wanted, **absent_parts(index)
        )
    except LOADING_ERRORS as error:
        raise MimaError(f"model: cannot open {path}: {first_line(error)}") from error
    for name, network in networks(pipeline).items():
        _check_complete(path / name, network)
    return pipeline


def check_folder_of_model(
    path: Path, variant: str | None, *, weights: bool = True
) -> dict[str, Any]:
    """What a diffusers folder's index names, the parts of which are there and undamaged.

    Args:
        path: the folder.
        variant: of the files of weights.
        weights: whether there must be weights; otherwise configurations do.

    Raises:
        MimaError: a part is missing or damaged, or the model is of no supported family.
    """
    check_model(path)
    index = _read_json(path / MODEL_INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise MimaError(f"model: {path / MODEL_INDEX} names no diffusers pipeline")
    _family_class(index["_class_name"], str(path))
    _check_code(path, index)
    if not weights:
        return index
    for name, kind in index.items():
        if isinstance(kind, list) and all(isinstance(part, str) for part in kind):
            _check_component(path / name, one_line(".".join(kind)), variant)
    files = [*path.glob("*/*.safetensors"), *path.glob("*/*.bin")]
    # diffusers takes the plain weights of components that come in no variant
    if variant is not None and not any(f".{variant}" in file.name for file in files):
        found = ", ".join(sorted(str(file.relative_to(path)) for file in files))
        raise MimaError(f"variant: {path} holds no {variant!r} weights, only {found}")
    return index


def _check_code(path: Path, index: Mapping[str, Any]) -> None:
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


def _check_sizes(
    folder: Path, index: Mapping[str, Any], files_of: Callable[[Path], Iterable[Path]]
) -> None:
    for name, kind in index.items():
        part = folder / name
        if isinstance(kind, list) and (part / "config.json").is_file():
            problem = _too_many(part, _size_asked(part, *kind), files_of(part))
            if problem is not None:
                raise MimaError(f"model: {problem}")


def _stored_dtypes(
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
    files = sorted(folder.glob("*.safetensors"))

    def variant_of(file: Path) -> str | None:
        return match[1] if (match := VARIANT.search(file.name)) else None

    named = [file for file in files if variant is not None and variant_of(file) == variant]
    return named or [file for file in files if variant_of(file) is None]


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The widest of the floating point dtypes in files; float32 for all but half precision."""
    found = {dtype for file in files for dtype, _ in read_header(file).values() if "F" in dtype}
    return (
        HALF_PRECISION[found.pop()]
        if len(found) == 1 and found <= {*HALF_PRECISION}
        else torch.float32
    )


def _dtype(dtype: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The keyword that diffusers calls it by; 0.42 warns of the old name."""
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def _check_complete(folder: Path, module: torch.nn.Module) -> None:
    """Refuse files that lack weights: the loaders only warn, and draw random ones."""
    stored = {key for file in folder.glob("*.safetensors") for key in safetensors_keys(file)}
    if not stored:
        return
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


def _check_component(folder: Path, kind: str, variant: str | None) -> None:
    """Name the file that is missing or damaged; the loaders' own errors often do not."""
    if not folder.is_dir():
        raise MimaError(f"model: {folder} is missing; it should hold the {kind}")
    held = {file.name for file in folder.iterdir()}
    for name in sorted(held):
        # a pipe would keep its reader waiting
        if (folder / name).exists() and not ((folder / name).is_file() or (folder / name).is_dir()):
            raise MimaError(f"model: {folder / name} is no ordinary file")
    for file in sorted(folder.glob("*.json")):
        content = _read_json(file)
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
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        safetensors_keys(file)
    tokenizer = kind.endswith(("Tokenizer", "TokenizerFast"))
    if tokenizer and not any(needed <= held for needed in VOCABULARIES):
        wanted = " or ".join(" with ".join(sorted(needed)) for needed in VOCABULARIES)
        raise MimaError(f"model: {folder} holds no vocabulary of the {kind}: {wanted}")
    if not (folder / "config.json").is_file():
        return
    weights += sorted(folder.glob("*.bin"))
    if not weights:
        raise MimaError(f"model: {folder} holds no weights (.safetensors or .bin) of the {kind}")
    # such as fp16 in diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    variants = {match[1] if (match := VARIANT.search(file.name)) else None for file in weights}
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


def _open_file(path: Path, dtype: torch.dtype | None, config: str | Path | None) -> Any:
    keys = safetensors_keys(path)
    opener = next((o for part, o in SINGLE_FILES if any(part in key for key in keys)), None)
    if opener is None:
        raise MimaError(
            f"model: {path} is no checkpoint of Stable Diffusion, SDXL, SD3 or Flux (its "
            f"tensors have names like {next(iter(keys), 'none')!r}); LoRA files and single "
            "components are not models"
        )
    if isinstance(opener, str):
        raise MimaError(f"model: {path}: {opener}")
    keywords = _dtype(stored_dtype([path]) if dtype is None else dtype)
    if issubclass(opener, torch.nn.Module):
        others = {key.partition(".")[0] for key in keys} & {"first_stage_model", "text_encoders"}
        return _open_transformer(path, opener, keywords, config, others)
    if config is not None:
        keywords["config"] = str(config)
        if expanded(config).is_dir():
            index = check_folder_of_model(expanded(config), None, weights=False)
            _check_sizes(expanded(config), index, lambda _: [path])
    elif unreachable():
        # offline, diffusers looks for the configuration in the hub's cache
        keywords["local_files_only"] = True
    try:
        pipeline = opener.from_single_file(str(path), **keywords)
    except LOADING_ERRORS as error:
        hint = ""
        if config is None and isinstance(error, OSError):
            hint = (
                "; diffusers reads its configuration from the hub: offline, pass config "
                "(--single-file-config), a diffusers folder of a model of the same architecture"
            )
        raise MimaError(f"model: cannot open {path}: {first_line(error)}{hint}") from error
    for name, network in networks(pipeline).items():
        _check_filled(path, name, network)
    return pipeline


def _open_transformer(
    path: Path,
    kind: Any,
    keywords: Mapping[str, Any],
    config: str | Path | None,
    others: Collection[str],
) -> Any:
    """The pipeline of another model of the architecture, with the transformer of a file."""
    if config is None:
        raise MimaError(
            f"model: {path} is read for its transformer alone; for the other parts pass config "
            "(--single-file-config), a diffusers folder or hub id of a model of the same "
            "architecture"
        )
    if others:
        logger.warning(
            "%s: of %s, which the file holds too, those of %s are used",
            *(path, " and ".join(sorted(others)), config),
        )
    offline = {"local_files_only": True} if Path(config).is_dir() or unreachable() else {}
    try:
        transformer = kind.from_single_file(
            str(path), config=str(config), subfolder="transformer", **keywords, **offline
        )
        pipeline = DiffusionPipeline.from_pretrained(
            str(config), transformer=transformer, **keywords, **offline
        )
    except LOADING_ERRORS as error:
        raise MimaError(
            f"model: cannot open {path} with the parts of {config}: {first_line(error)}"
        ) from error
    if type(pipeline).__name__ != TRANSFORMERS[kind]:
        raise MimaError(
            f"config: {config} is a {type(pipeline).__name__}, {path} holds the transformer of a "
            f"{TRANSFORMERS[kind]}"
        )
    _check_filled(path, "transformer", transformer)
    return pipeline


def _check_filled(path: Path, name: str, module: torch.nn.Module) -> None:
    """Refuse a file that lacks weights of a part."""
    missing = [key for key, value in module.named_parameters() if value.is_meta]
    if missing:
        raise MimaError(
            f"model: {path} is incomplete: {len(missing)} tensors of the {name} are missing, such "
            f"as {missing[0]}"
        )


def safetensors_keys(path: Path) -> list[str]:
    """Names of the tensors in a file, whose header is checked against its length."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise MimaError(
            f"model: {path} is damaged or no safetensors file: {first_line(error)}"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MimaError(f"model: cannot read {path}: {first_line(error)}") from error


def _open_embedded(dtype: torch.dtype | None) -> Any:
    folder = assets() / "model"
    if not (folder / MODEL_INDEX).is_file():
        raise MimaError(f"the embedded model is missing from this installation ({folder})")
    return _open_folder(folder, dtype, None)


def load_embedded(
    *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Load the embedded Stable Diffusion-format model.

    Args:
        dtype: of the weights; default float32 (they are stored in float16).
        device: where the model goes; default the CPU.

    Returns:
        A `diffusers.StableDiffusionPipeline` without a safety checker.

    Raises:
        MimaError: this installation came without its assets.
    """
    loaded = load_pipeline("embedded", dtype=dtype or torch.float32, device=device)
    # diffusers opens models in evaluation mode with gradients
    for network in networks(loaded).values():
        network.requires_grad_(True)
    pipeline: StableDiffusionPipeline = loaded
    return pipeline
