"""Plain data: YAML and JSON in which a name stands once (readers keep the last), and flattened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from mima.errors import MimaError, first_line, one_line, quoted

DEEPEST = 100
"""Levels of nesting that are read; Python's own recursion ends at 1000."""
MOST_VALUES = 100_000
"""Values that a YAML text may stand for, each alias counted as all that it repeats."""
LONGEST_INTEGER = 1000
"""Digits; to read a million of them takes minutes."""

# what PyYAML's constructors of numbers, dates and tagged values raise for what they cannot read
_VALUE_ERRORS = (ValueError, LookupError, AttributeError, ArithmeticError)
# a text that does not end reaches to the end: else each quote in it would be tried as the first
_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.?)*(?:"|\Z)|[\[\]{}]', re.S)


class _Once(Composer, SafeConstructor, Resolver):
    """Plain data alone; refuses keys that stand twice, deep nesting, and aliases that multiply."""

    check_event: Any
    """Of the parser that it is put together with."""

    def __init__(self) -> None:
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = 0
        self._values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        repeated = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST:
            raise MimaError(f"nested more than {DEEPEST} levels deep")
        # values are counted as they come: the size of a list is known at its end alone
        self._values += 1
        if self._values > MOST_VALUES:
            raise MimaError(f"more than {MOST_VALUES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if repeated and id(node) not in self._sizes:
            raise MimaError("an alias stands within what it repeats")
        if not repeated:
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in inner)
        if self._sizes[id(node)] > MOST_VALUES:
            raise MimaError(f"more than {MOST_VALUES} values, aliases counted in full")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_scalar(self, node: Any) -> Any:
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_INTEGER:
            raise MimaError(f"a number of {len(node.value)} digits")
        return super().construct_scalar(node)


class _OnceLoader(_Once, yaml.SafeLoader):
    """Parses in Python."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        _Once.__init__(self)


_TAKEN_OTHERWISE = {"\t", "?"}
_LOADERS: list[Any] = [_OnceLoader]
if yaml.__with_libyaml__:
    from yaml._yaml import CParser

    class _FastLoader(_Once, CParser):
        """Parses in C, in a fifth of the time."""

        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            _Once.__init__(self)

    _LOADERS.insert(0, _FastLoader)


def read_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: it is none, or would make more than plain data.
        MimaError: a mapping has a key twice; a value that cannot be read, or too long, too deep or
            too many of them.
    """
    *fast, own = _LOADERS
    try:
        # both take the same for YAML where no tab or question mark is in it; what is none is said
        # in the words of PyYAML's own parser
        for loader in () if _TAKEN_OTHERWISE & set(text) else fast:
            with suppress(yaml.YAMLError, UnicodeEncodeError):
                return yaml.load(text, Loader=loader)
        return yaml.load(text, Loader=own)
    except MimaError:
        raise
    except _VALUE_ERRORS as error:
        raise MimaError(f"a value cannot be read: {first_line(error)}") from error


def yaml_problem(error: yaml.YAMLError | ValueError) -> str:
    """What `read_yaml` or the decoding of its text raised, and where, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8 text"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {one_line(error.problem)}"


def read_json(text: str) -> Any:
    """Read JSON.

    Raises:
        json.JSONDecodeError: it is none.
        MimaError: an object has a key twice, a number is too long, or values are nested too deep.
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            raise MimaError(f"nested more than {DEEPEST} levels deep")
    return json.loads(text, object_pairs_hook=_once, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise MimaError(f"a number of {len(digits)} digits")
    return int(digits)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, ``lower.lr``; a list is a value, and so is an empty mapping."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What two flat mappings have apart, by name, as ``0 then, 8 now``."""
    return {
        name: f"{one_line(then.get(name), 60)} then, {one_line(now.get(name), 60)} now"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def _refuse_twice(keys: Sequence[Any]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise MimaError(f"{quoted(key)} stands twice in one mapping; only one could be kept")
        seen.add(key)


def hashed(text: str) -> str:
    """A short name for a text, which another text does not have."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
