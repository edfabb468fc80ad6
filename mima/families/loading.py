"""Open a model from wherever it is, and say clearly why it cannot be opened."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mima.assets import assets
from mima.errors import MimaError, first_line, one_line
from mima.families.base import UNQUANTIZED, Family
from mima.families.flux import Flux
from mima.families.frozen import cast
from mima.families.hub import TRANSPORT_ERRORS, unreachable
from mima.families.lumina2 import Lumina2
from mima.families.model_files import (
    LOADING_ERRORS,
    absent_parts,
    check_code,
    check_complete,
    check_filled,
    check_parts,
    check_sizes,
    json_of,
    read_index,
    safetensors_keys,
    stored_dtype,
    stored_dtypes,
    weight_files,
)
from mima.families.pipelines import Pipeline, networks, with_modules
from mima.families.pixart import PixArt
from mima.families.qwen_image import QwenImage
from mima.families.sana import Sana
from mima.families.sd3 import StableDiffusion3
from mima.families.sdxl import StableDiffusionXL
from mima.families.stable_diffusion import StableDiffusion
from mima.options import TrainingOptions
from mima.storage.inputs import check_model, expanded
from mima.storage.names import MODEL_INDEX

logger = logging.getLogger(__name__)

FAMILIES: tuple[type[Family], ...] = (
    *(StableDiffusion, StableDiffusionXL, PixArt, StableDiffusion3, Flux),
    *(Sana, Lumina2, QwenImage),
)
"""Every family; a pipeline is the first's that knows its name."""

# what huggingface_hub and diffusers raise for what cannot be fetched
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    *TRANSPORT_ERRORS,
    EntryNotFoundError,
)


# single checkpoint files by a prefix of their keys: how to open them, or why not
SINGLE_FILES: tuple[tuple[str, Any], ...] = (
    ("conditioner.embedders.1.", StableDiffusionXLPipeline),
    ("conditioner.embedders.0.model.", "the SDXL refiner is not supported, SDXL base models are"),
    ("joint_blocks.", SD3Transformer2DModel),
    ("double_blocks.", FluxTransformer2DModel),
    ("model.diffusion_model.input_blocks.0.", StableDiffusionPipeline),
)


V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors that say, in a single file, how the model was trained: what it predicts, and that
its last noise level is noise alone."""
SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8")
"""Ends of names that ComfyUI's files in scaled 8 bits hold beside the weights."""
TRANSFORMERS = {
    SD3Transformer2DModel: "StableDiffusion3Pipeline",
    FluxTransformer2DModel: "FluxPipeline",
}
"""Whose transformer a single file may be."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, for whatever opens one: ``load_pipeline``, ``immunize``, ``evaluate``, ...

    Examples:
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

    def __post_init__(self) -> None:
        # a path is no name
        if isinstance(self.model, Path) and str(self.model) == "embedded":
            object.__setattr__(self, "model", "./embedded")

    @property
    def label(self) -> str:
        """The model with its options, for people."""
        options = [f"{name} {value}" for name, value in self.options.items()]
        return f"{self.model} ({', '.join(options)})" if options else str(self.model)

    @property
    def options(self) -> dict[str, str]:
        """What is told beside the model, by the names of the commands' options."""
        options = {
            "revision": self.revision,
            "variant": self.variant,
            "single_file_config": self.config,
        }
        return {name: str(value) for name, value in options.items() if value is not None}


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

    Returns:
        The family, around the pipeline itself.

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

    Returns:
        The pipeline; `model` itself where that is one.

    Raises:
        MimaError: nothing there, damaged, or not of a supported family; the message says which.
        ValueError: ``revision``, ``variant`` or ``config`` is given beside a pipeline in memory, or
            beside a ``ModelSource``, which has its own.
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
    model: str,
    dtype: torch.dtype | None,
    revision: str | None,
    variant: str | None,
    **given: torch.nn.Module,
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
    index = json_of(Path(file))
    if not isinstance(index, dict):
        raise MimaError(f"model: {model} names no diffusers pipeline")
    # refuse other pipelines before gigabytes are fetched
    _family_class(str(index.get("_class_name")), model)
    try:
        folder = DiffusionPipeline.download(
            model, revision=revision, variant=variant, **absent_parts(index), **given
        )
    except HUB_ERRORS as error:
        raise MimaError(f"model: {_explain(model, revision, error)}") from error
    pipeline = _open_folder(Path(folder), dtype, variant, **given)
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


def _open_folder(
    path: Path, dtype: torch.dtype | None, variant: str | None, **given: torch.nn.Module
) -> Any:
    """The pipeline of a folder, with parts of another model in the places of its own."""
    index = check_folder_of_model(path, variant, given=given)
    check_sizes(path, index, lambda part: weight_files(part, variant))
    wanted = _dtype(stored_dtypes(path, index, variant) if dtype is None else dtype)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(path),
            variant=variant,
            local_files_only=True,
            **wanted,
            **absent_parts(index),
            **given,
        )
    except LOADING_ERRORS as error:
        raise MimaError(f"model: cannot open {path}: {first_line(error)}") from error
    for name, network in networks(pipeline).items():
        if name not in given:
            check_complete(path / name, network, variant)
    return pipeline


