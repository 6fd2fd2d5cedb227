"""In which options two networks differ, and whether parameters mean the same to both."""

from __future__ import annotations

from typing import Any

from cki_rec.config import Model, section

TRAINING_ONLY = ("dropout", "init_std", "matrix_std")
"""Last words of options that say nothing of a trained model."""
SECTIONS = {
    "cross": ("dcn", "dcnv2"),
    "attention": ("din",),
    "streams": ("final_mlp",),
}
"""Options of some networks only -> which."""
WITHOUT_MLP = ("lr", "fm")
OF_MLP = ("hidden", "activation", "batch_norm")


def differences(one: Model, other: Model) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two networks differ, by dotted name."""
    left, right = _flat(section(one)), _flat(section(other))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def decides(key: str, model: Model) -> bool:
    """Return whether an option decides what a network computes from given parameters.

    ``histories`` does, but shows in the features of a schema.
    """
    first, _, rest = key.partition(".")
    if (rest or first) in (*TRAINING_ONLY, "histories"):
        return False
    if rest:
        return model.name in SECTIONS[first]
    return not (first in OF_MLP and model.name in WITHOUT_MLP)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
