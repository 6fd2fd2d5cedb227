"""Options in which two networks differ, and their effect on the function of parameters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cki_rec.config import Model
from cki_rec.models import MODELS
from cki_rec.models.layers import MLP_OPTIONS
from cki_rec.plugins import loaded_class

TRAINING_ONLY = ("dropout", "init_std", "matrix_std")
"""Last words of options that matter in training only."""


def differences(one: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two networks differ, by dotted name."""
    left, right = _flat(asdict(one)), _flat(asdict(other))
    keys = {**left, **right}  # of a section that one of them lacks, the other has several
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def decides(key: str, model: Model) -> bool:
    """Return whether an option changes the function that a network computes from its parameters.

    ``histories`` is excluded: it changes the features of the schema, which are compared apart. So
    is ``module``, a path that may be written in several ways: ``name`` is its class.
    """
    first, _, rest = key.partition(".")
    if (rest or first) in (*TRAINING_ONLY, "histories", "module"):
        return False
    if not rest and first not in MLP_OPTIONS:
        return True
    return first in reads(model)


def reads(model: Model) -> tuple[str, ...]:
    """Return the optional options and sections that a network reads.

    A model class declares them as ``reads``. Default: the options of an MLP.
    """
    network = MODELS.get(model.name) if model.module is None else loaded_class(model.module)
    names: tuple[str, ...] = getattr(network, "reads", MLP_OPTIONS)
    return names


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
