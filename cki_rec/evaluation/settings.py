"""Options that the runs of one table must share: records are compared by the option's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested sections by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        leaves |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return leaves


def common(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options that are known of all sources: one value, or one per source."""
    names = [name for name in sources[0] if all(name in source for source in sources)]
    each = {name: [source[name] for source in sources] for name in names}
    return {n: values[0] if values.count(values[0]) == len(values) else values
            for n, values in each.items()}  # fmt: skip


def check_settings(records: Iterable[Record]) -> None:
    """Check that the runs of a suite differ in nothing but methods and seeds.

    All runs of a suite have sources of the same network and training. All methods of a seed have
    the same sources. All seeds of a method have the same options of the method. Options that a
    record does not hold are not compared.

    Raises:
        ValueError: An option differs; the message names it and two runs.
    """
    records = list(records)
    _compare(records, lambda r: (r["result"]["suite"],), _of_suite)
    _compare(records, lambda r: (r["result"]["suite"], r["result"]["seed"]), _of_seed)
    _compare(records, _row, lambda r: r["config"].get("settings", {}).get("method", {}))


def _compare(
    records: Sequence[Record],
    group: Callable[[Record], tuple[Any, ...]],
    options: Callable[[Record], Mapping[str, Any]],
) -> None:
    first: dict[tuple[Any, ...], tuple[Any, Record]] = {}
    for record in records:
        for name, value in options(record).items():
            before, other = first.setdefault((*group(record), name), (value, record))
            if before != value:
                raise ValueError(
                    f"suite {record['result']['suite']}: {name} is {before} in {_title(other)} and"
                    f" {value} in {_title(record)}"
                )


def _of_suite(record: Record) -> dict[str, Any]:
    settings = record["config"].get("settings", {})
    partition = record["config"].get("partition") or {}
    shared = {f"data.partition.{k}": partition[k] for k in ("by", "parts") if k in partition}
    shared["evaluate.ranking"] = record["config"].get("evaluate", {}).get("ranking")
    return {**shared, **settings.get("sources", {}), **settings.get("finetune", {})}


def _of_seed(record: Record) -> dict[str, Any]:
    sources = record["config"].get("sources")
    return {} if sources is None else {"suite.sources": sources}


def _row(record: Record) -> tuple[Any, ...]:
    result = record["result"]
    return result["suite"], result["method"], result["finetuned"]


def _title(record: Record) -> str:
    result = record["result"]
    tuned = ", fine-tuned" if result["finetuned"] else ""
    return f"{result['method']}{tuned}, seed {result['seed']}"
