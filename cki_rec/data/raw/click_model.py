"""A known click model that writes raw files, so that the best possible metrics are known.

Every weight is a hash of (seed, purpose, field, token). No table of weights is stored, so
vocabularies may have any size. Rows are drawn in blocks of ``BLOCK``, each from its own generator.
The files therefore depend on the options alone, and memory on the size of a block alone. (The last
bit of numpy's ``exp`` and ``log`` differs between kinds of processors.)

Shape legend: N rows of one block.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit, ndtri

from cki_rec.config import Synthetic, UserError
from cki_rec.data.raw.synthetic_layouts import (
    CRITEO_MEDIANS,
    LAYOUTS,
    Block,
    SyntheticLayout,
    Tokens,
    Words,
    scatter,
    write_movies,
)
from cki_rec.progress import progress

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK = 65_536
"""Rows drawn at once: another value changes every file."""
RANK = 4
"""Length of the vectors of a pair of fields."""
BINS = 1 << 16
"""Bins of the histogram of logits from -20 to 20."""

ALL_16_BITS = np.arange(1 << 16)
NORMAL: Floats = ndtri((ALL_16_BITS + 0.5) / (1 << 16)).astype(np.float32)
"""16 random bits -> a normal deviate."""
COUNT_BUCKETS = (2 + np.floor(2 * np.log1p((ALL_16_BITS - 4).clip(0)))).astype(np.uint32)
COUNT_BUCKETS[:4] = (0, 1, 1, 1)
"""Token of a Criteo integer -> bucket that selects its weight: missing, < 0, half-steps of
log1p."""


def write_raw(options: Synthetic, folder: Path) -> None:
    """Write raw files, ``logit.npy`` (true logits) and ``truth.json`` into an empty folder.

    The tokens of a field follow a power law. The logit is the sum of one weight per informative
    field and of one inner product of two vectors per interacting pair. Weights are normal
    deviates. Let d be the drift, e the difference, and t in [0, 1] the time from the first row to
    the last. A weight is

        sqrt(1 - e) w_shared + sqrt(e) w_domain, each of them
        sqrt(1 - d) w_static + sqrt(d) (cos(pi t / 2) w_start + sin(pi t / 2) w_end)

    so its variance is 1 at all times. In a pair, only the vectors of the second field move and
    differ.

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
        npy_header = {"descr": "<f4", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(logit_file, npy_header)
        for start in range(0, rows, BLOCK):
            # seed word 0 belongs to _calibrate; a block is drawn whole and then cut
            generator = np.random.default_rng([options.seed, 1 + start // BLOCK])
            position = np.minimum(np.arange(start, start + BLOCK), rows - 1)
            tokens = _draw_tokens(layout, options, generator)
            logit = np.full(BLOCK, intercept, np.float32)
            parts = _parts(layout, options, tokens, position / max(rows - 1, 1))
            for slope, part in zip(slopes, parts, strict=True):
                logit += np.float32(slope) * part
            label = generator.random(BLOCK) < expit(logit.astype(np.float64))
            tokens |= {"label": label, "position": position, "draw": generator.random(BLOCK)}
            block = {name: values[: rows - start] for name, values in tokens.items()}
            layout.write(text_file, block, rows)
            logit_file.write(logit[: rows - start].tobytes())
            clicks += int(block["label"].sum())
            advance(len(block["label"]))
    if options.layout == "movielens":
        write_movies(folder / "movies.csv", vocabulary_size(options, "movieId"))
    logits = np.load(folder / "logit.npy", mmap_mode="r")
    best = best_possible(logits[start : start + BLOCK] for start in range(0, rows, BLOCK))
    truth = {"rows": rows, "positive_rate": clicks / rows, **best}
    (folder / "truth.json").write_text(json.dumps(truth, indent=2) + "\n")


def check_synthetic(options: Synthetic) -> None:
    """Refuse options that no click model could satisfy.

    Raises:
        UserError: The first option out of range, by dotted path.
    """
    most = (2**32 - 2) // max(LAYOUTS[options.layout].sizes.values())
    ranges = {
        **{"rows": (1, 10**12), "vocabulary": (1e-9, most), "skew": (0, 100), "signal": (0, 100)},
        **{"drift": (0, 1), "domains": (1, 10**6), "difference": (0, 1), "seed": (0, 2**63)},
    }
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(f"data.synthetic.{name}={value}: expected {low} to {high}")


def vocabulary_size(options: Synthetic, name: str) -> int:
    """Return the number of tokens of a field: one per domain or more, if it is ``domain``."""
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

    Both are estimated on a sample of ``BLOCK`` rows, which are spread evenly over time. The slopes
    give each part its importance as standard deviation, and the sum ``options.signal``. Bisection
    finds the intercept with the published positive rate. A part that does not vary gets slope 0.
    Results are rounded, so that the last bit of the sample does not reach every logit.
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
    """Return the unscaled term of every entry of ``layout.importance``, ``(N,)`` each."""
    domain = (tokens[layout.domain] % options.domains).astype(np.uint64) << np.uint64(32)
    to_start: Floats = np.cos(math.pi / 2 * time).astype(np.float32)
    to_end: Floats = np.sin(math.pi / 2 * time).astype(np.float32)

    def normal(purpose: str, token: Words, moves: bool) -> Floats:
        key = hashlib.blake2b(f"{options.seed}/{purpose}".encode(), digest_size=8).digest()
        bits = scatter(token + np.frombuffer(key, np.uint64)).view(np.uint16)
        static = NORMAL.take(bits[::4])
        if not moves or not options.drift:
            return static
        moved = to_start * NORMAL.take(bits[1::4]) + to_end * NORMAL.take(bits[2::4])
        return _blend(static, moved, options.drift)

    def weight(purpose: str, token: Words) -> Floats:
        shared = normal(f"shared/{purpose}", token, True)
        if not options.difference:
            return shared
        of_domain = normal(f"domain/{purpose}", token | domain, True)
        return _blend(shared, of_domain, options.difference)

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
