"""The merges of every process of ``steps.py``.

Merged models go to the folder, exit codes and messages of every process beside them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from training import options

from cki_rec.checkpoints import checkpoint, reader
from cki_rec.cli import main
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.engine import checkpoint_io, distributed
from cki_rec.engine.embeddings import table_of
from cki_rec.models import build_model

SIZES = {"item": 101, "user": 37, "hour": 2, "bias": 1}
"""Rows of tables: no multiples of 2 or 3, fewer than processes; one is named like a parameter."""
SCHEMA = FeatureSchema(
    tuple(Feature(name, name, "categorical") for name in SIZES),
    SIZES,
    {name: f"hash of {name}" for name in SIZES},
)
EXACT = {
    "evidence": ("merge=evidence",),
    "average": ("merge=average",),
    "scope": ("merge=average", "merge.tables=evidence", "merge.scope=head"),
    "weighted": ("merge=weighted_average", "merge.options={weights: [0.3, 0.7]}"),
    "task_arithmetic": ("merge=task_arithmetic", "merge.options={scale: 0.7}"),
    "ties": ("merge=ties", "merge.options={scale: 0.7}"),
    "random": ("merge=random_splice",),
}
"""Integrations that are the same, bit for bit, on any number of processes."""
STREAMED = {
    "streamed evidence": ("merge=evidence", "merge.memory_gb=3"),
    "streamed ties": ("merge=ties", "merge.options={scale: 0.7}", "merge.memory_gb=3"),
    "streamed cki": ("merge=cki_dual_soft", "merge.memory_gb=3"),
    "streamed aligned": ("merge=aligned_weights", "merge.memory_gb=3"),
}
"""Merges from disk to disk; the word after gives the merge in memory."""
ALIGNED = {"aligned": ("merge=aligned_weights",)}
SUMS = {"cki": ("merge=cki_dual_soft", "merge.learn.what=none")}
"""The same up to rounding."""
MISTAKES = {
    "tokens": (
        "merge.vocabularies: 1 folders for 2 models",
        ("merge=evidence", "merge.vocabularies=[null]"),
    ),
}
"""What is refused, and with which words."""
WORDS = [*EXACT.values(), *ALIGNED.values(), *SUMS.values(), *STREAMED.values()]


def of(*names: str) -> str:
    return f"merge.sources=[{','.join(f'{{path: {name}}}' for name in names)}]"


def write(folder: Path, name: str, seed: int, sizes=SIZES, change=lambda params: None) -> None:
    """Write a random DeepFM as one process does."""
    config, draw = options("model.histories=false"), torch.Generator().manual_seed(seed)
    schema = FeatureSchema(SCHEMA.features, sizes, SCHEMA.vocabulary_hashes)
    network = build_model(schema, config.model, torch.device("meta"))
    params = {n: torch.randn(t.shape, generator=draw) for n, t in network.state_dict().items()}
    change(params)
    tables = [n for n in params if table_of(n)]
    tensors = {
        "model": params,
        "accumulator": {n: torch.rand(len(params[n]), 1, generator=draw) for n in tables},
        "counts": {t: torch.randint(0, 5, (n,), generator=draw) for t, n in sizes.items()},
    }
    checkpoint_io.save(folder / name, tensors, config.model, schema, Provenance("hash"))


def write_all(folder: Path) -> None:
    for seed, name in enumerate(("a", "b", "start")):
        write(folder, name, seed)
    write(folder, "larger", 1, {**SIZES, "item": 102})
    item = "sparse.collection.embedding_bags.item.weight"
    write(folder, "bad", 1, change=lambda params: params[item][-1].fill_(torch.nan))
    write(folder, "damaged", 1)
    for path in (folder / "damaged" / checkpoint.TENSORS).glob("*.distcp"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def merge_sources(folder: Path, case: str, *words: str) -> tuple[int, str]:
    """Return exit code and message of a merge whose result goes to ``case``."""
    return run_command(folder, case, "merge", *words)


def run_command(folder: Path, case: str, pipeline: str, *words: str) -> tuple[int, str]:
    """Return exit code and message of a command whose result goes to ``case``."""
    said = io.StringIO()
    words = (f"runtime.out={folder / case}", *words)
    config = options(*words)  # composes choices once: that takes longer than the rest
    compose, parse = (patch(f"cki_rec.{name}") for name in ("cli.compose_config", "config.parse"))
    with contextlib.redirect_stderr(said), compose, parse as parsed:
        parsed.return_value = config
        code = main([pipeline, *words])
    return code, said.getvalue()


def merged(folder: Path, case: str) -> Path:
    (run,) = (folder / case).glob("merge-*")
    return run


@contextlib.contextmanager
def full_disk():
    """Let the last process find no space, as it writes."""
    write_data = FileSystemWriter.write_data

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if distributed.rank() == distributed.world_size() - 1:
        FileSystemWriter.write_data = fail
    try:
        yield
    finally:
        FileSystemWriter.write_data = write_data


def run(folder: Path, sources: Path) -> None:
    """Merge in every way, and make every mistake where there are two processes."""
    a, b, start = (str(sources / name) for name in ("a", "b", "start"))
    begun, found = f"merge.base={{path: {start}}}", {}
    for case, words in {**EXACT, **ALIGNED, **SUMS}.items():
        bound = 0 if case == "evidence" else reader.SMALL_BYTES  # 0: read as large tensors are
        with patch.object(reader, "SMALL_BYTES", bound):
            found[case] = merge_sources(folder, case, of(a, b), begun, *words)
    again = str(merged(folder, "evidence"))
    found["again"] = merge_sources(folder, "again", of(again, b), "merge=evidence")
    if distributed.world_size() > 1:
        for case, words in STREAMED.items():
            found[case] = merge_sources(folder, case, of(a, b), begun, *words)
    if distributed.world_size() == 2:
        for case, (_, words) in MISTAKES.items():
            found[case] = merge_sources(folder, case, of(a, b), begun, *words)
        for other in ("larger", "bad", "damaged", "missing"):
            names = of(a, str(sources / other))
            found[other] = merge_sources(folder, other, names, "merge=evidence")
        with full_disk():
            found["full"] = merge_sources(folder, "full", of(a, b), "merge=evidence")
        found["after"] = merge_sources(folder, "after", of(b, a), "merge=evidence")
    (folder / f"process-{distributed.rank()}.json").write_text(json.dumps(found))
