"""Raw files written from a known click model, so that the best possible metrics are known.

Every weight is a hash of (seed, purpose, field, token): no table of weights is ever held, so
vocabularies may have any size. Rows are made in blocks of ``BLOCK``, each from its own generator:
the result depends on the options alone (up to the last bit of numpy's ``exp`` and ``log``, which
differs between kinds of processors), and memory on the size of a block alone.

Text is made of 8-byte words, unused bytes 0; the zeros are deleted when a line is complete.
Shape legend: N rows of one block.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit, ndtri

from cki_rec.config import Synthetic, UserError
from cki_rec.progress import progress

Tokens = NDArray[np.uint32]
"""1 .. vocabulary; 0: a missing value."""
Words = NDArray[np.uint64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Block = Mapping[str, NDArray[Any]]
"""``(N,)``: tokens of all fields, ``label``, its word ``click``, ``position``, ``draw``."""

BLOCK = 65_536
"""Rows drawn at once: changing it changes every file."""
LINES = 4096
"""Rows turned into text at once, as many as the cache of a core holds."""
RANK = 4
"""Length of the vectors of a pair of fields."""
BINS = 1 << 16
"""Of the histogram of logits from -20 to 20."""

ALL_16_BITS = np.arange(1 << 16)
NORMAL: Floats = ndtri((ALL_16_BITS + 0.5) / (1 << 16)).astype(np.float32)
"""16 random bits -> a normal deviate."""
HEX_WORDS = np.frombuffer(b"".join(b"%04x" % i for i in range(1 << 16)), np.uint32)
"""16 bits -> 4 hex digits."""
DIGITS = [b"%04d" % i for i in range(10_000)] + [b""] + [b"%d" % i for i in range(1, 10_000)]
DIGIT_WORDS = np.array(DIGITS, "S4").view(np.uint32)
"""0 .. 9999 -> 4 digits; 10000 more: without leading zeros."""
RATING_WORDS = np.array([b"%.1f" % (half / 2) for half in range(1, 11)], "S8").view(np.uint64)
COUNT_WORDS = np.array([b"", *(b"%d" % i for i in range(-3, (1 << 16) - 4))], "S8").view(np.uint64)
"""Token of a Criteo integer, which is the integer + 4, -> its text."""
COUNT_BUCKETS = (2 + np.floor(2 * np.log1p((ALL_16_BITS - 4).clip(0)))).astype(np.uint32)
COUNT_BUCKETS[:4] = (0, 1, 1, 1)
"""Token of a Criteo integer -> what its weight depends on: missing, < 0, half-steps of log1p."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLayout:
    """One published format and the click model behind it."""

    file: str
    header: bytes
    lines: Callable[[Block, int], Iterator[bytearray]]
    """(block, rows of the file) -> pieces of text."""
    sizes: Mapping[str, int]
    """Field -> distinct tokens in the published data set; 0: a Criteo integer."""
    importance: Mapping[str, float]
    """``field`` or ``field x field`` -> relative standard deviation of its part of the logit."""
    domain: str
    """The field whose token modulo ``domains`` is the domain."""
    positive_rate: float
    missing: Mapping[str, float] = field(default_factory=dict)
    """Field -> share of empty values, if any."""


