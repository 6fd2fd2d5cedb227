"""Published raw formats that the click model imitates: their fields, sizes and text.

Shape legend: N rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Tokens = NDArray[np.uint32]
"""1 .. vocabulary size; 0: a missing value."""
Words = NDArray[np.uint64]
Block = Mapping[str, NDArray[Any]]
"""``(N,)`` each: tokens of all fields, ``label``, ``position`` and ``draw`` (uniform)."""

MOVIES_BLOCK = 65_536
HEX = pl.Series([f"{number:04x}" for number in range(1 << 16)] + [""])
"""16 bits -> 4 hexadecimal digits; the last entry is the text of a missing value."""
RATINGS = pl.Series([f"{half / 2:.1f}" for half in range(1, 11)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLayout:
    """One published format and the click model behind it."""

    file: str
    frame: Callable[[Block, int], pl.DataFrame]
    """(block, rows of the file) -> columns of the file."""
    sizes: Mapping[str, int]
    """Field -> distinct tokens in the published data set; 0: a Criteo integer."""
    importance: Mapping[str, float]
    """``field`` or ``field x field`` -> relative standard deviation of its term in the logit."""
    domain: str
    """The field whose token modulo ``domains`` is the domain."""
    positive_rate: float
    missing: Mapping[str, float] = field(default_factory=dict)
    """Field -> share of empty values, if any."""
    separator: str = ","
    line_end: str = "\n"
    has_header: bool = True

    def write(self, file: IO[bytes], block: Block, rows: int) -> None:
        """Append a block of rows; the header precedes the first row."""
        frame = self.frame(block, rows)
        with_header = self.has_header and block["position"][0] == 0
        _append(file, frame, with_header, self.separator, self.line_end)


def write_movies(path: Path, movies: int) -> None:
    """Write a MovieLens table of movies with 1 to 3 genres, which are hashed from the movie id."""
    names = (
        "Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir "
        "Horror Musical Mystery Romance Sci-Fi Thriller War Western"
    ).split()
    sets = [sorted({names[j % 18], names[j // 18 % 18], names[j // 324]}) for j in range(18**3)]
    genres = pl.Series(["|".join(names) for names in sets])
    with path.open("wb") as file:
        for start in range(1, movies + 1, MOVIES_BLOCK):
            number = np.arange(start, min(start + MOVIES_BLOCK, movies + 1), dtype=np.int64)
            chosen = scatter(number.view(np.uint64)) % np.uint64(len(genres))
            frame = pl.DataFrame({"movieId": number}).with_columns(
                pl.format("Movie {} (1987)", "movieId").alias("title"),
                genres.gather(chosen).alias("genres"),
            )
            _append(file, frame, start == 1, ",", "\r\n")


def scatter(bits: Words) -> Words:
    """Return the finalizer of splitmix64: a bijection that scatters neighbors."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def _append(
    file: IO[bytes], frame: pl.DataFrame, with_header: bool, separator: str, line_end: str
) -> None:
    text = frame.write_csv(
        include_header=with_header,
        separator=separator,
        line_terminator=line_end,
        quote_style="never",
    )
    file.write(text.encode())


def _hex(token: Tokens, salt: int) -> pl.Series:
    """Return 8 hexadecimal digits, a bijection of the token; an empty text for token 0."""
    bits = token ^ np.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF)
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ bits >> np.uint32(15)) * np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    low, high = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
    low, high = (np.where(token > 0, half, 1 << 16).astype(np.uint32) for half in (low, high))
    return HEX.gather(low) + HEX.gather(high)


def _count(token: Tokens) -> pl.Series:
    """Return a Criteo integer, which is the token less 4; null for token 0."""
    return pl.Series(token.astype(np.int64) - 4).set(pl.Series(token == 0), None)


def _criteo(block: Block, rows: int) -> pl.DataFrame:
    columns = {"label": pl.Series(block["label"].astype(np.uint8))}
    columns |= {name: _count(block[name]) for name in list(CRITEO)[:13]}
    columns |= {f"C{i}": _hex(block[f"C{i}"], i) for i in range(1, 27)}
    return pl.DataFrame(columns)


