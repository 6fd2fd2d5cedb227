"""Options whose values are texts: kept as typed, and names that become folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from cki_rec.config.errors import UserError

NOT_TEXT = re.compile(
    r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?(inf|nan)|true|false", re.I
)
"""Words that Hydra reads as a number or a truth value."""
NAME = re.compile(r"[\w.-]{1,100}")
NAME_RULE = "must be 1 to 100 letters, digits, '_', '.' and '-', and not '.' or '..'"


def is_name(value: object) -> bool:
    """Return whether a text can name a folder or a file."""
    return bool(NAME.fullmatch(str(value))) and value not in (".", "..")


def check_name(option: str, value: object) -> None:
    """Check the name of a folder.

    Raises:
        UserError: It is too long, or may lead elsewhere.
    """
    if not is_name(value):
        raise UserError(f"{option}={value}: {NAME_RULE}")


def _name(value: Any) -> Any:
    if isinstance(value, float):  # from a YAML file: 1.10 has become 1.1
        raise PydanticCustomError("name", "is read as a number; put it in quotes")
    if not is_name(value):
        raise PydanticCustomError("name", "{rule}", {"rule": NAME_RULE})
    return value


Name = Annotated[str, BeforeValidator(_name)]
"""A text that names a folder."""
_hints = cache(get_type_hints)


def quote_texts(words: Sequence[str], config: type) -> list[str]:
    """Return the options of a command line with texts in quotes that Hydra would change.

    ``name=1.10`` is the text 1.10, not the number 1.1; values of a sweep are treated alike.

    Args:
        words: Options, ``key=value``.
        config: The class of the whole configuration.
    """
    return [_quoted(word, config) for word in words]


def _quoted(word: str, config: type) -> str:
    key, _, value = word.partition("=")
    if not _is_text(key.lstrip("+"), config):
        return word
    values = [f"'{v}'" if NOT_TEXT.fullmatch(v) else v for v in value.split(",")]
    return f"{key}={','.join(values)}"


def _is_text(key: str, kind: Any) -> bool:
    """Return whether an option is a text, or anything that a text may be."""
    for part in key.split("."):
        hints = _hints(kind) if isinstance(kind, type) else {}
        if part not in hints:
            return False
        kind = hints[part]
    return kind is Any or str in (kind, *get_args(kind))
