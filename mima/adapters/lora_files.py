"""What files of LoRAs and folders of peft hold: checked first, then read as peft understands it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from mima.adapters.adapter import low_rank_updates
from mima.errors import MimaError, first_line, one_line, quoted
from mima.storage.plain_data import read_json
from mima.storage.tensor_files import header_texts

# what diffusers, peft and torch raise for settings and pickles of unexpected types
FOREIGN_ERRORS = (
    *(TypeError, AttributeError, AssertionError, ArithmeticError),
    *(EOFError, MemoryError, struct.error),
)
READ_TYPES = (PeftType.LORA, PeftType.LOKR, PeftType.LOHA)
"""The kinds of peft's folders that are read; DoRA is a LORA."""
LYCORIS = {"lokr_w": "LoKr", "hada_w": "LoHa"}
"""Kinds of files by what names in them contain."""
KEPT_BASE = ("gaussian", "orthogonal", "eva")
"""Ways of peft to begin a LoRA's matrices that leave the weights beside them as they were."""
MAGNITUDE = "lora_magnitude_vector"
MOST_RANK = 256
"""A rank of which no matrix is in the file is believed up to this: peft makes matrices of it."""
MOST_NAMES = 10_000
"""Entries of one list of an adapter's configuration."""
# peft matches layers by regular expressions; one that repeats a part may run for hours
_PLAIN = re.compile(r"\^?[\w.\\-]*\$?|all-linear")
# whatever follows, line breaks too: else each such part of a name would be tried to its end
LAYER = re.compile(r"\.(lora|lokr|hada)_.*", re.S)
LORA_DOWN = re.compile(r"\.(down|lora_down|lora_A)(\.[^.]+)?\.weight$")
UP = {"down": "up", "lora_down": "lora_up", "lora_A": "lora_B"}
"""The second matrix of an update by what the first is called."""


@contextmanager
def foreign_errors(path: Path) -> Iterator[None]:
    """Turn what diffusers, peft and torch raise for an unusable file into a MimaError."""
    try:
        yield
    except FOREIGN_ERRORS as error:
        raise MimaError(f"adapter {path} cannot be read: {first_line(error)}") from error