def _avazu(block: Block, rows: int) -> pl.DataFrame:
    day, hour = np.divmod(block["position"] * 240 // rows, 24)
    columns: dict[str, Any] = {
        "id": 10**15 + block["position"],
        "click": block["label"].astype(np.uint8),
        "hour": 14_10_21_00 + 100 * day + hour,
    }
    for i, name in enumerate(AVAZU):
        if name.endswith(("_id", "_domain", "_category", "_ip", "_model")):
            columns[name] = _hex(block[name], i)
        else:
            columns[name] = block[name] + np.uint32(AVAZU_OFFSETS.get(name, 0))
    columns["C20"] = np.where(block["C20"] == 1, -1, columns["C20"].astype(np.int64))
    return pl.DataFrame(columns)


def _movielens(block: Block, rows: int) -> pl.DataFrame:
    # half stars: 4.0, 4.5 or 5.0 for a click, else 0.5 .. 3.5
    half = np.where(block["label"], 7 + 3 * block["draw"], 7 * block["draw"]).astype(np.int64)
    # three years from 2001 on
    time = 978_307_200 + (block["position"] * (94_608_000 / rows)).astype(np.int64)
    columns = {"userId": block["userId"], "movieId": block["movieId"]}
    return pl.DataFrame({**columns, "rating": RATINGS.gather(half), "timestamp": time})


CRITEO_MEDIANS = (1, 6, 6, 4, 2800, 32, 3, 7, 38, 1, 1, 1, 4)
CRITEO_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
CRITEO = {f"I{i}": 0 for i in range(1, 14)} | {f"C{i}": n for i, n in enumerate(CRITEO_SIZES, 1)}
CRITEO_EMPTY = (
    *(45, 0, 21, 21, 3, 22, 4, 0, 4, 45, 4, 76, 21),
    *(0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 44, 0, 3, 76, 0, 3, 44, 44),
)
"""Percent of missing values; none in C20, which determines the domain."""
AVAZU = {
    **{"C1": 7, "banner_pos": 7, "site_id": 4737, "site_domain": 7745, "site_category": 26},
    **{"app_id": 8552, "app_domain": 559, "app_category": 36, "device_id": 2686408},
    **{"device_ip": 6729486, "device_model": 8251, "device_type": 5, "device_conn_type": 4},
    **{"C14": 2626, "C15": 8, "C16": 9, "C17": 435, "C18": 4, "C19": 68, "C20": 172, "C21": 60},
}
AVAZU_OFFSETS = {"C1": 1000, "C14": 374, "C17": 111, "C19": 32, "C20": 100_000}
"""Field -> difference between its number in the file and its token."""

LAYOUTS = {
    "criteo": SyntheticLayout(
        file="train.txt",
        frame=_criteo,
        sizes=CRITEO,
        missing={name: n / 100 for name, n in zip(CRITEO, CRITEO_EMPTY, strict=True)},
        importance={
            **{"I6": 0.3, "I11": 0.25, "C2": 0.35, "C4": 0.25, "C10": 0.4, "C13": 0.35},
            **{"C14": 0.3, "C15": 0.35, "C17": 0.3, "C24": 0.3},
            **{"C15 x C17": 0.4, "C13 x C14": 0.35, "C10 x C18": 0.35},
        },
        domain="C20",
        positive_rate=0.256,
        separator="\t",
        has_header=False,
    ),
    "avazu": SyntheticLayout(
        file="train.csv",
        frame=_avazu,
        sizes=AVAZU,
        importance={
            **{"site_id": 0.4, "app_id": 0.4, "device_ip": 0.25, "device_model": 0.35},
            **{"device_conn_type": 0.2, "C14": 0.45, "C17": 0.35, "C21": 0.3},
            **{"device_model x C14": 0.4, "site_id x C17": 0.35, "app_id x C21": 0.3},
        },
        domain="banner_pos",
        positive_rate=0.17,
    ),
    "movielens": SyntheticLayout(
        file="ratings.csv",
        frame=_movielens,
        sizes={"userId": 6040, "movieId": 3706},
        importance={"userId": 0.5, "movieId": 0.6, "userId x movieId": 0.6},
        domain="userId",
        positive_rate=0.5,
        line_end="\r\n",
    ),
}
