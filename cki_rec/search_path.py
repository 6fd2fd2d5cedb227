"""Folders that add choices to the groups of ``conf/``: ``./conf``, ``--config-dir``, Hydra's own.

All of them become one ``hydra.searchpath``, so that Hydra, the checks of choices and the help see
the same folders.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from cki_rec import project_root

CONF = project_root() / "conf"
WORKING_CONF = Path("conf")
"""Folder of choices in the working folder; it needs no option."""
SEARCH_PATH = "hydra.searchpath"
FLAGS = ("--config-dir", "-cd")
FILE, PACKAGE = "file://", "pkg://"


def with_folders(options: Sequence[str]) -> list[str]:
    """Return the options with ``--config-dir DIR`` and ``./conf`` as Hydra's search path."""
    words, entries, rest = iter(options), list[str](), list[str]()
    for word in words:
        name, _, value = word.partition("=")
        if name in FLAGS:
            entries.append(value or next(words, "DIR"))
        elif name == SEARCH_PATH:
            entries += _entries(value)
        else:
            rest.append(word)
    if WORKING_CONF.is_dir():
        entries.append(str(WORKING_CONF))
    located = dict.fromkeys(_located(entry) for entry in entries)
    located.pop(_located(str(CONF)), None)  # the working folder is a clone of this project
    return rest + ([f"{SEARCH_PATH}=[{','.join(map(_quoted, located))}]"] if located else [])


def folders(options: Sequence[str]) -> list[Path]:
    """Return the folders that ``with_folders`` named; packages that are not there are left out."""
    value = next((o.partition("=")[2] for o in options if o.startswith(f"{SEARCH_PATH}=")), "")
    entries = [_located(entry) for entry in _entries(value)]
    named = [Path(e.removeprefix(FILE)) for e in entries if e.startswith(FILE)]
    return named + [f for e in entries if e.startswith(PACKAGE) for f in _of_package(e)]


def config_groups(search_path: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Return the choices of every configuration group, in ``conf/`` and in a search path."""
    found: dict[str, set[str]] = {}
    for file in (file for root in (CONF, *search_path) for file in root.glob("*/*.yaml")):
        if file.parent.name != "hydra":
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(choices) for name, choices in sorted(found.items())}


def hidden_choice(group: str, choice: str, search_path: Sequence[Path]) -> Path | None:
    """Return the file that Hydra would not read, since ``conf/`` has another one of its name."""
    ours = CONF / group / f"{choice}.yaml"
    theirs = [root / group / f"{choice}.yaml" for root in search_path]
    if not ours.is_file():
        return None
    return next((f for f in theirs if f.is_file() and f.read_bytes() != ours.read_bytes()), None)


def _entries(value: str) -> list[str]:
    entries = [entry.strip().strip("'\"") for entry in value.strip("[]").split(",")]
    return [entry for entry in entries if entry]


def _located(entry: str) -> str:
    """Return an entry of the search path with an absolute folder; others are unchanged."""
    if "://" in entry and not entry.startswith(FILE):
        return entry
    return f"{FILE}{Path(entry.removeprefix(FILE)).resolve()}"


def _quoted(entry: str) -> str:
    is_plain = all(letter.isalnum() or letter in "/\\_-.:+%@?|" for letter in entry)
    return entry if is_plain else "'" + entry.replace("'", "\\'") + "'"


def _of_package(entry: str) -> list[Path]:
    """Return the folders of ``pkg://package.folder``."""
    name = entry.removeprefix(PACKAGE).replace("/", ".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
