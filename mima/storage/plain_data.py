"""Plain data: YAML and JSON in which a name stands once (readers keep the last), and flattened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mima.errors import MimaError


class _OnceLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: it is none, or would make more than plain data.
        MimaError: a mapping has a key twice.
    """
    # a SafeLoader: plain data only
    return yaml.load(text, Loader=_OnceLoader)


def read_json(text: str) -> Any:
    """Read JSON.

    Raises:
        json.JSONDecodeError: it is none.
        MimaError: an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_once)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, ``lower.lr``; a list is a value, and so is an empty mapping."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def _refuse_twice(keys: Sequence[Any]) -> None:
    for n, key in enumerate(keys):
        if key in keys[:n]:
            raise MimaError(f"{key!r} stands twice in one mapping; only one could be kept")
