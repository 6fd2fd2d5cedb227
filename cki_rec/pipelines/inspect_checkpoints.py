"""``cki-rec inspect CHECKPOINT...``: describe checkpoints, and draft the YAML of their merge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from cki_rec.checkpoints.formats import layout
from cki_rec.checkpoints.formats.layout import BUFFERS
from cki_rec.checkpoints.formats.stored import Entry
from cki_rec.config import EVIDENCE, Config
from cki_rec.files import write_atomically
from cki_rec.merging.api import network_symmetries
from cki_rec.merging.inputs import sources_of
from cki_rec.merging.methods import METHODS
from cki_rec.merging.params import MergeError
from cki_rec.pipelines import keyed_inspect
from cki_rec.pipelines.foreign_evidence import has_evidence
from cki_rec.pipelines.foreign_inputs import SampleRows, network_of, rows_of
from cki_rec.pipelines.foreign_sources import (
    ARROW,
    Foreign,
    check_module,
    differences,
    name_changes,
    open_source,
    tables_of,
)
from cki_rec.pipelines.keyed_sources import is_keyed
from cki_rec.search_path import CONF, WORKING_CONF

SHOWN = 20
"""Most differences that are listed."""


def run(config: Config) -> None:
    """Print the parts of every checkpoint, how they differ and which merges are possible.

    Raises:
        UserError: A checkpoint is not readable.
    """
    if is_keyed(config.merge.sources):
        keyed_inspect.run(config)
        return
    with ExitStack() as stack:
        module = network_of(config)
        opened = [open_source(s, "inspect", module, stack) for s in config.merge.sources]
        sources = [opened[0]]
        for other in opened[1:]:
            changes = name_changes(opened[0], other)
            parts = layout(other.stored, changes)
            sources.append(replace(other, naming=changes, parts=parts))
        tables = tables_of(config, sources[0], module)
        for source in sources:
            _print(source, tables_of(config, source, module), module)
        found = _compare(sources, tables)
        if module is not None:
            check_module(sources, module)
        _print_methods(config, sources, tables, module, bool(found))
        if len(sources) > 1 and not found:
            _draft(config, sources, tables)


def _print(source: Foreign, tables: Sequence[str], module: nn.Module | None) -> None:
    """Print the tensors of a checkpoint by kind."""
    entries = source.parts.entries
    total = sum(entry.bytes for entry in entries.values())
    rest = sum(entry.bytes for entry in source.stored.entries.values()) - total
    beside = f", {_size(rest)} beside it" if rest else ""
    print(f"{source.path}: {source.stored.title}, model of {_size(total)}{beside}")
    if source.parts.prefix:
        print(f"  names without the prefix {source.parts.prefix}")
    table = Table(box=SIMPLE_HEAD)
    for title in ("kind", "tensor", "shape", "type", "size", "evidence"):
        table.add_column(title, justify="right" if title in ("shape", "size") else "left")
    kinds = {name: _kind(name, entries, tables) for name in entries}
    for kind in ("table", "layer", "norm", "buffer", "other"):
        for name in [name for name in entries if kinds[name] == kind]:
            entry = entries[name]
            shape = " x ".join(f"{size:,}" for size in entry.shape) or "1"
            evidence = ", ".join(_evidence(source, name)) if kind == "table" else ""
            dtype = str(entry.dtype).removeprefix("torch.")
            table.add_row(kind, name, shape, dtype, _size(entry.bytes), evidence)
    console = Console(width=120, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()))
    for names in _tied(source, module):
        print(f"  tied: {', '.join(names)}")
    for note in source.parts.notes:
        print(f"  {note}")


def _kind(name: str, entries: dict[str, Entry], tables: Sequence[str]) -> str:
    """Return ``table``, ``layer``, ``norm``, ``buffer`` or ``other``."""
    stem, _, last = name.rpartition(".")
    if name in tables:
        return "table"
    if last in BUFFERS or not entries[name].dtype.is_floating_point:
        return "buffer"
    beside = entries.get(f"{stem}.weight")
    if beside is not None and len(beside.shape) == 1:
        return "norm"
    if len(entries[name].shape) >= 2 or (last == "bias" and beside is not None):
        return "layer"
    return "other"


def _evidence(source: Foreign, table: str) -> Iterator[str]:
    """Yield the measures that a checkpoint holds of how often the rows of a table were trained."""
    for kind in EVIDENCE:
        if has_evidence(source, table, kind):
            names = f" ({', '.join(source.parts.state[table])})" if kind == "optimizer" else ""
            yield f"{kind}{names}"


def _tied(source: Foreign, module: nn.Module | None) -> list[list[str]]:
    """Return the groups of names that share one tensor: in the network, or in a file of torch."""
    groups: dict[object, list[str]] = {}
    if module is not None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
    else:
        for name, full in source.parts.names.items():
            groups.setdefault(source.stored.tied.get(full, full), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _compare(sources: Sequence[Foreign], tables: Sequence[str]) -> list[str]:
    """Print and return the differences that make a merge impossible."""
    if len(sources) == 1:
        return []
    digests = [source.stored.digest() for source in sources]
    found = differences(sources, tables)
    for k, digest in enumerate(digests):
        if digest in digests[:k]:
            same = sources[digests.index(digest)].path
            found.append(f"{same} and {sources[k].path} are the same checkpoint")
    for source in sources[1:]:
        first = sources[0].parts.entries
        entries = source.parts.entries
        shared = [name for name in first if name in entries]
        if odd := [name for name in shared if first[name].dtype != entries[name].dtype]:
            types = f"{first[odd[0]].dtype} and {entries[odd[0]].dtype}"
            print(f"{source.path}: {odd[0]} is of {types}, merged in float32 (merge.dtype)")
        if source.naming.renames:
            changes = ", ".join(f"{old}{ARROW}{new}" for old, new in source.naming.renames)
            print(f"{source.path}: names change by {changes}")
    print("differences:" if found else "the checkpoints fit together")
    for text in found[:SHOWN]:
        print(f"  {text}")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more")
    return found


def _print_methods(
    config: Config,
    sources: Sequence[Foreign],
    tables: Sequence[str],
    module: nn.Module | None,
    is_different: bool,
) -> None:
    """Print the methods that the inputs allow, and the inputs that allow more."""
    if is_different:
        print("no merge is possible before these are repaired")
        return
    rows = rows_of(config, module)
    held = {"counts"} if _shared_evidence(sources, tables) else set()
    held |= {"score"} if rows is not None and rows.labels is not None else set()
    held |= {"moments"} if rows is not None else set()
    needs = {name: set(method.info().needs) for name, method in METHODS.items()}
    possible = [name for name in METHODS if not needs[name] - held]
    print(f"possible methods: {', '.join(possible)}")
    for need, option in (
        ("counts", "evidence: {path: ..., counts: FILE} or {path: ..., optimizer: FILE}"),
        ("base", "merge.base={path: ...}, the model that all come from"),
    ):
        if need not in held and (more := [n for n in METHODS if need in needs[n]]):
            print(f"  with {option}: {', '.join(more)}")
    if module is None:
        print("  with merge.module and merge.batches: alignment, repair, auto")
    elif rows is not None:
        _print_symmetries(sources[0], module, rows)
    else:
        print("  with merge.batches or merge.data: alignment by activations, repair, auto")


def _print_symmetries(first: Foreign, module: nn.Module, rows: SampleRows) -> None:
    """Print the symmetries of the network."""
    state = module.state_dict()
    try:
        sources = sources_of([state, state], None, module)
        found = network_symmetries(None, sources, module, rows.batches, "inspect", False, 0)
    except MergeError as error:
        print(f"  symmetries: none, {error}")
        return
    for symmetry in found:
        parts = ", ".join(dict.fromkeys(part.parameter for part in symmetry.slices))
        print(f"  symmetry: {symmetry.kind} of {symmetry.size} in {parts}")


def _shared_evidence(sources: Sequence[Foreign], tables: Sequence[str]) -> str:
    """Return the measure of trained rows that all sources hold; "": there is none."""
    for kind in EVIDENCE:
        if any(all(has_evidence(s, name, kind) for s in sources) for name in tables):
            return kind
    return ""


def _draft(config: Config, sources: Sequence[Foreign], tables: Sequence[str]) -> None:
    """Write the draft of a merge into ``conf/merge`` of the working folder."""
    if all(source.stored.form == "own" for source in sources):
        listed = ",".join(source.path for source in sources)
        print(f"all are of cki-rec: cki-rec merge merge.sources=[{listed}]")
        return
    stem = re.sub(r"\W+", "_", Path(sources[0].path).stem.lower()).strip("_") or "mine"
    name = f"{stem}_own" if (CONF / "merge" / f"{stem}.yaml").exists() else stem
    text = "\n".join(_lines(config, name, sources, tables)) + "\n"
    target = WORKING_CONF / "merge" / f"{name}.yaml"
    if target.exists() and not config.runtime.force:
        print(f"{target} exists and is kept; runtime.force=true replaces it. The draft:\n\n{text}")
    else:
        write_atomically(target, text.encode())
        print(f"wrote {target}: read it, every line has a comment")
    print(f"next: cki-rec merge merge={name}")


def _lines(
    config: Config, name: str, sources: Sequence[Foreign], tables: Sequence[str]
) -> Iterator[str]:
    kind = _shared_evidence(sources, tables)
    yield f"# Merge of {len(sources)} checkpoints, drafted by cki-rec inspect."
    yield from ("defaults:", "  - default", "  - _self_", "")
    yield f"label: {name}  # name in tables, that of this file"
    yield f"method: {'evidence' if kind else 'average'}  # cki-rec merge --list"
    yield "sources:  # paths; names: changes of names; transposed: matrices that are stored so"
    for source, named in zip(sources, config.merge.sources, strict=True):
        renames = [f"{old}{ARROW}{new}" for old, new in source.naming.renames]
        entries = {**named, "names": renames, "transposed": list(source.naming.transposed)}
        shown = ", ".join(f"{key}: {json.dumps(value)}" for key, value in entries.items() if value)
        yield f"  - {{{shown}}}"
    patterns = [re.escape(table) for table in tables]
    yield f"table_names: {json.dumps(patterns)}  # regular expressions; all else are layers"
    yield f"evidence: {kind or 'none'}  # of trained rows: {', '.join(EVIDENCE)} or none"
    module = config.merge.module
    yield f"module: {json.dumps(module)}  # package.module:function or file.py:function"
    batches = json.dumps(config.merge.batches)
    yield f"batches: {batches}  # function that returns [inputs] or [(inputs, labels)]"
    yield f"data: {json.dumps(config.merge.data)}  # or a csv or Parquet file of rows"
    yield "align: {by: none}  # none, weights, activations; needs module and batches"
    yield "format: null  # safetensors, torch or dcp; null: that of the first source"


def _size(count: int) -> str:
    """Return bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
