"""``cki-rec inspect CHECKPOINT...`` of tables by raw key."""

from __future__ import annotations

from contextlib import ExitStack

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cki_rec.checkpoints.formats.keyed import VALUES
from cki_rec.config import Config, UserError
from cki_rec.merging.methods import METHODS
from cki_rec.pipelines.keyed_sources import (
    KEYS,
    KeyedSource,
    check_rest,
    matched_tables,
    open_keyed,
)
from cki_rec.pipelines.keyed_tables import use_of


def run(config: Config) -> None:
    """Print the tables of every source, how they differ, and which merges are possible.

    Raises:
        UserError: A source is not readable.
    """
    with ExitStack() as stack:
        sources = [open_keyed(config, s, "inspect", stack) for s in config.merge.sources]
        for source in sources:
            _print(source)
        try:
            tables = matched_tables(sources)
            check_rest(sources)
        except UserError as error:
            print(f"differences:\n  {error}")
            print("no merge is possible before these are repaired")
            return
        has_uses = all(use_of(each, "auto") for each in tables.values())
        held = {"counts"} if has_uses else set()
        possible = [n for n, m in METHODS.items() if m.row_wise and not {*m.info().needs} - held]
        print(f"possible methods: {', '.join(possible)}")
        if not has_uses:
            print("  with counts or scores in all sources: evidence, and merge.max_rows")
        if len(sources) > 1:
            method = "evidence" if has_uses else "average"
            listed = ",".join(_named(source) for source in config.merge.sources)
            print(f"next: cki-rec merge merge={method} 'merge.sources=[{listed}]'")


def _named(source: dict[str, object]) -> str:
    """Return a source as it is typed."""
    if set(source) == {"path"}:
        return str(source["path"])
    keys = source.get(KEYS)
    if isinstance(keys, dict):
        keys = "{" + ", ".join(f"{table}: {file}" for table, file in keys.items()) + "}"
    return f"{{path: {source['path']}, {KEYS}: {keys}}}"


def _print(source: KeyedSource) -> None:
    """Print the tables of a source."""
    facts = source.describe()
    rest = len(source.rest.parts.entries) if source.rest else 0
    beside = f", and {rest} other tensors" if rest else ""
    print(f"{source.path}: {facts['format']}{beside}")
    table = Table(box=SIMPLE_HEAD)
    for title in ("table", "keys", "columns", "type", "of keys", "beside"):
        table.add_column(title, justify="right" if title in ("keys", "columns") else "left")
    for name, each in source.tables.items():
        others = ", ".join(column for column in each.columns if column != VALUES)
        dtype, kind = str(each.dtype).removeprefix("torch."), "text" if each.is_text else "int64"
        width = f"{each.columns[VALUES].width}"
        table.add_row(name, f"{each.num_rows:,}", width, dtype, kind, others)
    console = Console(width=120, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()))
