"""The rows of an assessment: figures of parameters, layers, modules and the whole model.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from cki_rec.merging.extras import Processes
from cki_rec.merging.measures import Sums, added, mean_cosine, mean_distance
from cki_rec.merging.params import BLOCK, Params


def seen_rows(counts: Sequence[Params], processes: Processes) -> dict[str, dict[str, Any]]:
    """Return per table how many rows all sources have seen, several, one alone, or none."""
    result, num_sources = {}, len(counts)
    for name in counts[0] if counts else ():
        by_number = torch.zeros(len(counts) + 1, dtype=torch.int64)
        alone = torch.zeros(len(counts), dtype=torch.int64)
        for blocks in zip(*(source[name].split(BLOCK) for source in counts), strict=True):
            seen_KV = torch.stack([block > 0 for block in blocks])
            number_V = seen_KV.sum(0)
            by_number += torch.bincount(number_V, minlength=len(counts) + 1).cpu()
            alone += (seen_KV & (number_V == 1)).sum(1).cpu()
        both = processes.reduce(name, torch.cat([by_number, alone]), "sum")
        by_number, alone = both.split([num_sources + 1, num_sources])
        result[name] = {
            "rows": int(by_number.sum()),
            "rows_all": int(by_number[-1]),
            "rows_some": int(by_number[2:-1].sum()),
            "rows_one": alone.tolist(),
            "rows_none": int(by_number[0]),
        }
    return result


def assessment_rows(
    shapes: Mapping[str, Sequence[int]],
    measured: Mapping[str, tuple[Sums, list[float]]],
    tables: Collection[str],
    rows_of: Mapping[str, dict[str, Any]],
    shares: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Return the rows of parameters, layers, modules and the model, each sorted.

    Args:
        shapes: Shapes of all parameters.
        measured: Per parameter its sums, and the entropy of each source.
        tables: Names of tables.
        rows_of: Result of ``seen_rows``.
        shares: Mean mixing weights by counts, of the tables that have counts.
    """
    parameters, layers, modules = [], dict[str, list[str]](), dict[str, list[str]]()
    for name, shape in shapes.items():
        sums, entropies_K = measured[name]
        kind = "table" if name in tables else "tensor"
        row = _row(kind, name, [name], shapes, sums)
        row |= {"shape": list(shape), "entropy": entropies_K}
        row |= rows_of.get(name, {})
        if name in shares:
            row["evidence"] = list(shares[name])
        parameters.append(row)
        layers.setdefault(name.rpartition(".")[0], []).append(name)
        modules.setdefault(name.partition(".")[0], []).append(name)
    groups = [
        [("layer", title, names) for title, names in layers.items() if len(names) > 1 and title],
        [
            ("module", title, names)
            for title, names in modules.items()
            if len(names) > 1 and names not in layers.values()
        ],
        [("model", "all parameters", list(shapes))],
    ]
    summaries = [
        sorted(
            (
                _row(kind, title, names, shapes, added(measured[n][0] for n in names))
                for kind, title, names in group
            ),
            key=_order,
        )
        for group in groups
    ]
    return [*sorted(parameters, key=_order), *chain.from_iterable(summaries)]


def _order(row: Mapping[str, Any]) -> tuple[float, float, str]:
    """Return the key that puts the least compatible row first."""
    aligned = row["aligned_distance"]
    return row["compatibility"], -(row["distance"] if aligned is None else aligned), row["name"]


def _row(
    kind: str,
    name: str,
    parameters: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    sums: Sums,
) -> dict[str, Any]:
    """Return the row of one or several parameters, all entries present."""
    entries = sum(math.prod(shapes[parameter]) for parameter in parameters)
    is_aligned, divisor = "aligned_products" in sums, max(entries, 1)
    row: dict[str, Any] = {"kind": kind, "name": name, "shape": None, "entries": entries}
    row["entropy"] = None
    for key in ("global", "local", "dual", "hard", "soft"):
        row[key] = (sums[key] / divisor).tolist()
    for title, key in (
        *(("global_compatibility", "global_ratio"), ("local_compatibility", "local_ratio")),
        ("compatibility", "dual_ratio"),
    ):
        row[title] = float(sums[key]) / entries if entries else 1.0
    row["distance"], row["cosine"] = mean_distance(sums), mean_cosine(sums["products"])
    row["aligned_distance"], row["aligned_cosine"] = None, None
    if is_aligned:
        moved = {key: sums[f"aligned_{key}"] for key in ("products", "squares")}
        row["aligned_distance"] = mean_distance(moved)
        row["aligned_cosine"] = mean_cosine(moved["products"])
    row["task_cosine"], row["conflicts"] = None, None
    if "task_products" in sums:
        row["task_cosine"] = mean_cosine(sums["task_products"])
        row["conflicts"] = float(sums["conflicts"]) / divisor
    names = ("rows", "rows_all", "rows_some", "rows_one", "rows_none", "evidence")
    return row | dict.fromkeys(names)
