"""From Hydra's text to typed options, once; identity of runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cki_rec import __version__, project_root
from cki_rec.config.checks import check
from cki_rec.config.errors import UserError
from cki_rec.config.options import Config, Model


def first_comment(group: str, choice: str) -> str:
    """Return the first comment of a file in ``conf/``, which says what the choice is."""
    path = project_root() / "conf" / group / f"{choice}.yaml"
    lines = path.read_text().splitlines() if path.exists() else []
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return next((line for line in comments if not line.startswith("@package")), "")


def register_resolvers() -> None:
    """Define what ``${...:}`` in ``conf/`` may call: ``add`` and ``project``."""
    OmegaConf.register_new_resolver("add", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver(
        "project", lambda path: str(project_root() / path), replace=True
    )


def parse(composed: DictConfig) -> Config:
    """Return the typed configuration of a composed Hydra tree.

    Raises:
        UserError: An unknown key, a wrong type or an impossible combination, by dotted path.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    check(config)
    return config


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
    return asdict(value)


def model_options(value: dict[str, Any]) -> Model:
    """Return the model section that ``section`` gave.

    Raises:
        TypeError: A key is missing, unknown or of another type.
    """
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), value))
    except OmegaConfBaseException as error:
        raise TypeError(_first_line(error)) from None
    assert isinstance(options, Model)
    return options


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0]


def with_delta(config: Config, delta: dict[str, Any], where: str = "merge.sources") -> Config:
    """Return ``config`` with dotted keys replaced, as ``merge.sources`` names parents.

    Args:
        config: Stays as it is.
        delta: Values by dotted key; a start is replaced whole.
        where: Option that the delta stands in, for messages.

    Raises:
        UserError: A key that does not exist, or a value of another type.
    """
    tree = OmegaConf.structured(config)
    for key, value in delta.items():
        if ".start." in key or (key == "train" and isinstance(value, dict) and "start" in value):
            raise UserError(f"{where}, {key}: a start is named whole, as train.start: {{...}}")
        try:
            is_whole = key.rpartition(".")[2] in ("start", "base")
            OmegaConf.update(tree, key, value, force_add=False, merge=not is_whole)
        except OmegaConfBaseException as error:
            raise UserError(f"{where}, {key}: {_first_line(error)}") from None
    changed = OmegaConf.to_object(tree)
    assert isinstance(changed, Config)
    check(changed)
    return changed
