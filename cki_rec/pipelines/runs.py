"""List the runs of ``runtime.out``."""

from __future__ import annotations

import logging
from pathlib import Path

from cki_rec.config import Config
from cki_rec.pipelines import run_list

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Log a table of all runs, the newest first. ``cki-rec runs --json`` prints it as JSON."""
    out = Path(config.runtime.out)
    rows = run_list.listed(out)
    if not rows:
        log.info("no runs in %s; cki-rec train makes one", out)
        return
    for line in run_list.table(rows):
        log.info("%s", line)
