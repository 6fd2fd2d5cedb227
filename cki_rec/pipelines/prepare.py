"""Encode a data set and print its summary."""

from __future__ import annotations

from cki_rec.config import Config
from cki_rec.data.encoding import store
from cki_rec.data.encoding.summary import part_lines, summary_lines


def run(config: Config) -> None:
    """Encode the data set, unless it is encoded already, and print its summary and its regions."""
    dataset = store.prepared(config)
    lines = [*summary_lines(dataset), *part_lines(dataset, config.data.partition)]
    print("\n".join(lines))
