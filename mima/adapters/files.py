"""Adapters as files: LoRA, Custom Diffusion, Textual Inversion, and whole fine-tuned models.

Whatever trained them, they come out as what they change: low-rank updates, new values of
parameters, and embeddings of new words.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftType, inject_adapter_in_model
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from mima.adapters.adapter import Adapter, check_unadapted
from mima.adapters.lora_files import (
    LAYER,
    LORA_DOWN,
    LYCORIS,
    MAGNITUDE,
    READ_TYPES,
    check_config,
    check_metadata,
    check_numbers,
    foreign_errors,
    largest_rank,
    learned,
    left_out,
    refuse_others,
    with_strengths,
)
from mima.errors import MimaError, first_line, one_line, quoted
from mima.families import family_of, load_pipeline
from mima.families.ddpm import DDPM
from mima.families.loading import open_file_like
from mima.families.model_files import check_complete, lone_variants, read_index, visible
from mima.families.new_words import TOKEN
from mima.families.pipelines import (
    PREFIX,
    Pipeline,
    Reader,
    networks,
    parameter,
    readers,
    shared_copy,
    with_modules,
)
from mima.release.delta import is_delta, read_delta
from mima.storage.inputs import expanded
from mima.storage.names import (
    CUSTOM_DIFFUSION_FILE,
    DELTA_FILE,
    LORA_FILE,
    MODEL_INDEX,
    PEFT_CONFIG,
)
from mima.storage.plain_data import read_json
from mima.storage.record import prompt_of
from mima.storage.tensor_files import header_texts

# what diffusers and peft raise for files that are damaged or do not fit
READING_ERRORS = (
    *(OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError),
    # diffusers: no layer of the file is in the model
    *(KeyError, IndexError),
)
PEFT_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
MOST_VECTORS = 256
"""Of a learned word: as many tokens of a prompt, which has 77 or a few hundred."""

logger = logging.getLogger(__name__)

# what accelerate leaves in a checkpoint beside the weights
_TRAINER = re.compile(r"(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt")
_CUSTOM_DIFFUSION = re.compile(r"^(.*)\.processor\.(\w+)_custom_diffusion(\.\d+)?\.(\w+)$")


class AdapterReader:
    """Reads adapters for one diffusers pipeline, which stays as it is.

    Raises:
        MimaError: adapters are loaded into the pipeline.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.family = family_of(pipeline)
        check_unadapted(self.family)
        self.pipeline = pipeline
        self.denoiser = self.family.denoiser_name
        self._count = 0

    def read(self, source: str | Path) -> Adapter:
        """Read one adapter.

        Args:
            source: a folder or a file. Folders: what ``mima adapt`` or peft's or diffusers'
                training scripts write, a fine-tuned denoiser (``unet/`` or the folder itself) and
                text encoders (``text_encoder/``), a delta, a whole diffusers model with the
                pipeline's own prediction type and terminal noise (of another VAE a warning says
                that it is left out). Files: a LoRA, Custom
                Diffusion weights, a learned word, a delta, weights of the denoiser. Pickled files
                are read with ``weights_only``.

        Raises:
            MimaError: nothing there, damaged, of no known kind, or it does not fit the pipeline.
        """
        path = expanded(source)
        if not path.exists():
            raise MimaError(f"adapter {source} does not exist")
        if not path.is_dir() and not path.is_file():
            raise MimaError(f"adapter {source} is no ordinary file")
        found = self._found(path)
        self._check(path, found)
        return Adapter(path.name if path.is_dir() else path.stem, prompt=_prompt(path), **found)

    def _found(self, path: Path) -> dict[str, Any]:
        try:
            return self._read_folder(path) if path.is_dir() else self._read_file(path)
        except MimaError:
            raise
        except READING_ERRORS as error:
            raise MimaError(f"adapter {path} {_refusal(error)}") from error

    def _read_folder(self, path: Path) -> dict[str, Any]:
        if (path / DELTA_FILE).is_file():
            return self._found(path / DELTA_FILE)
        if (path / MODEL_INDEX).is_file():
            variant = _variant(path, [path / part for part in read_index(path)])
            return {"values": self._model(path, load_pipeline(str(path), variant=variant))}
        found: dict[str, Any] = {}
        for part in self._parts(path):
            for kind, changes in part.items():
                twice = changes.keys() & {name for held in found.values() for name in held}
                if twice:
                    raise MimaError(
                        f"adapter {path}: several files hold {one_line(min(twice))}; "
                        "name the one to use"
                    )
                found[kind] = {**found.get(kind, {}), **changes}
        if not found:
            raise MimaError(
                f"adapter {path} holds no adapter: no {LORA_FILE}, {CUSTOM_DIFFUSION_FILE}, "
                f"{PEFT_CONFIG}, {DELTA_FILE}, learned word, {self.denoiser}/ or {MODEL_INDEX}"
            )
        return found

    def _parts(self, path: Path) -> Iterator[dict[str, Any]]:
        """What the folders and files of a folder hold, each read once."""
        read: tuple[str, ...] = ()
        if (path / PEFT_CONFIG).is_file():
            yield self._peft(path)
            read = PEFT_WEIGHTS
        elif (path / "config.json").is_file() and not (path / self.denoiser).is_dir():
            yield {"values": self._component_folder(path, self.denoiser)}
            read = ("diffusion_pytorch_model",)
        for folder in (path / self.denoiser, *sorted(path.glob("text_encoder*"))):
            if folder.is_dir():
                yield {"values": self._component_folder(folder, folder.name)}
        if (path / CUSTOM_DIFFUSION_FILE).is_file():
            # diffusers' training script may leave the same weights in both formats
            read += (Path(CUSTOM_DIFFUSION_FILE).with_suffix(".bin").name,)
        kinds = (".safetensors", ".bin", ".pt")
        for file in visible(path, "*"):
            passed = file.name.startswith(read) or _TRAINER.fullmatch(file.name)
            # a pipe would keep its reader waiting
            if file.suffix in kinds and not passed and file.is_file():
                yield self._found(file)

    def _read_file(self, path: Path) -> dict[str, Any]:
        state: Any
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            with foreign_errors(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, dict) else state
        else:
            raise MimaError(f"adapter {path}: expected a folder, .safetensors, .bin or .pt")
        if not isinstance(state, dict) or not state:
            raise MimaError(f"adapter {path} holds no tensors by name")
        for key, value in state.items():
            if key == "string_to_token" and isinstance(value, Mapping):
                # of AUTOMATIC1111's words: their places in its tokenizer
                continue
            learned_word = key == "string_to_param" and isinstance(value, Mapping)
            # trainers note texts and numbers beside the tensors
            plain = value is None or isinstance(value, (torch.Tensor, str, int, float))
            if not isinstance(key, str) or not (learned_word or plain):
                raise MimaError(f"adapter {path}: {quoted(key)} is no tensor by name")
            for tensor in value.values() if learned_word else (value,):
                if isinstance(tensor, torch.Tensor) and not _is_plain(tensor):
                    raise MimaError(
                        f"adapter {path}: {quoted(key)} is sparse, quantized, complex or repeats "
                        "its numbers; plain tensors are read"
                    )
        if path.suffix == ".safetensors" and is_delta(path):
            delta = read_delta(path)
            return {"values": delta.values, "words": delta.words}
        for part, kind in LYCORIS.items():
            if any(part in key for key in state):
                raise MimaError(
                    f"adapter {path} is a {kind}; of these, peft's folders ({PEFT_CONFIG}) are read"
                )
        # a word of its own has no parts
        if any("lora" in key and "." in key for key in state):
            if any("dora_scale" in key for key in state):
                # diffusers drops dora_scale from the files of other programs
                raise MimaError(f"adapter {path} is a DoRA; this is not supported, LoRA is")
            return self._lora(path, state)
        if any("_custom_diffusion" in key for key in state):
            return {"values": self._custom_diffusion(path, state)}
        if any(key.startswith("model.diffusion_model.") for key in state):
            return {"values": self._model(path, open_file_like(path, self.pipeline))}
        names = {name for name, _ in self.family.denoiser.named_parameters()}
        tail = f"{self.denoiser}."
        stripped = {key.removeprefix(tail): value for key, value in state.items()}
        if names & set(stripped):
            # tables that a model is made with, and some files hold
            tables = dict(self.family.denoiser.named_buffers())
            same = {
                name
                for name in stripped.keys() & tables.keys()
                if isinstance(value := stripped[name], torch.Tensor)
                and torch.equal(value, tables[name].to(value))
            }
            stripped = {name: value for name, value in stripped.items() if name not in same}
            foreign = sorted(set(stripped) - names)
            if foreign:
                raise MimaError(
                    f"adapter {path} does not fit the model: the {self.denoiser} has no "
                    f"{one_line(foreign[0])} ({len(foreign)} such names)"
                )
            return {"values": {tail + key: value for key, value in stripped.items()}}
        return {"words": self._words_of_encoders(path, state) or _words(path, state)}

    def _words_of_encoders(self, path: Path, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A word for several encoders: by the encoders' names, as trainers of SDXL write it."""
        several = readers(self.pipeline)
        names = [reader.name for reader in several]
        if len(several) < 2 or not state.keys() & set(names):
            return {}
        rows = [state.get(name) for name in names]
        if len(state) != len(names) or not all(
            isinstance(part, torch.Tensor) and part.ndim in (1, 2) for part in rows
        ):
            raise MimaError(
                f"adapter {path} holds {one_line(', '.join(sorted(state)))}, expected a learned "
                f"word for {', '.join(names)}"
            )
        parts = [part.detach().view(-1, part.shape[-1]) for part in rows if part is not None]
        if len({len(part) for part in parts}) > 1:
            counts = " and ".join(str(len(part)) for part in parts)
            raise MimaError(f"adapter {path}: its word has {counts} vectors for the encoders")
        word = path.stem
        if path.suffix == ".safetensors":
            word = header_texts(path).get(TOKEN, word)
        return {word: torch.cat(parts, dim=1)}

    def _scratch(self) -> tuple[Any, str]:
        """A pipeline to load an adapter into, and a fresh name for it; weights are shared."""
        self._count += 1
        modules = {
            name: shared_copy(module)
            for name, module in _reading_modules(self.pipeline, self.denoiser).items()
        }
        return with_modules(self.pipeline, **modules), f"adapter{self._count}"

    def _lora(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        scratch, name = self._scratch()
        if not hasattr(scratch, "load_lora_weights"):
            raise MimaError(
                f"adapter {path}: {type(scratch).__name__} reads no LoRA files; peft's folders "
                f"({PEFT_CONFIG}) are read"
            )
        refuse_others(path, state)
        alphas = [key for key in state if key.endswith(".alpha")]
        # kohya's alphas may be whole
        check_numbers(path, {key: state[key] for key in state.keys() - alphas})
        configured = check_metadata(path, state)
        dora = any(MAGNITUDE in key for key in state)
        if alphas and (configured or dora):
            raise MimaError(
                f"adapter {path} holds {one_line(alphas[0])} beside "
                f"{'a configuration' if configured else 'the magnitudes of a DoRA'}; this is not "
                "supported"
            )

        def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
            # by which diffusers numbers SDXL's blocks
            config = {"unet_config": scratch.unet.config} if self.denoiser == "unet" else {}
            found = scratch.lora_state_dict(tensors, **config)
            found = found[0] if isinstance(found, tuple) else found
            return {key: value for key, value in found.items() if not key.endswith(".alpha")}

        with foreign_errors(path):
            state, strength = with_strengths(state)
            lost = left_out(state, renamed)
            state = renamed(dict(state))
        parts = tuple(f"{part}." for part in scratch._lora_loadable_modules)
        lost += [key for key in state if not key.startswith(parts)]
        if lost:
            raise MimaError(
                f"adapter {path} holds {one_line(lost[0])} ({len(lost)} such names), which "
                f"diffusers does not read for a {type(scratch).__name__}"
            )
        with foreign_errors(path):
            if configured:
                # in the file's header; offline, older diffusers look for no file unless named
                place = {"weight_name": path.name, "local_files_only": True}
                scratch.load_lora_weights(str(path.parent), adapter_name=name, **place)
            else:
                scratch.load_lora_weights(state, adapter_name=name)
            for reader in readers(scratch) if dora else ():
                _set_magnitudes(path, reader, state, name)
        found = learned(networks(scratch), name, path, whole=dora)
        expected = sum(bool(LORA_DOWN.search(key)) for key in state)
        if len(found) != expected:
            raise MimaError(
                f"adapter {path} does not fit the model: {len(found)} of its {expected} "
                "layers were found there"
            )
        if dora:
            return {"values": found}
        if not configured:
            found = {layer: replace(one, scale=strength) for layer, one in found.items()}
        return {"factors": found}

    def _peft(self, path: Path) -> dict[str, Any]:
        settings = read_json((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise MimaError(f"adapter {path}: {PEFT_CONFIG} holds no settings")
        if not any((path / name).is_file() for name in PEFT_WEIGHTS):
            # peft would ask the hub for a repository of the folder's name
            raise MimaError(f"adapter {path} holds no {' or '.join(PEFT_WEIGHTS)}")
        with foreign_errors(path):
            weights = {
                key.removeprefix("base_model.model."): value
                for key, value in load_peft_weights(str(path), device="cpu").items()
            }
        check_config(path, settings, largest_rank(weights))
        with foreign_errors(path):
            config = PeftConfig.from_pretrained(str(path))
        if config.peft_type not in READ_TYPES:
            kind = getattr(config.peft_type, "value", config.peft_type)
            read = ", ".join(one.value for one in READ_TYPES)
            raise MimaError(f"adapter {path} is a {kind}, expected one of {read}")
        refuse_others(path, weights)
        check_numbers(path, weights)
        scratch, name = self._scratch()
        module = getattr(scratch, self.denoiser)
        with foreign_errors(path):
            inject_adapter_in_model(config, module, name)
            # in training, older peft leaves rows of LoHa and LoKr out by chance
            module.eval()
            report: Any = set_peft_model_state_dict(module, weights, adapter_name=name)
        whole = config.peft_type != PeftType.LORA or getattr(config, "use_dora", False)
        found = learned({self.denoiser: module}, name, path, whole=whole)
        expected = len({LAYER.sub("", key) for key in weights})
        if report.unexpected_keys or len(found) != expected:
            raise MimaError(
                f"adapter {path} does not fit the model: {len(found)} layers match its "
                f"configuration and it holds {expected}"
                + "".join(f"; {one_line(key)} is unknown" for key in report.unexpected_keys[:1])
            )
        return {"values" if whole else "factors": found}

    def _custom_diffusion(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for key, value in state.items():
            matched = _CUSTOM_DIFFUSION.match(key)
            if matched:
                attention, projection, number, leaf = matched.groups()
                values[f"{self.denoiser}.{attention}.{projection}{number or ''}.{leaf}"] = value
            # a processor without weights is an empty entry
            elif not isinstance(value, torch.Tensor) or value.numel():
                raise MimaError(
                    f"adapter {path}: {one_line(key)} is no weight of a custom attention processor"
                )
        return values

    def _component_folder(self, path: Path, name: str) -> dict[str, torch.Tensor]:
        """What the folder of a denoiser or of a text encoder changes."""
        own = getattr(self.pipeline, name, None)
        if own is None:
            raise MimaError(f"adapter {path} does not fit the model, which has no {name}")
        kind: Any = type(own)
        settings = read_json((path / "config.json").read_text(encoding="utf-8"))
        settings = settings if isinstance(settings, dict) else {}
        # transformers writes a list
        given = settings.get("_class_name") or settings.get("architectures")
        if given not in (kind.__name__, [kind.__name__]):
            raise MimaError(f"adapter {path} is a {given}, the model has a {kind.__name__}")
        variant = _variant(path, [path])
        with foreign_errors(path):
            module = kind.from_pretrained(str(path), variant=variant, local_files_only=True)
        check_complete(path, module, variant)
        return self._changed({name: module})

    def _model(self, path: Path, pipeline: Pipeline) -> dict[str, torch.Tensor]:
        if type(pipeline) is not type(self.pipeline):
            raise MimaError(
                f"adapter is a {type(pipeline).__name__}, the model is a "
                f"{type(self.pipeline).__name__}"
            )
        self._check_unmerged(path, pipeline)
        return self._changed(_reading_modules(pipeline, self.denoiser))

    def _check_unmerged(self, path: Path, pipeline: Pipeline) -> None:
        """Refuse a model that predicts something else, and tell of a VAE that no merge takes over.

        Checkpoints come with VAEs of the same latents whose pictures have finer details.
        """
        other = family_of(pipeline)
        if isinstance(self.family, DDPM) and isinstance(other, DDPM):
            told, own = other.schedule.config, self.family.schedule.config
            for setting in ("prediction_type", "rescale_betas_zero_snr"):
                if told[setting] != own[setting]:
                    raise MimaError(
                        f"adapter {path} was trained with {setting} {told[setting]}, the model "
                        f"with {own[setting]}; one cannot be merged into the other"
                    )
        values = dict(self.pipeline.vae.named_parameters())
        for name, value in pipeline.vae.named_parameters():
            mine = values.get(name)
            if mine is None or mine.shape != value.shape or not _alike(mine, value):
                logger.warning(
                    "adapter %s has another vae than the model (%s differs), which is not merged: "
                    "the model's own draws",
                    *(path, name),
                )
                return

    def _changed(self, modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
        """The parameters that differ from the pipeline's own."""
        values: dict[str, torch.Tensor] = {}
        for component, module in modules.items():
            own = dict(getattr(self.pipeline, component).named_parameters())
            for name, changed in module.named_parameters():
                value = changed.detach()
                if name not in own:
                    raise MimaError(f"adapter: the model's {component} has no {name}")
                same = own[name].shape == value.shape and torch.equal(
                    own[name], value.to(own[name])
                )
                if not same:
                    values[f"{component}.{name}"] = value
        return values

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        """Refuse what the pipeline has no place for."""
        check_numbers(path, {**found.get("values", {}), **found.get("words", {})})
        for name, value in found.get("values", {}).items():
            try:
                own = parameter(self.pipeline, name)
            except AttributeError:
                raise MimaError(
                    f"adapter {path} does not fit the model, which has no {one_line(name)}"
                ) from None
            if own.shape != value.shape:
                raise MimaError(
                    f"adapter {path} does not fit the model: {name} is {list(value.shape)}, "
                    f"expected {list(own.shape)}"
                )
        numbers = [*found.get("values", {}).items(), *found.get("words", {}).items()]
        for name, factor in found.get("factors", {}).items():
            own, size = parameter(self.pipeline, name), (len(factor.B), factor.A.shape[1])
            # diffusers widens a layer of Flux for a LoRA of another width
            if size != (len(own), own[0].numel()):
                raise MimaError(
                    f"adapter {path} does not fit the model: {name} is changed as {list(size)}, "
                    f"expected {[len(own), own[0].numel()]}"
                )
            numbers += [(name, factor.A), (name, factor.B)]
            largest = math.prod(float(x.abs().max()) for x in (factor.A, factor.B) if x.numel())
            # what each product is at most, in the precision that they are added in
            bound = torch.tensor(largest * len(factor.A) * abs(factor.scale), dtype=torch.float32)
            numbers.append((name, bound))
        for name, value in numbers:
            # not all of the 8-bit types can be asked themselves
            if not bool(value.float().isfinite().all()):
                raise MimaError(
                    f"adapter {path}: {one_line(name)} holds numbers that are not finite"
                )
        if not any(found.values()):
            raise MimaError(f"adapter {path} changes nothing of this model")
        words = found.get("words", {})
        width = sum(reader.rows.shape[1] for reader in readers(self.pipeline))
        for word, rows in words.items():
            if not 1 <= len(rows) <= MOST_VECTORS:
                raise MimaError(
                    f"adapter {path}: the word {quoted(word)} has {len(rows)} vectors, expected "
                    f"1 to {MOST_VECTORS}"
                )
            if rows.shape[1] != width:
                raise MimaError(
                    f"adapter {path}: the word {quoted(word)} has {rows.shape[1]} numbers, the "
                    f"text encoder's embeddings have {width}"
                )


def _set_magnitudes(path: Path, reader: Reader, state: Mapping[str, Any], adapter: str) -> None:
    """Set the magnitudes of a text encoder's DoRA, which transformers 5 leaves as they began."""
    # as diffusers finds the names of the other tensors
    prefix = PREFIX if not hasattr(reader.encoder, "text_model") else ""
    own = {
        key.removeprefix(f"{reader.part}.").removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(f"{reader.part}.") and MAGNITUDE in key
    }
    if not own:
        return
    report: Any = set_peft_model_state_dict(reader.encoder, own, adapter_name=adapter)
    if report.unexpected_keys:
        raise MimaError(
            f"adapter {path} does not fit the model, whose {reader.part} has no "
            f"{one_line(report.unexpected_keys[0])}"
        )


def _variant(path: Path, folders: Iterable[Path]) -> str | None:
    """The one variant that an adapter's weights come in; None where plain ones are there."""
    variants = lone_variants(folders)
    if len(variants) > 1:
        raise MimaError(
            f"adapter {path} comes as variants {' and '.join(sorted(variants))}; leave one of them"
        )
    return variants.pop() if variants else None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than rounding to half precision."""
    one, other = one.detach().float(), other.detach().float().to(one.device)
    return torch.allclose(one, other, rtol=2**-7, atol=2**-24)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds each of its numbers itself; one of a pickle may stand for more."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _refusal(error: Exception) -> str:
    """What is to be said of an adapter that raised one of `READING_ERRORS`."""
    if isinstance(error, KeyError):
        return f"cannot be read: it lacks {first_line(error)}"
    if isinstance(error, IndexError):
        return "cannot be read: diffusers finds no layers in it that it knows"
    if isinstance(error, UnpicklingError):
        # torch's message advises weights_only=False, which runs the code in the file
        return "cannot be read: it is damaged, or holds more than tensors, which is not run"
    first, *named = str(error).splitlines() or [""]
    if "infer state dict type" in first:
        return "holds layers of a text encoder by names that diffusers does not know"
    if named and "loading state_dict" in first:
        # torch names the weights below a line that names their module alone
        return f"does not fit the model: {one_line(named[0])}"
    return f"cannot be read: {first_line(error)}"


def _reading_modules(pipeline: Pipeline, denoiser: str) -> dict[str, torch.nn.Module]:
    """The denoiser and the text encoders: what adapters change."""
    names = [denoiser, *(name for name in pipeline.components if name.startswith("text_encoder"))]
    return {name: module for name in names if (module := getattr(pipeline, name)) is not None}


def _words(path: Path, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """New words from a file of diffusers or of AUTOMATIC1111's web interface."""
    if isinstance(state.get("string_to_param"), Mapping) and "name" in state:
        state = {str(state["name"]): state["string_to_param"]["*"]}
    elif set(state) == {"emb_params"}:
        state = {path.stem: state["emb_params"]}
    words = {}
    for word, rows in state.items():
        if not isinstance(rows, torch.Tensor) or rows.ndim not in (1, 2) or len(state) > 8:
            raise MimaError(
                f"adapter {path} is of no known kind (it holds names like "
                f"{quoted(next(iter(state)))}): expected a LoRA, Custom Diffusion weights, a "
                "learned word, a delta, or weights of the denoiser"
            )
        words[word] = rows.detach().view(-1, rows.shape[-1])
    return words


def _prompt(path: Path) -> str | None:
    """The prompt that ``mima adapt`` recorded beside the adapter."""
    try:
        return prompt_of(path)
    except MimaError as error:
        raise MimaError(f"adapter {path}: {error}") from error
