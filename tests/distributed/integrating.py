"""What every process of ``test_integrate.py`` runs; also imported there, as the only process.

    torchrun --nproc-per-node 2 integrating.py FOLDER SOURCES

Merged models go to the folder, exit codes and messages of every process beside them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from training import options  # noqa: E402

from cki_rec.cli import main  # noqa: E402
from cki_rec.data.origin import Origin  # noqa: E402
from cki_rec.data.schema import Feature, FeatureSchema  # noqa: E402
from cki_rec.engine import checkpoint, distributed  # noqa: E402
from cki_rec.engine.embeddings import table_of  # noqa: E402
from cki_rec.models import build_model  # noqa: E402

SIZES = {"item": 101, "user": 37, "hour": 2, "bias": 1}
"""Rows of tables: no multiples of 2 or 3, fewer than processes; one is named like a parameter."""
SCHEMA = FeatureSchema(
    tuple(Feature(name, name, "categorical") for name in SIZES),
    SIZES,
    {name: f"hash of {name}" for name in SIZES},
)
EXACT = {
    "evidence": ("integrate=evidence",),
    "average": ("integrate=average",),
    "scope": ("integrate=average", "integrate.tables=evidence", "integrate.scope=head"),
    "weighted": ("integrate=weighted_average", "integrate.options={weights: [0.3, 0.7]}"),
    "task_arithmetic": ("integrate=task_arithmetic", "integrate.options={scale: 0.7}"),
}
"""Integrations that are the same, bit for bit, on any number of processes."""
ALIGNED = {"aligned": ("integrate=aligned_weights",)}
"""The same up to rounding."""
MISTAKES = {
    "best_of": ("cki-rec: integrate.method=best_of: needs whole models", ()),
    "ties": (
        "on several, each with some rows of every table, integrate.method is one of first, aver",
        ("integrate=ties",),
    ),
    "activations": ("integrate.align.by=activations: needs", ("integrate=aligned_activations",)),
    "repair": (
        "integrate.repair=rescale: needs whole models in one process; use integrate=evidence or",
        ("integrate=evidence", "integrate.repair=rescale"),
    ),
    "labels": ("validation rows decide (null): needs", ("integrate=weighted_average",)),
    "tokens": (
        "integrate.vocabularies: needs whole",
        ("integrate=evidence", "integrate.vocabularies=[null,null]"),
    ),
    "check": ("check_only=true: takes one", ("integrate=evidence", "check_only=true")),
}
"""What is refused, and with which words."""


def of(*names: str) -> str:
    return f"integrate.sources=[{','.join(f'{{path: {name}}}' for name in names)}]"


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
    checkpoint.save(folder / name, tensors, config.model, schema, Origin("hash"))


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


def integrate(folder: Path, case: str, *words: str) -> tuple[int, str]:
    """Return exit code and what is said of an integration whose result goes to ``case``."""
    said = io.StringIO()
    words = (f"runtime.out={folder / case}", *words)
    config = options(*words)  # composes choices once: that takes longer than the rest
    compose, parse = (patch(f"cki_rec.{name}") for name in ("cli._compose", "config.parse"))
    with contextlib.redirect_stderr(said), compose, parse as parsed:
        parsed.return_value = config
        code = main(["integrate", *words])
    return code, said.getvalue()


def merged(folder: Path, case: str) -> Path:
    (run,) = (folder / case).glob("integrate-*")
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
    """Integrate in every way, and make every mistake where there are two processes."""
    a, b, start = (str(sources / name) for name in ("a", "b", "start"))
    begun, found = f"integrate.start={{path: {start}}}", {}
    for case, words in {**EXACT, **ALIGNED}.items():
        found[case] = integrate(folder, case, of(a, b), begun, *words)
    again = str(merged(folder, "evidence"))
    found["again"] = integrate(folder, "again", of(again, b), "integrate=evidence")
    if distributed.world_size() == 2:
        for case, (_, words) in MISTAKES.items():
            found[case] = integrate(folder, case, of(a, b), begun, *words)
        for other in ("larger", "bad", "damaged", "missing"):
            names = of(a, str(sources / other))
            found[other] = integrate(folder, other, names, "integrate=evidence")
        deltas = "integrate.sources=[{seed: 1},{seed: 2}]"
        found["untrained"] = integrate(folder, "untrained", deltas, "integrate=evidence")
        with full_disk():
            found["full"] = integrate(folder, "full", of(a, b), "integrate=evidence")
        found["after"] = integrate(folder, "after", of(b, a), "integrate=evidence")
    (folder / f"process-{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:]))
