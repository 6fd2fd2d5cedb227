"""Options of a method: the parameters of its function that have a default value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cki_rec.merging.params import MergeError


def nearest(word: object, known: Iterable[str]) -> str:
    """Return "did you mean ...? " with the nearest known word, or an empty text."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def check_arguments(
    name: str,
    function: Callable[..., Any],
    known: Mapping[str, Any],
    options: Mapping[str, Any],
    others: Collection[str] = (),
) -> None:
    """Check that a function has these options, and that their values have the right types.

    Args:
        name: Name of the method, for the message.
        function: The method; its annotations are the types of the options.
        known: Option -> default value.
        options: Option -> value.
        others: Arguments that are no options, for the nearest name of a mistyped one.

    Raises:
        MergeError: An option does not fit; lists the options of the method.
    """
    shown = ", ".join(f"{option}={in_yaml(value)}" for option, value in known.items())
    takes = f"{name} takes {shown}" if shown else f"{name} takes none"
    hints = get_type_hints(function)
    for option, value in options.items():
        if option not in known:
            raise MergeError(f"no option '{option}': {nearest(option, [*known, *others])}{takes}")
        if option in hints and not _fits(value, hints[option]):
            wanted = _described(hints[option])
            raise MergeError(f"{option}={in_yaml(value)}: must be {wanted}; {takes}")


def in_yaml(value: Any) -> str:
    """Return a value as ``conf/`` writes it."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {in_yaml(of)}' for key, of in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(part, get_args(hint)[0]) for part in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if hint is float:
        return is_number and math.isfinite(value)
    if hint is int:
        return is_number and isinstance(value, Integral)
    return type(value) is hint


def _described(hint: Any) -> str:
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
    if get_origin(hint) is UnionType:
        return " or ".join(_described(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list (of each: {_described(get_args(hint)[0])})"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return words.get(hint, "null")
