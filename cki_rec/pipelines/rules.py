"""Which parameters a rule of ``conf/merge`` merges, and what it is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Merge, UserError
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.ablations import permute, shuffle
from cki_rec.merging.noise import entropy_differences
from cki_rec.merging.params import Params
from cki_rec.models import build_model

HEAD = re.compile(r"mlp\.(?:layers\.(\d+)\.)?")
"""Begins the names of the MLP's parameters; the number of their layer."""


def outside_scope(options: Merge, params: Params) -> list[str]:
    """Return the parameters that stay the first source's whatever the method says.

    Raises:
        UserError: The scope holds no parameter: a model without an MLP.
    """
    if options.scope == "all":
        return []
    head = {name: found.group(1) for name in params if (found := HEAD.match(name))}
    last = max((int(layer) for layer in head.values() if layer), default=None)
    output = {name for name, layer in head.items() if layer and int(layer) == last}
    inside = {"head": set(head), "output": output, "hidden": set(head) - output}[options.scope]
    if not inside:
        raise UserError(
            f"merge.scope={options.scope}: the model has no such layers; merge.scope=all"
            " merges everything"
        )
    return [name for name in params if name not in inside]


def is_decided_elsewhere(options: Merge, name: str, params: Params) -> bool:
    """Return whether an option, not the method, decides about a parameter in scope."""
    return (bool(table_of(name)) and options.tables != "same") or (
        params[name].ndim == 1 and options.bias == "base"
    )


def takes_all_alike(options: Merge) -> bool:
    """Return whether dense parameters are the plain mean of all sources, which repair restores."""
    is_mean = options.method in ("average", "evidence", "best_of")
    return is_mean and options.scope == "all" and options.bias == "splice"


def uses_entropy(options: Merge) -> bool:
    """Return whether the rule asks for the global term."""
    is_cki = options.method == "cki" and options.perspective != "local"
    return is_cki or options.method == "filter_grafting"


def entropy_report(
    options: Merge, models: Sequence[Params], seed: int
) -> dict[str, dict[str, list[float]]] | None:
    """Return what the global term saw of every parameter it decides about, and its noise."""
    if not uses_entropy(options):
        return None
    outside = set(outside_scope(options, models[0]))
    return {
        name: entropy_differences(
            [model[name] for model in models], options.bins, options.range, seed, name
        )
        for name in models[0]
        if name not in outside and not is_decided_elsewhere(options, name, models[0])
    }


def control(options: Merge, source: Checkpoint, seed: int) -> Checkpoint:
    """Return a source after the first as the control wants it."""
    if options.control == "none":
        return source
    if options.control == "shuffled":
        return replace(source, params=shuffle(source.params, seed))
    network: Any = build_model(source.schema, source.model, torch.device("meta"))
    return replace(source, params=permute(source.params, network.symmetries(), seed))
