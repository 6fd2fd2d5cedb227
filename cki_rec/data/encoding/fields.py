"""Fields of a data set: ``data.fields`` with all defaults filled in, and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from cki_rec.config import Data, UserError, choices, nearest
from cki_rec.data.columns import FIRST_ID
from cki_rec.data.raw.formats import FORMATS

KINDS = ("categorical", "numeric", "multi", "history", "time")
TRANSFORMS = choices(Data, "numeric")
FLOATS = ("log1p", "as_is")
"""Transforms with numbers as results; all others make categories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field and the options of its encoding."""

    name: str
    kind: str
    """``categorical``, ``numeric``, ``multi`` (a set of ids), ``time`` (an entry of
    ``raw.TIME_FIELDS``) or ``history`` (ids by time: liked items, or the list in a raw column)."""
    column: str
    """Raw column; for a history of liked items, the field whose ids it holds."""
    table: str
    """Table of embeddings; fields with equal tables share vocabulary and embeddings."""
    transform: str | None
    """Entry of ``TRANSFORMS``, for numeric fields only."""
    min_count: int
    """Fewest training rows with a token in the vocabulary."""
    hash_size: int | None
    """Size of a table whose ids are hashes of tokens; None: ids come from a vocabulary."""
    separator: str | None
    """Separator of the tokens of a multi field or a listed history; None: a history of liked
    items."""
    max_length: int | None
    """Most ids of a multi field or a listed history; None: no limit."""
    prefix: int | None
    """Length to which tokens of a category are cut; None: not cut."""
    edges: tuple[float, ...] | None
    """Ascending edges of the transform ``edges``: bucket ``i`` is above edge ``i`` and at most
    edge ``i + 1``; numbers outside are missing."""
    keep: str | None = None
    """Ids that a listed history keeps if it is too long: ``latest`` or ``first``."""
    rows: str | None = None
    """Rows that a history of liked items is made from: ``train`` (the same as None) or ``earlier``
    (all rows before this one in time, whatever their split)."""

    @property
    def is_listed(self) -> bool:
        """Return whether a raw column lists the ids."""
        return self.separator is not None

    @property
    def is_number(self) -> bool:
        """Return whether the field is encoded as a number, not as ids."""
        return self.kind == "numeric" and self.transform in FLOATS

    @property
    def learns(self) -> bool:
        """Return whether the transform is learned from training rows."""
        return self.kind == "numeric" and self.transform in ("log1p", "quantile")


OPTIONS = tuple(f.name for f in fields(Field))
_SHARED = ("table", "min_count", "hash_size", "prefix")
"""Options that a history of liked items copies from the field whose ids it holds."""
LARGEST_HASH = 2**31 - 1 - FIRST_ID
"""Largest ``hash_size``, since ids are int32."""
OWNERS = {
    "transform": ("numeric",),
    "edges": ("numeric",),
    "separator": ("multi", "history"),
    "max_length": ("multi", "history"),
    "keep": ("history",),
    "rows": ("history",),
    "prefix": ("categorical",),
}
"""Option -> the kinds that accept it."""
KEEP = ("latest", "first")
ROWS = ("train", "earlier")
CHRONOLOGICAL = ("time", "leave_last_out")
"""Splits in which earlier rows are known when a row is scored."""


def resolve_fields(data: Data, kinds: Mapping[str, str]) -> tuple[Field, ...]:
    """Return the fields of ``data``, in order.

    Args:
        data: Options of the data set.
        kinds: Column or field of the format -> its default kind.

    Raises:
        UserError: A field or option is unknown, or the combination is impossible.
    """
    if not data.fields and FORMATS[data.format].has_free_kinds:
        named = [n for n in kinds if n and n != data.time]  # pandas writes its index without name
        data = replace(data, fields=[n for n in named if kinds[n] in ("categorical", "multi")])
    names = [entry["name"] for entry in _entries(data)]
    if not names:
        raise UserError("data.fields: empty; name at least one field")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"data.fields: {', '.join(twice)} named twice; name each field once")
    unknown = [e["name"] for e in _entries(data) if e.get("column", e["name"]) not in kinds]
    if unknown:
        raise UserError(
            f"data.fields: {data.raw} has no {', '.join(unknown)}; "
            f"{nearest(unknown[0], kinds)}it has {', '.join(kinds)}"
        )
    resolved = tuple(_field(entry, data, kinds) for entry in _entries(data))
    if all(f.is_number for f in resolved):
        raise UserError("data.fields: all fields are numbers; add at least one field with ids")
    resolved = tuple(
        _with_source(f, resolved, kinds) if f.kind == "history" and not f.is_listed else f
        for f in resolved
    )
    _check_tables(resolved)
    return resolved


def fields_to_json(resolved: tuple[Field, ...]) -> list[dict[str, Any]]:
    """Return plain JSON values; newer options appear only if set, so old hashes stay the same."""
    late = ("keep", "rows")
    entries = [asdict(field) for field in resolved]
    return [{k: v for k, v in e.items() if k not in late or v is not None} for e in entries]


def _entries(data: Data) -> list[dict[str, Any]]:
    """Return every entry of ``data.fields`` as a dictionary, with checked keys and values."""
    entries = [{"name": e} if isinstance(e, str) else e for e in data.fields]
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f"data.fields: {entry!r}: expected a name or {{name: ..., ...}}")
        for key, value in entry.items():
            where = f"data.fields, {entry['name']}: {key}"
            if key not in OPTIONS:
                raise UserError(f"{where}: {nearest(key, OPTIONS)}one of {', '.join(OPTIONS)}")
            choices = {"kind": KINDS, "transform": TRANSFORMS, "keep": KEEP, "rows": ROWS}.get(key)
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
                raise UserError(f"{where}={value}: names with @ in front are reserved; rename it")
    return entries


def is_field_name(name: str) -> bool:
    """Return whether a name can be the name of a table of a model and of a file."""
    from torch import nn  # slow, and worker processes do not need it

    is_plain = re.fullmatch(r"\w[\w -]*", name) is not None and not name.endswith("_first_order")
    return is_plain and not hasattr(nn.ModuleDict, name) and name != "training"


def _check_name(where: str, name: str) -> None:
    if not is_field_name(name):
        raise UserError(
            f"{where}={name}: expected letters, digits, '_', '-' and spaces, and no name that "
            f"torch reserves; choose another: {{name: other, column: {name}}}"
        )


def _field(entry: dict[str, Any], data: Data, kinds: Mapping[str, str]) -> Field:
    name = entry["name"]
    kind = entry.get("kind", kinds[name if name in kinds else entry.get("column", name)])
    is_listed = kind == "history" and "separator" in entry
    column_kind = kinds[entry.get("column", name)] if kind != "history" or is_listed else kind
    allowed = {"numeric": ("numeric",), "time": ("time",)}.get(column_kind, KINDS[:4])
    is_free = FORMATS[data.format].has_free_kinds
    if kind != column_kind and (kind not in allowed or (kind == "numeric" and not is_free)):
        raise UserError(
            f"data.fields, {name}: kind={kind}: the column is {column_kind}, expected "
            f"{' or '.join(allowed if is_free else (column_kind,))}"
        )
    if is_listed and column_kind == "history":
        raise UserError(
            f"data.fields, {name}: separator requires a column that lists ids, and this is a "
            "history of liked items; remove separator"
        )
    is_liked = kind == "history" and not is_listed
    column = entry.get("column", (data.item or "item") if is_liked else name)
    transform = entry.get("transform", data.numeric) if kind == "numeric" else None
    for key, owners in OWNERS.items():
        if key in entry and kind not in owners:
            owner = " or ".join(owners)
            raise UserError(f"data.fields, {name}: {key} requires kind {owner} (got {kind})")
    for key in ("max_length", "keep"):
        if key in entry and is_liked:
            raise UserError(
                f"data.fields, {name}: {key} requires a history that a column lists; set its "
                "separator, or set data.history_length"
            )
    if is_listed and "rows" in entry:
        raise UserError(
            f"data.fields, {name}: rows requires a history of liked items; remove separator"
        )
    if entry.get("rows") == "earlier" and data.split.by not in CHRONOLOGICAL:
        raise UserError(
            f"data.fields, {name}: rows=earlier: with data.split.by={data.split.by}, labels of"
            f" test rows would be inputs; set data.split.by={' or '.join(CHRONOLOGICAL)}"
        )
    if (transform == "edges") != ("edges" in entry):
        raise UserError(f"data.fields, {name}: transform: edges and edges go together; set both")
    return Field(
        name=name,
        kind=kind,
        column=column,
        table=entry.get("table", column if is_liked else name),
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


def liked_field(history: Field, others: Iterable[Field]) -> Field | None:
    """Return the field whose ids a history of liked items holds; None: no field has its column.

    Of several fields with its column it is the first one with its table, else the first one.
    """
    same = [f for f in others if f.kind == "categorical" and f.column == history.column]
    return next((f for f in same if f.table == history.table), same[0] if same else None)


def _with_source(history: Field, others: tuple[Field, ...], kinds: Mapping[str, str]) -> Field:
    """Return the history with the ``_SHARED`` options of the field whose ids it holds."""
    source = liked_field(history, others)
    if source is not None:
        return replace(history, **{n: getattr(source, n) for n in _SHARED})
    if kinds.get(history.column) != "categorical":
        raise UserError(
            f"data.fields, {history.name}: column={history.column}: expected a categorical field "
            f"(got {kinds.get(history.column, 'unknown')})"
        )
    return history


def _check_tables(resolved: tuple[Field, ...]) -> None:
    """Check that fields with equal tables have equal options of the table."""
    first: dict[str, Field] = {}
    for field in resolved:
        if field.is_number or (field.kind == "history" and not field.is_listed):
            continue
        other = first.setdefault(field.table, field)
        facts = [(f.min_count, f.hash_size, f.transform == "quantile") for f in (field, other)]
        if facts[0] != facts[1]:
            raise UserError(
                f"data.fields: {other.name} and {field.name} share table {field.table}; give "
                "both the same min_count and hash_size, and the transform quantile or not"
            )
