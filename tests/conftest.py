"""What many tests share: one thread, a small data set with a signal, real configuration."""

from __future__ import annotations

import gc
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from composition import done_once
from hypothesis import settings

from cki_rec.config import Config, parse, register_resolvers

if TYPE_CHECKING:  # torch is imported where tests run, not by the process that starts the workers
    from cki_rec.data.schema import Batch, FeatureSchema

ROOT = Path(__file__).resolve().parents[1]
NUM_USERS, NUM_ITEMS, NUM_RATINGS = 60, 80, 3000
GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance")
SMALL = (
    "train.epochs=2",
    "train.batch_size=256",
    "model.hidden=[16,8]",
    "model.embedding_dim=8",
    "evaluate.bootstrap=100",
    "runtime.threads=1",
)


settings.register_profile("fixed", derandomize=True)  # make test: the same examples everywhere
settings.register_profile("search", print_blob=True)  # make test-all: new ones every time


gc.disable()


def pytest_configure(config):
    """Import the fixtures of ``store`` where tests run."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", default=None):
        config.pluginmanager.import_plugin("store")


def pytest_collection_finish():
    """Keep the imports of all tests out of garbage collections, and pytest off torch's loggers.

    The imports are most of the heap.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True  # pytest attaches handlers to others, six times in each test


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def log_as_before():
    """Forget the handler that a command set: each test has a standard output of its own."""
    yield
    ours = logging.getLogger("cki_rec")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


def write_raw_zip(path: Path, seed: int = 0) -> Path:
    """Write ratings whose level depends on user, item and a rank-2 taste, as MovieLens does."""
    draw = np.random.default_rng(seed)
    user_level, item_level = draw.normal(size=NUM_USERS), draw.normal(size=NUM_ITEMS)
    user_taste, item_taste = draw.normal(size=(NUM_USERS, 2)), draw.normal(size=(NUM_ITEMS, 2))
    pairs = draw.choice(NUM_USERS * NUM_ITEMS, size=NUM_RATINGS, replace=False)
    users, items = np.divmod(np.sort(pairs), NUM_ITEMS)
    score = user_level[users] + item_level[items] + (user_taste[users] * item_taste[items]).sum(1)
    stars = np.clip(np.round(2 * (3.5 + 0.8 * score)) / 2, 0.5, 5.0)
    times = draw.integers(1_000_000_000, 1_100_000_000, size=NUM_RATINGS)
    rows = zip(users + 1, items + 1, stars, times, strict=True)
    ratings = ["userId,movieId,rating,timestamp", *(f"{u},{i},{s},{t}" for u, i, s, t in rows)]
    movies = ["movieId,title,genres"]
    for item in range(1, NUM_ITEMS + 1):
        tags = "|".join(draw.choice(GENRES, size=int(draw.integers(1, 4)), replace=False))
        movies.append(f'{item},"Movie, The {item} ({1980 + item % 30})",{tags}')
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, lines in (("ratings", ratings), ("movies", movies)):
            info = zipfile.ZipInfo(f"ml-latest-small/{name}.csv")  # without the time of day
            archive.writestr(info, "\r\n".join(lines) + "\r\n")
    return path


@pytest.fixture(autouse=True, scope="session")
def composed_once():
    """Let Hydra compose each choice of groups once."""
    with done_once():
        yield


@pytest.fixture(scope="session")
def raw_zip(tmp_path_factory) -> Path:
    return write_raw_zip(tmp_path_factory.mktemp("raw") / "ml-latest-small.zip")


def compose_tree(*overrides: str):
    """Compose the real conf/ as the command line does, without running anything."""
    from cki_rec.cli import compose_config

    register_resolvers()
    return compose_config(list(overrides))


@pytest.fixture(scope="session")
def compose():
    return compose_tree


@pytest.fixture(scope="session")
def run_config(raw_zip):
    """Function (tmp_path, *overrides) -> Config: the real conf/, made small, writing to tmp."""

    def make(tmp_path: Path, *overrides: str) -> Config:
        folders = [f"runtime.{name}={tmp_path / name}" for name in ("out", "reports", "encoded")]
        return parse(compose_tree(f"data.raw={raw_zip}", *folders, *SMALL, *overrides))

    return make


@pytest.fixture(scope="session")
def schema() -> FeatureSchema:
    """Five features on four tables: two share a table without being neighbours."""
    from cki_rec.data.schema import Feature, FeatureSchema

    return FeatureSchema(
        features=(
            Feature("user", "user", "categorical"),
            Feature("item", "item", "categorical"),
            Feature("genres", "genres", "multi"),
            Feature("history", "item", "history"),
            Feature("hour", "hour", "categorical"),
        ),
        table_sizes={"user": 12, "item": 15, "genres": 6, "hour": 5},
        vocabulary_hashes={name: f"hash of {name}" for name in ("user", "item", "genres", "hour")},
    )


def draw_batch(schema: FeatureSchema, num_rows: int, seed: int = 0) -> Batch:
    """Draw rows; sets hold 1 to 3 ids, histories 0 to 4, the first row of both the fewest."""
    import torch

    from cki_rec.data.schema import Batch

    draw = np.random.default_rng(seed)
    values, lengths = [], []
    for feature in schema.features:
        low, high = {"categorical": (1, 1), "multi": (1, 3), "history": (0, 4)}[feature.kind]
        sizes = draw.integers(low, high + 1, size=num_rows)
        sizes[0] = low
        lengths.append(sizes)
        values.append(draw.integers(1, schema.table_sizes[feature.table], size=int(sizes.sum())))
    return Batch(
        values=torch.from_numpy(np.concatenate(values).astype(np.int64)),
        lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int32)),
        label=torch.from_numpy(draw.integers(0, 2, size=num_rows).astype(np.float32)),
    )


@pytest.fixture(scope="session")
def make_batch(schema):
    """Function (num_rows, seed=0, schema=the tiny one) -> Batch."""

    def make(num_rows: int, seed: int = 0, schema: FeatureSchema = schema) -> Batch:
        return draw_batch(schema, num_rows, seed)

    return make


@pytest.fixture
def sharded(schema):
    """Function (*overrides, seed=1) -> a sharded tiny DeepFM."""
    from training import sharded_model

    return lambda *overrides, seed=1: sharded_model(schema, *overrides, seed=seed)
