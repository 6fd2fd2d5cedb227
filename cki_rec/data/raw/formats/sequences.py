"""Sequences: one line per user, ``user item item ...`` in chronological order (Amazon Beauty).

Every item of a user is a row with a click. It is followed by ``data.negatives`` rows without a
click, whose items are drawn uniformly from the items that the user has in no split. Time is the
position in the sequence. The file ``*attributes.json`` next to the sequences (item -> list of
attributes) gives the field ``attributes``.
Source of the form: Zhou et al., S3-Rec, CIKM 2020 (its released data).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Chunk
from cki_rec.data.raw.delimited import Layout, read_rows
from cki_rec.data.raw.reading import LABEL, LINE, TIME, RawFiles, Reading, Text, paths

LAYOUT = Layout(columns={"sequence": "text"}, separator="\x1e", required=("sequence",))
"""A line is read as one field; words are split later."""
ATTRIBUTES = "attributes.json"


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    text, attributes = _find(data)
    return list(dict.fromkeys([text.path, *([attributes.path] if attributes else [])]))


def kinds(data: Data) -> dict[str, str]:
    """Return the kind of every field."""
    common = {"user": "categorical", "item": "categorical", "history": "history"}
    return {**common, **({"attributes": "multi"} if _find(data)[1] else {})}


def user(_: Data) -> str:
    """Return the column of users."""
    return "user"


def item(_: Data) -> str:
    """Return the column of items."""
    return "item"


def rows_per_step(data: Data) -> int:
    """Return the number of rows of one step: the clicked item and the drawn ones."""
    return 1 + data.negatives


def chunks(data: Data, reading: Reading) -> Iterator[Chunk]:
    """Yield the rows, users in the order of the file.

    A user may be named once, and negatives need all items, so all of the text is parsed here.

    Raises:
        UserError: A line or a file is bad, or a user has every item.
    """
    text, attributes = _find(data)
    quiet, users = Reading("skip", reading.block_bytes, has_published=False), set[str]()
    items: set[str] = set()
    for frame in read_rows(text, LAYOUT, quiet):  # bad lines are reported by the second pass
        for line in frame["sequence"]:
            if _is_good(line, "", users, quiet):
                items.update(line.split()[1:])
    universe = sorted(items)
    index = {item: number for number, item in enumerate(universe)}
    of_item = _read_attributes(attributes, universe) if attributes else None
    users = set()
    for frame in read_rows(text, LAYOUT, reading):
        parts = [
            _steps(line, words.split(), index, text, data)
            for line, words in zip(frame[LINE], frame["sequence"], strict=True)
            if _is_good(words, f"{text}, line {line}", users, reading)
        ]
        if not parts:
            continue
        names, steps = zip(*parts, strict=True)
        drawn = np.concatenate(steps)
        lengths = [len(step) for step in steps]
        width = drawn.shape[1]
        times = np.concatenate([np.arange(length) for length in lengths])
        rows = pl.DataFrame(
            {
                "user": np.repeat(np.array(names, dtype=object), np.array(lengths) * width),
                "item": pl.Series(universe, dtype=pl.String).gather(drawn.reshape(-1)),
                LABEL: np.tile(np.arange(width) == 0, len(drawn)).astype(np.uint8),
                TIME: np.repeat(times.astype(np.int64), width),
            },
            schema_overrides={"user": pl.String},
        )
        if of_item is not None:
            rows = rows.join(of_item, on="item", how="left", maintain_order="left")
        yield Chunk(partial(_parsed, rows))


def _parsed(rows: pl.DataFrame, _: Reading) -> pl.DataFrame:
    return rows


def _is_good(words: str, where: str, users: set[str], reading: Reading) -> bool:
    name, *sequence = words.split() or [""]
    if not sequence:
        reading.skip("missing field", where, words, "a user and at least one item")
    elif name in users:
        reading.skip("repeated user", where, words, "one line per user")
    else:
        users.add(name)
        return True
    return False


def _steps(
    line: int, words: list[str], index: dict[str, int], text: Text, data: Data
) -> tuple[str, NDArray[np.int64]]:
    """Return a user and ``(steps, 1 + negatives)`` item numbers, the clicked item first."""
    sequence = np.array([index[item] for item in words[1:]], dtype=np.int64)
    if len(set(words[1:])) == len(index):
        raise UserError(
            f"{text}, line {line}: user {words[0]} has all {len(index)} items, so there are none "
            "to draw negatives from; remove the line"
        )
    generator = np.random.default_rng([data.negatives_seed, line])
    drawn = generator.integers(len(index), size=(len(sequence), data.negatives))
    while (is_met := np.isin(drawn, sequence)).any():
        drawn[is_met] = generator.integers(len(index), size=int(is_met.sum()))
    return words[0], np.concatenate([sequence[:, None], drawn], axis=1)


def _find(data: Data) -> tuple[Text, Text | None]:
    """Return the sequences, and the attributes if there are any."""
    listed = paths(data)
    if len(listed) != 1:
        raise UserError(
            f"data.raw={data.raw}: {len(listed)} paths, expected a file, zip or folder"
        )
    path = listed[0]
    if path.is_file() and path.suffix != ".zip":
        stem = glob.escape(path.name.removesuffix(".gz").removesuffix(".txt"))
        beside = sorted(path.parent.glob(f"{stem}*{ATTRIBUTES}"))
        return Text(path), Text(beside[0]) if beside else None
    raw = RawFiles(path)
    sequences = [m for m in raw.members() if m.endswith((".txt", ".txt.gz"))]
    if len(sequences) != 1:
        raise UserError(
            f"{path}: contains {len(sequences)} .txt files ({', '.join(sequences[:5])}), expected "
            "one with a line per user; set data.raw to it"
        )
    attributes = [m for m in raw.members() if m.endswith(ATTRIBUTES)]
    return raw.text(sequences[0]), raw.text(attributes[0]) if attributes else None


def _read_attributes(text: Text, universe: list[str]) -> pl.DataFrame:
    """Return every item and its attributes, joined by ``|``."""
    content = b"".join(text.blocks(Reading("error")))
    try:
        lists = json.loads(content)
        if not all(isinstance(entry, list) for entry in lists.values()):
            raise TypeError("an entry is not a list")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{text}: not a JSON object of lists ({error}), expected item -> attributes; "
            "fetch the file again"
        ) from None
    joined = ["|".join(map(str, lists.get(item, []))) or None for item in universe]
    return pl.DataFrame(
        {"item": universe, "attributes": joined},
        schema={"item": pl.String, "attributes": pl.String},
    )
