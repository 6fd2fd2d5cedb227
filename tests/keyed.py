"""Tables by raw key in several forms, and the same merges by dictionaries."""

from pathlib import Path

import numpy as np
import torch


def draw(seed, keys, dim=4, top=20):
    """Return key -> (values, use)."""
    place = np.random.default_rng(seed)
    return {
        int(key): (place.normal(size=dim).astype(np.float32), int(place.integers(top)))
        for key in keys
    }


def write_dump(folder, table, rows, world_size=1, scores=True, rule=None, state=False):
    """Write a table as dynamicemb does."""
    place = Path(folder) / Path(table).parent
    place.mkdir(parents=True, exist_ok=True)
    name = Path(table).name
    for rank in range(world_size):
        mine = {k: v for k, v in rows.items() if (rule or unsigned)(k, world_size) == rank}
        end = f"rank_{rank}.world_size_{world_size}"
        np.array(list(mine), np.int64).tofile(place / f"{name}_emb_keys.{end}")
        values = [v for v, _ in mine.values()]
        np.array(values, np.float32).tofile(place / f"{name}_emb_values.{end}")
        uses = [use for _, use in mine.values()]
        if scores:
            np.array(uses, np.int64).tofile(place / f"{name}_emb_scores.{end}")
        if state:
            sums = [np.full(2, use + 0.5) for use in uses]
            np.array(sums, np.float32).tofile(place / f"{name}_emb_opt_values.{end}")
    return str(folder)


def unsigned(key, world_size):
    return (key % (1 << 64)) % world_size


def read_dump(folder, table, dim=4):
    """Return key -> (values, use), and check that every key is at its rank."""
    rows = {}
    place = Path(folder) / Path(table).parent
    for file in sorted(place.glob(f"{Path(table).name}_emb_keys.*")):
        keys = np.fromfile(file, np.int64)
        rank, world_size = (int(word.split("_")[-1]) for word in file.name.split(".")[1:])
        values = np.fromfile(str(file).replace("keys", "values"), np.float32).reshape(-1, dim)
        scores = Path(str(file).replace("keys", "scores"))
        uses = np.fromfile(scores, np.int64) if scores.exists() else np.zeros(len(keys), int)
        assert len(keys) == len(values) == len(uses)
        assert all(unsigned(int(key), world_size) == rank for key in keys)
        rows |= dict(zip(keys.tolist(), zip(values, uses.tolist(), strict=True), strict=True))
    return rows


def merged(sources, by="average", max_rows=None):
    """Return the merge of dictionaries key -> (values, use)."""
    result = {}
    for key in sorted({key for source in sources for key in source}):
        held = [source[key] for source in sources if key in source]
        uses = np.array([use for _, use in held], np.float64)
        weights = uses / uses.sum() if by == "evidence" and uses.sum() else 1 / len(held)
        values = np.stack([v for v, _ in held]).astype(np.float64)
        total = (np.broadcast_to(weights, len(held))[:, None] * values).sum(0)
        result[key] = (held[0][0] if len(held) == 1 else total, int(uses.max()))
    kept = sorted(result, key=lambda key: (-result[key][1], key))[:max_rows]
    return {key: result[key] for key in sorted(kept)}


def assert_same(rows, expected):
    assert sorted(rows) == sorted(expected)
    for key, (values, use) in expected.items():
        torch.testing.assert_close(
            torch.tensor(np.asarray(rows[key][0], np.float64)),
            torch.tensor(np.asarray(values, np.float64)),
            atol=1e-6,
            rtol=1e-6,
        )
        assert rows[key][1] == use
