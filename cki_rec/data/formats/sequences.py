"""Sequences: one line a user, ``user item item ...`` in the order of time (e.g. Amazon Beauty).

Every item of a user is a clicked row; ``data.negatives`` items that the user never met, drawn
uniformly, stand beside it as rows that were not clicked. Time is the position in the
sequence. A file ``*attributes.json`` beside the sequences (item -> list of attributes) gives the
field ``attributes``.
Source of the form: Zhou et al., S3-Rec, CIKM 2020 (its released data).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, UserError
from cki_rec.data.delimited import Layout, read_rows
from cki_rec.data.raw import LABEL, LINE, TIME, RawFiles, Reading, Text, paths

LAYOUT = Layout(columns={"sequence": "text"}, separator="\x1e", required=("sequence",))
"""A line is one field; words are split later."""
ATTRIBUTES = "attributes.json"


def files(data: Data) -> list[Path]:
    """Return the files on disk whose bytes decide the content."""
    text, attributes = _find(data)
    return list(dict.fromkeys([text.path, *([attributes.path] if attributes else [])]))


def kinds(data: Data) -> dict[str, str]:
    """Return the kind of every field."""
    found = {"user": "categorical", "item": "categorical", "history": "history"}
    return {**found, **({"attributes": "multi"} if _find(data)[1] else {})}


def user(_: Data) -> str:
    """Return the column of users."""
    return "user"


def item(_: Data) -> str:
    """Return the column of items."""
    return "item"


def rows_per_step(data: Data) -> int:
    """Return the rows of one step: the clicked item and those drawn."""
    return 1 + data.negatives


def read(data: Data, reading: Reading) -> Iterator[pl.DataFrame]:
    """Yield the rows, users in the order of the file.

    Raises:
        UserError: A bad line or file; a user who met every item.
    """
    text, attributes = _find(data)
    quiet = Reading("skip", reading.block_bytes)  # the second pass reports
    items: set[str] = set()
    for frame in read_rows(text, LAYOUT, quiet):
        for line in frame["sequence"]:
            items.update(line.split()[1:])
    universe = np.array(sorted(items), dtype=object)
    of_item = _read_attributes(attributes, universe) if attributes else None
    users: set[str] = set()
    for frame in read_rows(text, LAYOUT, reading):
        parts = [
            _steps(line, words.split(), universe, text, data)
            for line, words in zip(frame[LINE], frame["sequence"], strict=True)
            if _is_good(words, f"{text}, line {line}", users, reading)
        ]
        if not parts:
            continue
        rows = pl.concat(parts)
        if of_item is not None:
            rows = rows.join(of_item, on="item", how="left", maintain_order="left")
        yield rows


def _is_good(words: str, where: str, users: set[str], reading: Reading) -> bool:
    name, *sequence = words.split() or [""]
    if not sequence:
        reading.skip("missing field", where, words, "a user and at least one item")
    elif name in users:
        reading.skip("repeated user", where, words, "one line a user")
    else:
        users.add(name)
        return True
    return False


def _steps(
    line: int, words: list[str], universe: NDArray[np.object_], text: Text, data: Data
) -> pl.DataFrame:
    """Return the rows of one user."""
    sequence = np.array(words[1:], dtype=object)
    met = set(words[1:])
    if len(met) == len(universe):
        raise UserError(
            f"{text}, line {line}: user {words[0]} met all {len(universe)} items, expected some "
            "to draw negatives from; leave the line out"
        )
    generator = np.random.default_rng([data.negatives_seed, line])
    drawn = universe[generator.integers(len(universe), size=(len(sequence), data.negatives))]
    while (is_met := np.isin(drawn, sequence)).any():
        drawn[is_met] = universe[generator.integers(len(universe), size=int(is_met.sum()))]
    rows = np.concatenate([sequence[:, None], drawn], axis=1)
    width = rows.shape[1]
    return pl.DataFrame(
        {
            "user": pl.repeat(words[0], rows.size, eager=True),
            "item": pl.Series(rows.reshape(-1).tolist(), dtype=pl.String),
            LABEL: np.tile(np.arange(width) == 0, len(sequence)).astype(np.uint8),
            TIME: np.repeat(np.arange(len(sequence), dtype=np.int64), width),
        }
    )


def _find(data: Data) -> tuple[Text, Text | None]:
    """Return the sequences, and the attributes if there are any."""
    found = paths(data)
    if len(found) != 1:
        raise UserError(f"data.raw={data.raw}: {len(found)} paths, expected a file, zip or folder")
    path = found[0]
    if path.is_file() and path.suffix != ".zip":
        beside = sorted(path.parent.glob(f"{path.stem}*{ATTRIBUTES}"))
        return Text(path), Text(beside[0]) if beside else None
    raw = RawFiles(path)
    sequences = [m for m in raw.members() if m.endswith((".txt", ".txt.gz"))]
    if len(sequences) != 1:
        raise UserError(
            f"{path}: holds {len(sequences)} .txt files ({', '.join(sequences[:5])}), expected "
            "one with a line a user; name it in data.raw"
        )
    attributes = [m for m in raw.members() if m.endswith(ATTRIBUTES)]
    return raw.text(sequences[0]), raw.text(attributes[0]) if attributes else None


def _read_attributes(text: Text, universe: NDArray[np.object_]) -> pl.DataFrame:
    """Return item and its attributes, joined by ``|``."""
    content = b"".join(block for *_, block in text.blocks(Reading("error")))
    try:
        lists = {str(item): [str(x) for x in xs] for item, xs in json.loads(content).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{text}: not a JSON object of lists ({error}), expected item -> attributes; "
            "fetch the file again"
        ) from None
    joined = ["|".join(lists.get(item, [])) or None for item in universe.tolist()]
    return pl.DataFrame(
        {"item": universe.tolist(), "attributes": joined},
        schema={"item": pl.String, "attributes": pl.String},
    )