def write_raw(options: Synthetic, folder: Path) -> None:
    """Write raw files, ``logit.npy`` (true logits) and ``truth.json`` into an empty folder.

    Tokens of a field follow a power law. The logit is a sum of one weight per informative field
    and of inner products of two vectors per interacting pair; weights are normal deviates. With
    drift d and difference e, at time t in [0, 1] from the first row to the last, a weight is

        sqrt(1 - e) w_shared + sqrt(e) w_domain, each of them
        sqrt(1 - d) w_static + sqrt(d) (cos(pi t / 2) w_start + sin(pi t / 2) w_end)

    so its variance is 1 at all times. Of a pair, the second field's vectors move and differ.

    Raises:
        UserError: An option out of range.
    """
    check_synthetic(options)
    layout, rows = LAYOUTS[options.layout], options.rows
    intercept, slopes = _calibrate(layout, options)
    clicks = 0
    with (
        progress(f"write {options.layout}", rows, "rows") as advance,
        (folder / layout.file).open("wb") as text_file,
        (folder / "logit.npy").open("wb") as logit_file,
    ):
        text_file.write(layout.header)
        npy_header = {"descr": "<f4", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(logit_file, npy_header)
        for start in range(0, rows, BLOCK):
            # 0: the sample of _calibrate; blocks are drawn whole: rows after them change nothing
            generator = np.random.default_rng([options.seed, 1 + start // BLOCK])
            position = np.minimum(np.arange(start, start + BLOCK), rows - 1)
            tokens = _draw_tokens(layout, options, generator)
            logit = np.full(BLOCK, intercept, np.float32)
            parts = _parts(layout, options, tokens, position / max(rows - 1, 1))
            for slope, part in zip(slopes, parts, strict=True):
                logit += np.float32(slope) * part
            label = generator.random(BLOCK) < expit(logit.astype(np.float64))
            tokens |= {"label": label, "click": label + np.uint64(ord("0"))}
            tokens |= {"position": position, "draw": generator.random(BLOCK)}
            block = {name: values[: rows - start] for name, values in tokens.items()}
            text_file.writelines(layout.lines(block, rows))
            logit_file.write(logit[: rows - start].tobytes())
            clicks += int(block["label"].sum())
            advance(len(block["label"]))
    if options.layout == "movielens":
        _write_movies(folder / "movies.csv", vocabulary_size(options, "movieId"))
    logits = np.load(folder / "logit.npy", mmap_mode="r")
    best = best_possible(logits[start : start + BLOCK] for start in range(0, rows, BLOCK))
    truth = {"rows": rows, "positive_rate": clicks / rows, **best}
    (folder / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")


def check_synthetic(options: Synthetic) -> None:
    """Refuse options that no click model could satisfy.

    Raises:
        UserError: The first option out of range, by dotted path.
    """
    layout = options.layout
    if layout not in LAYOUTS:
        raise UserError(f"data.synthetic.layout={layout}: expected one of {', '.join(LAYOUTS)}")
    # tokens have 32 bits
    most = (2**32 - 2) // max(LAYOUTS[layout].sizes.values())
    ranges = {
        **{"rows": (1, 10**12), "vocabulary": (1e-9, most), "skew": (0, 100), "signal": (0, 100)},
        **{"drift": (0, 1), "domains": (1, 10**6), "difference": (0, 1), "seed": (0, 2**63)},
    }
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(f"data.synthetic.{name}={value}: expected {low} to {high}")


def vocabulary_size(options: Synthetic, name: str) -> int:
    """Return how many tokens a field has: at least one per domain, if it tells domains apart."""
    layout = LAYOUTS[options.layout]
    least = options.domains if name == layout.domain else 0
    return max(2, least, round(layout.sizes[name] * options.vocabulary))


def best_possible(logit_blocks: Iterable[Floats]) -> dict[str, float | None]:
    """Return the metrics of the ideal scorer, in expectation over labels.

    LogLoss is the mean entropy of the labels. AUC comes from a histogram of the logit that holds
    the expected clicks and non-clicks; ties within a bin count half.

    Returns:
        ``auc`` (None if one of the labels cannot occur) and ``log_loss`` (None without rows).
    """
    positive, negative, entropy, rows = np.zeros(BINS), np.zeros(BINS), 0.0, 0
    for logit in (block.astype(np.float64) for block in logit_blocks):
        bins = ((logit.clip(-20, 20) + 20) * ((BINS - 1) / 40)).astype(np.int64)
        click, other = expit(logit), expit(-logit)
        positive += np.bincount(bins, click, BINS)
        negative += np.bincount(bins, other, BINS)
        entropy += float((entr(click) + entr(other)).sum())
        rows += len(logit)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative / 2
    return {
        "auc": float((positive * below).sum() / pairs) if pairs > 0 else None,
        "log_loss": entropy / rows if rows else None,
    }


def _calibrate(layout: SyntheticLayout, options: Synthetic) -> tuple[float, list[float]]:
    """Return the intercept and one slope per part of the logit.

    From a sample of ``BLOCK`` rows that the options fix, spread evenly over time: the slopes give
    each part its importance as standard deviation and the sum ``options.signal``; bisection finds
    the intercept with the published positive rate. A part that does not vary gets slope 0.
    Rounded, so that the last bit of the sample does not reach every logit.
    """
    tokens = _draw_tokens(layout, options, np.random.default_rng([options.seed, 0]))
    parts = np.stack(_parts(layout, options, tokens, np.linspace(0, 1, BLOCK))).astype(np.float64)
    deviation = parts.std(1)
    slope = np.array(list(layout.importance.values())) * (deviation > 1e-6)
    slope *= 1 / deviation.clip(1e-6)
    slope *= options.signal / max(float((slope @ parts).std()), 1e-6)
    slopes = [round(value, 6) for value in slope.tolist()]
    score = np.array(slopes) @ parts
    low, high = -40.0 - float(score.max()), 40.0 - float(score.min())
    for _ in range(60):
        middle = (low + high) / 2
        is_low = expit(score + middle).mean() < layout.positive_rate
        low, high = (middle, high) if is_low else (low, middle)
    return round(low, 6), slopes


def _parts(
    layout: SyntheticLayout, options: Synthetic, tokens: Block, time: Doubles
) -> list[Floats]:
    """Return ``(N,)`` each: what each row of ``layout.importance`` adds to the logit, unscaled."""
    own_domain = (tokens[layout.domain] % options.domains).astype(np.uint64) << np.uint64(32)
    to_start: Floats = np.cos(math.pi / 2 * time).astype(np.float32)
    to_end: Floats = np.sin(math.pi / 2 * time).astype(np.float32)

    def normal(purpose: str, token: Words, moves: bool) -> Floats:
        key = hashlib.blake2b(f"{options.seed}/{purpose}".encode(), digest_size=8).digest()
        bits = _mix(token + np.frombuffer(key, np.uint64)).view(np.uint16)
        static = NORMAL.take(bits[::4])
        if not moves or not options.drift:
            return static
        moved = to_start * NORMAL.take(bits[1::4]) + to_end * NORMAL.take(bits[2::4])
        return _blend(static, moved, options.drift)

    def weight(purpose: str, token: Words) -> Floats:
        shared = normal(f"shared/{purpose}", token, True)
        if not options.difference:
            return shared
        own = normal(f"domain/{purpose}", token | own_domain, True)
        return _blend(shared, own, options.difference)

    def carrier(name: str) -> Words:
        token = tokens[name] if layout.sizes[name] else COUNT_BUCKETS.take(tokens[name])
        return token.astype(np.uint64)

    parts = []
    for name in layout.importance:
        one, *other = (carrier(field) for field in name.split(" x "))
        part = np.zeros(len(time), np.float32) if other else weight(name, one)
        for k in range(RANK if other else 0):
            part += normal(f"first/{name}/{k}", one, False) * weight(f"{name}/{k}", other[0])
        parts.append(part)
    return parts


def _blend(one: Floats, other: Floats, share: float) -> Floats:
    """Return a sum of two normal deviates whose variance is 1, ``share`` of it the other's."""
    return np.float32(math.sqrt(1 - share)) * one + np.float32(math.sqrt(share)) * other


def _mix(bits: Words) -> Words:
    """Return the finalizer of splitmix64: a bijection that scatters neighbors."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def _draw_tokens(
    layout: SyntheticLayout, options: Synthetic, generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return ``(BLOCK,)`` tokens of every field."""
    tokens: dict[str, NDArray[Any]] = {}
    for name, size in layout.sizes.items():
        missing = layout.missing.get(name, 0.0)
        share = (generator.random(BLOCK) - missing) / (1 - missing)
        if size:
            token = _power_law(share.clip(0), vocabulary_size(options, name), options.skew)
        else:
            deviate = NORMAL.take((share.clip(0) * (1 << 16)).astype(np.int64))
            count = CRITEO_MEDIANS[int(name[1:]) - 1] * np.exp(1.5 * deviate)
            lowest = 1 if name == "I2" else 4  # -3 or 0
            token = (lowest + count).clip(0, 65_535).astype(np.uint32)
        tokens[name] = token * (share >= 0)
    return tokens


def _power_law(share: Doubles, size: int, skew: float) -> Tokens:
    """Return the ``share`` quantile of 1 .. size under density x^-skew on [1, size + 1)."""
    span, power = math.log(size + 1), 1 - skew
    log_x = np.log1p(share * math.expm1(power * span)) / power if power else share * span
    return np.minimum(np.exp(log_x), size).astype(np.uint32)


def _hex(token: Tokens, salt: int) -> Words:
    """Return 8 hex digits, a bijection of the token; nothing for token 0."""
    bits = token ^ np.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF)
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ bits >> np.uint32(15)) * np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    words: Words = HEX_WORDS.take(bits.view(np.uint16)).view(np.uint64) * (token > 0)
    return words


def _decimal(number: NDArray[Any], words: int = 2) -> list[Words]:
    """Return the digits of numbers from 1 on, 8 to a word, without leading zeros."""
    text = np.empty((len(number), 2 * words), np.uint32)
    for group in reversed(range(2 * words)):
        number, last = np.divmod(number, 10_000)
        text[:, group] = DIGIT_WORDS.take(last + 10_000 * (number == 0))
    return list(text.view(np.uint64).T)


def _lines(words: Sequence[Words], gaps: Sequence[bytes]) -> Iterator[bytearray]:
    """Yield lines: ``gaps[0]``, the first word, ``gaps[1]``, ..., without their zero bytes."""
    template = bytes(8).join(gaps)
    offsets = [sum(map(len, gaps[: i + 1])) + 8 * i for i in range(len(words))]
    for start in range(0, len(words[0]), LINES):
        count = min(LINES, len(words[0]) - start)
        text = bytearray(template * count)
        for offset, word in zip(offsets, words, strict=True):
            places: Words = np.ndarray(count, np.uint64, text, offset, (len(template),))
            places[:] = word[start : start + LINES]
        yield text.translate(None, b"\0")


def _criteo_lines(block: Block, rows: int) -> Iterator[bytearray]:
    counts = [COUNT_WORDS.take(block[f"I{i}"]) for i in range(1, 14)]
    tokens = [_hex(block[f"C{i}"], i) for i in range(1, 27)]
    return _lines([block["click"], *counts, *tokens], (b"", *[b"\t"] * 39, b"\n"))


def _avazu_lines(block: Block, rows: int) -> Iterator[bytearray]:
    day, hour = np.divmod(block["position"] * 240 // rows, 24)
    words = [*_decimal(10**15 + block["position"]), block["click"]]
    words += _decimal(14_10_21_00 + 100 * day + hour, 1)
    for i, name in enumerate(AVAZU):
        if name.endswith(("_id", "_domain", "_category", "_ip", "_model")):
            words.append(_hex(block[name], i))
        else:
            words += _decimal(block[name] + AVAZU_OFFSETS.get(name, 0), 1)
        if name == "C20":
            words[-1][block[name] == 1] = int.from_bytes(b"-1", "little")
    return _lines(words, (b"", b"", *[b","] * 23, b"\n"))


def _movielens_lines(block: Block, rows: int) -> Iterator[bytearray]:
    # 4.0, 4.5, 5.0 for a click, else 0.5 .. 3.5
    rating = np.where(block["label"], 7 + 3 * block["draw"], 7 * block["draw"]).astype(np.int64)
    # three years from 2001 on
    time = 978_307_200 + (block["position"] * (94_608_000 / rows)).astype(np.int64)
    ids = [*_decimal(block["userId"]), *_decimal(block["movieId"])]
    gaps = (b"", b"", b",", b"", b",", b",", b"", b"\r\n")
    return _lines([*ids, RATING_WORDS.take(rating), *_decimal(time)], gaps)


def _write_movies(path: Path, movies: int) -> None:
    """Write every movie with 1 to 3 genres hashed from its number."""
    names = (
        "Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir "
        "Horror Musical Mystery Romance Sci-Fi Thriller War Western"
    ).split()
    sets = [sorted({names[j % 18], names[j // 18 % 18], names[j // 324]}) for j in range(18**3)]
    genres = np.array(["|".join(g) for g in sets], "S40").view(np.uint64).reshape(-1, 5)
    gaps = (b"", b"", b",Movie ", b"", b" (1987),", b"", b"", b"", b"", b"\r\n")
    with path.open("wb") as file:
        file.write(b"movieId,title,genres\r\n")
        for start in range(1, movies + 1, BLOCK):
            number = np.arange(start, min(start + BLOCK, movies + 1), dtype=np.int64)
            rows = genres[_mix(number.view(np.uint64)) % np.uint64(len(genres))]
            file.writelines(_lines([*_decimal(number) * 2, *rows.T], gaps))


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
"""Percent of missing values; none in C20, which tells the domain."""
AVAZU = {
    **{"C1": 7, "banner_pos": 7, "site_id": 4737, "site_domain": 7745, "site_category": 26},
    **{"app_id": 8552, "app_domain": 559, "app_category": 36, "device_id": 2686408},
    **{"device_ip": 6729486, "device_model": 8251, "device_type": 5, "device_conn_type": 4},
    **{"C14": 2626, "C15": 8, "C16": 9, "C17": 435, "C18": 4, "C19": 68, "C20": 172, "C21": 60},
}
AVAZU_OFFSETS = {"C1": 1000, "C14": 374, "C17": 111, "C19": 32, "C20": 100_000}
"""What a decimal field adds to its token."""

LAYOUTS = {
    "criteo": SyntheticLayout(
        file="train.txt",
        header=b"",
        lines=_criteo_lines,
        sizes=CRITEO,
        missing={name: n / 100 for name, n in zip(CRITEO, CRITEO_EMPTY, strict=True)},
        importance={
            **{"I6": 0.3, "I11": 0.25, "C2": 0.35, "C4": 0.25, "C10": 0.4, "C13": 0.35},
            **{"C14": 0.3, "C15": 0.35, "C17": 0.3, "C24": 0.3},
            **{"C15 x C17": 0.4, "C13 x C14": 0.35, "C10 x C18": 0.35},
        },
        domain="C20",
        positive_rate=0.256,
    ),
    "avazu": SyntheticLayout(
        file="train.csv",
        header=f"id,click,hour,{','.join(AVAZU)}\n".encode(),
        lines=_avazu_lines,
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
        header=b"userId,movieId,rating,timestamp\r\n",
        lines=_movielens_lines,
        sizes={"userId": 6040, "movieId": 3706},
        importance={"userId": 0.5, "movieId": 0.6, "userId x movieId": 0.6},
        domain="userId",
        positive_rate=0.5,
    ),
}
