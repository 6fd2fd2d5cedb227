"""Raw files of two regions that share some users and all items, and a model of each."""

from __future__ import annotations

import zipfile

from conftest import write_raw_zip

from cki_rec.cli import main

TINY = [
    *("runtime.threads=1", "train.epochs=1", "train.batch_size=256", "model.hidden=[8]"),
    *("model.embedding_dim=8", "data.min_count=1"),
]
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


def train_regions(home):
    """Encode and train each region on its own; return the run directories by name."""
    whole = write_raw_zip(home / "whole.zip")
    found = {}
    places = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    for name, users in USERS.items():
        write_region(home / f"{name}.zip", whole, users)
        before = set((home / "out").glob("train-*"))
        words = [f"data.raw={home / name}.zip", f"data.name={name}", *places, *TINY]
        assert main(["train", *words]) == 0
        (found[name],) = set((home / "out").glob("train-*")) - before
    return found
