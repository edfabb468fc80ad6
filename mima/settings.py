"""Settings as frozen classes: read from plain data, every problem named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mima.errors import MOST_PROBLEMS, MimaError, ProblemList, nearest, one_line, quoted

NO_NUMBER = "Input should be a number"


def _is_no_number(value: object, annotation: Any) -> bool:
    """Whether a truth value stands, alone or in a list, where numbers are asked for.

    Python takes `True` for 1, and so would pydantic.
    """
    if isinstance(value, (list, tuple)):
        return any(_is_no_number(part, annotation) for part in value)
    kinds = list(_parts(annotation))
    asked = (int in kinds or float in kinds) and bool not in kinds and Any not in kinds
    return isinstance(value, bool) and asked


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a type is made of."""
    inner = get_args(annotation)
    for part in inner:
        yield from _parts(part)
    if not inner:
        yield annotation


class Settings(BaseModel):
    """Frozen; refuses what it does not know, and numbers that are not finite or are no numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if _is_no_number(value, cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("no_number", NO_NUMBER)
        return value


SettingsT = TypeVar("SettingsT", bound=Settings)


ONE, SEVERAL = "<one>", "<several>"
"""Tags of a field that takes one group of settings or a list of such: no part of a name."""


def one_or_several(value: object) -> str:
    """Which of the two a plain value is, for pydantic's ``Discriminator``."""
    return SEVERAL if isinstance(value, (list, tuple)) else ONE


def set_nested(settings: dict[str, Any], name: str, value: Any) -> None:
    """Set ``a.b.c`` in nested settings, in place; parts that are missing are made.

    Raises:
        MimaError: a part on the way is a value.
    """
    *parts, last = name.split(".")
    for part in parts:
        settings = settings.setdefault(part, {})
        if not isinstance(settings, dict):
            raise MimaError(
                f"setting {one_line(name)}: {one_line(part)} has no settings of its own"
            )
    settings[last] = value


def parse_config(kind: type[SettingsT], raw: dict[str, Any], *, source: str) -> SettingsT:
    """Check plain data against a settings class; errors say where, what was expected and got."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        found = [item for item in error.errors() if not _follows(item)]
        # to look for the nearest name of a hundred thousand unknown ones takes minutes
        problems = [_explain(kind, dict(item)) for item in found[:MOST_PROBLEMS]]
        raise ProblemList(f"config: {source} has {len(found)} problem(s)", problems) from error


def _follows(error: ErrorDetails) -> bool:
    """Whether a list counts as too short because all in it was refused, which is told already."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


_EXPECTED = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be settings by name",
    "path_type": "Input should be a path",
}
"""In place of what pydantic says in Python's words."""


def _explain(kind: type[Settings], error: dict[str, Any]) -> str:
    # of a setting that takes a number or several, pydantic names which it tried
    tried = (ONE, SEVERAL, "float", "int")
    where = [
        str(part)
        for part in error["loc"]
        if part not in tried and not str(part).startswith("tuple[")
    ]
    name = ".".join(where)
    if error["type"] != "extra_forbidden":
        got = "" if isinstance(error["input"], dict) else f", got {quoted(error['input'])}"
        said = _EXPECTED.get(error["type"], error["msg"])
        return f"{name + ': ' if name else ''}{said}{got}"
    fields = kind.model_fields
    for part in where[:-1]:
        if not part.isdigit():
            group = group_of(fields[part].annotation)
            fields = group.model_fields if group else {}
    return f"{one_line(name)}: unknown setting; {nearest(where[-1], fields)}"


def group_of(annotation: Any) -> type[Settings] | None:
    """The settings class that a field's type is, or is made of."""
    # to Python 3.10, tuple[float, float] is a type
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation if issubclass(annotation, Settings) else None
    found = (group_of(part) for part in get_args(annotation))
    return next((group for group in found if group), None)


T = TypeVar("T")


def checked(kind: type[T], what: str, settings: Mapping[str, Any]) -> T:
    """A dataclass of settings from plain values, of the types that it declares.

    Raises:
        MimaError: a setting that it does not have, or values that it cannot have, all in one error.
    """
    for name, last, known in _unknown(kind, settings):
        raise MimaError(f"{what} has no setting {one_line(name)}; {nearest(last, known)}")
    problems = [
        f"{name} {NO_NUMBER}, got {quoted(value)}" for name, value in _no_numbers(kind, settings)
    ]
    try:
        made = TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        problems += [
            f"{'.'.join(map(str, item['loc']))} {item['msg']}, got {quoted(item['input'])}"
            if item["loc"]
            else item["msg"].removeprefix("Value error, ")
            for item in error.errors()
        ]
        raise ProblemList(f"{what} cannot be used:", problems) from error
    if problems:
        raise ProblemList(f"{what} cannot be used:", problems)
    return made


def _unknown(
    kind: Any, settings: Mapping[Any, Any], within: str = ""
) -> Iterator[tuple[str, str, set[str]]]:
    """Each name that a dataclass, or one within it, does not have: dotted, its end, those it has.

    Pydantic passes over such names without a word.
    """
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for name, value in settings.items():
        if name not in known:
            yield f"{within}{name}", str(name), known
        elif _is_dataclass(hints[name]) and isinstance(value, Mapping):
            yield from _unknown(hints[name], value, f"{within}{name}.")


def _is_dataclass(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _no_numbers(kind: Any, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of each setting of a dataclass, and of those within it, that is no number."""
    hints = get_type_hints(kind)
    for name, value in settings.items():
        hint = hints.get(name)
        if _is_dataclass(hint) and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", no) for inner, no in _no_numbers(hint, value))
        elif _is_no_number(value, hint):
            yield name, value
