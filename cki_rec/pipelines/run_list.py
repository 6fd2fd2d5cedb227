"""All runs of ``runtime.out`` as rows: name, data, model, metric, size, age."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import CHECKPOINT, DESCRIPTION
from cki_rec.engine.record import RECORD, Run
from cki_rec.engine.sweeps import LIST
from cki_rec.pipelines.names import names_of

RUN_ID = re.compile(r"\b(?:train|merge|finetune|evaluate|assess|refine)-[0-9a-f]{16}\b")
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def folders(out: Path) -> list[Path]:
    """Return all run directories, finished or not."""
    return sorted(p for p in out.glob("*") if p.is_dir() and RUN_ID.fullmatch(p.name))


def listed(out: Path) -> list[dict[str, Any]]:
    """Return one row per run, the newest first, as plain JSON values.

    An unfinished run has no metric, and ``is_finished`` is false.
    """
    names: dict[str, list[str]] = {}
    for name, run_id in names_of(out).items():
        names.setdefault(run_id, []).append(name)
    for name, run_id in reported(out):
        names.setdefault(run_id, [])
        if name not in names[run_id]:
            names[run_id].append(name)
    records = {folder: Run(folder).record for folder in folders(out)}
    known = [record["data"] for record in records.values() if record is not None]
    titles = {data["hash"]: data["name"] for data in known if {"hash", "name"} <= data.keys()}
    rows = []
    for folder, record in records.items():
        row = _row(folder, record, names.get(folder.name, []))
        row["model"], data_hash = _model_and_data(out, folder)
        row["data"] = titles.get(data_hash, data_hash and data_hash[:12])
        rows.append(row)
    return sorted(rows, key=lambda row: (row["age_seconds"], row["run"]))


def reported(out: Path) -> Iterator[tuple[str, str]]:
    """Yield every name of reports with each of its runs."""
    for path in sorted((out / "sweeps").glob(f"*/{LIST}")):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # an incomplete line of a killed process
                run_id = json.loads(line).get("run_id")
                if isinstance(run_id, str):
                    yield path.parent.name, run_id


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of runs."""
    cells = [("name", "run", "data", "model", "metric", "size", "age")]
    for row in rows:
        metric = "unfinished" if not row["is_finished"] else ""
        if row["auc"] is not None:
            metric = f"{row['split']} AUC {row['auc']:.4f}"
        model = " ".join(filter(None, (row["model"], row["detail"])))
        size, age = f"{row['bytes'] / 1e6:.1f} MB", _age(row["age_seconds"])
        name = ", ".join(row["names"])
        cells.append((name, row["run"], row["data"] or "", model, metric, size, age))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _row(folder: Path, record: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
    made = (folder / RECORD if record else folder).stat().st_mtime
    row: dict[str, Any] = {
        "names": names,
        "run": folder.name,
        "data": None,
        "model": None,
        "detail": "",
        "auc": None,
        "split": None,
        "bytes": size_of(folder),
        "age_seconds": round(max(0.0, time.time() - made)),
        "is_finished": record is not None,
    }
    if record is not None:
        config, result = record["config"], record["result"]
        row["detail"] = _detail(config)
        row["auc"], row["split"] = _metric(result)
    return row


def _model_and_data(out: Path, folder: Path, depth: int = 0) -> tuple[str | None, str | None]:
    """Return the network of a run and the hash of its data, or those of a run it builds on."""
    try:
        description = json.loads((folder / CHECKPOINT / DESCRIPTION).read_text())
        return description["model"]["name"], description["data_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        record = Run(folder).record  # it has no model of its own
    config = {} if record is None or depth > 8 else record["config"]
    builds_on = [*config.get("members", []), *config.get("sources", [])]
    for run_id in (r for r in builds_on if isinstance(r, str) and RUN_ID.fullmatch(r)):
        model, data = _model_and_data(out, out / run_id, depth + 1)
        if model is not None:
            return model, data
    return None, None


def _detail(config: dict[str, Any]) -> str:
    """Return the method of a merge or an evaluation, or the seed and the part of a training."""
    merge = config.get("merge")
    method = merge.get("method") if isinstance(merge, dict) else config.get("method")
    if method:
        return str(method)
    data = config.get("data")
    part = data.get("part") if isinstance(data, dict) else None
    named = {"seed": config.get("seed"), "part": part}
    return " ".join(f"{key} {value}" for key, value in named.items() if value is not None)


def _metric(result: dict[str, Any]) -> tuple[float | None, str | None]:
    """Return the test AUC of an evaluation, or the validation AUC of a model, and its split."""
    test = result.get("test")
    if isinstance(test, dict) and test.get("auc") is not None:
        return float(test["auc"]), "test"
    valid = result.get("valid_auc")
    if isinstance(valid, dict):  # of the candidates of auto, and their titles
        scores = [value for value in valid.values() if isinstance(value, int | float)]
        valid = max(scores, default=None)
    return (None, None) if not isinstance(valid, int | float) else (float(valid), "valid")


def _age(seconds: float) -> str:
    size, unit = next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
    return f"{seconds // size:.0f} {unit}"
