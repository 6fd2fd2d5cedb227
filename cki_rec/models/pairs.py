"""Pairs of targets and the histories that are read for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cki_rec.config import Model, UserError, nearest
from cki_rec.data.schema import Feature, FeatureSchema


@dataclass(frozen=True, slots=True)
class Pair:
    """Targets and their histories; several fields are concatenated."""

    targets: tuple[str, ...]
    histories: tuple[str, ...]


def history_pairs(
    schema: FeatureSchema, model: Model, option: str, named: list[Any]
) -> list[Pair]:
    """Return the pairs that an option names; by default every history and its table's field.

    Args:
        schema: The features.
        model: Options of the network.
        option: Name of the option, for messages.
        named: Its value, ``[[targets, histories], ...]``.

    Raises:
        UserError: There is no history, or a pair does not match the schema.
    """
    if not model.histories:
        raise UserError(
            f"model.histories=false: {model.name} reads histories; use model.histories=true"
        )
    histories = [f for f in schema.lookups if f.kind == "history"]
    if not histories:
        raise UserError(
            f"data.fields: {model.name} needs a field of kind history; add history, which follows"
            " from data.user, data.item and data.time, or a column of ids"
        )
    if named:
        return [_checked(pair, schema, option) for pair in named]
    firsts: dict[str, str] = {}
    for feature in schema.lookups:
        if feature.kind == "categorical":
            firsts.setdefault(feature.table, feature.name)
    pairs = [Pair((firsts[f.table],), (f.name,)) for f in histories if f.table in firsts]
    if not pairs:
        names = ", ".join(f.name for f in histories)
        raise UserError(f"{option}: no categorical field shares a table with a history ({names})")
    return pairs


def _checked(pair: Any, schema: FeatureSchema, option: str) -> Pair:
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(f"{option}: {pair} is not [targets, histories]")
    sides = [side if isinstance(side, list) else [side] for side in pair]
    targets = [_feature(name, "categorical", schema, option) for name in sides[0]]
    histories = [_feature(name, "history", schema, option) for name in sides[1]]
    if not targets or len(targets) != len(histories):
        raise UserError(f"{option}: {pair} needs as many targets as histories, at least one")
    for target, history in zip(targets, histories, strict=True):
        if target.table != history.table:
            raise UserError(
                f"{option}: {target.name} and {history.name} have different tables"
                f" ({target.table}, {history.table})"
            )
    return Pair(tuple(f.name for f in targets), tuple(f.name for f in histories))


def _feature(name: Any, kind: str, schema: FeatureSchema, option: str) -> Feature:
    fit = {f.name: f for f in schema.features if f.kind == kind}
    if name not in fit:
        hint = nearest(name, fit)
        names = ", ".join(fit) or "none"
        raise UserError(f"{option}: {name} is no {kind} field; {hint}{kind} fields: {names}")
    return fit[name]