def check_numbers(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what is no tensor of floating point; whole numbers would need a scale."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = getattr(value, "dtype", type(value).__name__)
            raise MimaError(
                f"adapter {path}: {one_line(name)} is of {kind}, expected numbers of floating point"
            )


def refuse_others(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what would be copied into the weights that the reading pipeline shares."""
    marks = ("lora", *LYCORIS, "lokr_t", "hada_t")
    others = [
        key
        for key in state
        if not any(mark in key for mark in marks) and not key.endswith(".alpha")
    ]
    if others:
        raise MimaError(
            f"adapter {path} holds {one_line(others[0])} beside the low-rank matrices "
            f"({len(others)} such names); this is not supported"
        )


def with_strengths(state: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Take the alphas of a LoRA's layers into their updates ``alpha / rank · B A``.

    Where they differ, diffusers gives layers each other's: it looks for them by names that no layer
    has.

    Args:
        state: the file's tensors. A layer without an alpha has the update ``B A``.

    Returns:
        The tensors, whose alphas say 1, and what all updates are to be scaled by: ``alpha / rank``
        where the layers have one, which is then in no matrix; else 1, and each ``B`` has its own.
    """
    told = dict(state)
    strengths: dict[str, float] = {}
    for key, down in state.items():
        found = LORA_DOWN.search(key)
        if found is None:
            continue
        rank, alpha = len(down), f"{key[: found.start()]}.alpha"
        up = f"{key[: found.start(1)]}{UP[found[1]]}{key[found.end(1) :]}"
        strengths[up] = float(state.get(alpha, rank)) / rank
        if alpha in state:
            # some of diffusers' readers want one
            told[alpha] = torch.tensor(float(rank))
    if len(set(strengths.values())) == 1:
        return told, strengths.popitem()[1]
    for up, strength in strengths.items():
        if up in told:
            told[up] = told[up].float() * strength
    return told, 1.0


def left_out(
    state: Mapping[str, Any], renamed: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[str]:
    """The names of what is lost where diffusers renames a LoRA's tensors.

    It says so in its log at most. Here it is given tensors that hold nothing but their number,
    which being split, joined, and scaled by 1 leaves in them.

    Args:
        state: tensors, whose alphas say 1.
        renamed: what diffusers makes of them.
    """
    names = [key for key in state if not key.endswith(".alpha")]
    numbered = {name: torch.full(state[name].shape, float(n)) for n, name in enumerate(names)}
    kept = {
        number
        for value in renamed({**state, **numbered}).values()
        for number in value.flatten()[:1].tolist()
    }
    return [
        name for n, name in enumerate(names) if n not in kept and bool(state[name].float().any())
    ]


def check_metadata(path: Path, state: Mapping[str, Any]) -> bool:
    """Check the configuration in a LoRA file's header, of which diffusers makes matrices.

    Returns:
        Whether there is one.
    """
    if path.suffix != ".safetensors":
        return False
    text = header_texts(path).get("lora_adapter_metadata")
    header = None if text is None else read_json(text)
    if not isinstance(header, dict):
        return False
    parts: dict[str, dict[str, Any]] = {}
    for name, value in header.items():
        part, _, setting = name.partition(".")
        parts.setdefault(part, {})[setting] = value
    most = largest_rank(state)
    for settings in parts.values():
        check_config(path, settings, most)
    return bool(header)


def largest_rank(state: Mapping[str, Any]) -> int:
    """Of the matrices of a LoRA's file; 0 where it has none."""
    downs = [value for key, value in state.items() if LORA_DOWN.search(key)]
    # a pickle may hold texts and numbers in a matrix's place
    return max((len(x) for x in downs if isinstance(x, torch.Tensor) and x.ndim), default=0)


def check_config(path: Path, settings: Mapping[str, Any], most: int) -> None:
    """Refuse settings of a LoRA that cannot be read, or not in finite time and memory.

    Args:
        path: of the adapter.
        settings: its configuration.
        most: the largest rank of its own matrices.

    Raises:
        MimaError: a beginning that changes the base weights, too; an expression that repeats
            something, too long a list, or a rank that is no number from 1 on, or far above that of
            the file's own matrices.
    """
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in KEPT_BASE:
        raise MimaError(
            f"adapter {path}: init_lora_weights {quoted(begun, 40)} has changed the base weights, "
            "too; peft's save_pretrained converts it, by path_initial_model_for_weight_conversion"
        )
    names: list[object] = []
    for setting in ("target_modules", "exclude_modules"):
        value = settings.get(setting)
        given = value if isinstance(value, list) else [value]
        if len(given) > MOST_NAMES:
            raise MimaError(f"adapter {path}: {setting} has {len(given)} entries")
        names += [one for one in given if one is not None]
    ranks = [settings["r"]] if "r" in settings else []
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(setting) or {}
        if not isinstance(pattern, dict) or len(pattern) > MOST_NAMES:
            raise MimaError(f"adapter {path}: {setting} is no short mapping of names to numbers")
        names += pattern
        ranks += pattern.values() if setting == "rank_pattern" else ()
    for name in names:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise MimaError(
                f"adapter {path}: {quoted(name, 80)} is an expression for layers, "
                "which is not run; name the layers"
            )
    for rank in ranks:
        if not isinstance(rank, int) or not 1 <= rank <= max(most, MOST_RANK):
            raise MimaError(
                f"adapter {path}: rank {quoted(rank, 40)}, the largest of the file's "
                f"matrices is {most}"
            )


def learned(
    modules: Mapping[str, torch.nn.Module], adapter: str, path: Path, *, whole: bool
) -> dict[str, Any]:
    """What peft has put into modules: whole weights, or low-rank updates."""
    found: dict[str, Any] = {}
    for component, module in modules.items():
        if whole:
            with foreign_errors(path):
                changes = _merged_weights(module, adapter)
        else:
            updates = low_rank_updates(module, adapter, f"adapter {path}")
            changes = {name: update.copied() for name, update in updates.items()}
        found |= {f"{component}.{name}": change for name, change in changes.items()}
    return found


def _merged_weights(module: torch.nn.Module, adapter: str) -> dict[str, Any]:
    """The weights that peft makes of an adapter that is no low-rank matrix, by name."""
    values = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if any(adapter in getattr(layer, part) for part in layer.adapter_layer_names):
            # without safe_merge peft writes into the weight
            layer.merge(safe_merge=True, adapter_names=[adapter])
            weight: Any = layer.get_base_layer().weight
            values[f"{name}.weight"] = weight.detach()
    return values
