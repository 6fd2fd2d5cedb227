"""Facts of an encoded data set that make models worse: unseen ids, odd numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.schema import FIRST_ID

logger = logging.getLogger(__name__)
MOST_UNSEEN = 0.1
"""Share of ids out of vocabulary above which a warning names the field."""
LARGEST_NUMBER = 1e4
"""Magnitude of an unscaled number above which a warning names the field."""
SHOWN = 5
"""Fields that a line names."""


def unseen_line(manifest: Mapping[str, Any], above: float = 0.0) -> str | None:
    """Return the fields with the most ids out of vocabulary; None if no share is above a limit.

    Args:
        manifest: The manifest of an encoded data set.
        above: The limit.
    """
    shares = {
        name: [share for share in by_split.values() if share is not None]
        for name, by_split in manifest["unseen_share"].items()
    }
    names = [name for name, known in shares.items() if known and max(known) > above]
    names.sort(key=lambda name: -max(shares[name]))
    if not names:
        return None
    listed = [
        f"{name} {' / '.join(map(_percent, manifest['unseen_share'][name].values()))}"
        for name in names[:SHOWN]
    ]
    more = f" and {len(names) - SHOWN} more fields" if len(names) > SHOWN else ""
    splits = next(iter(manifest["unseen_share"].values()))
    return f"ids out of vocabulary ({' / '.join(splits)}): {', '.join(listed)}{more}"


@lru_cache(maxsize=64)
def _log(line: str, _data_hash: str) -> None:
    logger.info("%s", line)


def log_unseen(dataset: EncodedDataset) -> None:
    """Log the shares of ids out of vocabulary, once per data set and process."""
    _log(unseen_line(dataset.manifest) or "no id is out of vocabulary", dataset.hash)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def large_numbers(manifest: Mapping[str, Any]) -> list[str]:
    """Return the fields whose unscaled numbers are large, with their ranges."""
    transforms = {f["name"]: f["transform"] for f in manifest["options"]["fields"]}
    return [
        f"field '{name}' has numbers from {facts['low']:.10g} to {facts['high']:.10g}"
        for name, facts in manifest.get("number_ranges", {}).items()
        if transforms[name] == "as_is"
        and facts["low"] is not None
        and max(abs(facts["low"]), abs(facts["high"])) > LARGEST_NUMBER
    ]


def findings(manifest: Mapping[str, Any]) -> list[str]:
    """Return one line per fact that deserves a warning."""
    lines = [
        f"{line}, which enter the network as they are (as_is) in float32; set transform: log1p,"
        " quantile or ln_squared"
        for line in large_numbers(manifest)
    ]
    for name in _constant(manifest):
        lines.append(
            f"field '{name}': all training rows have one value or none, so it carries no"
            " information; remove it from data.fields"
        )
    if unseen := unseen_line(manifest, MOST_UNSEEN):
        lines.append(
            f"{unseen}; all of them share one embedding: lower data.min_count, or add newer token"
            " lists to data.vocabularies, or the new tokens with data.new_tokens=add"
        )
    return lines


@lru_cache(maxsize=64)
def _warn(name: str, data_hash: str, lines: tuple[str, ...]) -> None:
    """Log warnings, once per data set and process."""
    for line in lines:
        logger.warning("%s: %s", name, line)


def warn_of_findings(dataset: EncodedDataset) -> None:
    """Log one warning per finding, once per data set and process."""
    _warn(dataset.folder.name, dataset.hash, tuple(findings(dataset.manifest)))


def _constant(manifest: Mapping[str, Any]) -> list[str]:
    """Return the numeric fields that have one value in training rows, or none."""
    ranges, sizes = manifest.get("number_ranges", {}), manifest["schema"]["table_sizes"]
    names = [name for name, facts in ranges.items() if not facts["deviation"]]
    return names + [
        field["name"]
        for field in manifest["options"]["fields"]
        if field["kind"] == "numeric"
        and field["hash_size"] is None
        and field["table"] == field["name"]
        and "vocabularies" not in manifest["options"]
        and sizes.get(field["name"], FIRST_ID + 2) <= FIRST_ID + 1
    ]
