"""Options as typed, ``key=value``: every mistake becomes one line with the form that works."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OPEN = "merge.options"
"""Section whose keys depend on the method."""
KEY = re.compile(r"[+~]{0,2}[\w@/.:$-]+", re.ASCII)
LEAF = re.compile(r"[^\[\]{},]+")
"""Text between the brackets and commas of a list or mapping."""


def unprintable(words: Sequence[str]) -> str:
    """Return the mistake of a command line with control characters; "": there are none."""
    for word in words:
        if word.endswith("\r"):
            return (
                f"{word.rstrip()!r} ends with a carriage return, as in scripts saved on Windows;"
                " save the script with Unix line ends (dos2unix SCRIPT)"
            )
        if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in word):
            return f"{word!r}: has a control character, or bytes that are no UTF-8"
    return ""


def parse_options(words: Sequence[str]) -> list[Override]:
    """Return the parsed options of a command line.

    Raises:
        UserError: A word is no option, or its value must be quoted.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from cki_rec.config.errors import UserError

    parser, parsed = OverridesParser.create(), list[Any]()
    for place, word in enumerate(words):
        more = list(itertools.takewhile(_is_part, words[place + 1 :]))
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"'{word}': options are written key=value; see cki-rec --help")
        try:
            parsed.append(parser.parse_rule(word, "override"))
        except Exception:  # of Hydra's grammar, on any text
            raise UserError(_unreadable(word, more)) from None
        if more and "=" in word:
            quoted = shlex.quote(" ".join([word, *more]))
            raise UserError(
                f"'{more[0]}': options are written key=value; a value with blanks is quoted:"
                f" {quoted}; see cki-rec --help"
            )
    return parsed


def with_open_options(words: Sequence[str]) -> list[str]:
    """Return the options with those of the method marked as allowed to be new (``++``)."""
    return [f"++{w}" if w.startswith((f"{OPEN}.", f"{OPEN}=")) else w for w in words]


def check_method_options(method: str, words: Sequence[str], roots: Sequence[Path]) -> None:
    """Check the names of the method's options by the files of ``merge/``.

    Options of a method without any listed option are checked when the method is imported.

    Raises:
        UserError: An option that no file lists for this method.
    """
    from omegaconf import OmegaConf

    from cki_rec.config.errors import UserError, nearest

    names = [w.partition("=")[0].removeprefix(f"++{OPEN}.") for w in words if "=" in w]
    typed = [n for n, w in zip(names, words, strict=False) if w.startswith(f"++{OPEN}.")]
    if not typed:
        return
    files = [path for root in roots for path in sorted((root / "merge").glob("*.yaml"))]
    of_method = [p for p in files if re.search(rf"^method: {method}$", p.read_text(), re.M)]
    values = [OmegaConf.to_container(OmegaConf.load(path)) for path in of_method]
    known = sorted({o for v in values if isinstance(v, dict) for o in v.get("options", ())})
    for name in typed if known else []:
        if name not in known:
            raise UserError(
                f"no option '{OPEN}.{name}': {nearest(name, known)}{method} takes"
                f" {', '.join(known)}"
            )


def explain(error: Exception, words: Sequence[str], groups: Mapping[str, Any]) -> str:
    """Return one line for an error of composition: the unknown key and its nearest name.

    Args:
        error: The error of Hydra.
        words: The options.
        groups: The choices of every configuration group.
    """
    from difflib import get_close_matches

    from hydra import compose
    from omegaconf import OmegaConf

    known: set[str] = set(groups)
    choices = [w for w in words if w.partition("=")[0] in {*groups, "hydra.searchpath"}]
    try:
        tree = OmegaConf.to_container(compose("config", choices))
    except Exception:  # the choices are the mistake
        return " ".join(str(error).split())
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        prefix, node = pending.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            known.add(prefix + str(key))
            pending.append((f"{prefix}{key}.", value))
    for word in words:
        key = word.split("=")[0].lstrip("~")
        if key not in known and not key.startswith(("hydra", "+")):
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            return f"no option '{key}': {hint}see cki-rec --help"
    return " ".join(str(error).split())


def sweep_mistake(override: Override, is_group: bool) -> str:
    """Return the line for an option with several values outside a sweep."""
    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    line = f"{key}={value}: several values are a sweep, which needs -m"
    if is_group:
        return f"{line}; without a sweep, name one choice"
    return f"{line}; a list is {_option(key, f'[{value}]')}, a text {_option(key, _string(value))}"


def _is_part(word: str) -> bool:
    """Return whether a word may belong to the option before it: the shell splits at blanks."""
    return "=" not in word and word[:1] not in ("~", "-")


def _unreadable(word: str, more: Sequence[str]) -> str:
    """Return the line for an option that Hydra's grammar does not read."""
    key, _, value = word.partition("=")
    whole = " ".join([word, *more])
    if not KEY.fullmatch(key):
        return f"no option '{key}': see cki-rec --help"
    if more and _reads(whole):
        quoted = shlex.quote(whole)
        return f"{word}: the shell splits this option at its blanks; quote it: {quoted}"
    if value[:1] in ("[", "{"):
        fixed = LEAF.sub(lambda leaf: _quoted_leaf(leaf[0]), value)
        if _reads(f"{key}={fixed}"):
            return f"{word}: texts with special characters need quotes: {_option(key, fixed)}"
        return (
            f"{word}: brackets or quotes do not match; a list is [1,2], a mapping {{a: 1}}, a text"
            f" {_option(key, _string(value))}"
        )
    fixed = _string(value)
    if not _reads(f"{key}={fixed}"):
        return f"{word}: cannot be read; options are written key=value, see cki-rec --help"
    return f"{word}: a value with special characters needs quotes: {_option(key, fixed)}"


def _reads(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_rule(word, "override")
    except Exception:  # of Hydra's grammar, on any text
        return False
    return True


def _quoted_leaf(leaf: str) -> str:
    """Return an entry of a list or mapping, ``value`` or ``key: value``, quoted if necessary."""
    if _reads(f"x=[{leaf}]") or _reads(f"x={{{leaf}}}"):
        return leaf
    key, colon, value = leaf.partition(":")
    if colon and _reads(f"x={{{key}: 1}}"):
        return f"{key}: {_string(value.strip())}"
    return _string(leaf.strip())


def _string(value: str) -> str:
    """Return a value as a quoted text of Hydra's grammar."""
    mark = "'" if '"' in value and "'" not in value else '"'
    escaped = re.sub(
        rf"(\\*)({mark}|$)", lambda m: m[1] * 2 + (f"\\{mark}" if m[2] else ""), value
    )
    return f"{mark}{escaped}{mark}"


def _option(key: str, value: str) -> str:
    """Return an option as it is typed in a shell."""
    return shlex.quote(f"{key}={value}")
