"""Raw files of days: consecutive windows of time, with more items every day."""

from __future__ import annotations

import zipfile

from conftest import write_raw_zip

TINY = [
    *("runtime.threads=1", "train.epochs=1", "train.batch_size=256", "model.hidden=[8]"),
    *("model.embedding_dim=8", "data.min_count=1"),
]


def write_days(home, num):
    """Write the ratings of ``num`` days; day d has items below 40 + 10 d. Return their zips."""
    return cut_days(write_raw_zip(home / "whole.zip"), home, num, lambda day: 40 + 10 * day)


def cut_days(whole, home, num, end):
    """Write equal windows of time of MovieLens ratings, of items below ``end(day)`` alone."""
    with zipfile.ZipFile(whole) as source:
        texts = {name: source.read(name).decode() for name in source.namelist()}
    (ratings,) = (name for name in texts if name.endswith("ratings.csv"))
    head, *rows = texts[ratings].splitlines()
    rows.sort(key=lambda row: int(row.split(",")[3]))
    paths = []
    for day in range(num):
        window = rows[len(rows) * day // num : len(rows) * (day + 1) // num]
        kept = [row for row in window if int(row.split(",")[1]) < end(day)]
        paths.append(home / f"day{day + 1}.zip")
        with zipfile.ZipFile(paths[-1], "w") as target:
            for name, text in texts.items():
                new = "\r\n".join([head, *kept]) + "\r\n" if name == ratings else text
                target.writestr(name, new)
    return paths
