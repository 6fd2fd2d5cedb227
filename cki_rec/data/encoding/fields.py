"""The fields of a data set: what ``data.fields`` and the format say, made explicit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from torch import nn

from cki_rec.config import CHOICES, Data, UserError, nearest
from cki_rec.data.schema import FIRST_ID

KINDS = ("categorical", "numeric", "multi", "history", "time")
TRANSFORMS = CHOICES["data.numeric"]
FLOATS = ("log1p", "as_is")
"""Transforms of numbers to numbers; the others make categories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field, as it is encoded."""

    name: str
    kind: str
    """``categorical``, ``numeric``, ``multi`` (a set of ids), ``history`` (ids by time: items that
    the user liked before, or what a raw column lists) or ``time`` (of ``raw.TIME_FIELDS``)."""
    column: str
    """Raw column; of a history of liked items the field whose ids it holds."""
    table: str
    """Fields with the same table share vocabulary and embeddings."""
    transform: str | None
    """Of numeric fields: one of ``TRANSFORMS``."""
    min_count: int
    hash_size: int | None
    """Ids are a hash of the token modulo this; no vocabulary is kept. None: a vocabulary."""
    separator: str | None
    """Between the tokens of a multi field, or of a history that a raw column lists; None: the
    history is what the user liked before."""
    max_length: int | None
    """Most ids of a multi field, the first ones, or of a listed history; None: all."""
    prefix: int | None
    """Tokens are the first so many characters of a category; None: all."""
    edges: tuple[float, ...] | None
    """Of the transform ``edges``: ascending; bucket ``i`` is above edge ``i`` and at most edge
    ``i + 1``, anything outside is missing."""
    keep: str | None = None
    """Of a listed history longer than ``max_length``: its ``latest`` or its ``first`` ids."""
    rows: str | None = None
    """Of a history of liked items: ``train`` (None says the same: training rows alone) or
    ``earlier`` (all rows before this one in time, whatever their split)."""

    @property
    def is_listed(self) -> bool:
        """Return whether a raw column lists its ids."""
        return self.separator is not None

    @property
    def is_number(self) -> bool:
        """Return whether it is encoded as a number, not as ids."""
        return self.kind == "numeric" and self.transform in FLOATS

    @property
    def learns(self) -> bool:
        """Return whether training rows say what its numbers become."""
        return self.kind == "numeric" and self.transform in ("log1p", "quantile")


OPTIONS = tuple(f.name for f in fields(Field))
_SHARED = ("table", "min_count", "hash_size", "prefix")
"""What a history has of the field whose ids it holds."""
LARGEST_HASH = 2**31 - 1 - FIRST_ID
"""Ids are int32."""
OWNERS = {
    "transform": ("numeric",),
    "edges": ("numeric",),
    "separator": ("multi", "history"),
    "max_length": ("multi", "history"),
    "keep": ("history",),
    "rows": ("history",),
    "prefix": ("categorical",),
}
"""Option -> the only kinds that have it."""
KEPT = ("latest", "first")
ROWS = ("train", "earlier")
CHRONOLOGICAL = ("time", "leave_last_out")
"""Splits in which what is earlier is known when a row is scored."""


def resolve_fields(data: Data, kinds: Mapping[str, str]) -> tuple[Field, ...]:
    """Return the fields of ``data``, in order.

    Args:
        data: What the configuration says.
        kinds: What the format gives, and of which kind it is.

    Raises:
        UserError: An unknown field or option, or a combination that makes no sense.
    """
    for option in ("min_count", "history_length", "negatives"):
        if getattr(data, option) < 1:
            raise UserError(f"data.{option}={getattr(data, option)}: expected 1 or more")
    if data.on_bad_row not in CHOICES["data.on_bad_row"]:
        raise UserError(f"data.on_bad_row={data.on_bad_row}: expected error or skip")
    names = [entry["name"] for entry in _entries(data)]
    if not names:
        raise UserError("data.fields: empty, expected at least one field")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"data.fields: {', '.join(twice)} named twice; name each field once")
    unknown = [e["name"] for e in _entries(data) if e.get("column", e["name"]) not in kinds]
    if unknown:
        raise UserError(
            f"data.fields: {data.raw} gives no {', '.join(unknown)}; "
            f"{nearest(unknown[0], kinds)}it gives {', '.join(kinds)}"
        )
    found = tuple(_field(entry, data, kinds) for entry in _entries(data))
    if all(f.is_number for f in found):
        raise UserError("data.fields: numbers only, expected at least one field with ids")
    found = tuple(
        _with_source(f, found, kinds) if f.kind == "history" and not f.is_listed else f
        for f in found
    )
    _check_tables(found)
    return found


def fields_to_json(found: tuple[Field, ...]) -> list[dict[str, Any]]:
    """Return a form that ``json.dumps`` takes; data sets without late options are as before."""
    late = ("keep", "rows")
    entries = [asdict(field) for field in found]
    return [{k: v for k, v in e.items() if k not in late or v is not None} for e in entries]


def _entries(data: Data) -> list[dict[str, Any]]:
    """Return every entry of ``data.fields`` as a dictionary, its words checked."""
    entries = [{"name": e} if isinstance(e, str) else e for e in data.fields]
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f"data.fields: {entry!r}: expected a name or {{name: ..., ...}}")
        for key, value in entry.items():
            where = f"data.fields, {entry['name']}: {key}"
            if key not in OPTIONS:
                raise UserError(f"{where}: {nearest(key, OPTIONS)}one of {', '.join(OPTIONS)}")
            choices = {"kind": KINDS, "transform": TRANSFORMS, "keep": KEPT, "rows": ROWS}.get(key)
            if choices and value not in choices:
                hint = nearest(value, choices)
                raise UserError(f"{where}={value}: {hint}one of {', '.join(choices)}")
            if key == "edges":
                if not _is_ascending(value):
                    raise UserError(f"{where}={value!r}: expected two ascending numbers or more")
            elif key in ("min_count", "hash_size", "max_length", "prefix"):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise UserError(f"{where}={value}: expected a whole number, 1 or more")
                if key == "hash_size" and value > LARGEST_HASH:
                    raise UserError(f"{where}={value}: expected at most {LARGEST_HASH}")
            elif not isinstance(value, str) or not value:
                raise UserError(f"{where}={value!r}: expected a word")
            elif key in ("name", "table"):
                _check_name(where, value)
            elif key == "column" and value.startswith("@"):
                raise UserError(f"{where}={value}: names that begin with @ are ours; rename it")
    return entries


def _check_name(where: str, name: str) -> None:
    """Refuse names that cannot name a table of a model or a file."""
    is_plain = re.fullmatch(r"\w[\w -]*", name) is not None and not name.endswith("_first_order")
    if not is_plain or hasattr(nn.ModuleDict, name) or name == "training":
        raise UserError(
            f"{where}={name}: expected letters, digits, '_', '-' and spaces, and no word that "
            f"torch has taken; name it otherwise: {{name: other, column: {name}}}"
        )


def _field(entry: dict[str, Any], data: Data, kinds: Mapping[str, str]) -> Field:
    name = entry["name"]
    kind = entry.get("kind", kinds[name if name in kinds else entry.get("column", name)])
    is_listed = kind == "history" and "separator" in entry
    given = kinds[entry.get("column", name)] if kind != "history" or is_listed else kind
    allowed = {"numeric": ("numeric",), "time": ("time",)}.get(given, KINDS[:4])
    if kind != given and (kind not in allowed or (kind == "numeric" and data.format != "csv")):
        raise UserError(
            f"data.fields, {name}: kind={kind}: the column is {given}, expected "
            f"{' or '.join(allowed if data.format == 'csv' else (given,))}"
        )
    if is_listed and given == "history":
        raise UserError(
            f"data.fields, {name}: separator is of a column that lists ids, this history is what "
            "the user liked before; leave it out"
        )
    own = (data.item or "item") if kind == "history" and not is_listed else name
    column = entry.get("column", own)
    transform = entry.get("transform", data.numeric) if kind == "numeric" else None
    for key, owners in OWNERS.items():
        if key in entry and kind not in owners:
            owner = " or ".join(owners)
            raise UserError(f"data.fields, {name}: {key} is of kind {owner}, this is {kind}")
    for key in ("max_length", "keep"):
        if key in entry and kind == "history" and not is_listed:
            raise UserError(
                f"data.fields, {name}: {key} is of a history that a column lists: give its "
                "separator, or set data.history_length"
            )
    if is_listed and "rows" in entry:
        raise UserError(
            f"data.fields, {name}: rows is of a history of liked items, this one is listed"
        )
    if entry.get("rows") == "earlier" and data.split.by not in CHRONOLOGICAL:
        raise UserError(
            f"data.fields, {name}: rows=earlier: with data.split.by={data.split.by} labels of test"
            f" rows would be inputs; it goes with {' or '.join(CHRONOLOGICAL)}"
        )
    if (transform == "edges") != ("edges" in entry):
        raise UserError(f"data.fields, {name}: edges and transform: edges go together")
    return Field(
        name=name,
        kind=kind,
        column=column,
        table=entry.get("table", column if kind == "history" and not is_listed else name),
        transform=transform,
        min_count=entry.get("min_count", data.min_count),
        hash_size=entry.get("hash_size"),
        separator=entry.get("separator", "|" if kind == "multi" else None),
        max_length=entry.get("max_length"),
        prefix=entry.get("prefix"),
        edges=tuple(map(float, entry["edges"])) if "edges" in entry else None,
        keep=entry.get("keep", "latest") if is_listed and "max_length" in entry else None,
        rows="earlier" if entry.get("rows") == "earlier" else None,
    )


def _is_ascending(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
        return False
    return len(value) > 1 and all(a < b for a, b in pairwise(value))


def _with_source(history: Field, found: tuple[Field, ...], kinds: Mapping[str, str]) -> Field:
    """Return the history with table, minimum count and hashing of the field whose ids it holds."""
    sources = [f for f in found if f.kind == "categorical" and f.column == history.column]
    if sources:
        source = sources[0]
        return replace(history, **{n: getattr(source, n) for n in _SHARED})
    if kinds.get(history.column) != "categorical":
        raise UserError(
            f"data.fields, {history.name}: column={history.column}: expected a categorical field, "
            f"this is {kinds.get(history.column, 'unknown')}"
        )
    return history


def _check_tables(found: tuple[Field, ...]) -> None:
    """Check that fields which share a table agree on it, and that histories have a source."""
    first: dict[str, Field] = {}
    for field in found:
        if field.is_number or (field.kind == "history" and not field.is_listed):
            continue
        other = first.setdefault(field.table, field)
        facts = [(f.min_count, f.hash_size, f.transform == "quantile") for f in (field, other)]
        if facts[0] != facts[1]:
            raise UserError(
                f"data.fields: {other.name} and {field.name} share table {field.table}, expected "
                "the same min_count and hash_size, and quantiles or not"
            )
