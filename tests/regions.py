"""Raw files of two regions that share some users and all items, and a model of each."""

from __future__ import annotations

import json
import zipfile

import numpy as np
from conftest import write_raw_zip

from cki_rec.cli import main
from cki_rec.data.dataset import EncodedDataset

TINY = [
    *("runtime.threads=1", "train.epochs=1", "train.batch_size=256", "model.hidden=[8]"),
    *("model.embedding_dim=8", "data.min_count=1"),
]
SAID = "evaluate.disjoint_files=true"
USERS = {"north": range(1, 41), "south": range(21, 61)}


def write_region(path, whole, users):
    """Write those ratings of ``whole`` that are of some users."""
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            text = source.read(name).decode()
            if name.endswith("ratings.csv"):
                head, *rows = text.splitlines()
                kept = [row for row in rows if int(row.split(",")[0]) in users]
                text = "\r\n".join([head, *kept]) + "\r\n"
            target.writestr(name, text)


def train_regions(home, *options):
    """Encode and train each region on its own; return the run directories by name."""
    whole = write_raw_zip(home / "whole.zip")
    found = {}
    places = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    for name, users in USERS.items():
        write_region(home / f"{name}.zip", whole, users)
        before = set((home / "out").glob("train-*"))
        words = [f"data.raw={home / name}.zip", f"data.name={name}", *places, *TINY, *options]
        assert main(["train", *words]) == 0
        (found[name],) = set((home / "out").glob("train-*")) - before
    return found


def opened(folder, name):
    (manifest,) = folder.glob(f"{name}-[0-9a-f]*/manifest.json")
    return EncodedDataset(manifest.parent)


def call(regions, out, pipeline, *words, region="north", name="both", models=None):
    home, found, _ = regions
    named = ",".join(f"{{path: {path}}}" for path in models or found.values())
    places = [f"runtime.{key}={out / key}" for key in ("out", "reports")]
    places += [f"runtime.encoded={home / 'encoded'}", "evaluate.bootstrap=100"]
    data = [f"data.raw={home / region}.zip", f"data.name={name}_{region}"]
    words = [f"suite.sources=[{named}]", *data, *places, *TINY, *words]
    return main([pipeline, "merge.vocabularies=[null,null]", *words])


def record_of(out, kind):
    (path,) = (out / "out").glob(f"{kind}-*/record.json")
    return json.loads(path.read_text())


def logits_of(out, identity, dataset):
    folder = out / "out" / ("logits" if identity.startswith("external") else "") / identity
    return dict(np.load(folder / f"logits-{dataset.hash[:16]}.npz"))
