"""Sections of the configuration: validated dataclasses, and their errors in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from typing_extensions import dataclass_transform

from cki_rec.config.errors import UserError, nearest

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SOURCE_RULE = "must be a path, or options as {seed: 1}"


def _source(value: Any) -> Any:
    """Return a source as a mapping: a plain path is ``{path: ...}``."""
    if isinstance(value, str) and value.strip():
        return {"path": value}
    if not isinstance(value, dict):
        raise PydanticCustomError("source", "{rule}", {"rule": SOURCE_RULE})
    return value


Source = Annotated[dict[str, Any], BeforeValidator(_source)]
"""A model, by its path or by config deltas."""
WORDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be a word",
    "list": "must be a list",
    "dict": "must be a mapping",
    "dataclass": "must be a section with keys",
    "missing": "is missing",
    "finite": "must be finite",
    "too": "must not be empty",
}
"""First word of a pydantic error type -> the message."""


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Make a class a section: every key is required, no other key is allowed."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
    made: Any = dataclass(cls, slots=True, kw_only=True, config=config)
    return cast("type[T]", made)


def choices(kind: type, option: str) -> tuple[str, ...]:
    """Return the words that an option of a section takes."""
    return get_args(get_type_hints(kind)[option])


def validated(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a section with these values.

    Raises:
        UserError: The first wrong value, by dotted path.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise UserError(_line(kind, error)) from None


def _line(kind: Any, error: ValidationError) -> str:
    """Return one line for the first error: the option, its value, the rule."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if not str(part).startswith("function-")]
    key = ".".join(str(part) for part in path if not isinstance(part, int))
    key += "".join(f"[{part}]" for part in path if isinstance(part, int))
    context, name = first.get("ctx", {}), first["type"]
    if name == "unexpected_keyword_argument":
        known = _keys(kind, [str(part) for part in path[:-1]])
        return f"{key}: no such option; {nearest(path[-1], known)}one of {', '.join(known)}"
    if name == "value_error":
        prefix = f"{key}." if key else ""
        return f"{prefix}{context['error']}"
    where = f"{key}={first['input']}"
    if name == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        return f"{where}: {nearest(first['input'], words)}one of {', '.join(words)}"
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for bound, phrase in bounds.items():
        if bound in context:
            return f"{where}: must be {phrase} {context[bound]:g}"
    rule = WORDS.get(name.partition("_")[0], first["msg"])
    return f"{key} {rule}" if name == "missing" else f"{where}: {rule}"


def _keys(kind: Any, path: list[str]) -> list[str]:
    """Return the keys of the section that a path leads to."""
    for part in path:
        hint = get_type_hints(kind)[part]
        kind = next((k for k in get_args(hint) if is_dataclass(k)), hint)  # of SECTION | None
    return list(get_type_hints(kind))