def check_folder_of_model(
    path: Path, variant: str | None, *, weights: bool = True, given: Collection[str] = ()
) -> dict[str, Any]:
    """What a diffusers folder's index names, the parts of which are there and undamaged.

    Args:
        path: the folder.
        variant: of the files of weights.
        weights: whether there must be weights; otherwise configurations do.
        given: parts that are not read from it, and that it need not have.

    Raises:
        MimaError: a part is missing or damaged, or the model is of no supported family.
    """
    index = read_index(path)
    _family_class(index["_class_name"], str(path))
    check_code(path, index)
    index = {name: kind for name, kind in index.items() if name not in given}
    if weights:
        check_parts(path, index, variant)
    return index


def _dtype(dtype: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The keyword that diffusers calls it by; 0.42 warns of the old name."""
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def open_file_like(path: Path, pipeline: Pipeline) -> Any:
    """Open a single file in float32 as a model of the architecture of an open one.

    Of SD3 and Flux the file is read for its transformer; the other parts are the open model's.

    Raises:
        MimaError: as of ``load_pipeline``, or a file of another architecture.
    """
    check_model(path)
    opener = _opener(path, safetensors_keys(path))
    own, kind = type(pipeline).__name__, TRANSFORMERS.get(opener, opener.__name__)
    if kind != own:
        raise MimaError(f"model: {path} holds a {kind}, expected a {own}")
    with TemporaryDirectory() as config:
        _write_configuration(pipeline, Path(config))
        if opener not in TRANSFORMERS:
            return load_pipeline(path, config=config)
        transformer = _transformer(path, opener, torch.float32, config)
    return with_modules(pipeline, transformer=transformer)


def _write_configuration(pipeline: Any, folder: Path) -> None:
    """Write a diffusers folder without weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif part is not None:
            # a network of transformers writes its weights, too
            getattr(part, "config", part).save_pretrained(folder / name)


def _opener(path: Path, keys: Collection[str]) -> Any:
    """The class of a single file's pipeline, or of the transformer that it is read for."""
    scaled = next((key for key in keys if key.endswith(SCALES)), None)
    if scaled is not None:
        raise MimaError(
            f"model: {path} holds {one_line(scaled)}, by which its weights would have to be "
            "scaled; files in scaled 8 bits are not read, those of other types are"
        )
    opener = next((o for part, o in SINGLE_FILES if any(part in key for key in keys)), None)
    if opener is None:
        raise MimaError(
            f"model: {path} is no checkpoint of Stable Diffusion, SDXL, SD3 or Flux (its "
            f"tensors have names like {next(iter(keys), 'none')!r}); LoRA files and single "
            "components are not models"
        )
    if isinstance(opener, str):
        raise MimaError(f"model: {path}: {opener}")
    return opener


def _open_file(path: Path, dtype: torch.dtype | None, config: str | Path | None) -> Any:
    keys = safetensors_keys(path)
    opener = _opener(path, keys)
    if opener in TRANSFORMERS:
        others = {key.partition(".")[0] for key in keys} & {"first_stage_model", "text_encoders"}
        return _open_transformer(path, opener, dtype, config, others)
    keywords = _dtype(stored_dtype([path]) if dtype is None else dtype)
    if config is not None:
        keywords["config"] = str(expanded(config))
        if expanded(config).is_dir():
            index = check_folder_of_model(expanded(config), None, weights=False)
            check_sizes(expanded(config), index, lambda _: [path])
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
        check_filled(path, name, network)
    if V_PREDICTION in keys:
        # diffusers does not read these marks
        said: dict[str, Any] = {"prediction_type": "v_prediction"}
        if ZERO_SNR in keys:
            said["rescale_betas_zero_snr"] = True
        scheduler: Any = pipeline.scheduler
        marked = type(scheduler).from_config(scheduler.config, **said)
        if not said.items() <= dict(marked.config).items():
            # PNDM, as of Stable Diffusion 1.x, knows no terminal SNR of zero
            marked = DDIMScheduler.from_config(scheduler.config, **said)
        pipeline.scheduler = marked
    return pipeline


def _open_transformer(
    path: Path,
    kind: Any,
    dtype: torch.dtype | None,
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
    folder = expanded(config)
    transformer = _transformer(path, kind, dtype, folder)
    if folder.is_dir():
        pipeline = _open_folder(folder, dtype, None, transformer=transformer)
    else:
        pipeline = _open_hub(str(config), dtype, None, None, transformer=transformer)
    if type(pipeline).__name__ != TRANSFORMERS[kind]:
        raise MimaError(
            f"config: {config} is a {type(pipeline).__name__}, {path} holds the transformer of a "
            f"{TRANSFORMERS[kind]}"
        )
    return pipeline


def _transformer(
    path: Path, kind: Any, dtype: torch.dtype | None, config: str | Path
) -> torch.nn.Module:
    """The transformer of a file, as a folder or a model of the hub describes it."""
    keywords = _dtype(stored_dtype([path]) if dtype is None else dtype)
    if Path(config).is_dir() or unreachable():
        keywords["local_files_only"] = True
    try:
        transformer: torch.nn.Module = kind.from_single_file(
            str(path), config=str(config), subfolder="transformer", **keywords
        )
    except LOADING_ERRORS as error:
        raise MimaError(
            f"model: cannot open {path} with another model's configuration: {first_line(error)}"
        ) from error
    check_filled(path, "transformer", transformer)
    return transformer


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
