"""AUC by region: every source and every method on the test rows of each region, as text cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from cki_rec.evaluation.display import method_name, number
from cki_rec.evaluation.tables import DOMAIN

ALL = "all rows"
MOST_LETTERS = 60
"""Letters of the sources' names in a title."""
Record = Mapping[str, Any]


def region_tables(records: Sequence[Record], summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return suite -> a table with a row per model and a column per region, as text.

    The first rows are the sources, then come the rows of ``summary``. Regions are in the order of
    the sources of the same name, others follow. A number is the mean over
    repetitions. Suites without named regions have no table.

    Args:
        records: Of evaluated models.
        summary: Of ``summary_frame``, of the same records.
    """
    tables = {}
    for suite in summary["suite"].unique():
        results = [record["result"] for record in records if record["result"]["suite"] == suite]
        scored = {r["seed"]: r["of_sources"] for r in results if "of_sources" in r}
        if not scored:
            continue
        first = next(iter(scored.values()))
        order = [source["name"] for source in first]
        regions = sorted(
            first[0]["domains"], key=lambda r: order.index(r) if r in order else len(order)
        )
        rows = [_of_source(place, list(scored.values()), regions)
                for place in range(min(map(len, scored.values())))]  # fmt: skip
        for row in summary[summary["suite"] == suite].to_dict("records"):
            name = method_name(row["method"], row["finetuned"])
            cells = [number(row["auc"]), *(number(row.get(f"{DOMAIN}{r}")) for r in regions)]
            rows.append([name, *cells])
        tables[str(suite)] = pd.DataFrame(rows, columns=["model", ALL, *regions], dtype=object)
    return tables


def _of_source(
    place: int, repetitions: Sequence[Sequence[Record]], regions: Sequence[str]
) -> list[str]:
    """Return the name and the cells of the source at a place: means over repetitions."""
    sources = [repetition[place] for repetition in repetitions]
    names = dict.fromkeys(str(source["name"]) for source in sources)
    each = [[s["auc"], *(s["domains"][region] for region in regions)] for s in sources]
    means = np.array(each, dtype=np.float64).mean(0)  # NaN if one is undefined
    return [f"source {' or '.join(names)}", *(number(float(mean)) for mean in means)]


def titles(records: Sequence[Record], own: str) -> dict[str, str]:
    """Return suite -> title: the names of the sources if the user named them by path.

    Args:
        records: Of evaluated models.
        own: Suite of checkpoints that the user named.
    """
    found = {}
    for result in (record["result"] for record in records):
        title = result["suite"]
        if title == own and "sources" in result:
            names = [_short(name) for name in result["sources"]]
            listed = ", ".join(names)
            title = f"{len(names)} models"
            title += f": {listed}" if len(listed) <= MOST_LETTERS else " of your own"
        found[result["suite"]] = title
    return found


def _short(name: str) -> str:
    """Return a name, or the last folder of a path other than ``checkpoint``."""
    parts = [part for part in PurePath(name).parts if part != "checkpoint"]
    return parts[-1] if parts else name
