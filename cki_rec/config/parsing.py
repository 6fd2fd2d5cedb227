"""From Hydra's text to typed options, once; identity of runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cki_rec import __version__, project_root
from cki_rec.config.data_options import named_parts
from cki_rec.config.errors import UserError, nearest
from cki_rec.config.options import Config, Model
from cki_rec.config.section import validated
from cki_rec.config.texts import is_name, quote_texts

WHOLE = ("base", "start")
"""Options that a change replaces whole: they name one model."""
OF_SOURCES = ("data", "model", "train", "seed")
"""Options by which a source is named: those that its training reads."""

OF_OTHERS: dict[str, Any] = {
    **{"batches": None, "data": None, "format": None, "table_names": [], "max_rows": None},
}
"""Options of merges that only checkpoints of other programs have -> the value of no option."""
EVIDENCE = ("counts", "optimizer", "scores")
"""Measures of how often rows were trained, the best one first."""
OF_SOME_NETWORKS: dict[str, Any] = dict.fromkeys(("module", "sequence", "bottom"))
"""Options of ``model`` that not every network has, and their value without them."""
LATER: dict[str, Any] = {
    **{"plugins": [], "ranking": None, "new_rows": "oov", "deltas": [], "write": "model"},
    "evidence": "auto",
    **OF_SOME_NETWORKS,
    **OF_OTHERS,
}
"""Later options -> the value at which ``section`` leaves them out: identities stay the same."""


def first_comment(group: str, choice: str) -> str:
    """Return the first comment of a choice: in ``conf/``, ``./conf`` or beside an experiment."""
    beside = sorted(project_root().glob("experiments/*/conf"))
    roots = (project_root() / "conf", Path("conf"), *beside)
    paths = (root / group / f"{choice}.yaml" for root in roots if is_name(choice))
    path = next((path for path in paths if path.exists()), None)
    lines = path.read_text().splitlines() if path else []
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return next((line for line in comments if not line.startswith("@package")), "")


def preset_method(label: str) -> str | None:
    """Return the method of a preset of ``conf/merge``, or of the preset it starts from.

    None: there is no preset of this name.
    """
    path = project_root() / "conf" / "merge" / f"{label}.yaml"
    if not is_name(label) or not path.is_file():
        return None
    text = path.read_text()
    if named := re.search(r"^method: (\w+)", text, re.M):
        return named[1]
    start = re.search(r"^  - (?!_self_)(\w+)$", text, re.M)
    return preset_method(start[1]) if start else None


def register_resolvers() -> None:
    """Define the resolvers of ``${...:}`` in ``conf/``: ``add``, ``project`` and ``parts``."""
    OmegaConf.register_new_resolver("add", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver(
        "project", lambda path: str(project_root() / path), replace=True
    )
    OmegaConf.register_new_resolver("parts", _sources_of_parts, replace=True)


def _sources_of_parts(parts: Any) -> list[dict[str, Any]]:
    """Return one source per part of ``data.partition.parts``: its number or its name."""
    if not isinstance(parts, ListConfig):
        return [{"data.part": number} for number in range(int(parts))]
    listed = OmegaConf.to_container(parts, resolve=True)
    return [{"data.part": name} for name, _ in named_parts(cast("list[Any]", listed))]


def parse(composed: DictConfig) -> Config:
    """Return the typed configuration of a composed Hydra tree.

    Raises:
        UserError: An unknown key, a wrong type or an impossible combination, by dotted path.
    """
    seed = OmegaConf.select(composed, "seed", default=0)
    if not isinstance(seed, int):  # others are computed from it
        raise UserError(f"seed={seed}: must be a whole number")
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{error.full_key or 'configuration'}: {line}") from None
    return validated(Config, cast("dict[str, Any]", values))


def texts_as_typed(words: Sequence[str]) -> list[str]:
    """Return the options of a command line, of which Hydra changes no text (``quote_texts``)."""
    return quote_texts(words, Config)


def run_id(pipeline: str, reads: dict[str, Any]) -> str:
    """Return ``<pipeline>-<hash>``: equal for equal work, whatever machine or folder it runs in.

    Args:
        pipeline: Its name.
        reads: Everything its result depends on; never ``runtime``.
    """
    text = json.dumps({"version": __version__, **reads}, sort_keys=True)
    return f"{pipeline}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def section(value: Any) -> dict[str, Any]:
    """Return a section of the configuration as plain JSON values."""
    tree = asdict(value)
    return {k: v for k, v in tree.items() if k not in LATER or v != LATER[k]}


def model_options(value: dict[str, Any]) -> Model:
    """Return the model section that ``section`` gave.

    Raises:
        TypeError: A key is missing, unknown or of another type.
    """
    try:
        return validated(Model, {**OF_SOME_NETWORKS, **value})
    except UserError as error:
        raise TypeError(str(error)) from None


def check_source(delta: dict[str, Any], where: str) -> None:
    """Check that a source is named by no option that its training does not read.

    Raises:
        UserError: It is. (Unknown options are found by ``with_delta``.)
    """
    for key, value in delta.items():
        if key == "train.start" and isinstance(value, dict):
            check_source(value, f"{where}, {key}")
        elif key.split(".")[0] in {f.name for f in fields(Config)} - set(OF_SOURCES):
            raise UserError(
                f"{where}: {key} does not change the training of a source; name a source by"
                f" {', '.join(OF_SOURCES)}, or by the path of a checkpoint"
            )


def with_delta(config: Config, delta: dict[str, Any], where: str = "merge.sources") -> Config:
    """Return ``config`` with dotted keys replaced, as ``merge.sources`` names models.

    Args:
        config: The configuration; it is not changed.
        delta: Values by dotted key. Sections are merged; a start or a base is replaced whole.
        where: Option that holds the delta, for messages.

    Raises:
        UserError: A key that does not exist, or a value of another type.
    """
    tree = asdict(config)
    for key, value in delta.items():
        if ".start." in key or (key == "train" and isinstance(value, dict) and "start" in value):
            raise UserError(f"{where}, {key}: a start is named whole, as train.start: {{...}}")
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = _child(node, part, f"{where}, {key}")
        is_open = path == ["merge", "options"]
        if not is_open:
            _child(node, last, f"{where}, {key}")
        is_section = isinstance(value, dict) and isinstance(node.get(last), dict)
        node[last] = _merged(node[last], value) if is_section and last not in WHOLE else value
    try:
        return validated(Config, tree)
    except UserError as error:
        raise UserError(f"{where}, {error}") from None


def _child(node: Any, key: str, where: str) -> Any:
    if not isinstance(node, dict) or key not in node:
        known = list(node) if isinstance(node, dict) else []
        raise UserError(f"{where}: no such option; {nearest(key, known)}one of {', '.join(known)}")
    return node[key]


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        is_section = isinstance(value, dict) and isinstance(old.get(key), dict)
        result[key] = _merged(old[key], value) if is_section else value
    return result
