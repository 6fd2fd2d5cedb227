"""The card of a merged model: ``merge.json``, and ``README.md`` for readers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cki_rec import __version__
from cki_rec.files import write_atomically
from cki_rec.merging.result import MergeResult
from cki_rec.pipelines.foreign_sources import Foreign

CARD, README = "merge.json", "README.md"


def describe(source: Foreign) -> dict[str, Any]:
    """Return the facts about a source."""
    entries = source.parts.entries.values()
    return {
        "path": source.path,
        "format": source.stored.title,
        "tensors": len(source.parts.entries),
        "bytes": sum(entry.bytes for entry in entries),
    }


def write(folder: Path, result: MergeResult, facts: Mapping[str, Any]) -> None:
    """Write the card of a model into its folder.

    Args:
        folder: The folder.
        result: The merge.
        facts: Sources with digests, evidence, tables, types, rows, seed, command, file.
    """
    content = {
        "version": __version__,
        "recipe": result.recipe,
        **facts,
        "scores": result.scores,
        "shares": result.shares,
        "alignment": result.alignment,
        "warnings": result.warnings,
    }
    write_atomically(folder / CARD, json.dumps(content, indent=1, default=str).encode())
    write_atomically(folder / README, "\n".join(_lines(result, facts)).encode() + b"\n")


def _lines(result: MergeResult, facts: Mapping[str, Any]) -> Iterator[str]:
    yield "# Merged model"
    yield ""
    yield f"`{facts['model']}` was merged from {len(facts['sources'])} checkpoints by cki-rec"
    yield f"{__version__}, with the recipe `{result.recipe}`."
    yield ""
    yield "| source | checkpoint | format | tensors | bytes | sha256 |"
    yield "|---|---|---|---|---|---|"
    for k, source in enumerate(facts["sources"]):
        cells = [source["path"], source["format"], f"{source['tensors']:,}"]
        cells += [f"{source['bytes']:,}", f"`{source['digest'][:16]}`"]
        yield f"| {k} | {' | '.join(cells)} |"
    yield ""
    kind, tables = facts["evidence"]["kind"], facts["evidence"]["tables"]
    of = f", of {', '.join(tables)}" if tables else ""
    yield f"- Evidence of trained rows: {kind}{of}"
    yield f"- Tables: {', '.join(facts['tables']) or 'none'}"
    types = facts["types"]
    yield f"- Types: {', '.join(types['sources'])} in; {', '.join(types['result'])} out"
    yield f"- Seed: {facts['seed']}"
    if result.alignment is not None:
        before, after = result.alignment["agreement_before"], result.alignment["agreement"]
        yield f"- Agreement of the sources: {before:.3f}, after alignment {after:.3f}"
    yield from (f"- Warning: {warning}" for warning in result.warnings)
    if result.scores:
        yield from ("", f"## Scores (AUC on {facts['rows']:,} rows)", "", "| recipe | AUC |")
        yield "|---|---|"
        for name in sorted(result.scores, key=lambda name: -result.scores[name]):
            yield f"| {name} | {result.scores[name]:.6f} |"
    if result.shares:
        heads = " | ".join(f"source {k}" for k in range(len(next(iter(result.shares.values())))))
        yield from ("", "## Mean share of each source", "", f"| tensor | {heads} |")
        yield f"|---|{'---|' * len(next(iter(result.shares.values())))}"
        for name, shares in result.shares.items():
            yield f"| `{name}` | {' | '.join(f'{share:.1%}' for share in shares)} |"
    yield from ("", "## Command", "", "```", facts["command"], "```")
