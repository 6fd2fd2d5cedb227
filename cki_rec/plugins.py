"""Code of users: methods, networks and metrics in a package of theirs or in a ``.py`` file.

Only names in the configuration are imported. A checkpoint holds the name of its network's class,
and reading it imports nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import marshal
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from cki_rec.config import UserError, nearest

_digests: dict[str, str] = {}
"""Name of a loaded module -> digest of the source that was loaded."""
_classes: dict[str, Any] = {}
"""``model.module`` -> the class that it names."""


def load(name: str, option: str) -> ModuleType:
    """Return the module of a dotted name or of a path that ends in ``.py``.

    The working folder is searched last. A file whose content has changed is loaded again.

    Args:
        name: As written in the configuration.
        option: The option that holds it, for messages.

    Raises:
        UserError: It is not there, or its import fails.
    """
    where = f"{option}={name}"
    if not name.endswith(".py"):
        return _imported(name, where)
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"{where}: no such file; name a .py file, or a module as package.module")
    digest = _file_digest(path)
    unique = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if _digests.get(unique) != digest:
        loader = SourceFileLoader(unique, str(path))
        spec = importlib.util.spec_from_file_location(unique, path, loader=loader)
        assert spec is not None
        module = sys.modules[unique] = importlib.util.module_from_spec(spec)
        try:  # not the compiled file: it may be of a content of the same size and second
            exec(loader.source_to_code(path.read_bytes(), str(path)), vars(module))
        except Exception as error:
            del sys.modules[unique]
            raise UserError(f"{where}: {_reason(error, path)}") from error
        _digests[unique] = digest
    return sys.modules[unique]


def load_class(name: str, option: str = "model.module") -> Any:
    """Return the class that ``package.module:Class`` or ``path/to/file.py:Class`` names.

    Raises:
        UserError: There is none of that name, or see ``load``.
    """
    value = _classes[name] = _attribute(name, option, "Class", inspect.isclass)
    return value


def load_function(name: str, option: str) -> Any:
    """Return the function or class that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        UserError: There is none of that name, or see ``load``.
    """
    return _attribute(name, option, "function", callable)


def _attribute(name: str, option: str, kind: str, is_kind: Callable[[Any], bool]) -> Any:
    """Return the callable of a name; ``is_kind`` selects those that a message lists."""
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise UserError(
            f"{option}={name}: expected package.module:{kind}, or path/to/file.py:{kind}"
        )
    module = load(source, option)
    if not callable(value := getattr(module, attribute, None)):
        known = [n for n, v in vars(module).items() if is_kind(v)]
        listed = ", ".join(n for n in known if vars(module)[n].__module__ == module.__name__)
        plural = "classes" if kind == "Class" else "functions"
        raise UserError(
            f"{option}={name}: {nearest(attribute, known)}{source} has no {kind.lower()}"
            f" {attribute}; its {plural} are {listed or 'none'}"
        )
    return value


def loaded_class(name: str) -> Any:
    """Return the class of a ``model.module`` that the configuration has named; None if it has not.

    Paths may be written in several ways, so a class of the same name counts.
    """
    ending = f":{name.rpartition(':')[2]}"
    alike = [value for key, value in _classes.items() if key.endswith(ending)]
    return _classes.get(name, alike[-1] if alike else None)


def source_digest(value: Any) -> str | None:
    """Return the digest of the source of a function or class; None for those of this package.

    It covers the file of its module, or all files of its package if ``load`` was given a package.
    Of code that was typed into a notebook it covers the definition.
    """
    name = value.__module__
    if name.split(".")[0] == "cki_rec":
        return None
    for loaded, digest in _digests.items():
        if name == loaded or name.startswith(f"{loaded}."):
            return digest
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None:
        return _file_digest(Path(file))
    try:
        return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()
    except (OSError, TypeError):  # typed into a plain interpreter
        code = getattr(value, "__code__", None)
        compiled = value.__qualname__.encode() if code is None else marshal.dumps(code)
        return hashlib.sha256(compiled).hexdigest()


def _imported(name: str, where: str) -> ModuleType:
    """Return the module of a dotted name."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"{where}: no module {error.name} is installed or in {os.getcwd()}; install it,"
                " or name a .py file by its path"
            ) from None
        raise UserError(f"{where}: {_reason(error, None)}") from error
    except Exception as error:
        raise UserError(f"{where}: {_reason(error, None)}") from error
    if module.__name__ not in _digests and module.__file__ is not None:
        path = Path(module.__file__)
        is_package = path.name == "__init__.py"
        files = sorted(path.parent.rglob("*.py")) if is_package else [path]
        _digests[module.__name__] = _joined_digest(files)
    return module


def _joined_digest(files: list[Path]) -> str:
    if len(files) == 1:
        return _file_digest(files[0])
    lines = [f"{path.relative_to(files[0].parent)} {_file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reason(error: Exception, path: Path | None) -> str:
    """Return the error of a user's module in one line, with the place in their code."""
    place = ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
        return f"SyntaxError: {error.msg}{place}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and not frame.filename.startswith("<")
        and (path is None or frame.filename == str(path))
    ]
    if frames:
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
