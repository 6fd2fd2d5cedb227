"""Summary of an encoded data set, as text."""

from __future__ import annotations

import json

import numpy as np

from cki_rec.config import Partition
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.store import PREPARATION

FORMS = {
    "categorical": "id",
    "multi": "ids",
    "history": "history",
}


def summary_lines(dataset: EncodedDataset) -> list[str]:
    """Return lines with rows, fields, vocabularies, positive rates, bad rows, time and memory."""
    manifest, schema = dataset.manifest, dataset.schema
    is_synthetic = ", SYNTHETIC" if manifest["synthetic"] else ""
    lines = [
        f"{dataset.folder}: {len(dataset):,} rows, {len(schema.features)} fields{is_synthetic}"
    ]
    lines += [f"  from {entry['name']} ({entry['size']:,} bytes)" for entry in manifest["source"]]
    wanted = manifest["should_be_published_as"]
    for file, name in manifest["published"].items():
        if name is not None:
            lines.append(f"  {file} is published as {name}")
        elif wanted is not None:
            lines.append(f"  {file} is NOT the file published as {wanted}")
    for name, split in manifest["splits"].items():
        line = f"  {name:<5} {split['rows']:>13,} rows"
        if split["rows"]:
            line += f", {split['positive_rate']:.2%} positive"
        best = (manifest["best_possible"] or {}).get(name)
        if best:
            line += (
                f"; best possible: AUC {_number(best['auc'])}, LogLoss {_number(best['log_loss'])}"
            )
        lines.append(line)
    width = max(len(feature.name) for feature in schema.features)
    lines.append(
        f"  {'field':<{width}}  kind     vocabulary  unseen in training, validation and test"
    )
    for feature in schema.features:
        if feature.kind == "numeric":
            shift, scale = manifest["numbers"][feature.name]
            facts = f"number              less {shift:.4g}, divided by {scale:.4g}"
        else:
            unseen = manifest["unseen_share"][feature.name].values()
            shares = "  ".join("  none" if u is None else f"{u:6.2%}" for u in unseen)
            size = schema.table_sizes[feature.table]
            facts = f"{FORMS[feature.kind]:<7} {size:>11,}  {shares}"
            if feature.table != feature.name:
                facts += f"  (table {feature.table})"
        lines.append(f"  {feature.name:<{width}}  {facts}")
    skipped = manifest["skipped"]
    lines.append(f"  bad rows left out: {sum(entry['count'] for entry in skipped.values()):,}")
    for reason, entry in skipped.items():
        lines.append(f"    {reason}: {entry['count']:,}, e.g. {entry['examples'][0]}")
    facts = json.loads((dataset.folder / PREPARATION).read_text())
    rate = len(dataset) / max(facts["seconds"], 1e-9)
    lines.append(
        f"  prepared in {facts['seconds']:.1f} s ({rate:,.0f} rows/s), peak memory "
        f"{facts['peak_memory_mb']:,} MB"
    )
    return lines


def part_lines(dataset: EncodedDataset, partition: Partition) -> list[str]:
    """Return a line per group of rows of a column, with its rows; nothing for other partitions."""
    if partition.column is None:
        return []
    parts = dataset.parts(partition)
    names = parts.names or []
    sizes = np.bincount(parts.part, minlength=len(names)).tolist()
    width = max(map(len, names))
    lines = [f"  parts by {partition.by}"]
    return lines + [
        f"    {n:<{width}} {size:>13,} rows" for n, size in zip(names, sizes, strict=True)
    ]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
